"""Sampling levels fitted to a model: where a few steps lose the least.

A run over levels gamma_0 > .. > gamma_{N-1} that then lands on its prediction is a variational model of the text.
It loses

    L = sum_k 1/2 (e^{-gamma_{k+1}} - e^{-gamma_k}) E|x - x0(z_{gamma_k})|^2,   gamma_N = gamma_min          (4)

nats (Kingma et al. 2021, arXiv:2107.00630, equation 13). Once the error is known over gamma, the levels with the
smallest sum are a shortest path (Watson et al. 2021, arXiv:2106.03802), found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from embdiff import losses
from embdiff.batches import Batch
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.noise import Array

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline


class Tuned(NamedTuple):
    """Levels for a number of steps. lost, lost_even: nats a text, of these levels and of levels even in t."""

    steps: int
    levels: list[float]
    lost: float
    lost_even: float


@torch.no_grad()
def error_curve(denoiser: Denoiser, batch: Batch, gammas: Array, generator: torch.Generator) -> Array:
    """E|x - x0(z_gamma)|^2 of a text, summed over its positions and dimensions, at each of `gammas`: [n].

    x0 is the second of two self-conditioning passes, as in sampling; every text is seen at every level.
    """
    x = denoiser.space.embed(batch.ids)
    target = batch.target()
    noise = torch.randn(x.shape, generator=generator).to(
        x.device
    )  # the same at all levels, so that the curve is smooth
    errors = []
    for gamma in gammas:
        level = torch.full((len(batch.ids),), float(gamma), device=x.device)
        h = losses.features(denoiser, batch, x, level, noise, True)
        errors.append(float(((denoiser.x0(h) - x).square().sum(-1) * target).sum() / len(batch.ids)))
    return np.array(errors)


def loss(levels: Array, gammas: Array, errors: Array, gamma_min: float) -> float:
    """L of equation (4) in nats a text, for falling `levels`; errors are known at rising `gammas`."""
    signal = np.exp(-np.append(levels, gamma_min))
    return float((0.5 * np.diff(signal) * np.interp(levels, gammas, errors)).sum())


def best_levels(gammas: Array, errors: Array, steps: int) -> Array:
    """`steps` of the rising `gammas`, falling from the last, with the smallest loss (4) down to the first.

    Raises:
        UserError: more steps than there are gammas to choose from.
    """
    n = len(gammas)
    if not 1 <= steps < n:
        raise UserError(f"{steps} levels can't be chosen from {n}: give 1 to {n - 1} steps")
    signal = np.exp(-gammas)
    # cost[i, j]: from level i down to level j < i with the prediction made at i.
    cost = 0.5 * (signal[None, :] - signal[:, None]) * errors[:, None]
    cost[np.triu_indices(n)] = np.inf
    best = np.full(n, np.inf)
    best[n - 1] = 0.0
    came: list[Any] = []
    for _ in range(steps):
        ways = best[:, None] + cost
        came.append(ways.argmin(0))
        best = ways.min(0)
    path = [0]
    for origin in reversed(came):
        path.append(int(origin[path[-1]]))
    return np.asarray(gammas[path[:0:-1]])


def tune(
    pipe: TextDiffusionPipeline, batch: Batch, steps: Sequence[int], generator: torch.Generator, grid: int = 96
) -> list[Tuned]:
    """The best levels of a pipeline for each number of steps, and what they lose beside levels even in t."""
    schedule = pipe.scheduler.noise_schedule
    gammas = np.linspace(schedule.gamma_min, float(schedule.gamma(1.0)), grid)
    errors = error_curve(pipe.denoiser, batch, gammas, generator)
    result = []
    for n in steps:
        levels, even = best_levels(gammas, errors, n), schedule.gamma(1.0 - np.arange(n) / n)
        losses = (loss(at, gammas, errors, gammas[0]) for at in (levels, even))
        result.append(Tuned(n, levels.tolist(), *losses))
    return result
