"""Training runs: learning, resuming to the bit, and everything that can go wrong with a run."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch

from embdiff import baselines, checkpoint, losses, objectives, training
from embdiff.baselines import BASELINES
from embdiff.batches import encode
from embdiff.config import TrainConfig, read_config
from embdiff.data import Corpus, Example
from embdiff.errors import UserError
from embdiff.objectives import OBJECTIVES
from embdiff.pipeline import load
from embdiff.schedulers import RenoiseScheduler, UniPCScheduler
from embdiff.training import Silent, Stopped, train
from embdiff.vocabulary import train_word
from tests.conftest import WORDS, sentences

SMALL = TrainConfig(
    size="tiny",
    tokenizer="word",
    min_count=1,
    max_length=24,
    max_prompt_length=8,
    batch_size=8,
    max_steps=6,
    warmup=2,
    filter_ramp=2,
    save_every=2,
    validate_every=100,
    previews=1,
    compile=False,
    dtype="fp32",
)


def small(**options) -> TrainConfig:
    return TrainConfig(**{**SMALL.__dict__, **options})


def corpus(prompted: bool = True, count: int = 60) -> Corpus:
    examples = [Example(s, " ".join(s.split()[:2]) if prompted else None) for s in sentences(count)]
    return Corpus(examples[:-6], examples[-6:], [])


def weights(folder):
    return checkpoint.read_tensors(folder / "denoiser" / "diffusion_pytorch_model.safetensors")


class Notes(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def stop_after(steps: int):
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize(
    ("prompted", "options"), [(False, {"transitions": 4}), (True, {}), (True, {"dropout": 0.2, "draws": 4})]
)
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path, prompted, options):
    data, config = corpus(prompted), small(**options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, corpus=data)
    with pytest.raises(Stopped):
        train(config, parts, corpus=data, should_stop=stop_after(3))
    torch.rand(7)  # a new process has another random state
    train(config, parts, corpus=data, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    assert isinstance(load(str(whole)).scheduler, RenoiseScheduler if prompted else UniPCScheduler)


@pytest.mark.parametrize("objective", ["ce", "mixed"])
def test_transitions_are_learned_and_nothing_else_learns_otherwise(tmp_path, monkeypatch, objective):
    monkeypatch.setattr(objectives, "EVERY", 2)
    data = corpus(prompted=False)
    config = small(objective=objective, infill=0.5, max_steps=12, transitions=0)
    train(config, tmp_path / "without", corpus=data)
    train(replace(config, transitions=4), tmp_path / "with", corpus=data)
    found = weights(tmp_path / "with")
    assert found.pop("transitions.right").abs().max() > 0
    assert found.pop("transitions.left").shape[1] == 4
    for name, tensor in weights(tmp_path / "without").items():
        assert torch.equal(tensor, found.pop(name)), name
    assert not found


def test_a_run_that_dies_between_checkpoints_ends_with_the_same_weights(tmp_path):
    """What SIGKILL leaves: the last checkpoint and nothing that came after it."""
    data = corpus()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = small(max_steps=30, save_every=7)  # across a refit of the noise schedule at step 25
    train(config, whole, corpus=data)

    def die() -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return False

    left = 26
    with pytest.raises(KeyboardInterrupt):
        train(config, parts, corpus=data, should_stop=die)
    assert checkpoint.checkpoints(parts)[-1].name == "step-00000021"
    train(config, parts, corpus=data, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    scheduler = "scheduler/scheduler_config.json"
    assert json.loads((whole / scheduler).read_text()) == json.loads((parts / scheduler).read_text())


def test_training_learns_and_leaves_a_pipeline_without_pickles(tmp_path):
    config = small(max_steps=60, batch_size=16, save_every=50, validate_every=30)
    out = train(config, tmp_path / "run", corpus=corpus(count=200))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses, bounds = ([m[name] for m in log if name in m] for name in ("loss", "bound"))
    assert losses[-1] < 0.6 * losses[0]
    assert len(bounds) == 2
    assert bounds[1] < bounds[0]
    assert {p.suffix for p in out.rglob("*") if p.is_file()} <= {".json", ".jsonl", ".yaml", ".safetensors"}
    pipe = load(str(out))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("the a", num_inference_steps=2).texts


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_embeddings_are_not_the_noise_of_the_same_seed(tmp_path, seed):
    """Both are normal numbers from a torch generator: from one stream, noise would look like tokens."""
    out = train(small(max_steps=1, seed=seed), tmp_path / "run", corpus=corpus())
    table = load(str(out)).denoiser.space.table()
    noise = torch.randn(24, table.shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.nn.functional.cosine_similarity(noise[:, None], table[None], -1).max() < 0.9


@pytest.mark.parametrize("objective", ["vlb", "mixed"])
def test_the_objectives_with_the_bound_train_too(tmp_path, objective):
    train(small(objective=objective, max_steps=3), tmp_path / "run", corpus=corpus())


def test_adamw_accumulation_infilling_and_a_table_schedule_train_too(tmp_path):
    train(
        small(optimizer="adamw", accumulate=2, infill=0.5, schedule="table", max_steps=3),
        tmp_path / "run",
        corpus=corpus(False),
    )


# One start of the processes for two commands, since starting them takes longer than the commands.
TWICE = """
import sys
from embdiff.cli import main

