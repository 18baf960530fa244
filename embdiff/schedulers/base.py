"""The scheduler base: every solver is a table of coefficients.

    z' = a z + b x0 + c x0_prev + s eps,   eps ~ N(0, I)                                              (3)

x0 is the denoiser's prediction at this step, x0_prev the one of the step before. A solver is a noise schedule and one
method, `_rows`, that turns the levels gamma_0 > gamma_1 > .. > gamma_N into N rows (a, b, c, s). The table is made once
in float64 by `set_timesteps`; `step` applies a row and reads nothing from the device.

gamma_N = -inf: the last row always lands on the prediction itself (0, 1, 0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from embdiff.errors import UserError
from embdiff.noise import Array, NoiseSchedule, corrupt, noise_schedule, velocity

Row = tuple[float, float, float, float]
TO_X0: Row = (0.0, 1.0, 0.0, 0.0)
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class SchedulerOutput(BaseOutput):  # type: ignore[misc]
    """prev_sample: z at the next, lower noise level [B, L, D]; pred_original_sample: the x0 that led there."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Level:
    """alpha, sigma and lambda = log(alpha / sigma) = -gamma / 2 of one noise level, in float64."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        # exp overflows only where the other tail is already exactly 0 or 1.
        self.alpha = math.exp(-0.5 * np.logaddexp(0.0, gamma))
        self.sigma = math.exp(-0.5 * np.logaddexp(0.0, -gamma))
        self.lam = -0.5 * gamma


class EmbeddingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What all solvers share. Timesteps are t * num_train_timesteps with t in [0, 1], fp32, falling.

    Args:
        num_train_timesteps: the scale of timesteps; models are conditioned on gamma, so it is only a unit.
        noise_schedule: a name or a config (see `embdiff.noise`); a trained model's scheduler holds its fitted one.
        prediction_type: "sample" only: the model predicts x0.
    """

    _compatibles = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]  # noqa: RUF012
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        noise_schedule: str | Mapping[str, Any] = "gumbel",
        prediction_type: str = "sample",
    ) -> None:
        if prediction_type != "sample":
            raise UserError(f"prediction_type {prediction_type!r}: embdiff models predict x0, use 'sample'")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._set_levels(num_train_timesteps)

    # ------------------------------------------------------------------------------------------ the solver

    def _rows(self, levels: list[Level]) -> list[Row]:
        """N - 1 rows from N falling levels: row k leads from level k to level k + 1."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------- diffusers' contract

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that maps t to gamma."""
        return noise_schedule(self.config.noise_schedule)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Chooses the noise levels, uniform in t from 1 down to 1 / N, and compiles the table."""
        if isinstance(num_inference_steps, bool) or int(num_inference_steps) != num_inference_steps:
            raise UserError(f"steps must be a whole number, got {num_inference_steps!r}")
        if num_inference_steps < 1:
            raise UserError(f"steps must be at least 1, got {num_inference_steps}")
        self.num_inference_steps = int(num_inference_steps)
        self._begin_index = None
        self._set_levels(self.num_inference_steps, device)

    def _set_levels(self, n: int, device: str | torch.device | None = None) -> None:
        times = 1.0 - np.arange(n) / n
        gamma = self.noise_schedule.gamma(times)
        rows = [*self._rows([Level(float(g)) for g in gamma]), TO_X0]
        self._times: Array = times
        self._table = rows
        self.gammas = torch.tensor(gamma, dtype=torch.float32, device=device)
        self.timesteps = torch.tensor(times * self.config.num_train_timesteps, dtype=torch.float32, device=device)
        self._step_index: int | None = None
        self._x0_prev: Tensor | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Applies the next row of the table, equation (3).

        The first call after `set_timesteps` looks up `timestep` (the nearest one on the schedule); later calls follow
        the table in order, as diffusers' multistep solvers do.

        Args:
            model_output: x0 [B, L, D]. sample: z [B, L, D]. generator: one, or one for each of the B samples.
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = min(self._step_index, len(self._table) - 1)
        a, b, c, s = self._table[index]
        x0 = model_output
        prev = b * x0
        if a:
            prev = prev + a * sample
        if c:
            # Entered in the middle of the table there is no previous prediction: this one stands in for it.
            prev = prev + c * (x0 if self._x0_prev is None else self._x0_prev)
        if s:
            noise = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            prev = prev + s * noise
        self._x0_prev = x0
        self._step_index = index + 1
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

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
        """gamma of any timesteps in [0, num_train_timesteps], on the schedule or off it, fp32."""
        times = torch.as_tensor(timesteps)
        t = times.detach().cpu().double().numpy() / self.config.num_train_timesteps
        return torch.tensor(self.noise_schedule.gamma(t), dtype=torch.float32, device=times.device)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The row whose timestep is nearest."""
        t = float(timestep) / self.config.num_train_timesteps
        return int(np.abs(self._times - t).argmin())

    @property
    def step_index(self) -> int | None:
        """The row that the next `step` applies; None before the first."""
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
