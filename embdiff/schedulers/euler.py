"""Euler and Euler-ancestral, in the probability-flow view."""

from __future__ import annotations

import math
from itertools import pairwise

from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.table import Level, Row


def from_flow(row: Row, now: Level, to: Level) -> Row:
    """A row for y = z / alpha, as a row for z.

    y = x + (sigma / alpha) eps moves along dy / dr = (y - x0) / r, where r = sigma / alpha (Karras et al. 2022,
    arXiv:2206.00364, equations (1) and (3)).
    """
    return Row(row.a * to.alpha / now.alpha, *(to.alpha * weight for weight in row[1:]))


class EulerScheduler(EmbeddingScheduler):
    """Euler's method: y' = y + (r' - r) (y - x0) / r, with y = z / alpha and r = sigma / alpha.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its correction. The same steps as DDIM's at eta = 0.
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows = []
        for now, to in pairwise(levels):
            keep = to.ratio / now.ratio
            rows.append(from_flow(Row(keep, 1 - keep), now, to))
        return rows


class EulerAncestralScheduler(EmbeddingScheduler):
    """Euler's method down to r_down, then noise up to r'.

    r_up^2 = r'^2 (r^2 - r'^2) / r^2,   r_down^2 = r'^2 - r_up^2,   y' = y + (r_down - r) (y - x0) / r + r_up eps
    (Crowson's k-diffusion, `sample_euler_ancestral`). The same steps as DDPM's.
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows = []
        for now, to in pairwise(levels):
            shrink = to.ratio / now.ratio
            keep = shrink**2  # r_down / r, for r_down = r'^2 / r
            rows.append(from_flow(Row(keep, 1 - keep, s=to.ratio * math.sqrt(1 - keep)), now, to))
        return rows