for arguments in (["train", "missing.txt", "--output", "missing"], sys.argv[1:]):
    sys.argv = ["embdiff", *arguments]
    try:
        main()
    except SystemExit as leaving:
        print(f"left with {leaving.code}", file=sys.stderr, flush=True)
"""


def test_two_processes_refuse_alike_and_train_like_one_with_twice_the_batch(tmp_path):
    pairs, script = tmp_path / "pairs.txt", tmp_path / "twice.py"
    pairs.write_text("\n".join(f"{' '.join(s.split()[:2])}||{s}" for s in sentences(60)))
    script.write_text(TWICE)
    common = [str(pairs), "--separator", "||", "--size", "tiny", "--tokenizer", "word", "--min-count", "1"]
    # Of 25 positions windows see 16, which doesn't divide: 12 texts of 8 twice are one less than those of 16.
    common += ["--max-length", "25", "--max-steps", "8", "--no-compile", "--dtype", "fp32", "--infill", "0.3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    errors, logs = [], []
    for name, start, batch in (("one", [sys.executable], "16"), ("two", launch, "8")):
        config = tmp_path / f"{name}.yaml"
        config.write_text("log_every: 1\nwarmup: 1\n")
        options = ["--output", str(tmp_path / name), "--batch-size", batch, "--config", str(config)]
        done = subprocess.run(
            [*start, str(script), "train", *common, *options],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("model written to") == 1
        # Counted, not compared line by line: two processes may write into one line.
        errors.append([done.stderr.count(part) for part in ("no such file or folder: 'missing.txt'", "left with")])
        assert done.stderr.count("left with 2") == done.stderr.count("left with 0") == errors[-1][0]
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([m["loss"] for m in log if "loss" in m])
    assert errors == [[1, 2], [2, 4]]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_trackers_that_are_not_there_are_refused(tmp_path):
    for name, cause in (("abacus", "unknown"), ("clearml", "not installed")):
        with pytest.raises(UserError, match=cause):
            train(small(tracker=name), tmp_path / "run", corpus=corpus())


def test_nan_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    step_of_nan = 5
    original = losses.cross_entropy
    calls = iter(range(1, 100))

    def poisoned(*args):
        loss = original(*args)
        return loss._replace(total=loss.total * math.nan) if next(calls) == step_of_nan else loss

    monkeypatch.setattr(losses, "cross_entropy", poisoned)
    with pytest.raises(UserError, match=r"nan at step 5.*step-00000004"):
        train(small(save_every=4, max_steps=12), tmp_path / "run", corpus=corpus())
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000004"]


def test_nan_is_told_by_its_step_also_where_the_schedule_is_refitted(tmp_path, monkeypatch):
    original = losses.cross_entropy
    calls = iter(range(1, 100))

    def poisoned(*args):
        loss = original(*args)
        bad = next(calls) >= 23
        return loss._replace(total=loss.total * math.nan, cross_entropy=loss.cross_entropy * math.nan) if bad else loss

    monkeypatch.setattr(losses, "cross_entropy", poisoned)
    with pytest.raises(UserError, match="nan at step 23"):
        train(small(max_steps=60), tmp_path / "run", corpus=corpus())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def poison(parameters, limit):
        for p in parameters:
            p.grad = torch.full_like(p, math.nan)

    monkeypatch.setattr(training, "clip_grad_norm_", poison)
    with pytest.raises(UserError, match="not finite at step 1"):
        train(small(save_every=1), tmp_path / "run", corpus=corpus())
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original = checkpoint.write_tensors
    calls = iter(range(1, 100))

    def full(path, tensors):
        original(path, tensors)
        if next(calls) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        train(SMALL, tmp_path / "run", corpus=corpus())
    monkeypatch.undo()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    train(SMALL, tmp_path / "run", corpus=corpus(), resume=True)


def test_noise_levels_of_a_text_share_out_a_batch(tmp_path):
    with pytest.raises(UserError, match="draws 5 does not divide batch_size 12"):
        train(small(batch_size=12, draws=5), tmp_path / "run", corpus=corpus())
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_an_output_folder_with_another_run_is_refused(tmp_path):
    train(small(max_steps=1), tmp_path / "run", corpus=corpus())
    before = weights(tmp_path / "run")
    with pytest.raises(UserError, match="--overwrite"):
        train(SMALL, tmp_path / "run", corpus=corpus())
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "run").items())
    old = checkpoint.classifier_folder(tmp_path / "run", "toxicity")
    old.mkdir(parents=True)  # of the old embedding space
    train(small(max_steps=2), tmp_path / "run", corpus=corpus(), overwrite=True)
    assert not old.exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no embdiff run"):
        train(SMALL, tmp_path / "precious", corpus=corpus(), overwrite=True)
    with pytest.raises(UserError, match="no such file"):  # bad input costs nothing, not even with overwrite
        train(small(data="missing.txt"), tmp_path / "run", overwrite=True)
    assert weights(tmp_path / "run")


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(Stopped):
        train(SMALL, tmp_path / "run", corpus=corpus(), should_stop=stop_after(2))
    return tmp_path / "run"


def test_resuming_refuses_another_vocabulary_data_or_shape(stopped, tmp_path):
    with pytest.raises(UserError, match="examples"):
        train(SMALL, stopped, corpus=corpus(count=50), resume=True)
    with pytest.raises(UserError, match="shape"):
        train(small(size="mini"), stopped, corpus=corpus(), resume=True)
    with pytest.raises(UserError, match="optimizer is adamw"):
        train(small(optimizer="adamw"), stopped, corpus=corpus(), resume=True)
    from embdiff.vocabulary import train_word

    shutil.rmtree(stopped / "tokenizer")
    train_word(["other words entirely"], min_count=1).save_pretrained(stopped / "tokenizer")
    with pytest.raises(UserError, match="vocabulary"):
        train(SMALL, stopped, corpus=corpus(), resume=True)


def test_resuming_refuses_other_texts_of_the_same_number(stopped):
    data = corpus()
    examples = [Example(data.train[0].text, data.train[1].prompt), *data.train[1:]]
    with pytest.raises(UserError, match="other texts"):
        train(SMALL, stopped, corpus=Corpus(examples, data.valid, []), resume=True)


@pytest.mark.parametrize(
    "option", [{"tokenizer": "bpe"}, {"vocab_size": 500}, {"min_count": 2}, {"on_long": "drop"}], ids=str
)
def test_resuming_refuses_another_tokenizer_and_keeps_run_yaml(stopped, option):
    before = (stopped / "run.yaml").read_text()
    with pytest.raises(UserError, match=f"{next(iter(option))} is .*resume without changing it"):
        train(small(**option), stopped, corpus=corpus(), resume=True)
    assert (stopped / "run.yaml").read_text() == before


def test_resuming_refuses_another_number_of_processes(stopped):
    path = checkpoint.checkpoints(stopped)[-1] / "state.json"
    state = json.loads(path.read_text())
    state["fingerprint"]["processes"] = 2
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"1 processes.*had 2"):
        train(SMALL, stopped, corpus=corpus(), resume=True)


def test_resuming_before_the_first_checkpoint_takes_the_options_given(tmp_path):
    run = tmp_path / "run"

    def die() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(log_every=1), run, corpus=corpus(), should_stop=die)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 1, "lo')  # what a kill leaves
    train(small(tokenizer="bpe", vocab_size=270, log_every=1), run, corpus=corpus(), resume=True)
    assert len(load(str(run)).tokenizer) <= 270
    assert [m["step"] for m in logged(run)] == [1, 2, 3, 4, 5, 6, 6]


def test_resuming_a_finished_run_logs_its_bound_once(tmp_path):
    run = train(SMALL, tmp_path / "run", corpus=corpus())
    before = logged(run)
    with (run / "log.jsonl").open("a") as log:
        log.write('[1]\n{"loss": 1}\n{"step": "x"}\njunk')
    train(SMALL, run, corpus=corpus(), resume=True)
    assert logged(run) == before
    assert [m["step"] for m in before if "bound" in m] == [6]


def test_resuming_a_finished_run_leaves_its_model_as_it_was_tuned(tmp_path):
    run = train(SMALL, tmp_path / "run", corpus=corpus())
    index = run / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"temperature": 0.3}))
    train(SMALL, run, corpus=corpus(), resume=True)
    assert load(str(run)).config.temperature == 0.3
    index.unlink()  # what is written last is missing where writing was interrupted
    train(SMALL, run, corpus=corpus(), resume=True)
    assert load(str(run)).config.temperature == 0.76


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def refused(run) -> str:
    """What a resumed run says of its checkpoint, in one line."""
    with pytest.raises(UserError) as caught:
        train(SMALL, run, corpus=corpus(), resume=True)
    message = str(caught.value)
    assert str(checkpoint.checkpoints(run)[-1]) in message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("damaged") / "run"
    with pytest.raises(Stopped):
        train(SMALL, run, corpus=corpus(), should_stop=stop_after(2))
    return run


@pytest.fixture
def damaged(whole, tmp_path):
    """A run to damage, and its newest checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run", checkpoint.checkpoints(tmp_path / "run")[-1]


