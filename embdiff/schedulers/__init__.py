"""Schedulers: a solver each, over any noise schedule (see `embdiff.noise`)."""

from __future__ import annotations

from diffusers import SchedulerMixin

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler, SchedulerOutput
from embdiff.schedulers.ddim import DDIMScheduler
from embdiff.schedulers.ddpm import DDPMScheduler
from embdiff.schedulers.dpm_solver import (
    DPMSolver3Scheduler,
    DPMSolver3SDEScheduler,
    DPMSolverScheduler,
    DPMSolverSDEScheduler,
)
from embdiff.schedulers.euler import EulerAncestralScheduler, EulerScheduler
from embdiff.schedulers.heun import ChurnScheduler, HeunScheduler
from embdiff.schedulers.renoise import RenoiseScheduler
from embdiff.schedulers.unipc import UniPCScheduler

SCHEDULERS: dict[str, type[EmbeddingScheduler]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "renoise": RenoiseScheduler,
    "euler": EulerScheduler,
    "euler-a": EulerAncestralScheduler,
    "heun": HeunScheduler,
    "churn": ChurnScheduler,
    "dpm++": DPMSolverScheduler,
    "dpm++3m": DPMSolver3Scheduler,
    "dpm++sde": DPMSolverSDEScheduler,
    "dpm++3m-sde": DPMSolver3SDEScheduler,
    "unipc": UniPCScheduler,
}

# A saved pipeline names the module of its scheduler. It is this one for every solver, so files may move; diffusers
# looks for SchedulerMixin beside the class.
for _cls in SCHEDULERS.values():
    _cls.__module__ = __name__


def scheduler_class(name: str) -> type[EmbeddingScheduler]:
    """The solver of this name, as `embdiff sample --scheduler` takes it."""
    if name not in SCHEDULERS:
        raise UserError(f"scheduler {name!r} is unknown: choose one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]


__all__ = [
    "SCHEDULERS",
    "ChurnScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolver3SDEScheduler",
    "DPMSolver3Scheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverScheduler",
    "EmbeddingScheduler",
    "EulerAncestralScheduler",
    "EulerScheduler",
    "HeunScheduler",
    "RenoiseScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
    "UniPCScheduler",
    "scheduler_class",
]
