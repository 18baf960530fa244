"""Renoise: fresh noise on the prediction at every step."""

from __future__ import annotations

from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.table import Level, Row


class RenoiseScheduler(EmbeddingScheduler):
    """z' = alpha' x0 + sigma' eps: the forward process applied to the prediction (q-sampling, TESS, arXiv:2305.08379).

    Nothing of z survives a step but what the prediction says, so mistakes of early steps can be undone.
    """

    def _rows(self, levels: list[Level]) -> list[Row]:
        return [Row(0.0, to.alpha, s=to.sigma) for to in levels[1:]]
