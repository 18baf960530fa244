"""embdiff eval and frontier, end to end on small real text."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from embdiff.cli import app
from tests.cli.test_cli import SMALL, refused
from tests.conftest import sentences


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pairs with validation data beside it, and its held-out file."""
    folder = tmp_path_factory.mktemp("eval")
    for name, seed in (("train", 0), ("valid", 1)):
        lines = [f"{text.split()[1]}||{text}" for text in sentences(120, seed=seed)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    options = ["--separator", "||", "--validation", str(folder / "valid.txt"), "--max-steps", "2"]
    result = CliRunner().invoke(app, ["train", str(folder / "train.txt"), "-o", str(folder / "run"), *SMALL, *options])
    assert result.exit_code == 0, result.output
    return folder / "run"


def strict(text: str):
    """JSON as other parsers read it: without NaN and infinities."""

    def refuse(constant: str):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def evaluated(*arguments) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def test_eval_prints_json_and_writes_the_same_with_the_texts(run, tmp_path):
    out = tmp_path / "eval.json"
    options = ["-n", "8", "--steps", "2", "--bound", "20", "--flow", "2", "--mbr", "2", "--judge", "2-gram"]
    printed = strict(evaluated("eval", run, *options, "--json", "--output", out))
    written = strict(out.read_text())
    texts = written.pop("texts")
    assert printed == written
    assert len(texts) == 8 == printed["samples"]["texts"]
    assert printed["likelihood"]["bound"]["texts"] == 20
    assert set(printed["likelihood"]) == {"bound", "flow"}
    assert set(printed["conditional"]) == {"one sample a prompt", "mbr of 2"}
    assert printed["protocol"]["options"]["guidance"][0]["scale"] == 1.0
    assert list(printed["real"]["cross_entropy"]) == ["2-gram"]
    again = strict(evaluated("eval", run, *options, "--json"))
    for name in ("likelihood", "samples", "real", "conditional"):
        assert again[name] == printed[name]


def test_eval_of_other_data_with_references_shows_tables(run, tmp_path):
    held_out = [{"prompt": text.split()[1], "text": text} for text in sentences(30, seed=2)]
    data, references = tmp_path / "data.jsonl", tmp_path / "references.jsonl"
    data.write_text("\n".join(map(json.dumps, held_out)))
    references.write_text("\n".join(json.dumps(pair | {"text": "all alike"}) for pair in held_out))
    options = ["-n", "9", "--steps", "2", "--bound", "0", "--scheduler", "ddim", "--cfg-scale", "1.5"]
    shown = evaluated("eval", run, "--data", data, "--references", references, *options)
    for word in ("unigram entropy", "mauve style", "one sample a prompt", "5-gram", "reverse cross entropy"):
        assert word in shown
    assert "likelihood" not in shown


def test_a_judge_may_be_a_transformers_model(run, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from embdiff import vocabulary

    words = vocabulary.train_word(sentences(50), min_count=1)
    sizes = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "little")
    words.save_pretrained(tmp_path / "little")
    options = ["--judge", tmp_path / "little", "--judge", "1-gram", "-n", "8", "--steps", "1", "--bound", "0", "--json"]
    assert list(strict(evaluated("eval", run, *options))["samples"]["cross_entropy"]) == ["little", "1-gram"]


def test_a_judge_of_other_words_is_refused_before_sampling(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "other.txt").write_text("\n".join(f"word{i} word{i + 1} ." for i in range(60)))
    options = ["--objective", "autoregressive", "--size", "tiny", "--tokenizer", "word", "--max-steps", "2"]
    judge = tmp_path / "judge"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "other.txt"), "--output", str(judge), *options])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr("embdiff.pipeline.TextDiffusionPipeline.__call__", lambda *_, **__: pytest.fail("sampled"))
    for command in ("eval", "frontier"):
        assert "of the held-out words" in refused(capsys, monkeypatch, command, str(run), "--judge", str(judge))


