"""diffusers' own schedulers under our models.

Their samples are s = alpha x + sigma eps in many scales (variance preserving, sigma up to 80 on top of x, straight
flows), and they want the network's output as x0, eps, v, flow or EDM's F. Our models take
z = s / sqrt(alpha^2 + sigma^2) with gamma = log(sigma^2 / alpha^2) and give x0. What a scheduler needs is not believed
but tried: a dry run with a known x0 shows the level of every call, and whether the run ends at that x0. If no way of
handing x0 over does, the scheduler is refused.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from embdiff.errors import UserError, reason
from embdiff.schedulers.base import EmbeddingScheduler, Generators, whole_steps


class Call(NamedTuple):
    """alpha > 0 and sigma > 0 of the sample that the scheduler hands out at one call."""

    alpha: float
    sigma: float

    @property
    def norm(self) -> float:
        """The standard deviation of the sample for x of unit variance."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def gamma(self) -> float:
        """The log noise-to-signal ratio."""
        return 2 * math.log(self.sigma / self.alpha)


def _sample(x0: Tensor, s: Tensor, call: Call) -> Tensor:
    return x0


def _epsilon(x0: Tensor, s: Tensor, call: Call) -> Tensor:
    return (s - call.alpha * x0) / call.sigma


def _velocity(x0: Tensor, s: Tensor, call: Call) -> Tensor:
    return (call.alpha * _epsilon(x0, s, call) - call.sigma * x0) / call.norm


def _flow(x0: Tensor, s: Tensor, call: Call) -> Tensor:
    return _epsilon(x0, s, call) - x0


def _edm(x0: Tensor, s: Tensor, call: Call) -> Tensor:
    """F of x0 = c_skip s + c_out F with sigma_data = 1 / 2, diffusers' default (arXiv:2206.00364, table 1)."""
    data = 0.5
    total = call.sigma**2 + data**2
    return (x0 - data**2 / total * s) * math.sqrt(total) / (call.sigma * data)


# The value of the scheduler's `prediction_type`, if it has one, and what it then wants. In order of preference.
WAYS: tuple[tuple[str | None, Callable[[Tensor, Tensor, Call], Tensor]], ...] = (
    ("sample", _sample),
    ("epsilon", _epsilon),
    ("v_prediction", _velocity),
    ("flow_prediction", _flow),
    ("epsilon", _edm),
    (None, _sample),
    (None, _epsilon),
    (None, _velocity),
    (None, _flow),
)
START = 2.0  # gamma from which on pure noise may be handed over: the signal is at most a third
_known: dict[str, int] = {}


class DryRun(NamedTuple):
    """The levels of all calls, and how far (root mean square) the run ended from the x0 it was given."""

    calls: list[Call]
    error: float


class MissedError(ValueError):
    """A dry run that went wrong."""


class ForeignScheduler:
    """A diffusers scheduler with the methods of ours that sampling uses.

    Clipping and thresholding are off, and the last step lands on the prediction, as ours do.

    Raises:
        UserError: it cannot be used, with the reason.
    """

    init_noise_sigma: float

    def __init__(self, scheduler: Any) -> None:
        self.name = type(scheduler).__name__
        if not isinstance(scheduler, SchedulerMixin) or not hasattr(scheduler, "step"):
            raise UserError(f"scheduler {self.name} is no diffusers scheduler: assign one with set_timesteps and step")
        self.scheduler, self.convert = self._first_way(scheduler)
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def _first_way(self, scheduler: Any) -> tuple[Any, Callable[[Tensor, Tensor, Call], Tensor]]:
        """The scheduler with its `prediction_type`, and the conversion, with which a run ends at the x0 it is given."""
        key = self.name + json.dumps(dict(scheduler.config), sort_keys=True, default=str)
        if key in _known:
            kind, convert = WAYS[_known[key]]
            return _configured(scheduler, kind), convert
        missed, failed = list[str](), list[str]()
        for i, (kind, convert) in enumerate(WAYS):
            try:
                candidate = _configured(scheduler, kind)
                if candidate is not None:
                    dry_run(candidate, convert, 20)
                    _known[key] = i
                    return candidate, convert
            except MissedError as error:
                missed.append(str(error))
            except Exception as error:
                failed.append(f"{type(error).__name__} ({reason(error)})")
        cause = [*missed, *failed, "it takes no prediction that x0 can be turned into"][0]
        raise UserError(f"scheduler {self.name} can't sample from embdiff models: {cause}; take one of embdiff's")

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Chooses the noise levels, as the wrapped scheduler does; they are read off a dry run."""
        steps = whole_steps(num_inference_steps)
        try:
            self.calls = dry_run(self.scheduler, self.convert, steps).calls
        except Exception as error:
            raise UserError(f"scheduler {self.name} can't take {steps} steps: {reason(error)}") from error
        self.scheduler = _rewound(self.scheduler, steps, device)
        self.timesteps: Tensor = self.scheduler.timesteps
        self.gammas = torch.tensor([call.gamma for call in self.calls], dtype=torch.float32, device=device)
        self.init_noise_sigma = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        self._index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sampling always begins at the beginning."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """z, variance preserving, for the scheduler's sample."""
        _scaled(self.scheduler, sample, timestep)  # some count their steps here
        return sample / self.calls[self._index].norm

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The wrapped scheduler's step from the prediction x0, and x0."""
        output = self.convert(model_output, sample, self.calls[self._index])
        options = {"generator": generator} if self._takes_generator else {}
        prev = self.scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
        self._index += 1
        return (prev if self._index < len(self.calls) else model_output), model_output


