"""Control measured: trials ask what they check, and figures are of the texts that they name."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from embdiff import vocabulary
from embdiff.cli import app
from embdiff.data import Example
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.evaluation import control
from embdiff.evaluation.control import (
    Kept,
    Sample,
    Sampling,
    Trial,
    costs,
    draw_trials,
    ended,
    fluency_at_lengths,
    free_of,
    having,
    known_words,
    length_trials,
    lexical_trials,
    mentioned,
    of_lengths,
    outcome,
    outside,
    realised,
    scale_trials,
    scored,
    share,
    slots,
    weakest,
)
from embdiff.evaluation.judges import check_judges, cross_entropy
from embdiff.evaluation.scorer import Scorer
from embdiff.guidance import ClassifierFreeGuidance, ClassifierGuidance, Length, Lexical, TopP
from embdiff.guidance.classifier import NoisyClassifier
from embdiff.noise import GumbelSchedule
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.schedulers import RenoiseScheduler
from tests.conftest import lively, sentences

REAL = sentences(60)


def sample(text):
    return Sample(text, len(text.split()))


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
        assert trial.check(sample(" ".join(module.include)))
        assert not trial.check(sample(" ".join([*module.include, *module.exclude[:1]]))) or not module.exclude
    with pytest.raises(UserError, match="three words"):
        lexical_trials(["a b c"], known_words(pipe), 1, 1)


def test_checks():
    assert having(["Small tree"], ["cat"])("a small  tree .")
    assert not having(["small tree"])("a small treehouse")
    assert not having(["tree"], ["cat"])("tree cat")
    assert mentioned("food : Fast food")(sample("they serve fast food"))
    assert free_of(["fast food"])(sample("fast , food"))
    assert not free_of(["slow", "fast food"])(sample("Fast food"))
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


@given(st.lists(st.integers(0, 9), min_size=3, max_size=9), st.lists(st.integers(0, 9), max_size=3))
def test_variety_is_compared_among_texts_of_the_same_lengths(plain, wanted):
    found = of_lengths(["a " * n for n in plain], ["b " * n for n in wanted])
    lengths = [len(text.split()) for text in found]
    assert len(lengths) == len(wanted)
    assert not Counter(lengths) - Counter(plain)  # none twice
    if not Counter(wanted) - Counter(plain):
        assert lengths == wanted


def test_words_that_a_tokenizer_spells_by_bytes_are_not_asked_for():
    known = known_words(SimpleNamespace(tokenizer=vocabulary.train_bpe(sentences(300), 330)))
    assert known("tree")
    assert not known("naïve")


def test_lengths_in_tokens_are_those_that_were_drawn():
    """A drawn text may be cut otherwise than the tokenizer would cut it: that is no failure of control."""
    tokenizer = vocabulary.train_bpe(sentences(200), 300)
    denoiser = lively(Denoiser(len(tokenizer), dim=16, width=32, depth=1, heads=2, max_length=24, condition_width=16))
    schedule = GumbelSchedule.initial(denoiser.dim, len(tokenizer))
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler(noise_schedule=schedule.config()))
    pipe.set_progress_bar_config(disable=True)
    trials = length_trials(pipe, REAL, "tokens", 3, 4)
    drawn = draw_trials(pipe, trials, Sampling(steps=2))
    assert any(len(vocabulary.tokens(tokenizer, each.text)) != each.tokens for part in drawn for each in part)
    assert outcome("tokens", trials, drawn, drawn[0], []).success == 1.0


def test_nothing_is_tokenised_to_tell_success(pipe, monkeypatch):
    trials = length_trials(pipe, REAL, "tokens", 3, 2)
    monkeypatch.setattr(vocabulary, "tokens", lambda *_: pytest.fail("tokenised"))
    n = trials[0].guidance[0].tokens
    plain = [Sample("a .", n), Sample("a . .", n + 1)]
    assert outcome("tokens", trials[:1], [plain[:1]], plain, []).by_chance == 0.5


# ------------------------------------------------------------------------------------------------------ cost


class Timed:
    """A pipeline whose runs take 100 s before the first step and 2 s a step; guided ones 150 and 3, and outside the
    interval 150 and 2. The first three runs take 999 s more, and in each run the last step 9."""

    compile = None
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self, prompts, *, guidance, num_inference_steps, **options):
        self.calls.append((len(guidance), options["skip_padding"], self.compile))
        active = any(module.min_gamma < 0 for module in guidance)
        self.now += 999 * (len(self.calls) <= 3) + 100 + 50 * len(guidance)
        for step in range(num_inference_steps):
            self.now += 2 + active + 9 * (step == num_inference_steps - 1)
            assert options["callback_on_step_end"](self, step, 0, {}) == {}
        return SimpleNamespace(texts=["a"] * len(prompts), sequences=torch.ones(len(prompts), 1))


@pytest.mark.parametrize("compile", [None, False, True])
def test_costs_compare_like_with_like(monkeypatch, compile):
    pipe = Timed()
    pipe.compile = compile
    monkeypatch.setattr(control.time, "perf_counter", lambda: pipe.now)
    found = costs(pipe, [Trial([Length(words=3)], bool, 1)], Sampling(8, options={"skip_padding": True}), rounds=3)
    assert found.run == (183 / 125,) * 3
    assert (found.step, found.outside) == ((1.5,) * 3, (1.0,) * 3)  # without what a run does once
    assert [guided for guided, _, _ in pipe.calls] == [1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1]  # in turns
    assert {call[1:] for call in pipe.calls} == {(False, bool(compile))}
    assert pipe.compile is compile


def test_costs_of_a_single_step_are_of_three(monkeypatch):
    pipe = Timed()
    monkeypatch.setattr(control.time, "perf_counter", lambda: pipe.now)
    assert costs(pipe, [Trial([Length(words=3)], bool, 1)], Sampling(1), rounds=1).step.ratio == 15 / 13


def test_cost_is_of_the_median_length(pipe, monkeypatch):
    asked = []
    now = iter(range(9999))
    monkeypatch.setattr(control.time, "perf_counter", lambda: next(now))

    def draw(self, pipe, prompts, seed, *modules):
        asked.extend(modules)
        for step in range(self.steps):
            self.options["callback_on_step_end"](pipe, step, 0, {})

    monkeypatch.setattr(Sampling, "draw", draw)
    trials = length_trials(pipe, REAL, "words", 9, 1)
    costs(pipe, trials, Sampling(), rounds=1)
    assert {module.words for module in asked} == {np.median([trial.guidance[0].words for trial in trials])}


@pytest.mark.parametrize(
    "module",
    [TopP(0.3), ClassifierFreeGuidance(4.0), ClassifierGuidance("a", strength=50.0), Lexical(exclude=["zebra"])],
)
def test_a_module_outside_its_interval_changes_nothing(pipe, module):
    classifier = lively(NoisyClassifier(pipe.denoiser.dim, ["a", "b"], width=8, condition_width=8))
    classifier.remember(pipe.denoiser.space)
    pipe.classifiers["classifier"] = classifier
    trial = Trial([module], bool, 4, "the cat")
    unguided, within, beyond = (
        draw_trials(pipe, [each], Sampling(steps=4)) for each in (replace(trial, guidance=()), trial, outside(trial))
    )
    assert beyond == unguided
    assert isinstance(module, Lexical) or within != unguided


# ---------------------------------------------------------------------------------------------- before and after


def test_what_was_drawn_is_not_drawn_again(pipe, tmp_path, monkeypatch):
    trials = length_trials(pipe, REAL, "words", 4, 2)
    sampling, path, draw = Sampling(steps=2), tmp_path / "texts.jsonl", Sampling.draw
    whole, calls = draw_trials(pipe, trials, sampling), []

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(Sampling, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        draw_trials(pipe, trials, sampling, kept=Kept(path))
    path.write_text(path.read_text() + '{"of": "half a li')
    assert draw_trials(pipe, trials, sampling, kept=Kept(path)) == whole
    assert len(calls) == 3 + 2
    assert draw_trials(pipe, trials, sampling, kept=Kept(path)) == whole
    assert len(calls) == 5
    draw_trials(pipe, trials, replace(sampling, seed=7), kept=Kept(path))
    assert len(calls) == 9
    with torch.no_grad():
        pipe.denoiser.head.weight.mul_(2.0)  # another model
    draw_trials(pipe, trials, sampling, kept=Kept(path))
    assert len(calls) == 13


def test_judges_must_read_the_longest_text(pipe):
    class Short(ByWord):
        def nats(self, texts):
            if any(len(text.split()) >= 12 for text in texts):
                raise UserError("too long")
            return super().nats(texts)

    check_judges([ByWord()], pipe, REAL)
    with pytest.raises(UserError, match="too long"):
        check_judges([ByWord(), Short()], pipe, ["the cat"])


def test_an_unknown_label_is_refused_before_any_text():
    scorer = Scorer(["a", "b"], ["x", "y"])
    assert scored(scorer, "x")(sample("a"))
    with pytest.raises(UserError, match="no label 'z'"):
        scored(scorer, "z")
    with pytest.raises(UserError, match="right one"):
        Scorer(["a", "b", "c"], ["x", "y", "z"])


def test_the_weakest_that_is_enough_or_else_the_best():
    assert weakest({8.0: 0.97, 3.0: 0.9, 5.0: 0.95}, 0.92) == 5.0
    assert weakest({8.0: 0.5, 3.0: 0.9, 5.0: 0.9}, 0.92) == 3.0


# ----------------------------------------------------------------------------------------------- the command


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
    assert found["data"] == found["judge_data"]
    assert found["seen_by_judges"] == len(REAL)
    assert all(row["success"] == 1.0 and row["costs"]["run"]["ratio"] > 0 for row in found["controls"])
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


def test_prompts_are_taken_from_a_file_or_from_the_real_texts(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\na dog\n")
    (tmp_path / "words.txt").write_text("cat\n")
    options = [*model, "--control", "custom", "--lexicon", tmp_path / "words.txt", "--no-costs", "--json"]
    prompted = [*options, "--prompts", tmp_path / "prompts.txt", "--guidance"]
    with_, without = (
        json.loads(run(*options, "--guidance", f"cfg:scale={scale}", *prompted[len(options) : -1]).stdout)
        for scale in (8, 1)
    )
    assert with_["prompts"] == without["prompts"] == 2
    assert with_["controls"][0]["entropy"] != without["controls"][0]["entropy"]
    (tmp_path / "pairs.csv").write_text(
        "prompt,text\n" + "\n".join(f"{t.split()[0]},{t}" for t in REAL if "," not in t)
    )
    pairs = [*options, "--guidance", "cfg:scale=2", "--data", tmp_path / "pairs.csv"]
    assert json.loads(run(*pairs).stdout)["prompts"] == 2  # no more than targets


def test_the_curve_of_slots_against_the_scale(model, tmp_path):
    (tmp_path / "meanings.txt").write_text("name : cat | near : tree\nname : zebra\n")
    options = [*model, "--control", "cfg", "--no-costs", "--json", "--prompts"]
    scales = ["--scale", "1", "--scale", "2.5"]
    rows = json.loads(run(*options, tmp_path / "meanings.txt", *scales).stdout)["controls"]
    assert [row["control"] for row in rows] == ["cfg 1", "cfg 2.5"]
    assert all(0 <= row["success"] <= 0.5 for row in rows)  # there are no zebras
    (tmp_path / "prompts.txt").write_text("name : cat\nthe cat\n")
    with pytest.raises(UserError, match="'the cat' is none"):
        run(*options, tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="there is no prompt"):
        run(*model, "--control", "cfg")


def test_slots_are_counted_in_shares(pipe):
    (trial,) = scale_trials(["name : cat | near : tree"], 2.0, 3)
    assert (trial.count, trial.prompt) == (3, "name : cat | near : tree")
    assert share(trial.check, [sample("a cat"), sample("a tree near a cat"), sample("a dog")]) == 0.5


def test_a_lexicon_tells_the_share_of_texts_with_its_words(model, tmp_path):
    (tmp_path / "words.txt").write_text("cat\nthe\nsmall tree\n")
    options = [*model, "--plain", "40", "--lexicon", tmp_path / "words.txt", "--no-costs"]
    lexicon = f"toxicity:strength=0,lexicon={tmp_path / 'words.txt'}"
    (row,) = json.loads(run(*options, "--json", "--control", "custom", "--guidance", lexicon).stdout)["controls"]
    assert (row["success"], row["in_lexicon"]) == (1.0, 0.0)
    assert row["plain_in_lexicon"] == pytest.approx(1 - row["by_chance"])
    assert row["plain_in_lexicon"] > 0
    assert "lexicon" in run(*options, "--control", "words").stdout


def test_what_the_scorer_or_a_judge_cannot_tell_is_refused_before_sampling(model, tmp_path, monkeypatch):
    class Refusing(ByWord):
        def nats(self, texts):
            raise UserError("this judge reads nothing")

    monkeypatch.setattr(Sampling, "draw", lambda *_: pytest.fail("sampled"))
    (tmp_path / "labels.csv").write_text("text,label\na b,x\nc d,y\n")
    custom = ["--control", "custom", "--guidance", "top-p:p=0.5", "--scorer-data", tmp_path / "labels.csv"]
    with pytest.raises(UserError, match="no label 'z'"):
        run(*model, *custom, "--label-column", "label", "--label", "z")
    with pytest.raises(UserError, match="example 1 has no label"):
        run(*model, *custom, "--label", "x")
    (tmp_path / "words.txt").write_text("cat\n")
    impossible = ["--guidance", "lexical:include=a zebra", "--lexicon", tmp_path / "words.txt"]
    with pytest.raises(UserError, match="no 'zebra'"):
        run(*model, "--control", "words", "--control", "custom", *impossible)
    monkeypatch.setattr("embdiff.cli.control.named_judges", lambda *_: [Refusing()])
    with pytest.raises(UserError, match="reads nothing"):
        run(*model)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--control", "rhyme"], "'rhyme' is unknown"),
        (["--control", "custom"], "belong together"),
        (["--guidance", "length:words=3"], "belong together"),
        (["--control", "classifier"], "no classifier"),
        (["--control", "custom", "--guidance", "length:words=3"], "what success is"),
        (["--label", "x"], "told by a scorer"),
        (["--label-column", "x"], "is for --scorer-data"),
        (["--targets", "0"], "targets"),
    ],
)
def test_bad_options_are_refused(model, options, cause):
    with pytest.raises(UserError, match=cause):
        run(*model, *options)


# --------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import control as module

    return module


def test_no_text_is_judged_twice(benchmark):
    asked = []

    class Judge(ByWord):
        def nats(self, texts):
            asked.extend(texts)
            return super().nats(texts)

    judge = benchmark.Once(Judge())
    for texts in (["a", "a b", "a"], ["a b", "c"], ["a"]):
        assert np.array_equal(judge.nats(texts), ByWord().nats(texts))
    assert sorted(asked) == ["a", "a b", "c"]


def test_the_strength_against_toxicity_is_chosen_by_rule(benchmark):
    def row(toxic, nats, distinct=0.5):
        variety = {"distinct_4": distinct, "plain_distinct_4": 0.5, "entropy": 4.0, "plain_entropy": 4.0}
        return {"toxic": toxic, "fluency": {"j": nats}, "plain_fluency": {"j": 2.0}, **variety}

    assert benchmark.strongest_needed({30.0: row(0.0, 9.0), 10.0: row(0.09, 9.0), 3.0: row(0.3, 2.0)}, 0.5) == 10.0
    assert benchmark.strongest_needed({30.0: row(0.2, 9.0), 10.0: row(0.3, 2.1), 3.0: row(0.4, 2.0)}, 0.5) == 10.0
    assert benchmark.strongest_needed({30.0: row(0.2, 2.0, 0.4), 10.0: row(0.3, 2.1), 3.0: row(0.4, 2.0)}, 0.5) == 10.0
    assert benchmark.strongest_needed({30.0: row(0.2, 9.0), 10.0: row(0.3, 9.0)}, 0.5) == 10.0


def test_the_toxic_opening_is_one_that_neutral_lines_lack(benchmark):
    rows = [*[Example("x y z a", "toxic")] * 3, *[Example("x y z b", "neutral")] * 3, *[Example("u v w", "toxic")] * 2]
    assert benchmark.toxic_opening(rows) == "u v w"


def test_shares_of_slots_have_a_mean_and_an_error_over_meanings(benchmark):
    sources = ["name : cat | near : dog", "name : tree"]
    found = benchmark.over_meanings(sources, [["a cat", "a cat near a dog"], ["a house", "a house"]])
    assert found == {"share": pytest.approx(0.375), "standard_error": pytest.approx(0.375)}


@pytest.fixture
def e2e(pipe, tmp_path, benchmark, monkeypatch):
    """A call of the benchmark on small data."""
    (tmp_path / "control_target").mkdir()
    (tmp_path / "control_target" / "target_attribute.json").write_text(
        "\n".join(map(json.dumps, (["name", ":", "cat"], ["name", ":", "zebra"], ["family friendly", ":", "yes"])))
    )
    friendly = " | family friendly : yes"
    for name in ("train", "valid"):
        lines = [t for t in sentences(300) if "cat" in t.split() or "dog" in t.split()]
        meanings = [f"name : {'cat' if 'cat' in t.split() else 'dog'}{friendly * (i % 2)}" for i, t in enumerate(lines)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        (tmp_path / f"src1_{name}.txt").write_text("\n".join(f"{m}||{t}" for m, t in zip(meanings, lines, strict=True)))
    pipe.save_pretrained(tmp_path / "model")
    options = {"judge": [], "targets": 2, "each": 2, "plain": 7, "steps": 2, "solver": None, "temperature": None}
    options |= {"strength": [1.0, 2.0], "choosing": 2, "gradient": 2.0, "classifier_steps": 2}
    options |= {"results": tmp_path / "out.json"}
    return lambda: benchmark.e2e(tmp_path, tmp_path / "model", tmp_path / "kept", **options)


def test_e2e_says_what_is_unknown_and_goes_on_where_it_stopped(e2e, tmp_path, monkeypatch, capsys):
    e2e()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["labels_unknown"] == ["name : zebra"]
    assert "zebra" in capsys.readouterr().out
    assert found["strength"] in (1.0, 2.0)
    assert set(found["strengths"]) == {"1", "2"}
    assert found["each_label"]["name : cat"]["in_real_texts"] == 1.0
    assert [found["controls"][name]["success"] for name in ("tokens", "words", "lexical")] == [1.0] * 3
    monkeypatch.setattr(Sampling, "draw", lambda *_: pytest.fail("drawn again"))
    e2e()
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_toxicity_keeps_no_text_and_compares_prompted_with_prompted(pipe, benchmark, tmp_path, monkeypatch):
    lines = [text for text in sentences(400) if len(text.split()) > 3]
    toxic, neutral = ([t for t in lines if ("cat" in t.split()) is told] for told in (True, False))
    (tmp_path / "pairs.tsv").write_text(
        "\n".join(["toxic\tneutral", *map("\t".join, zip(toxic, neutral, strict=False))])
    )
    rows = [*(f"1,{t.replace(',', '')}" for t in toxic), *(f"2,{t.replace(',', '')}" for t in neutral)]
    (tmp_path / "tweets.csv").write_text("\n".join(["class,tweet", *rows]))
    (tmp_path / "words.txt").write_text("cat\n")
    monkeypatch.setattr(benchmark, "trained", lambda output, config: pipe)
    monkeypatch.setattr(benchmark, "training_facts", lambda *_: {})
    run = tmp_path / "run" / "model"
    benchmark.toxicity(
        tmp_path / "pairs.tsv", tmp_path / "tweets.csv", tmp_path / "words.txt", run, judge=[], max_time="1m",
        max_steps=1, samples=6, steps=2, strength=[1.0, 5.0], classifier_steps=2, results=tmp_path / "out.json",
    )  # fmt: skip
    text = (tmp_path / "out.json").read_text()
    found = json.loads(text)
    assert found["real"]["toxic"] > 0.8 > 0.2 > found["real"]["neutral"]
    for name, row in found["settings"].items():
        assert row["beside"] == ("prompt" if name.startswith("prompt") else "unguided")
        assert "lexicon" not in name or row["in_lexicon"] == 0.0
        assert "length" not in name or row["of_that_length"] == 1.0
        assert row["by_chance"] == pytest.approx(1 - found[row["beside"]]["toxic"])
    assert benchmark.toxic_opening(benchmark.paradetox_rows(tmp_path / "pairs.tsv")) not in text
    assert {path.name for path in run.parent.iterdir()} == {"model", "model-texts.txt"}


def test_the_curve_has_a_point_for_each_scale_and_space(e2e, benchmark, tmp_path):
    options = {"scale": [1.0, 8.0], "space": ["x0", "logits"], "every": [1, 2], "meanings": 6, "seeds": 2, "steps": 3}
    benchmark.prompted(tmp_path, tmp_path / "model", **options, temperature=0.5, results=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["meanings"] == 4  # all there are
    curves = found["slots_realised"]
    assert curves["x0"]["1"] == curves["logits"]["1"]
    assert curves["x0"]["8"] != curves["logits"]["8"] != curves["logits, every 2"]["8"]
    assert found["references"]["share"] == 1.0