@pytest.mark.parametrize("text", ["{", "[1]", "3", "{}", '{"fingerprint": []}', '{"fingerprint": {"options": "x"}}'])
def test_a_state_that_is_none_is_refused(damaged, text):
    run, folder = damaged
    (folder / "state.json").write_text(text)
    assert "no embdiff checkpoint" in refused(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", None),
        ("step", "2"),
        ("tokens", -1),
        ("seconds", math.nan),
        ("idle", 5),
        ("schedule", None),
        ("schedule", {"schedule": {"name": "cubic"}, "weight": [], "total": [], "h_inf": 1, "mu_bounds": [0, 1]}),
        ("schedule", {"schedule": "gumbel", "weight": ["a"], "total": [1.0], "h_inf": 1, "mu_bounds": [0, 1]}),
        ("schedule", {"schedule": "gumbel", "weight": [1.0], "total": [1.0], "h_inf": 1, "mu_bounds": [0, 1]}),
    ],
)
def test_a_state_with_wrong_values_is_refused(damaged, key, value):
    run, folder = damaged
    state = json.loads((folder / "state.json").read_text()) | {key: value}
    if value is None:
        del state[key]
    (folder / "state.json").write_text(json.dumps(state))
    assert "damaged" in refused(run)


@pytest.mark.parametrize("name", ["denoiser", "ema", "optimizer-0", "optimizer-1"])
def test_tensors_that_are_not_the_runs_are_refused(damaged, name):
    run, folder = damaged
    path = folder / f"{name}.safetensors"
    right = {name: tensor.clone() for name, tensor in checkpoint.read_tensors(path).items()}
    some = next(iter(right))
    for wrong in ({}, right | {"foreign": torch.ones(1)}, right | {some: torch.ones(1, 1, 1)}):
        checkpoint.write_tensors(path, wrong)
        assert "damaged" in refused(run)
    path.write_bytes(b"junk")
    assert "damaged" in refused(run)


