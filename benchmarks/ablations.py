"""What each choice of the recipe is worth: short runs that differ in one option, on the same texts and seeds.

    python benchmarks/ablations.py TRAIN VALID --output runs/ablations --max-steps 1000
    python benchmarks/ablations.py TRAIN VALID --output runs/ablations --only "batch 64" --only "dim 32"

TRAIN and VALID are text files, one text a line. The default here: D = 64, self-conditioning in half of the steps,
batches of 32 texts. Runs of another cost a step
get as many more or fewer of them, so that all see about as many positions times parameters. The bound is on the same
600 random lines of VALID with the same noise, so that its differences are finer than its error. Samples: 150 of the
same seeds, in 32 steps at temperature 0.76 and 8 at 0.5, judged by the 5-gram of TRAIN. Short runs favour what learns
fast: they say little on dropout, size and averages over long times.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
from common import machine, trained

from embdiff.batches import encode
from embdiff.config import TrainConfig
from embdiff.data import Example, read_examples
from embdiff.evaluation.frontier import point
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.likelihood import bound
from embdiff.evaluation.samples import as_written, draw, some

# What differs from the default; `steps` are relative.
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "dim 16": {"dim": 16},
    "dim 32": {"dim": 32},
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
    "self-conditioning 0.25": {"self_condition": 0.25},
    "self-conditioning 0.9": {"self_condition": 0.9},
    "table schedule": {"schedule": "table"},
    "loss: bound": {"objective": "vlb"},
    "loss: both": {"objective": "mixed"},
    "dim 32, self-conditioning 0.9": {"dim": 32, "self_condition": 0.9},
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
    rows: dict[str, Any] = json.loads(results.read_text())["runs"] if results.exists() else {}
    judge = None
    for name in only or RUNS:
        change = dict(RUNS[name])
        steps = round(max_steps * change.pop("steps", 1.0))
        config = TrainConfig(**{
            "data": str(train), "validation": str(valid), "tokenizer": "word", "min_count": min_count, "size": size,
            "dim": 64, "self_condition": 0.5, "batch_size": 32, "infill": 0.0, "max_steps": steps, "save_every": steps,
            "validate_every": steps, "previews": 0, **change,
        })  # fmt: skip
        pipe = trained(output / re.sub(r"[^a-z0-9.]+", "-", name.lower()), config)
        judge = judge or NGramJudge(as_written(pipe.tokenizer, texts["train"]))
        lines = encode(
            [Example(text) for text in some(texts["valid"], 600, seed=1)], pipe.tokenizer,
            pipe.denoiser.config.max_length, on_long="drop",
        )  # fmt: skip
        found = bound(pipe.denoiser, lines, pipe.scheduler.noise_schedule)
        row = {"steps": steps, "bound": round(found.nats_per_token, 4), "noise_error": round(found.noise_error, 4)}
        for n, temperature in ((32, 0.76), (8, 0.5)):
            drawn = draw(pipe, [None] * 150, num_inference_steps=n, temperature=temperature)
            place = point(judge, drawn)
            row[f"{n} steps"] = [round(place.cross_entropy, 3), round(place.entropy, 3), round(place.mean_words, 1)]
        rows[name] = row
        print(name, row, flush=True)
        results.write_text(json.dumps({"runs": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
