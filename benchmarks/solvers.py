"""Text quality against steps for every solver, and the tuner's choice against DDIM over levels even in t.

    python benchmarks/solvers.py runs/e2e DATA --picture docs/solvers.svg

MODEL is what e2e_text.py trained, DATA its folder. Samples of the same seeds are judged as there (5-gram cross-entropy,
unigram entropy, length), and by the tuner's charge: that cross-entropy plus the one of real texts under a 3-gram of
the samples. The tuner's choice is compared with DDIM at three temperatures: at its entropy, DDIM's cross-entropy is
interpolated along them. Entropy grows with the number of samples, so real text is as many random lines.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import typer
from common import write
from e2e_text import judged

from embdiff.cli.common import quiet
from embdiff.data import Example
from embdiff.evaluation.ngram import NGram
from embdiff.pipeline import load
from embdiff.schedulers import SCHEDULERS
from embdiff.tuning import Examiner, Trial, tune

SAME = {"euler", "euler-a"}  # the same steps as ddim and ddpm
TEMPERATURES = (0.5, 0.76, 1.0)


def main(
    model: Path,
    data: Path,
    steps: list[int] = typer.Option([8, 16, 32], help="Sampling steps."),
    samples: int = 192,
    results: Path = Path("benchmarks/results/solvers.json"),
    picture: Path = Path("docs/solvers.svg"),
) -> None:
    """Prints a row for each run, writes all of them and draws the curves."""
    quiet()
    pipe = load(str(model))
    pipe.set_progress_bar_config(disable=True)
    train, valid = ((data / f"{part}.txt").read_text().splitlines() for part in ("train", "valid"))
    real = random.Random(0).sample(valid, samples)
    examiner = Examiner(pipe, [Example(line) for line in train], [Example(line) for line in real], samples=samples)
    judge = NGram.fit(train, order=5, min_count=11)
    rows: list[dict[str, Any]] = []

    @cache
    def drawn(n: int, solver: str, options: tuple[tuple[str, Any], ...], power: float, temperature: float) -> Trial:
        examiner.options = {"temperature": temperature}
        texts = examiner.draw(examiner.scheduler(solver, dict(options), {n: power}), n)
        trial = examiner.judged(texts, n, solver, dict(options), power)
        rows.append({"steps": n, "solver": solver, **dict(options), "power": power, "temperature": temperature,
                     "charge": round(trial.charge, 3), **judged(judge, texts)})  # fmt: skip
        print(rows[-1], flush=True)
        return trial

    def examine(n: int, solver: str, options: dict[str, Any], power: float = 1.0) -> Trial:
        return drawn(n, solver, tuple(options.items()), power, 0.76)

    curves = {name: [examine(n, name, {}).charge for n in steps] for name in SCHEDULERS if name not in SAME}
    for n in steps:
        for temperature in TEMPERATURES:
            drawn(n, "ddim", (), 1.0, temperature)
    chosen = [compared(rows, tune(examine, [n])[n]) for n in steps]
    write(results, {"samples": samples, "real": judged(judge, real), "tuned": chosen, "rows": rows})
    draw_curves(picture, steps, curves)


def compared(rows: list[dict[str, Any]], best: Trial) -> dict[str, Any]:
    """The tuner's choice, and DDIM at its entropy."""

    def row(solver: str, power: float, temperature: float, **options: Any) -> dict[str, Any]:
        wanted = {"steps": best.steps, "solver": solver, "power": power, "temperature": temperature, **options}
        return next(row for row in rows if wanted.items() <= row.items())

    own = row(best.solver, best.power, 0.76, **best.options)
    ddim = [row("ddim", 1.0, temperature) for temperature in TEMPERATURES]
    entropy = [point["unigram_entropy"] for point in ddim]
    equal = float(np.interp(own["unigram_entropy"], entropy, [point["cross_entropy"] for point in ddim]))
    return own | {
        "ddim_at_equal_entropy": round(equal, 4),
        "better_by": round(equal - own["cross_entropy"], 4),
        "better_than_ddim_at_temperature_1_by": round(ddim[-1]["cross_entropy"] - own["cross_entropy"], 4),
    }


def draw_curves(picture: Path, steps: list[int], curves: dict[str, list[float]]) -> None:
    """The charge of every solver against steps."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "embdiff"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, charges), style in zip(curves.items(), ["-", "--", "-.", ":"] * 3, strict=False):
        axes.plot(steps, charges, style, marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="steps", ylabel="nats a word, both ways: less is better", xticks=steps)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