def test_parameters_that_no_step_has_used_need_no_state(tmp_path):
    config, run = small(infill=0.0), tmp_path / "run"  # nothing is ever given as context
    with pytest.raises(Stopped):
        train(config, run, corpus=corpus(False), should_stop=stop_after(2))
    assert checkpoint.read_state(checkpoint.checkpoints(run)[-1])["idle"]
    train(config, run, corpus=corpus(False), resume=True)


def test_overwriting_leaves_what_no_run_wrote(tmp_path):
    run = train(small(max_steps=1), tmp_path / "run", corpus=corpus())
    (run / "thesis.tex").write_text("x")
    (run / "texts").mkdir()
    (run / "texts" / "a.txt").write_text("\n".join(sentences(30)))
    (run / "checkpoints" / "step-99999999").mkdir()
    train(small(max_steps=1, data=str(run / "texts"), separator=None), run, overwrite=True)
    assert (run / "thesis.tex").exists()
    assert (run / "texts" / "a.txt").exists()
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step-00000001"]


@pytest.mark.parametrize("option", ["data", "validation"])
def test_overwriting_never_deletes_the_data(tmp_path, option):
    run = train(small(max_steps=1), tmp_path / "run", corpus=corpus())
    inside, outside = run / "checkpoints" / "a.txt", tmp_path / "b.txt"
    for path in (inside, outside):
        path.write_text("\n".join(sentences(30)))
    options = {"data": str(outside), "validation": str(outside)} | {option: str(inside)}
    with pytest.raises(UserError, match=r"a\.txt.*--overwrite deletes"):
        train(small(**options), run, overwrite=True)
    assert inside.exists()
    assert weights(run)


