"""Text quality against steps for every solver.

    python benchmarks/solvers.py runs/e2e DATA --picture docs/solvers.svg

MODEL is what e2e_text.py trained, DATA its folder. Samples of the same seeds at temperature 0.76 are judged as there
(5-gram cross-entropy, unigram entropy, length), and by the tuner's charge: that cross-entropy plus the one of real
texts under a 3-gram of the samples. Entropy grows with the number of samples, so real text is as many random lines.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import typer
from common import judged, real_texts, write

from embdiff.cli.common import load_pipeline, quiet
from embdiff.data import Example
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.samples import some
from embdiff.schedulers import SCHEDULERS
from embdiff.tuning import Examiner

SAME = {"euler", "euler-a"}  # the same steps as ddim and ddpm
TEMPERATURE = 0.76


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
    pipe = load_pipeline(str(model))
    train, valid = (real_texts(pipe, data / f"{part}.txt") for part in ("train", "valid"))
    real = some(valid, samples)
    examiner = Examiner(pipe, [Example(line) for line in train], [Example(line) for line in real], samples=samples)
    judge = NGramJudge(train)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    for name in (name for name in SCHEDULERS if name not in SAME):
        for n in steps:
            texts = examiner.draw(examiner.scheduler(name, {}, {}), n, TEMPERATURE)
            charge = round(sum(examiner.charged(texts)), 3)
            rows.append({"steps": n, "solver": name, "charge": charge, **judged(judge, texts)})
            print(rows[-1], flush=True)
            curves.setdefault(name, []).append(charge)
    write(results, {"samples": samples, "real": judged(judge, real), "rows": rows})
    draw_curves(picture, steps, curves)


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
    axes.minorticks_off()
    axes.set_ylim(top=1.08 * median(charges[0] for charges in curves.values()))  # the worst leave the picture
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
