"""The tuner's choice for a few steps, beside DDIM over levels even in t, on seeds that the tuner did not see.

    python benchmarks/tuning.py runs/e2e DATA

MODEL is what e2e_text.py trained, DATA its folder; judged as there. Both write the same number of samples. DDIM is
drawn at several temperatures, so that its 5-gram cross-entropy can be read off at the entropy of the tuner's choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from common import judged, real_texts, write

from embdiff.cli.common import load_pipeline, quiet
from embdiff.data import Example
from embdiff.evaluation.frontier import Point, at_entropy, point
from embdiff.evaluation.judges import Judge, NGramJudge
from embdiff.evaluation.samples import some
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
    pipe = load_pipeline(str(model))
    train, valid = (real_texts(pipe, data / f"{part}.txt") for part in ("train", "valid"))
    texts, real = ([Example(line) for line in lines] for lines in (train, some(valid, 500)))
    examiner = Examiner(pipe, texts, real, samples=tuning_samples)
    judge = NGramJudge(train)
    figures: dict[str, Any] = {"samples": samples, "real": judged(judge, some(valid, samples))}
    for n in steps:
        best = tune(examiner, [n], lambda trial: print(tuple(trial), round(trial.charge, 3), flush=True))[n]
        figures[f"{n} steps"] = compared(examiner, judge, best, samples)
        write(results, figures)


def compared(examiner: Examiner, judge: Judge, best: Trial, samples: int) -> dict[str, Any]:
    """The choice and DDIM on new seeds."""

    def place(solver: str, options: dict[str, Any], temperature: float, power: float) -> Point:
        scheduler = examiner.scheduler(solver, options, {best.steps: power})
        texts = fresh.draw(scheduler, best.steps, temperature)
        print(solver, options, temperature, power, judged(judge, texts), flush=True)
        return point(judge, texts, solver, best.steps, temperature)

    fresh = examiner.with_seeds(100_000, samples)
    own = place(best.solver, best.options, best.temperature, best.power)
    ddim = [place("ddim", {}, temperature, 1.0) for temperature in TEMPERATURES]
    found = at_entropy(ddim, own.entropy)
    equal = None if found is None else found.cross_entropy
    return {
        "tuned": own._asdict() | best.options | {"power": best.power},
        "ddim": [found._asdict() for found in ddim],
        "ddim_at_equal_entropy": equal,
        "better_by": None if equal is None else round(equal - own.cross_entropy, 3),
    }


if __name__ == "__main__":
    typer.run(main)
