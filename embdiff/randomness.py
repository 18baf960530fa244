"""Noise of samples: each draws from its own generator, so its text does not depend on the batch that it was in.

B samples   L positions   D embedding dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from embdiff import ops
from embdiff.errors import UserError


def sample_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """A CPU generator for each sample. One generator, or none, gives the seeds; several are used as they are."""
    if generator is not None and not isinstance(generator, torch.Generator):
        if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
            raise UserError(f"generator {generator!r}: give torch.Generator().manual_seed(..), or one for each sample")
        if len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} samples: give one, or one for each")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(generators: Sequence[torch.Generator], device: torch.device, count: int) -> Tensor:
    """Numbers [B, count] in [0, 1), of each generator as many."""
    return torch.stack([torch.rand(count, generator=g, device=g.device) for g in generators]).to(device)


def mixed_seed(*numbers: int) -> int:
    """One seed for torch out of several numbers: a run's own and what it is for, or its step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Noise(Protocol):
    """Gives scale times eps [B, L, D] ~ N(0, I), another one at each call."""

    def __call__(self) -> Tensor:
        """The next draw."""


def noise_of(
    generators: list[torch.Generator], shape: tuple[int, int], device: torch.device, scale: float = 1.0
) -> Noise:
    """The noise of samples with these generators. shape: (L, D)."""
    source = DeviceNoise if ops.has_kernels(device.type) else HostNoise
    return source(generators, shape, device, scale)


class HostNoise:
    """From the generators themselves, several draws in one copy to the device."""

    AHEAD = 8

    def __init__(
        self, generators: list[torch.Generator], shape: tuple[int, int], device: torch.device, scale: float = 1.0
    ) -> None:
        self.generators, self.shape, self.device, self.scale = generators, shape, device, scale
        self.ready = list[Tensor]()
        self.drawn = 0

    def __call__(self) -> Tensor:
        """The next draw."""
        if not self.ready:
            # The first alone: whatever else a generator is asked for comes between it and the rest.
            self.ready = list(reversed(self._draw(self.AHEAD if self.drawn else 1)))
        self.drawn += 1
        return self.ready.pop()

    def _draw(self, count: int) -> list[Tensor]:
        drawn = [torch.randn((count, *self.shape), generator=g, device=g.device) for g in self.generators]
        noise = torch.stack(drawn, 1).mul_(self.scale)
        if self.device.type == "cuda" and noise.device.type == "cpu":
            noise = noise.pin_memory()
        return list(noise.to(self.device, non_blocking=noise.is_pinned()).unbind())


class DeviceNoise:
    """Made on the device from one seed [B] of each generator, so that nothing is copied there."""

    def __init__(
        self, generators: list[torch.Generator], shape: tuple[int, int], device: torch.device, scale: float = 1.0
    ) -> None:
        self.scale = scale
        seeds = [torch.randint(2**62, (1,), generator=g, device=g.device) for g in generators]
        self.seeds, self.shape, self.drawn = torch.cat(seeds).to(device), shape, 0

    def __call__(self) -> Tensor:
        """The next draw."""
        from embdiff import kernels

        self.drawn += 1
        return self.scale * kernels.normal(self.seeds, self.drawn - 1, *self.shape)
