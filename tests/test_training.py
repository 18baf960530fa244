"""Training runs: learning, resuming to the bit, and everything that can go wrong with a run."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from embdiff import checkpoint, training
from embdiff.config import TrainConfig
from embdiff.data import Corpus, Example
from embdiff.errors import UserError
from embdiff.pipeline import load
from embdiff.training import Stopped, train
from tests.conftest import sentences

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
    return Corpus("test", examples[:-6], examples[-6:], [])


def weights(folder):
    return checkpoint.read_tensors(folder / "denoiser" / "diffusion_pytorch_model.safetensors")


def stop_after(steps: int):
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("prompted", [False, True])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path, prompted):
    data = corpus(prompted)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(SMALL, whole, corpus=data)
    with pytest.raises(Stopped):
        train(SMALL, parts, corpus=data, should_stop=stop_after(3))
    train(SMALL, parts, corpus=data, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name


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


def test_the_bound_objective_trains_too(tmp_path):
    train(small(objective="vlb", max_steps=3), tmp_path / "run", corpus=corpus())


def test_adamw_accumulation_infilling_and_a_table_schedule_train_too(tmp_path):
    train(
        small(optimizer="adamw", accumulate=2, infill=0.5, schedule="table", max_steps=3),
        tmp_path / "run",
        corpus=corpus(False),
    )


def test_two_processes_train_like_one_with_twice_the_batch(tmp_path):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("\n".join(f"{' '.join(s.split()[:2])}||{s}" for s in sentences(60)))
    common = [str(pairs), "--separator", "||", "--size", "tiny", "--tokenizer", "word", "--min-count", "1"]
    common += ["--max-length", "24", "--max-steps", "8", "--no-compile", "--dtype", "fp32", "--infill", "0.3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    logs = []
    for name, start, batch in (("one", [sys.executable, "-m"], "16"), ("two", launch, "8")):
        command = [*start, "embdiff.cli", "train", *common, "--output", str(tmp_path / name), "--batch-size", batch]
        config = tmp_path / f"{name}.yaml"
        config.write_text("log_every: 1\nwarmup: 1\n")
        done = subprocess.run(
            [*command, "--config", str(config)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([m["loss"] for m in log if "loss" in m])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_trackers_that_are_not_there_are_refused(tmp_path):
    for name, cause in (("abacus", "unknown"), ("clearml", "not installed")):
        with pytest.raises(UserError, match=cause):
            train(small(tracker=name), tmp_path / "run", corpus=corpus())


def test_nan_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    step_of_nan = 5
    original = training.losses.cross_entropy
    calls = iter(range(1, 100))

    def poisoned(*args):
        loss = original(*args)
        return loss._replace(total=loss.total * math.nan) if next(calls) == step_of_nan else loss

    monkeypatch.setattr(training.losses, "cross_entropy", poisoned)
    with pytest.raises(UserError, match=r"nan at step 5.*step-00000004"):
        train(small(save_every=4, max_steps=12), tmp_path / "run", corpus=corpus())
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000004"]


def test_nan_is_told_by_its_step_also_where_the_schedule_is_refitted(tmp_path, monkeypatch):
    original = training.losses.cross_entropy
    calls = iter(range(1, 100))

    def poisoned(*args):
        loss = original(*args)
        bad = next(calls) >= 23
        return loss._replace(total=loss.total * math.nan, cross_entropy=loss.cross_entropy * math.nan) if bad else loss

    monkeypatch.setattr(training.losses, "cross_entropy", poisoned)
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


def test_an_output_folder_with_another_run_is_refused(tmp_path):
    train(small(max_steps=1), tmp_path / "run", corpus=corpus())
    before = weights(tmp_path / "run")
    with pytest.raises(UserError, match="--overwrite"):
        train(SMALL, tmp_path / "run", corpus=corpus())
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "run").items())
    train(small(max_steps=2), tmp_path / "run", corpus=corpus(), overwrite=True)
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


def test_damaged_checkpoints_are_named(stopped):
    folder = checkpoint.checkpoints(stopped)[-1]
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="no embdiff checkpoint"):
        train(SMALL, stopped, corpus=corpus(), resume=True)
    (folder / "state.json").write_text(state)
    (folder / "ema.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged"):
        train(SMALL, stopped, corpus=corpus(), resume=True)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(SMALL, tmp_path / "none", corpus=corpus(), resume=True)
