"""Heun's method, with EDM's churn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.euler import from_flow
from embdiff.schedulers.table import TO_X0, Level, Row, Step


def trapezoid_row(now: Level, to: Level) -> Row:
    """The correction of an Euler step from `now` to `to`, applied to its result.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1, line 7: y' = y + (r' - r) (d + d') / 2 with
    d = (y - x0_prev) / r and d' = (y_euler - x0) / r'. Inserting y_euler = y + (r' - r) d leaves
    y' = y_euler + w (x0 - x0_prev) with w = (r - r') / 2 r'.
    """
    weight = 0.5 * (now.ratio / to.ratio - 1)
    return from_flow(Row(1.0, weight, -weight), to, to)


def noised(row: Row, at: Level, up: Level) -> Row:
    """A row that lands on `at`, then adds noise up to the level `up`: z'' = (alpha'' / alpha') z' + .. eps."""
    keep = up.alpha / at.alpha
    a, b, c, d = (keep * weight for weight in row[:4])
    s = math.sqrt((keep * row.s) ** 2 + max(0.0, up.sigma**2 - (keep * at.sigma) ** 2))
    return Row(a, b, c, d, s)


class HeunScheduler(EmbeddingScheduler):
    """Heun's method: second order with two evaluations between two levels and one after the last.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1. N evaluations make do with N / 2 + 1 levels; where N is even,
    the first step is Euler's.
    """

    order = 2

    def _plan(self, evaluations: int) -> list[Step]:
        levels = self._levels(evaluations // 2 + 1)
        now, plan = levels[0], list[Step]()
        for to in levels[1:]:
            up = self._churned(to, len(levels))
            keep = to.ratio / now.ratio
            euler = from_flow(Row(keep, 1 - keep), now, to)
            if not plan and evaluations % 2 == 0:
                plan.append(Step(now.gamma, noised(euler, to, up)))
            else:
                plan += [Step(now.gamma, euler), Step(to.gamma, noised(trapezoid_row(now, to), to, up))]
            now = up
        return [*plan, Step(now.gamma, TO_X0)]

    def _churned(self, level: Level, count: int) -> Level:
        """The level up to which noise is added before the step that starts at `level`."""
        return level


class ChurnScheduler(HeunScheduler):
    """Heun's method with EDM's stochastic churn (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

    Before a step that starts at r = sigma / alpha, noise is added up to r (1 + min(churn / n, sqrt(2) - 1)), with n the
    number of levels; not at the first, which is noise already.

    Args:
        churn: S_churn, 0 (off) or more.
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
        churn: float = 4.0,
    ) -> None:
        if not (math.isfinite(churn) and churn >= 0):
            raise UserError(f"churn {churn} is out of range: choose 0 (off) or more")
        super().__init__(
            num_train_timesteps=num_train_timesteps, noise_schedule=noise_schedule, prediction_type=prediction_type,
            nodes=nodes, levels=levels, trained_betas=trained_betas,
        )  # fmt: skip

    def _churned(self, level: Level, count: int) -> Level:
        return Level(level.gamma + 2 * math.log1p(min(self.config.churn / count, math.sqrt(2) - 1)))