def dry_run(scheduler: Any, convert: Callable[[Tensor, Tensor, Call], Tensor], steps: int) -> DryRun:
    """A run with a known x0.

    Raises MissedError where samples are not alpha x0 + sigma eps, where the noise rises or does not start high, or the
    run ends further from x0 than 1e-3 or twice the noise of the last call, which some leave in, but 0.05 at most.
    """
    scheduler = _rewound(copy.deepcopy(scheduler), steps, None)
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 8, 64, generator=random, dtype=torch.float64).float()
    options = {"generator": random} if "generator" in inspect.signature(scheduler.step).parameters else {}
    sample, calls = None, list[Call]()
    for t in scheduler.timesteps:
        probe = noise if sample is None else sample
        call = _level(scheduler, t, probe)
        if sample is None:
            sample = call.alpha * x0 + call.sigma * noise
            _scaled(scheduler, sample, t)
        spread = float(((sample - call.alpha * x0) / call.sigma).square().mean().sqrt())
        if not 0.8 < spread < 1.25:
            raise MissedError(f"its samples hold {spread:.2g} times the noise of their level")
        calls.append(call)
        sample = scheduler.step(convert(x0, sample, call), t, sample, return_dict=False, **options)[0]
    if sample is None:
        raise MissedError("it makes no calls")
    if any(later.gamma > call.gamma + 1e-3 for call, later in pairwise(calls)):
        raise MissedError("its noise rises")
    if calls[0].gamma < START:
        raise MissedError(
            f"it starts from pure noise but calls it gamma {calls[0].gamma:.2g}, which is below {START:g}"
        )
    error = float((sample - x0).square().mean().sqrt())
    if not error < max(1e-3, min(0.05, 2 * calls[-1].sigma / calls[-1].alpha)):
        raise MissedError(f"it ends {error:.2g} (root mean square) from a known x0")
    return DryRun(calls, error)


def _scaled(scheduler: Any, sample: Tensor, t: Tensor) -> Tensor:
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def _level(scheduler: Any, t: Tensor, sample: Tensor) -> Call:
    """alpha and sigma at the coming call."""
    scaled = _scaled(scheduler, sample, t)
    factor = float((scaled * sample).sum() / (sample * sample).sum())
    if abs(factor - 1) > 1e-6:  # sigma on top of x
        data = float(getattr(scheduler.config, "sigma_data", 1.0))
        return Call(1.0, math.sqrt(max(1e-12, factor**-2 - data**2)))
    sigmas = getattr(scheduler, "sigmas", None)
    index = getattr(scheduler, "step_index", None) or 0
    if sigmas is not None and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas[index])
        return Call(float(alpha), float(sigma))
    if sigmas is not None and hasattr(scheduler, "scale_noise"):
        return Call(max(1e-4, 1.0 - float(sigmas[index])), float(sigmas[index]))
    if hasattr(scheduler, "alphas_cumprod"):
        kept = float(scheduler.alphas_cumprod[int(t)])
        return Call(math.sqrt(kept), math.sqrt(1 - kept))
    if hasattr(scheduler, "alphas") and hasattr(scheduler, "betas"):
        return Call(max(1e-4, float(scheduler.alphas[index])), float(scheduler.betas[index]))
    raise MissedError("its noise levels can't be told")


def _configured(scheduler: Any, prediction_type: str | None) -> Any:
    """A copy with this `prediction_type`, without clipping, from t = 1 on; None where the class doesn't go with it.

    Copied, not made anew, so that what was set at run time stays.
    """
    known = inspect.signature(type(scheduler).__init__).parameters
    if ("prediction_type" in known) != (prediction_type is not None):
        return None
    changes: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    changes |= {name: False for name in ("clip_sample", "thresholding") if name in known}
    if prediction_type == "flow_prediction" and "use_flow_sigmas" in known:
        changes["use_flow_sigmas"] = True
    spacing = known.get("timestep_spacing")
    # The class's own is changed also where it was named, as a saved config names all: it calls pure noise half clean
    # if steps are few.
    if spacing is not None and scheduler.config["timestep_spacing"] == spacing.default:
        changes["timestep_spacing"] = "trailing"
    changed = copy.deepcopy(scheduler)
    changed.register_to_config(**changes)
    return changed


def _rewound(scheduler: Any, steps: int, device: str | torch.device | None) -> Any:
    scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def adapted(scheduler: Any) -> EmbeddingScheduler | ForeignScheduler:
    """Ours as it is, diffusers' behind the same methods."""
    return scheduler if isinstance(scheduler, EmbeddingScheduler) else ForeignScheduler(scheduler)
