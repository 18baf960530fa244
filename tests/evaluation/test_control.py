"""Control measured: trials ask what they check, and figures are of the texts that they name."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from embdiff.cli import app
from embdiff.errors import UserError
from embdiff.evaluation.control import (
    Sampling,
    Trial,
    cost,
    draw_trials,
    ended,
    fluency_at_lengths,
    having,
    known_words,
    length_trials,
    lexical_trials,
    mentioned,
    outcome,
    realised,
    slots,
)
from embdiff.evaluation.judges import cross_entropy
from embdiff.guidance import Length
from tests.conftest import sentences

REAL = sentences(60)


class ByWord:
    """A judge to whom every word costs 2 nats, and the end 1."""

    name = "by word"

    def nats(self, texts):
        return np.array([2.0 * len(text.split()) + 1 for text in texts])


@pytest.mark.parametrize("control", ["tokens", "words", "characters", "lexical"])
def test_exact_controls_succeed_always(pipe, control):
    if control == "lexical":
        trials = lexical_trials(REAL, known_words(pipe), 3, 2)
    else:
        trials = length_trials(pipe, REAL, control, 3, 2)
    sampling = Sampling(steps=2, batch_size=4)
    plain = sampling.draw(pipe, [None] * 8, 100)
    found = outcome(control, trials, draw_trials(pipe, trials, sampling), plain, [ByWord()])
    assert (found.texts, found.success) == (6, 1.0)
    assert 0 <= found.by_chance < 1
    assert control == "lexical" or found.ended == 1.0


def test_lexical_trials_ask_for_words_of_one_text_and_ban_others(pipe):
    for trial in lexical_trials(REAL, known_words(pipe), 20, 1):
        (module,) = trial.guidance
        assert len(module.include) == 3
        assert not set(module.include) & set(module.exclude)
        assert any(set(module.include) <= set(text.split()) for text in REAL)
        assert trial.check(" ".join(module.include))
        assert not trial.check(" ".join([*module.include, *module.exclude[:1]])) or not module.exclude
    with pytest.raises(UserError, match="three words"):
        lexical_trials(["a b c"], known_words(pipe), 1, 1)


def test_checks():
    assert having(["Small tree"], ["cat"])("a small  tree .")
    assert not having(["small tree"])("a small treehouse")
    assert not having(["tree"], ["cat"])("tree cat")
    assert mentioned("food : Fast food")("they serve fast food")
    assert ended(["a .", "b", "", 'c ! "']) == 0.5
    source = "name : The Mill | food : Italian | family friendly : yes"
    assert slots(source) == {"name": "The Mill", "food": "Italian", "family friendly": "yes"}
    assert realised(source, "the mill serves Indian food") == 0.5


def test_plain_texts_are_weighted_to_the_lengths_of_the_guided():
    plain = ["a b", "a b c d", "a b c d"]
    judge = ByWord()
    assert cross_entropy(judge, ["a b"]) == pytest.approx(5 / 3)
    assert fluency_at_lengths(judge, plain, ["x y", "x y"]) == pytest.approx(5 / 3)
    assert fluency_at_lengths(judge, plain, ["x y", "w x y z"]) == pytest.approx((5 + 9) / (3 + 5))
    assert fluency_at_lengths(judge, plain, ["v w x y z"]) == pytest.approx(9 / 5)  # the nearest there is


def test_cost_is_a_ratio(pipe):
    assert 0.2 < cost(pipe, Trial([Length(words=3)], bool, 1), Sampling(steps=2, batch_size=2), rounds=3) < 20


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "real.txt").write_text("\n".join(REAL))
    return [str(tmp_path / "model"), "--data", str(tmp_path / "real.txt"), "--judge-data", str(tmp_path / "real.txt"),
            "--targets", "2", "--each", "2", "--plain", "8", "--steps", "2"]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["eval-control", *map(str, arguments)], catch_exceptions=False)


def test_the_command_prints_a_table_and_writes_json(model, tmp_path):
    result = run(*model, "--output", tmp_path / "control.json")
    assert "lexical" in result.stdout
    found = json.loads((tmp_path / "control.json").read_text())
    assert [row["control"] for row in found["controls"]] == ["tokens", "words", "lexical"]
    assert all(row["success"] == 1.0 and row["cost"] > 0 for row in found["controls"])
    with pytest.raises(UserError, match="exists"):
        run(*model, "--output", tmp_path / "control.json")


def test_a_custom_control_is_scored_by_other_data(model, tmp_path):
    rows = [json.dumps({"text": t, "label": "cat" if "cat" in t.split() else "none"}) for t in sentences(200)]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    result = run(
        *model, "--control", "custom", "--guidance", "lexical:include=cat", "--scorer-data", tmp_path / "labels.jsonl",
        "--label-column", "label", "--label", "cat", "--json",
    )  # fmt: skip
    (found,) = json.loads(result.stdout)["controls"]
    assert found["success"] > 0.7


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--control", "rhyme"], "'rhyme' is unknown"),
        (["--control", "custom"], "belong together"),
        (["--guidance", "length:words=3"], "belong together"),
        (["--control", "classifier"], "no classifier"),
        (["--control", "custom", "--guidance", "length:words=3"], "what success is"),
        (["--targets", "0"], "targets"),
    ],
)
def test_bad_options_are_refused(model, options, cause):
    with pytest.raises(UserError, match=cause):
        run(*model, *options)
