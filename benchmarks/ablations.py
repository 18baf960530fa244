"""What each choice of the recipe is worth: short runs that differ in one option, on the same texts and seeds.

    python benchmarks/ablations.py TRAIN VALID --output runs/ablations --max-steps 1000
    python benchmarks/ablations.py TRAIN VALID --output runs/ablations --only "batch 64" --only "dim 16"

TRAIN and VALID are text files, one text a line. The default is that of `embdiff train`, with batches of 32 texts. Runs
of another cost a step get as many more or fewer of them, so that all see about as many positions times parameters. The
bound is on the same 600 random lines of VALID with the same noise, so that its differences are finer than its error.
Samples: 150 of the same seeds by UniPC, in 32 and in 8 steps, at three temperatures; their cross-entropy under the
5-gram of TRAIN is read off at the entropy of 150 real lines. Short runs favour what learns fast: they say little on
dropout, size and averages over long times.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
from common import chosen, machine, trained

from embdiff.batches import encode
from embdiff.cli.common import run_config
from embdiff.config import TrainConfig
from embdiff.data import Example, read_examples
from embdiff.errors import UserError
from embdiff.evaluation.frontier import at_entropy, frontier, point
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.likelihood import bound
from embdiff.evaluation.samples import as_written, some

SAMPLES = 150
TEMPERATURES = (0.65, 0.85, 1.05)

# What differs from the default; `steps` are relative.
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, another seed": {"seed": 1},
    "dim 16": {"dim": 16},
    "dim 64": {"dim": 64},
    "dim 128": {"dim": 128},
    "batch 64": {"batch_size": 64, "steps": 0.5},
    "batch 16": {"batch_size": 16, "steps": 2.0},
    "width 256": {"width": 256, "heads": 4, "steps": 0.61},
    "depth 9": {"depth": 9, "steps": 0.67},
    "rates x 1.5": {"matrix_lr": 6e-3, "lr": 3e-3},
    "AdamW": {"optimizer": "adamw"},
    "no windows": {"window": 0.0},
    "windows 0.85": {"window": 0.85},
    "self-conditioning 0": {"self_condition": 0.0},
    "self-conditioning 0.5": {"self_condition": 0.5},
    "table schedule": {"schedule": "table"},
    "loss: bound": {"objective": "vlb"},
    "loss: both": {"objective": "mixed"},
    "no transitions": {"transitions": 0},
    "infill 0.3": {"infill": 0.3},
    "filter from the start": {"filter_ramp": 0},
    "no average": {"ema": 0.0},
}


def main(
    train: Path,
    valid: Path,
    output: Path = typer.Option(..., help="Folder of the runs."),
    max_steps: int = typer.Option(1000, help="Steps of the default run."),
    size: str = typer.Option("mini", help="Model size."),
    min_count: int = typer.Option(11, help="Rarer words become <unk>."),
    only: list[str] = typer.Option([], help="These runs; all by default."),
    results: Path = typer.Option(Path("benchmarks/results/ablations.json"), help="Where the figures go; added to."),
) -> None:
    """Trains, measures and adds a row for each run."""
    texts = {name: [e.text for e in read_examples(str(path))] for name, path in (("train", train), ("valid", valid))}
    judge = None
    for name in chosen(only, RUNS):
        change = dict(RUNS[name])
        steps = round(max_steps * change.pop("steps", 1.0))
        config = TrainConfig(**{
            "data": str(train), "validation": str(valid), "tokenizer": "word", "min_count": min_count, "size": size,
            "batch_size": 32, "infill": 0.0, "max_steps": steps, "save_every": steps,
            "validate_every": steps, "previews": 0, **change,
        })  # fmt: skip
        folder = output / re.sub(r"[^a-z0-9.]+", "-", name.lower())
        if (own := run_config(folder)) is not None and own != config.located():
            raise UserError(f"{folder} holds a run with other options: name another --output")
        pipe = trained(folder, config)
        judge = judge or NGramJudge(as_written(pipe.tokenizer, texts["train"]))
        lines = encode(
            [Example(text) for text in some(texts["valid"], 600, seed=1)], pipe.tokenizer,
            pipe.denoiser.config.max_length, on_long="drop",
        )  # fmt: skip
        found = bound(pipe.denoiser, lines, pipe.scheduler.noise_schedule, samples=16)
        row = {"steps": steps, "bound": round(found.nats_per_token, 4), "noise_error": round(found.noise_error, 4)}
        real = point(judge, some(as_written(pipe.tokenizer, texts["valid"]), SAMPLES))
        drawn = frontier(
            pipe, judge, [None] * SAMPLES, solvers=["unipc"], steps=[32, 8], temperatures=TEMPERATURES,
            report=lambda found: print(tuple(found), flush=True),
        )  # fmt: skip
        for n in (32, 8):
            found_at = at_entropy([p for p in drawn if p.steps == n], real.entropy)
            row[f"{n} steps"] = None if found_at is None else found_at._asdict()
        print(name, row, flush=True)
        # Read anew: two processes may share the runs.
        rows = json.loads(results.read_text())["runs"] if results.exists() else {}
        rows[name] = row
        results.write_text(json.dumps({"real": real._asdict(), "runs": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
