"""DPM-Solver++: exponential multistep solvers of second and third order, for the ODE and the SDE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffusers.configuration_utils import register_to_config

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler
from embdiff.schedulers.table import Level, Row


class DPMSolverScheduler(EmbeddingScheduler):
    """DPM-Solver++(2M): one evaluation a step (Lu et al. 2022, arXiv:2211.01095).

    With lambda = log(alpha / sigma), h = lambda' - lambda and k = (1 + eta) h, a step solves the linear part exactly
    and integrates a polynomial through the last predictions:

        z' = (sigma' / sigma) e^{-eta h} z + alpha' (1 - e^{-k}) x0 + .. + sigma' sqrt(1 - e^{-2 eta h}) eps.

    eta = 0 is the probability-flow ODE (algorithm 2 of the paper), eta = 1 the reverse SDE; with eta between or above
    the marginals are the same, with less or more noise to undo mistakes. The first step has no previous prediction and
    is of first order, the second at most of second.
    """

    solver_order = 2

    def _rows(self, levels: list[Level]) -> list[Row]:
        rows, steps = list[Row](), list[float]()
        eta = float(self.config.get("eta", 0.0))
        for now, to in pairwise(levels):
            steps.append(to.lam - now.lam)
            h = steps[-1]
            past = [size / h for size in steps[-2::-1][: self.solver_order - 1]]
            b, c, d = (to.alpha * weight for weight in multistep_weights((1 + eta) * h, past))
            noise = to.sigma * math.sqrt(-math.expm1(-2 * eta * h))
            rows.append(Row(to.sigma / now.sigma * math.exp(-eta * h), b, c, d, noise))
        return rows


class DPMSolver3Scheduler(DPMSolverScheduler):
    """DPM-Solver++(3M)."""

    solver_order = 3


class DPMSolverSDEScheduler(DPMSolverScheduler):
    """DPM-Solver++(2M) for the SDE.

    Args:
        eta: how strong the noise is: 1 the reverse SDE, 0 none; at most 10.
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
        eta: float = 1.0,
    ) -> None:
        if not 0.0 <= eta <= 10.0:
            raise UserError(f"eta {eta} is out of range: choose 0 (no noise) to 10, 1 is the reverse SDE")
        super().__init__(
            num_train_timesteps=num_train_timesteps, noise_schedule=noise_schedule, prediction_type=prediction_type,
            nodes=nodes, levels=levels, trained_betas=trained_betas,
        )  # fmt: skip


class DPMSolver3SDEScheduler(DPMSolverSDEScheduler):
    """DPM-Solver++(3M) for the SDE."""

    solver_order = 3


def multistep_weights(k: float, past: list[float]) -> tuple[float, float, float]:
    """The weights of x0, x0_prev and x0_prev2 over alpha'. past: the step sizes before this one, over this one.

    With D1 the slope at x0 in units of this step and D2 half the second derivative,

        second order   phi1 (x0 + D1 / 2)                  arXiv:2211.01095, algorithm 2
        third order    phi1 x0 + phi2 D1 + psi D2          the integral of the parabola through three predictions
        phi1 = 1 - e^{-k},   phi2 = 1 - phi1 / k,   psi = 1 - 2 phi2 / k.

    The published third-order code weights D2 by psi / 2 (`multistep_dpm_solver_third_update`), with which the error
    falls with the square of the step only.
    """
    phi1 = -math.expm1(-k)
    if not past:
        return phi1, 0.0, 0.0
    if len(past) == 1:
        half = 0.5 * phi1 / past[0]
        return phi1 + half, -half, 0.0
    r, q = past
    phi2 = 1 - phi1 / k
    psi = 1 - 2 * phi2 / k
    # u = (x0 - x0_prev) / r and v = (x0_prev - x0_prev2) / q give D1 = u + r / (r + q) (u - v), D2 = (u - v) / (r + q).
    bend = (phi2 * r + psi) / (r + q)
    return phi1 + (phi2 + bend) / r, -(phi2 + bend) / r - bend / q, bend / q
