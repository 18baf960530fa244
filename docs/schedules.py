"""Draws docs/schedules.svg: every noise schedule as gamma(t), and the share of signal that is left.

python docs/schedules.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import typer
from scipy.special import expit

from embdiff.noise import SCHEDULES, noise_schedule

RANGE = {"gamma_min": -6.0, "gamma_max": 9.0}
# A table has no curve of its own: here one with two bends.
TABLE = {"gammas": (-6.0, 0.0, 1.5, 4.5, 9.0), "times": (0.0, 0.1, 0.45, 0.8, 1.0)}


def main(output: Path = typer.Option(Path("docs/schedules.svg"), help="Where the picture goes.")) -> None:
    """Draws all schedules over one range of gamma."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "embdiff"
    from matplotlib import pyplot as plt

    t = np.linspace(0.0, 1.0, 400)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, style in zip(SCHEDULES, ["-", "--", "-.", ":"] * 2, strict=True):
        gamma = noise_schedule({"name": name, **(TABLE if name == "table" else RANGE)}).gamma(t)
        left.plot(t, gamma, style, label=name)
        right.plot(t, expit(-gamma), style)
    left.set(xlabel="t", ylabel="gamma = log(sigma² / alpha²)")
    right.set(xlabel="t", ylabel="alpha²")
    left.legend(fontsize=8)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
