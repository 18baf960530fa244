"""The coefficient table: what a solver is compiled to, and how one row of it is applied.

    z' = a z + b x0 + c x0_prev + d x0_prev2 + s eps,   eps ~ N(0, I)                                  (3)

x0 is the denoiser's prediction at this step, x0_prev and x0_prev2 those of the one and two steps before. Rows are made
in float64. One row serves all positions, or every position has its own: then the coefficients are tensors [L, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embdiff.noise import Array


class Level:
    """One noise level in float64: alpha, sigma, their ratio sigma / alpha, and lambda = log(alpha / sigma)."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        # exp overflows only where the other tail is already exactly 0 or 1.
        self.alpha = math.exp(-0.5 * np.logaddexp(0.0, gamma))
        self.sigma = math.exp(-0.5 * np.logaddexp(0.0, -gamma))
        self.lam = -0.5 * gamma
        self.ratio = math.exp(0.5 * gamma)


class Row(NamedTuple):
    """The coefficients of equation (3)."""

    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    s: float = 0.0


class Rows(NamedTuple):
    """Coefficients of their own for every position, each [L, 1] or [B, L, 1]; moves: False where one waits."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    s: Tensor
    moves: Tensor


class Step(NamedTuple):
    """Evaluate the denoiser at level gamma, then apply the row."""

    gamma: float
    row: Row


TO_X0 = Row(0.0, 1.0)
WAIT = Row(1.0, 0.0)
Predictions = tuple[Tensor, Tensor, Tensor]


def advance(row: Row | Rows, z: Tensor, predictions: Predictions, noise: Tensor | None) -> Tensor:
    """Equation (3), in the type of z. z, noise: [B, L, D]; predictions: x0, x0_prev, x0_prev2, each [B, L, D]."""
    x0, before, before_that = predictions
    if isinstance(row, Rows):
        a, b, c, d, s, _ = row
        return (a * z + b * x0 + c * before + d * before_that + s * (0.0 if noise is None else noise)).to(z.dtype)
    result = torch.mul(z, row.a).add_(x0, alpha=row.b) if row.a else x0.to(z.dtype) * row.b
    if row.c:
        result.add_(before, alpha=row.c)
    if row.d:
        result.add_(before_that, alpha=row.d)
    if row.s and noise is not None:
        result.add_(noise, alpha=row.s)
    return result


def remembered(row: Row | Rows, predictions: Predictions) -> tuple[Tensor, Tensor]:
    """(x0_prev, x0_prev2) of the next step: a position that waits keeps what it had."""
    x0, before, before_that = predictions
    if isinstance(row, Rows):
        return torch.where(row.moves, x0, before), torch.where(row.moves, before, before_that)
    return x0, before


def rows_of_times(
    times: Array, gammas: Array, through: Callable[[list[Level]], list[Step]], device: str | torch.device | None
) -> list[Row] | list[Rows]:
    """The table for given times [N] or [N, .., L], falling along N, and their gammas.

    A position is moved by the solver (`through`) where its time falls, waits where it stays, and is clean at 0.
    """
    flat, flat_gammas = times.reshape(len(times), -1), gammas.reshape(len(times), -1)
    _, columns, of_position = np.unique(flat, axis=1, return_index=True, return_inverse=True)  # alike: compiled once
    tables = np.array([_rows_of_position(flat[:, i], flat_gammas[:, i], through) for i in columns])
    if times.ndim == 1:
        return [Row(*row) for row in tables[0].tolist()]
    shape = (*times.shape[1:], 1)
    result = []
    for k in range(len(times)):
        rows = tables[of_position.ravel(), k].T.reshape(5, *shape)
        a, b, c, d, s = torch.tensor(rows, dtype=torch.float32, device=device).unbind()
        result.append(Rows(a, b, c, d, s, moves=(a != WAIT.a) | (b != WAIT.b)))
    return result


def _rows_of_position(times: Array, gammas: Array, through: Callable[[list[Level]], list[Step]]) -> list[Row]:
    rows = [WAIT] * len(times)
    noisy = int((times > 0).sum())
    if noisy:
        last = np.flatnonzero(np.append(np.diff(times[:noisy]), -1.0))  # of the calls at one level, the last moves on
        for call, step in zip(last, through([Level(gammas[call]) for call in last]), strict=True):
            rows[call] = step.row
    return rows
