"""Schedulers: a solver each, over any noise schedule (see `embdiff.noise`)."""

from __future__ import annotations

import inspect
from typing import Any, cast

from diffusers import SchedulerMixin

from embdiff.errors import UserError
from embdiff.schedulers.base import EmbeddingScheduler, SchedulerOutput, options_of, same_betas, schedule_of_signal
from embdiff.schedulers.ddim import DDIMScheduler
from embdiff.schedulers.ddpm import DDPMScheduler
from embdiff.schedulers.dpm_solver import (
    DPMSolver3Scheduler,
    DPMSolver3SDEScheduler,
    DPMSolverScheduler,
    DPMSolverSDEScheduler,
)
from embdiff.schedulers.euler import EulerAncestralScheduler, EulerScheduler
from embdiff.schedulers.foreign import adapted
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


def with_solver(scheduler: Any, name: str, **options: Any) -> EmbeddingScheduler:
    """The solver of this name over the scheduler's noise schedule, with these options and else its defaults.

    What was tuned, levels and options such as eta, stays behind.
    """
    kept = dict(scheduler.config)
    if isinstance(scheduler, EmbeddingScheduler):
        kept = {key: kept[key] for key in options_of(EmbeddingScheduler) - {"levels"}}
    elif hasattr(scheduler, "alphas_cumprod"):
        kept = schedule_of(scheduler)
    changed: EmbeddingScheduler = scheduler_class(name).from_config(kept, **options)
    return changed


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """The noise schedule of a diffusers scheduler that has betas, as options of ours."""
    config = scheduler.config
    spec = config.get("noise_schedule")
    if not same_betas(spec, config.get("trained_betas")):  # else it was made from one of ours
        spec = schedule_of_signal(scheduler.alphas_cumprod.double().cpu().numpy()).config()
    return {"num_train_timesteps": int(config.num_train_timesteps), "noise_schedule": spec}


# Whose steps each solver takes. diffusers' third order keeps its own coefficients, see `embdiff.schedulers.dpm_solver`.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++3m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
}


# Options of diffusers' schedulers that change the levels in ways of their own.
NO_IMAGE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas",
            "rescale_betas_zero_snr")  # fmt: skip

# Options of diffusers' solvers that ours don't have, and their only values that mean what ours do.
ONLY: dict[str, tuple[Any, ...]] = {
    "variance_type": (None, "fixed_small", "fixed_small_log"), "predict_x0": (None, True),
}  # fmt: skip


def to_diffusers(scheduler: EmbeddingScheduler, cls: type[Any] | None = None) -> Any:
    """A diffusers scheduler with the noise schedule of ours; of its own counterpart, or of any class with betas.

    Raises:
        UserError: diffusers has no such solver or option, or the class has no betas.
    """
    import diffusers

    name = next((name for name, ours in SCHEDULERS.items() if type(scheduler) is ours), None)
    if name is None:
        raise UserError(f"{type(scheduler).__name__} is no scheduler of embdiff: choose {', '.join(SCHEDULERS)}")
    eta = scheduler.config.get("eta", 0.0)
    if name == "ddim" and eta == 1.0:
        name = "ddpm"
    elif eta not in ((1.0,) if "sde" in name else (0.0,)):
        raise UserError(f"eta {eta} is no option of diffusers: take the eta of the textbook, 0 or 1")
    for option in ("nodes", "levels"):
        if scheduler.config[option]:
            raise UserError(f"diffusers has no counterpart of {option}: convert a scheduler without them")
    counterpart, options = DIFFUSERS.get(name, ("", {}))
    if cls is None:
        if not counterpart:
            raise UserError(
                f"diffusers has no counterpart of {name}: name one of its classes to keep the noise schedule"
            )
        cls = getattr(diffusers, counterpart)
    if "trained_betas" not in inspect.signature(cls.__init__).parameters:
        raise UserError(
            f"{cls.__name__} has no betas, so it can't follow another noise schedule: take a class that does"
        )
    return cls.from_config(scheduler.config, **(options if cls.__name__ == counterpart else {}))


def from_diffusers(scheduler: Any) -> EmbeddingScheduler:
    """Our scheduler with the solver and the noise schedule of a diffusers one.

    Raises:
        UserError: we have no such solver, or the scheduler has no betas.
    """
    config = scheduler.config
    for name, (counterpart, options) in DIFFUSERS.items():
        wanted = {k: options[k] for k in ("algorithm_type", "solver_order") if k in options}
        if type(scheduler).__name__ == counterpart and all(config.get(k) == v for k, v in wanted.items()):
            strange = [option for option in NO_IMAGE if config.get(option)]
            strange += [option for option, values in ONLY.items() if config.get(option) not in values]
            if config.get("solver_type", "midpoint") != options.get("solver_type", "midpoint"):
                strange.append("solver_type")
            if strange:
                raise UserError(f"{type(scheduler).__name__} with {', '.join(strange)} has no counterpart in embdiff: "
                                "assign it as it is")  # fmt: skip
            return cast(EmbeddingScheduler, SCHEDULERS[name](**schedule_of(scheduler)))
    said = ", ".join(f"{k}={config[k]!r}" for k in ("algorithm_type", "solver_order") if k in config)
    names = ", ".join(sorted({counterpart for counterpart, _ in DIFFUSERS.values()}))
    raise UserError(
        f"{type(scheduler).__name__}{said and f' with {said}'} has no counterpart in embdiff: assign it as it is, or "
        f"take one of {names}"
    )


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
    "adapted",
    "from_diffusers",
    "scheduler_class",
    "to_diffusers",
    "with_solver",
]