def test_what_was_cut_is_told_for_both_sets(tmp_path):
    notes, data = Notes(), corpus()
    long = Example("the cat " * 30, "the cat " * 30)
    longer = Corpus([*data.train, long], [*data.valid, long], [])
    train(small(max_steps=1), tmp_path / "run", corpus=longer, reporter=notes)
    assert "1 truncated of 55 texts: longer than 24 tokens" in notes.lines
    assert "1 truncated of 7 validation texts: longer than 24 tokens" in notes.lines
    assert "1 prompts of 55 texts cut to their last 8 tokens" in notes.lines
    assert "1 prompts of 7 validation texts cut to their last 8 tokens" in notes.lines


def test_validation_texts_that_are_all_too_long_are_named(tmp_path):
    data, long = corpus(), [Example("the cat " * 30)]
    with pytest.raises(UserError, match="every validation text"):
        train(small(on_long="drop"), tmp_path / "run", corpus=Corpus(data.train, long, []))


def test_without_validation_texts_the_first_text_may_be_too_long(tmp_path):
    texts = [Example("the cat " * 30), *corpus(False).train]
    train(small(on_long="drop", max_steps=1, previews=0), tmp_path / "run", corpus=Corpus(texts, [], []))


def test_options_without_effect_are_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    notes = Notes()
    train(small(max_steps=1, vocab_size=500), tmp_path / "run", corpus=corpus(), reporter=notes)
    assert "vocab_size 500 has no effect with tokenizer word" in notes.lines
    assert any(line.startswith("accelerate's mixed_precision bf16 has no effect") for line in notes.lines)


def test_a_run_resumes_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").write_text("\n".join(sentences(30)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped):
        train(small(data="a.txt"), tmp_path / "run", should_stop=stop_after(2))
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(TrainConfig(**read_config(tmp_path / "run" / "run.yaml")), tmp_path / "run", resume=True)