def test_a_judge_is_trained_by_one_command(run, tmp_path):
    texts, judge = tmp_path / "texts.txt", tmp_path / "reader"
    texts.write_text("\n".join(sentences(80)))
    evaluated(
        "train", texts, "-o", judge, *SMALL, "--objective", "autoregressive", "--max-steps", "2", "--max-length", "48"
    )
    options = ["--judge", judge, "-n", "8", "--steps", "1", "--bound", "0", "--json"]
    found = strict(evaluated("eval", run, *options))
    assert 0 < found["real"]["cross_entropy"]["reader"] < 10


def test_frontier_compares_samplers_with_as_many_real_texts(run, tmp_path):
    picture = tmp_path / "frontier.svg"
    options = ["--steps", "1", "--steps", "2", "--solver", "own", "--solver", "unipc", "--temperature", "0.5"]
    options += ["--temperature", "1", "-n", "10", "--picture", picture]
    found = strict(evaluated("frontier", run, *options, "--json"))
    assert len(found["points"]) == 8
    assert found["real"]["solver"] == "real"
    assert {"versions", "dtype", "scheduler"} <= set(found["run"])
    assert found["length_bias"] == 1.0
    assert (found["data"], found["seen_by_judges"]) == ("the run's validation texts", 0)
    assert picture.read_text().count("</svg>") == 1
    shown = evaluated("frontier", run, *options, "--overwrite").splitlines()
    rows = [line.split() for line in shown[1:-1]]
    assert [row[0] for row in rows] == ["real"] + ["own"] * 4 + ["unipc"] * 4
    assert {len(row) for row in rows} == {7}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["eval", "RUN", "-n", "3"], "too few to judge"),
        (["eval", "RUN", "--data", "/nowhere.txt"], "/nowhere.txt"),
        (["eval", "RUN", "--data", "TINY"], "2 texts are too few"),
        (["eval", "RUN", "--data", "EMPTY"], "EMPTY"),
        (["eval", "RUN", "--judge", "0-gram"], "0-gram"),
        (["eval", "RUN", "--judge", "RUN"], "no baseline"),
        (["eval", "RUN", "--judge", "2-gram", "--judge", "2-gram"], "each judge once"),
        (["eval", "RUN", "--references", "TINY"], "no reference"),
        (["eval", "RUN", "--output", "TINY"], "--overwrite"),
        (["eval", "RUN", "--output", "/nowhere/eval.json"], "/nowhere"),
        (["eval", "RUN", "--scheduler", "cubic"], "cubic"),
        (["eval", "RUN", "--steps", "0"], "steps 0"),
        (["eval", "RUN", "--mbr", "1"], "mbr 1"),
        (["eval", "/nowhere"], "/nowhere"),
        (["frontier", "RUN", "--temperature", "0"], "--temperature 0"),
        (["frontier", "RUN", "--solver", "cubic"], "cubic"),
        (["frontier", "RUN", "--steps", "0"], "--steps 0"),
        (["frontier", "RUN", "-n", "1"], "--samples 1"),
        (["frontier", "RUN", "-n", "500"], "can end for 500 samples"),
        (["frontier", "RUN", "--picture", "SVG"], "--overwrite"),
        (["frontier", "RUN", "--picture", "FOLDER/foo"], "no known kind"),
        (["frontier", "RUN", "--batch-size", "0"], "--batch-size 0"),
        (["eval", "RUN", "--output", "FOLDER", "--overwrite"], "is a folder"),
        (["eval", "RUN", "--output", "/proc/eval.json"], "/proc/eval.json"),
        (["eval", "RUN", "--bound", "-3"], "bound_texts -3"),
        (["eval", "RUN", "--judge-data", "TINY"], "knows"),
        (["eval", "RUN", "-n", "0", "--references", "TINY"], "references are for samples"),
        (["eval", "RUN", "--separator", ":"], "--separator ':' is for a .txt file"),
        (["frontier", "RUN", "--data", "TINY", "--prompt-column", "said"], "--prompt-column 'said' is for a table"),
        (["eval", "RUN", "-n", "9", "--guidance", "length:words=2|3"], "2 lengths in words for 9 samples"),
        (["eval", "RUN", "--steps", "99999999999"], "at most 1,000,000"),
    ],
)
def test_bad_options_get_one_line(run, tmp_path, capsys, monkeypatch, arguments, cause):
    (tmp_path / "TINY.txt").write_text("cat||the cat .\ndog||a dog .\n")
    (tmp_path / "EMPTY.txt").write_text("\n")
    (tmp_path / "frontier.svg").write_text("mine")
    places = {
        "SVG": str(tmp_path / "frontier.svg"),
        "FOLDER": str(tmp_path),
        "RUN": str(run),
        "TINY": str(tmp_path / "TINY.txt"),
        "EMPTY": str(tmp_path / "EMPTY.txt"),
    }
    assert cause in refused(
        capsys, monkeypatch, *(places.get(word, word.replace("FOLDER", str(tmp_path))) for word in arguments)
    )
    assert (tmp_path / "frontier.svg").read_text() == "mine"
    assert (tmp_path / "TINY.txt").read_text() == "cat||the cat .\ndog||a dog .\n"


