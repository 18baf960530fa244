"""The tuner's choice for a few steps, beside DDIM over levels even in t, on seeds that the tuner did not see.

    python benchmarks/tuning.py runs/e2e DATA

MODEL is what e2e_text.py trained, DATA its folder; judged as there. Both write the same number of samples. DDIM is
drawn at several temperatures, so that its 5-gram cross-entropy can be read off at the entropy of the tuner's choice.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from common import write
from e2e_text import judged

from embdiff.cli.common import quiet
from embdiff.data import Example
from embdiff.evaluation.ngram import NGram
from embdiff.pipeline import load
from embdiff.tuning import Examiner, Trial, tune

TEMPERATURES = (0.4, 0.5, 0.6, 0.76, 1.0)


def main(
    model: Path,
    data: Path,
    steps: list[int] = typer.Option([8, 16, 32], help="Sampling steps."),
    tuning_samples: int = 128,
    samples: int = 400,
    results: Path = Path("benchmarks/results/tuning.json"),
) -> None:
    """Tunes each number of steps, then compares."""
    quiet()
    pipe = load(str(model))
    pipe.set_progress_bar_config(disable=True)
    train, valid = ((data / f"{part}.txt").read_text().splitlines() for part in ("train", "valid"))
    texts, real = ([Example(line) for line in lines] for lines in (train, random.Random(0).sample(valid, 500)))
    examiner = Examiner(pipe, texts, real, samples=tuning_samples)
    judge = NGram.fit(train, order=5, min_count=11)
    figures: dict[str, Any] = {"samples": samples, "real": judged(judge, random.Random(0).sample(valid, samples))}
    for n in steps:
        best = tune(examiner, [n], lambda trial: print(tuple(trial), round(trial.charge, 3), flush=True))[n]
        figures[f"{n} steps"] = compared(examiner, judge, best, samples)
        write(results, figures)


def compared(examiner: Examiner, judge: NGram, best: Trial, samples: int) -> dict[str, Any]:
    """The choice and DDIM on new seeds."""

    def row(solver: str, options: dict[str, Any], temperature: float, power: float) -> dict[str, Any]:
        scheduler = examiner.scheduler(solver, options, {best.steps: power})
        texts = fresh.draw(scheduler, best.steps, temperature)
        found = {"solver": solver, **options, "temperature": temperature, "power": power, **judged(judge, texts)}
        print(found, flush=True)
        return found

    fresh = examiner.with_seeds(100_000, samples)
    own = row(best.solver, best.options, best.temperature, best.power)
    ddim = [row("ddim", {}, temperature, 1.0) for temperature in TEMPERATURES]
    equal = at_entropy(ddim, own["unigram_entropy"])
    better = None if equal is None else round(equal - own["cross_entropy"], 3)
    return {"tuned": own, "ddim": ddim, "ddim_at_equal_entropy": equal, "better_by": better}


def at_entropy(rows: list[dict[str, Any]], entropy: float) -> float | None:
    """Cross-entropy between two neighbours on a line through them; None outside of all."""
    for low, high in pairwise(rows):
        if low["unigram_entropy"] <= entropy <= high["unigram_entropy"]:
            share = (entropy - low["unigram_entropy"]) / (high["unigram_entropy"] - low["unigram_entropy"])
            return round(low["cross_entropy"] + share * (high["cross_entropy"] - low["cross_entropy"]), 4)
    return None


if __name__ == "__main__":
    typer.run(main)