def test_benchmarks_continue_a_run_with_its_own_options(stopped, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import common

    monkeypatch.setattr(common, "train", lambda config, *_, **options: train(config, *_, corpus=corpus(), **options))
    common.trained(stopped, small(max_steps=50, schedule="table"))
    assert logged(stopped)[-1]["step"] == SMALL.max_steps


def test_what_one_process_refuses_all_refuse(monkeypatch):
    """The words travel from the main process to the others."""
    sent = []

    def broadcast(words):
        sent.append(list(words)) if is_main else words.__setitem__(slice(None), sent[0])

    def work():
        raise OSError("the disk is full")

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
    for is_main, kind in ((True, OSError), (False, UserError)):
        process = SimpleNamespace(is_main_process=is_main, num_processes=2)
        with pytest.raises(kind, match="the disk is full"):
            training.by_main(process, work)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(SMALL, tmp_path / "none", corpus=corpus(), resume=True)


# ------------------------------------------------------------------------------------------------ baselines


def parts(run):
    return checkpoint.read_tensors(run / "model" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("objective", list(BASELINES))
@pytest.mark.parametrize("prompted", [False, True])
def test_a_baseline_that_is_stopped_and_resumed_ends_with_the_same_weights(tmp_path, objective, prompted):
    data, config = corpus(prompted), small(objective=objective)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(config, whole, corpus=data)
    with pytest.raises(Stopped):
        train(config, pieces, corpus=data, should_stop=stop_after(3))
    assert not (pieces / "model").exists()
    with pytest.raises(UserError, match="not finished"):
        baselines.load(pieces)
    train(config, pieces, corpus=data, resume=True)
    for name, tensor in parts(whole).items():
        assert torch.equal(tensor, parts(pieces)[name]), name


@pytest.mark.parametrize("objective", list(BASELINES))
def test_a_baseline_learns_what_words_go_together(tmp_path, objective):
    """Texts whose words decide each other, so that there is much to gain on the words' frequencies."""
    choices = itertools.product(WORDS[2:8], WORDS[8:12], WORDS[3:6])
    lines = [f"the {a} {b} {a} near the {b} {c} ." for a, b, c in choices]
    data = Corpus([Example(line) for line in lines], [Example(line) for line in lines[::7]], [])
    config = small(
        objective=objective, max_steps=60, batch_size=32, validate_every=20, save_every=99, ema=0.9, max_length=12
    )
    run = train(config, tmp_path / "run", corpus=data)
    words = Counter(word for line in lines for word in [*line.split(), "<eos>"])
    entropy = -sum(n / words.total() * math.log(n / words.total()) for n in words.values())
    bounds = [m["bound"] for m in logged(run) if "bound" in m]
    assert len(bounds) == 3
    assert bounds[2] < min(0.5 * entropy, bounds[0])
    assert {p.suffix for p in run.rglob("*") if p.is_file()} <= {".json", ".jsonl", ".yaml", ".safetensors"}
    assert {p.name for p in run.iterdir()} == {"run.yaml", "log.jsonl", "tokenizer", "checkpoints", "model"}
    assert type(baselines.load(run)[0]) is BASELINES[objective]


@pytest.mark.parametrize("objective", list(BASELINES))
def test_muon_gets_the_matrices_of_a_baseline_and_windows_are_the_masked_ones(tmp_path, objective):
    run = train(small(objective=objective, max_steps=4), tmp_path / "run", corpus=corpus())
    folder = checkpoint.checkpoints(run)[-1]
    names = {name.rsplit("/", 1)[0] for name in checkpoint.read_tensors(folder / "optimizer-0.safetensors")}
    layers = ("qkv", "attention_out", "mlp_in", "mlp_out")
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(4) for layer in layers}
    tokens = checkpoint.read_state(folder)["tokens"]
    texts = 4 * SMALL.batch_size  # without windows, and each text once
    lengths = [len(e.text.split()) + 1 for e in corpus().train]
    assert (tokens <= texts * max(lengths)) == (objective == "autoregressive")


def test_a_run_goes_on_with_its_own_objective_and_makes_way_for_another(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(small(objective="masked"), run, corpus=corpus(), should_stop=stop_after(3))
    with pytest.raises(UserError, match=r"objective is ce, the run in .* had masked"):
        train(SMALL, run, corpus=corpus(), resume=True)
    train(small(objective="autoregressive", max_steps=1), run, corpus=corpus(), overwrite=True)
    assert baselines.kind(run) == "autoregressive"
    train(small(max_steps=1), run, corpus=corpus(), overwrite=True)
    assert not (run / "model").exists()
    assert load(str(run))


def test_processes_share_out_a_batch_of_a_baseline(tmp_path):
    """Means weighted with the shares that the objective gives are the mean over the whole batch."""
    for objective in OBJECTIVES:
        run = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
        data = encode([Example(s, s[:6]) for s in sentences(8)], train_word(sentences(60), 1), 24, 4)
        torch.manual_seed(0)
        whole = OBJECTIVES[objective](small(objective=objective), train_word(sentences(60), 1), 4, run)
        batch = data.batch(range(8))
        full, share = whole.loss(batch, slice(0, 8), 5, np.random.default_rng(0))
        halves = [whole.loss(batch, mine, 5, np.random.default_rng(0)) for mine in (slice(0, 4), slice(4, 8))]
        assert share == 1.0
        assert sum(loss.item() * part for loss, part in halves) == pytest.approx(full.item(), rel=1e-4)