def test_a_run_whose_data_is_gone_needs_other_texts(run, tmp_path, capsys, monkeypatch):
    gone = shutil.copytree(run, tmp_path / "gone")
    (gone / "run.yaml").write_text((run / "run.yaml").read_text().replace("train.txt", "nowhere.txt"))
    data = str(run.parent / "valid.txt")
    assert "--judge-data" in refused(capsys, monkeypatch, "eval", str(gone), "--data", data)
    options = ["--data", data, "--bound", "8", "--json"]
    assert strict(evaluated("eval", gone, *options, "-n", "0"))["likelihood"]["bound"]["texts"] == 8
    found = strict(evaluated("eval", gone, *options, "-n", "8", "--steps", "1", "--judge-data", data))
    assert found["seen_in_training"] is None  # the data is gone
    assert found["seen_by_judges"] == 120


def test_texts_that_were_trained_on_are_counted_whatever_the_judge_read(run, tmp_path):
    judge = tmp_path / "judge.txt"
    judge.write_text("\n".join(f"x||{text}" for text in sentences(60, seed=7)))
    data = ["--data", run.parent / "train.txt", "--bound", "4", "--json"]
    assert strict(evaluated("eval", run, *data, "-n", "0"))["seen_in_training"] == 120
    found = strict(evaluated("eval", run, *data, "-n", "8", "--steps", "1", "--judge-data", judge))
    assert (found["seen_in_training"], found["seen_by_judges"]) == (120, 0)


def test_prompts_are_read_as_the_run_read_them_or_as_told(run, tmp_path, pipe):
    """The same pairs in a file, in a folder, as a table, and for a model without a run: the same figures."""
    pairs = [line.split("||") for line in (run.parent / "valid.txt").read_text().splitlines()]
    folder, table = tmp_path / "folder", tmp_path / "table.csv"
    folder.mkdir()
    shutil.copy(run.parent / "valid.txt", folder)
    table.write_text("said,words\n" + "".join(f"{prompt},{text}\n" for prompt, text in pairs))
    ways = {folder: [], table: ["--prompt-column", "said", "--text-column", "words"]}
    options = ["-n", "8", "--steps", "1", "--bound", "0", "--json"]
    found = [strict(evaluated("eval", run, "--data", data, *way, *options)) for data, way in ways.items()]
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["conditional"] == found[1]["conditional"]
    pipe.save_pretrained(tmp_path / "model")
    alone = ["eval", tmp_path / "model", "--data", folder, *options, "--judge-data", folder]
    assert "conditional" in strict(evaluated(*alone, "--separator", "||"))
    result = CliRunner().invoke(app, list(map(str, alone)))
    assert "with --separator" in result.stderr
    assert "conditional" not in strict(result.stdout)


def test_a_model_without_a_run_needs_texts_for_its_judge(pipe, tmp_path, capsys, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(sentences(40)))
    model, texts = str(tmp_path / "model"), str(tmp_path / "texts.txt")
    assert "--data" in refused(capsys, monkeypatch, "eval", model)
    assert "--judge-data" in refused(capsys, monkeypatch, "eval", model, "--data", texts)
    options = ["--data", texts, "--judge-data", texts, "-n", "8", "--steps", "1", "--bound", "8", "--json"]
    assert strict(evaluated("eval", model, *options))["real"]["texts"] == 8
