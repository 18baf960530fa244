"""Time of one scheduler step, ours beside diffusers', in one run; and device reads in a step.

    python benchmarks/scheduler_speed.py

Each step is called as a sampling loop does, with the timestep tensor of the schedule. Rounds over all schedulers
alternate; medians are compared, ours with the median of diffusers' DDIM, DPM++ and UniPC. The floor is one pass over
the same memory, `torch.lerp(x0, z, a)`: what a step would take as a single kernel without any bookkeeping.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import typer
from common import write
from torch import Tensor

from embdiff.schedulers import DDIMScheduler, DPMSolverScheduler, RenoiseScheduler, UniPCScheduler

STEPS = 50
NOISE = {"name": "cosine", "gamma_min": -6.0, "gamma_max": 8.0}
OURS = {cls.__name__: cls for cls in (DDIMScheduler, DPMSolverScheduler, UniPCScheduler, RenoiseScheduler)}
THEIRS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


class Floor:
    """One pass over the memory of a step, without any bookkeeping."""

    def set_timesteps(self, steps: int, device: str) -> None:
        """As many steps."""
        self.timesteps = torch.arange(steps, device=device)

    def step(self, x0: Tensor, t: Tensor, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        """A step that mixes z and x0."""
        return (torch.lerp(x0, z, 0.9),)


def main(
    rounds: int = 15,
    threads: int = 1,
    results: Path = Path("benchmarks/results/scheduler_speed.json"),
) -> None:
    """Prints and writes microseconds a step, and the ratio."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {"threads": threads}
    for shape in ((1, 64, 128), (64, 64, 128)):
        schedulers: dict[str, Any] = {f"embdiff {name}": cls(noise_schedule=NOISE) for name, cls in OURS.items()}
        for name in THEIRS:
            options = {"clip_sample": False} if name == "DDIMScheduler" else {}
            schedulers[f"diffusers {name}"] = getattr(diffusers, name)(prediction_type="sample", **options)
        schedulers["floor"] = Floor()
        times: dict[str, list[float]] = {name: [] for name in schedulers}
        for _ in range(rounds):
            for name, scheduler in schedulers.items():
                times[name].append(loop(scheduler, shape, device))
        medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
        reference = statistics.median(medians[f"diffusers {name}"] for name in THEIRS)
        figures[str(list(shape))] = {
            name: {"microseconds": round(value, 2), "times_faster": round(reference / value, 2)}
            for name, value in medians.items()
        }
    write(results, figures)


def loop(scheduler: Any, shape: tuple[int, ...], device: str) -> float:
    """Seconds for each step of a whole run."""
    scheduler.set_timesteps(STEPS, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    z, x0 = torch.randn(2, *shape, device=device)
    # Drawing noise costs the same everywhere: it is not part of the step.
    options = {"variance_noise": torch.randn_like(z)} if isinstance(scheduler, RenoiseScheduler) else {}
    timesteps = list(scheduler.timesteps)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in timesteps:
        z = scheduler.step(x0, t, z, return_dict=False, **options)[0]
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(timesteps)


if __name__ == "__main__":
    typer.run(main)
