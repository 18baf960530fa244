"""UniPC: a predictor, and a corrector that costs no evaluation."""

from __future__ import annotations

import math

import numpy as np

from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.dpm_solver import multistep_weights
from embdiff.schedulers.table import Level, Row


class UniPCScheduler(EmbeddingScheduler):
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6, data prediction).

    The predictor is DPM-Solver++(2M). The prediction x0 at its result then corrects the step that led there, for
    third order, before the next step starts. The corrected z^c is never evaluated: as the predictor wrote
    z = a z_last^c + b x0_prev + c x0_prev2, where it came from can be told from z, and correction and next prediction
    are one row.
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows = list[Row]()
        predictor = Row(1.0, 0.0)  # of the step that led here; none before the first
        steps = list[float]()
        for k in range(len(levels) - 1):
            now, to = levels[k], levels[k + 1]
            corrector = (0.0, 0.0, 0.0) if k == 0 else corrector_weights(levels[k - 1], now, steps[:-1][-1:])
            steps.append(to.lam - now.lam)
            past = [steps[-2] / steps[-1]] if k else []
            weights = multistep_weights(steps[-1], past)
            ahead = Row(to.sigma / now.sigma, *(to.alpha * w for w in weights))
            # z^c - z: what the corrector has of x0, x0_prev and x0_prev2 beyond the predictor's b and c.
            change = (corrector[0], corrector[1] - predictor.b, corrector[2] - predictor.c) if k else corrector
            rows.append(Row(ahead.a, ahead.b + ahead.a * change[0], ahead.c + ahead.a * change[1], ahead.a * change[2]))
            predictor = ahead
        return rows


def corrector_weights(start: Level, end: Level, before: list[float]) -> tuple[float, float, float]:
    """The weights of the predictions at `end`, `start` and one step before (`before`: the size of that step, if any).

    z^c = (sigma' / sigma) z - alpha' (e^{-h} - 1) m - alpha' B (sum_i rho_i D_i), where D_i = (m_i - m) / r_i over the
    older prediction and the new one, and rho solves sum_i rho_i r_i^(n-1) = n! phi_{n+1} / B (equations (9), (10)).
    """
    h = end.lam - start.lam
    phi1 = math.expm1(-h)  # = B(-h)
    phi2 = phi1 / -h - 1
    phi3 = phi2 / -h - 0.5
    scale = -end.alpha * phi1
    if not before:
        return 0.5 * scale, 0.5 * scale, 0.0
    r = -before[0] / h
    old, new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi2 / phi1, 2 * phi3 / phi1]).tolist()
    return scale * new, scale * (1 - new - old / r), scale * old / r
