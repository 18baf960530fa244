"""embdiff: text diffusion in a continuous embedding space.

    from embdiff import TextDiffusionPipeline

    pipe = TextDiffusionPipeline.from_pretrained("runs/quickstart")
    print(pipe("def mean(values)", guidance_scale=2.0).texts[0])

Names are loaded when they are first used, so that `import embdiff` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embdiff.config import TrainConfig as TrainConfig
    from embdiff.denoiser import Denoiser as Denoiser
    from embdiff.errors import UserError as UserError
    from embdiff.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from embdiff.guidance import Guidance as Guidance
    from embdiff.pipeline import TextDiffusionPipeline as TextDiffusionPipeline
    from embdiff.schedulers import DDIMScheduler as DDIMScheduler
    from embdiff.schedulers import DDPMScheduler as DDPMScheduler
    from embdiff.schedulers import DPMSolverScheduler as DPMSolverScheduler
    from embdiff.schedulers import RenoiseScheduler as RenoiseScheduler
    from embdiff.training import train as train

__version__ = "0.1.0"

HOMES = {
    "ClassifierFreeGuidance": "guidance",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DPMSolverScheduler": "schedulers",
    "Denoiser": "denoiser",
    "Guidance": "guidance",
    "RenoiseScheduler": "schedulers",
    "TextDiffusionPipeline": "pipeline",
    "TrainConfig": "config",
    "UserError": "errors",
    "train": "training",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'embdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"embdiff.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
