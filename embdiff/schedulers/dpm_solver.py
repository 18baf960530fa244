"""DPM-Solver++(2M)."""

from __future__ import annotations

import math
from itertools import pairwise

from embdiff.schedulers.base import EmbeddingScheduler, Level, Row


class DPMSolverScheduler(EmbeddingScheduler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order with one evaluation a step.

    With lambda = log(alpha / sigma), h_k = lambda_{k+1} - lambda_k and r = h_{k-1} / h_k,

        D  = (1 + 1 / 2r) x0 - (1 / 2r) x0_prev
        z' = sigma' / sigma z - alpha' (e^{-h} - 1) D.

    The first step has no previous prediction and is of first order (D = x0).
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows: list[Row] = []
        h_prev = None
        for now, to in pairwise(levels):
            h = to.lam - now.lam
            step = -to.alpha * math.expm1(-h)
            extrapolation = 0.0 if h_prev is None else 0.5 * h / h_prev
            rows.append((to.sigma / now.sigma, step * (1 + extrapolation), -step * extrapolation, 0.0))
            h_prev = h
        return rows
