"""The scheduler base: every solver is a table of coefficients, and every scheduler keeps diffusers' contract.

A solver is a noise schedule and one method, `_rows`, that turns the levels gamma_0 > gamma_1 > .. > gamma_N into N rows
of equation (3) (see `embdiff.schedulers.table`). The table is made once in float64 by `set_timesteps`; `step` applies
a row and reads nothing from the device.

gamma_N = -inf: the last row always lands on the prediction itself, z' = x0. One row is one evaluation of the denoiser.
A solver that evaluates more than once between two levels has more rows than levels and overrides `_plan`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import ArrayLike
from torch import Tensor

from embdiff.errors import UserError, reason
from embdiff.noise import Array, NoiseSchedule, TableSchedule, corrupt, noise_schedule, velocity
from embdiff.schedulers.table import TO_X0, Level, Row, Rows, Step, advance, remembered, rows_of_times

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class SchedulerOutput(BaseOutput):  # type: ignore[misc]
    """prev_sample: z at the next, lower noise level [B, L, D]; pred_original_sample: the x0 that led there."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


# How diffusers' classes are told to sample as ours do: levels even in t from t = 1 on, nothing clipped.
NEUTRAL = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
}


class EmbeddingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What all solvers share. Timesteps are t * num_train_timesteps with t in [0, 1], fp32, falling.

    Args:
        num_train_timesteps: the scale of timesteps; models are conditioned on gamma, so it is only a unit.
        noise_schedule: a name or a config (see `embdiff.noise`); a trained model's scheduler holds its fitted one.
        prediction_type: "sample" only: the model predicts x0.
        nodes: the noise schedule whose even quantiles are the sampling levels, for instance "karras"; None =
            `noise_schedule`, so levels are even in t.
        levels: for some numbers of steps, as strings, their falling gammas (from `embdiff tune-steps`); they are used
            where `nodes` is None, by solvers of one evaluation a level.
        trained_betas: a discrete noise schedule as diffusers' classes take it, instead of `noise_schedule`; it is
            kept as a table.
    """

    _compatibles = [  # noqa: RUF012
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        noise_schedule: str | Mapping[str, Any] = "gumbel",
        prediction_type: str = "sample",
        nodes: str | Mapping[str, Any] | None = None,
        levels: Mapping[str, Sequence[float]] | None = None,
        trained_betas: Sequence[float] | None = None,
    ) -> None:
        if prediction_type != "sample":
            raise UserError(f"prediction_type {prediction_type!r}: embdiff models predict x0, use 'sample'")
        if num_train_timesteps < 1:
            raise UserError(f"num_train_timesteps {num_train_timesteps} is too small: 1000 is usual")
        if trained_betas is not None:
            kept: Array = np.cumprod(1.0 - np.array(trained_betas, dtype=np.float64), dtype=np.float64)
            self.register_to_config(noise_schedule=schedule_of_signal(kept).config(), trained_betas=None)
        elif not isinstance(noise_schedule, str):  # as plain numbers, which can be saved
            self.register_to_config(noise_schedule=described(noise_schedule))
        self.init_noise_sigma = 1.0
        check_levels(levels or {}, self.noise_schedule)
        self.num_inference_steps: int | None = None
        self._follow_plan(self._plan(min(num_train_timesteps, 1000)))

    # ------------------------------------------------------------------------------------------ the solver

    def _rows(self, levels: list[Level]) -> list[Row]:
        """n - 1 rows from n falling levels: row k leads from level k to level k + 1."""
        raise NotImplementedError

    def _plan(self, evaluations: int) -> list[Step]:
        """That many evaluations, the last of which lands on its prediction."""
        return self._through(self._levels(evaluations))

    def _through(self, levels: list[Level]) -> list[Step]:
        rows = [*self._rows(levels), TO_X0]
        return [Step(level.gamma, row) for level, row in zip(levels, rows, strict=True)]

    def _levels(self, n: int) -> list[Level]:
        """n levels: those that were tuned, or the node schedule's quantiles 1, 1 - 1 / n, .., 1 / n."""
        tuned = (self.config.levels or {}).get(str(n)) if self.config.nodes is None and self.order == 1 else None
        gammas = self.node_schedule.gamma(1.0 - np.arange(n) / n) if tuned is None else np.array(tuned)
        if np.any(np.diff(gammas.astype(np.float32)) >= 0):
            raise UserError(f"{n} steps are more than the {self.node_schedule.name} schedule resolves: take fewer")
        return [Level(float(gamma)) for gamma in gammas]

    # ---------------------------------------------------------------------------------- diffusers' contract

    @property
    def config(self) -> Any:
        """The options, and beside them what diffusers' classes need in their `from_config` to mean the same.

        That is a discrete noise schedule, clipping off, and x0 as the prediction. `_use_default_values` is empty, for
        what it names diffusers replaces by the other class's defaults.
        """
        own = dict(self._internal_dict)
        known = getattr(self, "_whole", None)
        if known is None or known[0] != own:
            extra = NEUTRAL | {
                "_class_name": type(self).__name__,
                "trained_betas": betas(noise_schedule(own["noise_schedule"]), own["num_train_timesteps"]),
            }
            if "_use_default_values" in own:
                extra["_use_default_values"] = []
            known = self._whole = (own, FrozenDict(own | extra))
        return known[1]

    @property
    def betas(self) -> Tensor:
        """The discrete noise schedule of diffusers, [num_train_timesteps] fp32."""
        return torch.tensor(self.config.trained_betas, dtype=torch.float32)

    @classmethod
    def _get_compatibles(cls) -> list[type[Any]]:
        """Without diffusers' classes that merely have the name of ours."""
        import diffusers

        return [getattr(diffusers, name) for name in cls._compatibles if hasattr(diffusers, name)]

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """A scheduler from the config of another one, ours or diffusers', with its noise schedule.

        Options that only some solvers have, such as eta, are taken over from this class or one that it extends: in
        another solver they mean something else.
        """
        if isinstance(config, Mapping):
            listed, source = config.get("trained_betas"), config.get("_class_name")
            if "beta_schedule" in config and not same_betas(config.get("noise_schedule"), listed):
                kwargs.setdefault("noise_schedule", schedule_of_config(config).config())
                config = {"num_train_timesteps": config["num_train_timesteps"]}
            elif "noise_schedule" in config and listed is not None:  # added by `config`
                config = {name: value for name, value in config.items() if name != "trained_betas"}
            elif not {"noise_schedule", "trained_betas"} & kwargs.keys() and cls._is_foreign(config):
                raise UserError(f"the config of {source or 'this scheduler'} has no betas: name a noise_schedule")
            akin = source is None or source in {of.__name__ for of in cls.__mro__}
            own = options_of(cls if akin else EmbeddingScheduler)
            config = {name: value for name, value in config.items() if name in own or name[0] == "_"}
        return super().from_config(config, **kwargs)

    @classmethod
    def _is_foreign(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config is that of a diffusers scheduler over sigmas or flows, which holds no noise schedule."""
        if "noise_schedule" in config or config.get("trained_betas") is not None:
            return False
        return "trained_betas" in config or any(name[0] != "_" and name not in options_of(cls) for name in config)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that maps t to gamma."""
        return noise_schedule(self.config.noise_schedule)

    @property
    def node_schedule(self) -> NoiseSchedule:
        """The schedule whose quantiles are the sampling levels; its range is the noise schedule's if it has none.

        Raises UserError where its range reaches beyond the noise schedule's.
        """
        spec, own = self.config.nodes, self.noise_schedule
        if spec is None:
            return own
        spec = {"name": spec} if isinstance(spec, str) else dict(spec)
        known = own.config() if spec.get("name") == own.name else {}
        nodes = noise_schedule({"gamma_min": own.gamma_min, "gamma_max": own.gamma_max} | known | spec)
        if nodes.gamma_min < own.gamma_min - 1e-6 or nodes.gamma_max > own.gamma_max + 1e-6:
            raise UserError(
                f"levels of the {nodes.name} schedule, {nodes.gamma_max:.4g} to {nodes.gamma_min:.4g}, reach beyond "
                f"the noise schedule's {own.gamma_max:.4g} to {own.gamma_min:.4g}: give it a range within"
            )
        return nodes

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: ArrayLike | Tensor | None = None,
    ) -> None:
        """Chooses the noise levels and compiles the table: one row for each evaluation of the denoiser.

        `table` then holds the rows, `gammas` their levels, on the host, and `noisy` whether their steps add noise.

        Args:
            num_inference_steps: N >= 1 evaluations, at the schedule's own levels.
            timesteps: N falling timesteps instead, [N]; or [N, L] or [N, B, L], where every position has its own. A
                position waits while its timestep stays, and is clean from where it is 0; what is 0 from the start
                is kept as it is.

        Raises:
            UserError: fewer than 1 step, no whole number, more steps than the schedule resolves, or timesteps that
                rise or are out of range.
        """
        if timesteps is not None:
            times = self._checked(timesteps)
            gammas = self.noise_schedule.gamma(times)
            self.num_inference_steps = len(times)
            self._follow(rows_of_times(times, gammas, self._through, device), gammas, times, device)
            return
        self.num_inference_steps = whole_steps(num_inference_steps)
        self._follow_plan(self._plan(self.num_inference_steps), device)

    def _follow_plan(self, plan: list[Step], device: str | torch.device | None = None) -> None:
        gammas = np.array([step.gamma for step in plan])
        self._follow([step.row for step in plan], gammas, self.noise_schedule.t(gammas), device)

    def _follow(
        self, table: Sequence[Row | Rows], gammas: Array, times: Array, device: str | torch.device | None
    ) -> None:
        self.table, self._times = table, times
        self.noisy = [bool(torch.as_tensor(row.s).any()) for row in table]
        self.gammas = torch.tensor(gammas, dtype=torch.float32)  # on the host, where the loop over steps is
        self.timesteps = torch.tensor(times * self.config.num_train_timesteps, dtype=torch.float32, device=device)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._history: tuple[Tensor, Tensor] | None = None

    def _checked(self, timesteps: ArrayLike | Tensor) -> Array:
        """Given timesteps as times in [0, 1]."""
        values = timesteps.detach().cpu().double().numpy() if isinstance(timesteps, Tensor) else timesteps
        try:
            times: Array = np.asarray(values, dtype=np.float64) / self.config.num_train_timesteps
        except (TypeError, ValueError) as error:
            raise UserError(f"timesteps are no numbers: {reason(error)}") from error
        if self.order > 1:
            raise UserError(f"{type(self).__name__} evaluates between levels, so it takes no timesteps: give steps")
        if times.ndim not in (1, 2, 3) or not times.size:
            raise UserError(f"timesteps of shape {list(times.shape)}: give [N], [N, L] or [N, B, L]")
        if not np.all((times >= 0) & (times <= 1)):
            raise UserError(f"timesteps out of range: give numbers from 0 to {self.config.num_train_timesteps}")
        if np.any(np.diff(times, axis=0) > 0) or (times.ndim == 1 and not np.all(np.diff(times, append=0.0) < 0)):
            raise UserError("timesteps do not fall: give the noisiest first; a single position can't wait or be clean")
        return times

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Applies the next row of the table, equation (3).

        The first call after `set_timesteps` takes the row of `set_begin_index`, or else looks up `timestep`, on the
        schedule or off it: the nearest row. Later calls follow the table in order whatever they name, as diffusers'
        multistep solvers do, and what comes after the last row is a first call again.

        Args:
            model_output: x0 [B, L, D]. sample: z [B, L, D]. generator: one, or one for each of the B samples.
            variance_noise: eps [B, L, D], instead of drawing it.

        Raises:
            UserError: x0 and z differ in shape, or `timestep` is looked up and is no number.
        """
        if model_output.shape != sample.shape:
            raise UserError(f"model_output {list(model_output.shape)} and sample {list(sample.shape)} differ in shape")
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            self._history = None
        # Entered in the middle of the table there are no previous predictions: this one stands in for them.
        predictions = (model_output, *(self._history or (model_output, model_output)))
        row = self.table[index]
        noise = variance_noise
        if noise is None and self.noisy[index]:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        prev = advance(row, sample, predictions, noise)
        last = index + 1 == len(self.table)
        self._history = None if last else remembered(row, predictions)
        self._step_index = None if last else index + 1
        return SchedulerOutput(prev, model_output) if return_dict else (prev, model_output)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """z as it is: latents are variance preserving."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z at `timesteps` ([B], [B, L] or scalar), equation (2)."""
        return corrupt(original_samples, self.gamma_of(timesteps).to(original_samples), noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x at `timesteps`."""
        return velocity(sample, noise, self.gamma_of(timesteps).to(sample))

    def gamma_of(self, timesteps: float | Tensor) -> Tensor:
        """gamma of any timesteps in [0, num_train_timesteps], on the schedule or off it, fp32.

        Raises UserError for timesteps out of that range, by more than rounding.
        """
        times = torch.as_tensor(timesteps)
        t = times.detach().cpu().double().numpy() / self.config.num_train_timesteps
        if not np.all((t > -1e-6) & (t < 1 + 1e-6)):
            raise UserError(f"timesteps out of range: give numbers from 0 to {self.config.num_train_timesteps}")
        return torch.tensor(self.noise_schedule.gamma(t), dtype=torch.float32, device=times.device)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The row whose timestep is nearest; of [L] timesteps, on average.

        Of two rows at one timestep, as Heun's method has them, it is the second: there a step begins.
        """
        times = torch.as_tensor(timestep).detach().cpu().double().numpy() / self.config.num_train_timesteps
        away = np.abs(self._times - times).reshape(len(self._times), -1).mean(1)
        if np.isnan(away).any():
            raise UserError(f"timestep {timestep} is no number")
        nearest = np.flatnonzero(away == away.min())
        return int(nearest[min(self.order, len(nearest)) - 1])

    @property
    def step_index(self) -> int | None:
        """The row that the next `step` applies; None before the first and after the last."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The row to begin with, if set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this row instead of looking the first timestep up (which reads the device)."""
        self._begin_index = begin_index

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


MOST_STEPS = 1_000_000


def whole_steps(steps: Any) -> int:
    """A number of steps, at least 1; anything else raises UserError."""
    if not isinstance(steps, Real) or not float(steps).is_integer():
        raise UserError(f"steps must be a whole number, got {steps!r}")
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if float(steps) > MOST_STEPS:
        raise UserError(f"steps must be at most {MOST_STEPS:,}, got {steps}")
    return int(float(steps))


def check_levels(levels: Mapping[str, Sequence[float]], schedule: NoiseSchedule) -> None:
    """Raises UserError where levels can't be sampled at."""
    for steps, gammas in levels.items():
        if not isinstance(steps, str) or not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"levels for {steps!r} steps: give the number as a string, like '8'")
        if len(gammas) != int(steps):
            raise UserError(f"levels for {steps} steps are {len(gammas)} numbers: give {steps} falling gammas")
        low, high = schedule.gamma_min - 1e-6, schedule.gamma_max + 1e-6
        if not np.all(np.diff(gammas) < 0) or not low <= gammas[-1] <= gammas[0] <= high:
            raise UserError(f"levels for {steps} steps must fall, from {high:.4g} at most to {low:.4g} at least")


