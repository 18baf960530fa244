"""Renoise: fresh noise on the prediction at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.table import Level, Row


class RenoiseScheduler(EmbeddingScheduler):
    """z' = alpha' x0 + sigma' (sqrt(1 - f) eps_now + sqrt(f) eps), with eps_now = (z - alpha x0) / sigma.

    At f = 1 this is the forward process applied to the prediction (q-sampling, TESS, arXiv:2305.08379): nothing of z
    survives a step but what the prediction says, so mistakes of early steps can be undone. f = 0 is DDIM, which keeps
    all of the noise (arXiv:2010.02502, equation (12) with sigma_t^2 = f sigma'^2).

    Args:
        fresh: f, the share of the noise's variance that is drawn anew, in [0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        noise_schedule: str | Mapping[str, Any] = "gumbel",
        prediction_type: str = "sample",
        nodes: str | Mapping[str, Any] | None = None,
        levels: Mapping[str, Sequence[float]] | None = None,
        trained_betas: Sequence[float] | None = None,
        fresh: float = 1.0,
    ) -> None:
        if not 0.0 <= fresh <= 1.0:
            raise UserError(f"fresh {fresh} is out of range: choose 0 (all noise is kept) to 1 (all of it is new)")
        super().__init__(
            num_train_timesteps=num_train_timesteps, noise_schedule=noise_schedule, prediction_type=prediction_type,
            nodes=nodes, levels=levels, trained_betas=trained_betas,
        )  # fmt: skip

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows, fresh = [], self.config.fresh
        for now, to in pairwise(levels):
            keep = math.sqrt(1 - fresh) * to.sigma / now.sigma
            rows.append(Row(keep, to.alpha - keep * now.alpha, s=math.sqrt(fresh) * to.sigma))
        return rows
