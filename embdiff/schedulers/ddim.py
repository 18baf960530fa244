"""DDIM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.table import Level, Row


def ddim_row(now: Level, to: Level, eta: float) -> Row:
    """Song et al. 2021 (arXiv:2010.02502), equations (12) and (16), with eps = (z - alpha x0) / sigma inserted.

    s = eta * sigma_to / sigma_now * sqrt(1 - alpha_now^2 / alpha_to^2),
    z' = alpha_to x0 + sqrt(sigma_to^2 - s^2) (z - alpha_now x0) / sigma_now + s eps.
    """
    s = eta * to.sigma / now.sigma * math.sqrt(max(0.0, -math.expm1(2 * math.log(now.alpha / to.alpha))))
    a = math.sqrt(max(0.0, to.sigma**2 - s**2)) / now.sigma
    return Row(a, to.alpha - a * now.alpha, s=s)


class DDIMScheduler(EmbeddingScheduler):
    """DDIM (arXiv:2010.02502).

    eta = 0 follows the probability-flow ODE to first order; eta = 1 is ancestral sampling.
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
        eta: float = 0.0,
    ) -> None:
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta {eta} is out of range: choose 0 (deterministic) to 1 (ancestral)")
        # By name: diffusers takes values given by position for defaults, and drops them in from_config.
        super().__init__(
            num_train_timesteps=num_train_timesteps, noise_schedule=noise_schedule, prediction_type=prediction_type,
            nodes=nodes, levels=levels, trained_betas=trained_betas,
        )  # fmt: skip

    def _rows(self, levels: list[Level]) -> list[Row]:
        return [ddim_row(now, to, self.config.eta) for now, to in pairwise(levels)]