def described(spec: str | Mapping[str, Any] | NoiseSchedule) -> dict[str, Any]:
    """A noise schedule by plain numbers."""
    return noise_schedule(spec).config()


def options_of(cls: type[Any]) -> set[str]:
    """What a class is made from."""
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def same_betas(schedule: Any, listed: Any) -> bool:
    """Whether a noise schedule's discrete betas are those listed."""
    if schedule is None or listed is None:
        return False
    own = betas(noise_schedule(schedule), len(listed))
    return bool(np.allclose(own, np.asarray(listed, dtype=np.float64)))


def betas(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The discrete schedule of diffusers: beta_i = 1 - alpha^2(t_i) / alpha^2(t_{i-1}) at t_i = (i + 1) / steps."""
    gamma = schedule.gamma(np.arange(1, steps + 1) / steps)
    kept = 1 / (1 + np.exp(gamma))
    result: list[float] = (1 - kept / np.concatenate([[1.0], kept[:-1]])).tolist()
    return result


def schedule_of_signal(kept: Array) -> TableSchedule:
    """The noise schedule through alpha^2 = `kept`, falling, at even times up to 1: the inverse of `betas`."""
    signal = kept[kept > 0]
    lowest = min(1e-9, 0.1 * float(signal.min())) if len(signal) else 1e-9  # for no signal at all, at the end
    gamma = np.log1p(-kept) - np.log(np.where(kept > 0, kept, lowest))
    if len(gamma) < 2 or not np.all(np.diff(gamma) > 0):
        raise UserError(f"{len(gamma)} betas: give two or more numbers between 0 and 1")
    # t = 0 is not in their tables: one step further the same way.
    gammas = [2 * gamma[0] - gamma[1], *gamma]
    return TableSchedule(gammas=tuple(gammas), times=tuple(np.arange(len(gammas)) / len(kept)))


def schedule_of_config(config: Mapping[str, Any]) -> TableSchedule:
    """The noise schedule of a diffusers config."""
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    # All that it says counts: in `_use_default_values` are the defaults of the class that it comes from.
    said = {name: value for name, value in config.items() if name != "_use_default_values"}
    try:
        return schedule_of_signal(cls.from_config(said).alphas_cumprod.double().numpy())
    except NotImplementedError as error:
        raise UserError(f"{reason(error)}: convert the scheduler itself by embdiff.from_diffusers") from error
