"""Reading and splitting: every format gives the same examples, and the two sides share nothing."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff.data import Example, load_corpus, read_examples, split
from embdiff.errors import UserError

PAIRS = [Example(text=f"answer {i}, é", prompt=f"question {i}") for i in range(30)]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows(examples: list[Example]) -> list[dict[str, str | None]]:
    return [{"prompt": e.prompt, "text": e.text} for e in examples]


def write_as(suffix: str, path: Path) -> str:
    """PAIRS in one of the formats."""
    path = path.with_suffix(suffix)
    if suffix == ".txt":
        write(path, "".join(f"{e.prompt} || {e.text}\n" for e in PAIRS))
    elif suffix == ".jsonl":
        write(path, "\n\n".join(json.dumps(row) for row in rows(PAIRS)))
    elif suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows(PAIRS))
        parquet.write_table(table, path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "text"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows(PAIRS))
    return str(path)


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    separator = "||" if suffix == ".txt" else None
    assert read_examples(write_as(suffix, tmp_path / "data"), separator=separator) == PAIRS


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "three\n")
    write(tmp_path / "a" / "x.jsonl", '{"text": "one"}\n')
    write(tmp_path / "a" / "y.TXT", "two\n")
    write(tmp_path / ".hidden" / "z.txt", "no\n")
    write(tmp_path / ".z.txt", "no\n")
    write(tmp_path / "readme.md", "no\n")
    assert [e.text for e in read_examples(str(tmp_path))] == ["one", "two", "three"]


def test_training_runs_in_a_folder_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\n")
    write(tmp_path / "runs" / "first" / "run.yaml", "data: a.txt\n")
    write(tmp_path / "runs" / "first" / "log.jsonl", '{"step": 1}\n')
    write(tmp_path / "runs" / "first" / "deeper" / "samples.txt", "no\n")
    assert read_examples(str(tmp_path)) == [Example("one")]
    with pytest.raises(UserError, match="training runs aside"):
        read_examples(str(tmp_path / "runs"))


def test_lines_end_at_newlines_only_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    data = write(tmp_path / "a.txt", "\ufeffone\r\n\n  \n two\u2028three \n")
    assert [e.text for e in read_examples(data)] == ["one", "two\u2028three"]


def test_the_separator_splits_at_its_first_occurrence(tmp_path: Path) -> None:
    data = write(tmp_path / "a.txt", " p | t | u \n| v\nnothing |\n")
    assert read_examples(data, separator="|") == [Example("t | u", "p"), Example("v", None)]


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", "n,title,body\n1,t,b\n")
    assert read_examples(data)[0].text == "1"  # in a csv all is text: the first column
    assert read_examples(data, text_column="body", prompt_column="title") == [Example("b", "t")]
    replies = [{"n": 1, "prompt": "p", "reply": "r"}, {"n": 2, "prompt": None, "reply": "s"}]
    data = write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, replies)))
    assert read_examples(data) == [Example("r", "p"), Example("s", None)]
    assert read_examples(data, text_column="reply") == [Example("r"), Example("s")]
    data = write(tmp_path / "c.jsonl", '{"prompt": "p"}')
    assert read_examples(data) == [Example("p")]


def test_a_label_may_be_a_number_or_a_list(tmp_path: Path) -> None:
    labels = [3, True, 0.5, ["toxic", "insult"], [], None, "mild"]
    data = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "x", "label": label}) for label in labels))
    found = [example.prompt for example in read_examples(data, prompt_column="label")]
    assert found == ["3", "True", "0.5", "toxic|insult", None, None, "mild"]


def test_columns_are_those_of_many_rows(tmp_path: Path) -> None:
    late = [{"id": 1, "body": None}, {"id": "2b", "body": "b"}, {"body": "c", "prompt": "p"}]
    data = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, late)))
    assert read_examples(data) == [Example("b"), Example("c", "p")]
    assert load_corpus(data).notes[0] == "texts are column 'body', prompts column 'prompt'"
    assert not load_corpus(data, text_column="body").notes


def test_what_was_guessed_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    data = write(tmp_path / "a.csv", "id,review\n1,x\n")
    read_examples(data, note=told.append)
    assert told == ["texts are column 'id', without prompts"]


def test_limit_takes_the_first(tmp_path: Path) -> None:
    data = write_as(".jsonl", tmp_path / "data")
    assert read_examples(data, limit=10**30) == PAIRS
    assert read_examples(data, limit=7) == PAIRS[:7]
    assert read_examples(data, limit=1000) == PAIRS


BAD_FILES = {
    "separator missing": ("a.txt", "p||t\nbare\n", {"separator": "||"}, "a.txt:2"),
    "separator empty": ("a.txt", "x\n", {"separator": ""}, "separator"),
    "columns of lines": ("a.txt", "x\n", {"text_column": "text"}, "no columns"),
    "separator of a table": ("a.csv", "text\nx\n", {"separator": "||"}, "separator"),
    "no such column": ("a.csv", "title,body\nt,b\n", {"text_column": "txt"}, "'title', 'body'"),
    "no such prompt column": ("a.csv", "text\nt\n", {"prompt_column": "q"}, "'q'"),
    "no column of text": ("a.jsonl", '{"n": 1}\n', {}, "'n'"),
    "a number for a text": ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', {}, "a.jsonl:2"),
    "a later row without the column": ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', {}, "a.jsonl:2"),
    "bad json": ("a.jsonl", '{"text": "x"}\n{"text"\n', {}, "a.jsonl:2"),
    "deep json": ("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", {}, "a.jsonl:1"),
    "json of another kind": ("a.jsonl", '["x"]\n', {}, "a.jsonl:1"),
    "ragged csv": ("a.csv", "text\nx, y\n", {}, "a.csv:2"),
    "two columns of one name": ("a.csv", "text,n,text\nx,1,y\n", {}, "a.csv:1: two columns are named 'text'"),
    "quote without an end": ("a.csv", 'prompt,text\np,"Hello\nq,bye\n', {}, "a.csv:3"),
    "quote within a field": ("a.csv", 'text\n"Hi," he said.\n', {}, "a.csv:2"),
    "giant csv field": ("a.csv", "text\n" + "x" * 200_000, {}, "a.csv:2"),
    "not UTF-8": ("a.txt", b"fine\nna\xefve\n", {}, "a.txt:2: byte 7"),
    "not parquet": ("a.parquet", "text", {}, "parquet"),
    "empty": ("a.txt", "", {}, "blank"),
    "blank": ("a.txt", " \n\n", {}, "blank"),
    "header only": ("a.csv", "text\n", {}, "blank"),
    "unknown kind": ("a.docx", "x", {}, ".jsonl"),
    "limit": ("a.txt", "x\n", {"limit": 0}, "limit 0"),
    "share": ("a.txt", "x\n", {"valid_share": 1.0}, "share 1.0"),
    "validation missing": ("a.txt", "x\n", {"validation": "./none.txt"}, "none.txt"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_line(tmp_path: Path, case: str) -> None:
    name, content, options, expected = BAD_FILES[case]
    if case == "not parquet":
        pytest.importorskip("pyarrow")
    data = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load_corpus(data, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_what_cannot_be_opened_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    names = [
        "./none",
        "/none",
        "~no.such.user/f.txt",
        "none.txt[train]",
        "none.txt",
        "~/none.csv",
        "../a/b",
        "a/b/c",
        str(tmp_path / "none"),
        "",
    ]
    for data in [*names, str(tmp_path / "empty"), str(tmp_path / "loop.txt")]:
        with pytest.raises(UserError):
            read_examples(data)


def test_an_unreachable_hub_id_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a local file nor"):
        read_examples("nobody/no-such-data")


@pytest.mark.parametrize(
    ("data", "called"),
    [
        ("squad", ("squad", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name[validation]", ("owner/name", None, "validation")),
        ("owner/name:en-2.0", ("owner/name", "en-2.0", "train")),
        ("owner/name:en[train[:10]]", ("owner/name", "en", "train[:10]")),
    ],
)
def test_a_hub_id_may_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str, called: tuple[str, str | None, str]
) -> None:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return [{"text": f"{split} {i}"} for i in range(3)]

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert len(read_examples(data)) == 3
    assert calls == [called]
    corpus = load_corpus("owner/name", validation="owner/name[test]")
    assert corpus.valid[0] == Example("test 0")


def test_docstrings_is_a_word_and_not_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from embdiff import docstrings

    monkeypatch.setattr(docstrings, "build", lambda **_: PAIRS)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "docstrings" / "a.txt", "mine\n")
    assert read_examples("docstrings") == PAIRS
    assert read_examples("./docstrings") == [Example("mine")]
    with pytest.raises(UserError):
        read_examples("docstrings", separator="||")


def test_importing_is_light() -> None:
    code = "import sys, embdiff; b = set(sys.modules); import embdiff.data; print(*(set(sys.modules) - b))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "tokenizers", "datasets", "pyarrow", "rich"} & set(done.stdout.split())


# --- splitting -------------------------------------------------------------------------------------------

small = st.sampled_from([f"w{i}" for i in range(12)])
examples_lists = st.lists(st.builds(Example, text=small, prompt=st.none() | small), max_size=40)
shares = st.sampled_from([0.01, 0.05, 0.3, 0.9])


@given(examples_lists, shares)
def test_the_sides_share_neither_prompt_nor_text(examples: list[Example], share: float) -> None:
    train, valid, _ = split(examples, share)
    assert not {e.text for e in train} & {e.text for e in valid}
    assert not {e.prompt for e in train if e.prompt} & {e.prompt for e in valid if e.prompt}


@given(examples_lists, shares, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order(examples: list[Example], share: float, dice: random.Random) -> None:
    shuffled = examples.copy()
    dice.shuffle(shuffled)
    for one, other in zip(split(examples, share)[:2], split(shuffled, share)[:2], strict=True):
        assert sorted(map(repr, one)) == sorted(map(repr, other))


@given(st.sets(st.integers().map(str), min_size=2, max_size=20), shares)
def test_two_distinct_texts_are_enough_for_both_sides(texts: set[str], share: float) -> None:
    train, valid, _ = split([Example(text) for text in texts], share)
    assert train
    assert valid
    assert len(train) + len(valid) == len(texts)


@given(examples_lists)
def test_a_side_is_empty_only_where_all_belong_together(examples: list[Example]) -> None:
    train, valid, notes = split(examples, 0.05)
    if not valid:
        assert any("no validation" in note for note in notes)
        assert train == examples


def test_the_side_of_an_example_is_its_own_affair() -> None:
    train, valid, _ = split(PAIRS * 2 + [Example(f"other {i}") for i in range(1000)], 0.2)
    alone_train, alone_valid, _ = split(PAIRS, 0.2)
    assert set(alone_train) <= set(train)
    assert set(alone_valid) <= set(valid)
    assert len(valid) / (len(train) + len(valid)) == pytest.approx(0.2, abs=0.05)


def test_the_split_is_the_same_in_every_process() -> None:
    code = "from embdiff.data import *; print(split([Example(f't{i}') for i in range(50)], .3)[1])"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b""


def test_duplicates_stay_in_train_and_overlaps_leave_the_validation_side() -> None:
    said_twice = [Example("same answer", e.prompt) for e in PAIRS]
    train, valid, notes = split(PAIRS + PAIRS + said_twice, 0.3)
    assert len(train) > len(set(train))
    assert valid
    assert "same answer" not in {e.text for e in valid}
    assert len(notes) == 1


def test_validation_data_is_kept_whole_and_left_out_of_train(tmp_path: Path) -> None:
    data = write_as(".jsonl", tmp_path / "data")
    validation = write(tmp_path / "valid.jsonl", "\n".join(json.dumps(r) for r in rows(PAIRS[:4] * 2)))
    corpus = load_corpus(data, validation=validation)
    assert corpus.valid == PAIRS[:4] * 2
    assert corpus.train == PAIRS[4:]
    assert len(corpus.notes) == 2
    assert corpus.notes[1].startswith("4 ")
    with pytest.raises(UserError):
        load_corpus(data, validation=data)
