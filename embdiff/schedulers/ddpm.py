"""DDPM: ancestral sampling."""

from __future__ import annotations

from itertools import pairwise

from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.ddim import ddim_row
from embdiff.schedulers.table import Level, Row


class DDPMScheduler(EmbeddingScheduler):
    """Draws z' from the posterior q(z' | z, x0): DDIM at eta = 1.

    Ho et al. 2020 (arXiv:2006.11239), equations (6) and (7).
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        return [ddim_row(now, to, eta=1.0) for now, to in pairwise(levels)]
