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
    from embdiff.schedulers import ChurnScheduler as ChurnScheduler
    from embdiff.schedulers import DDIMScheduler as DDIMScheduler
    from embdiff.schedulers import DDPMScheduler as DDPMScheduler
    from embdiff.schedulers import DPMSolver3Scheduler as DPMSolver3Scheduler
    from embdiff.schedulers import DPMSolver3SDEScheduler as DPMSolver3SDEScheduler
    from embdiff.schedulers import DPMSolverScheduler as DPMSolverScheduler
    from embdiff.schedulers import DPMSolverSDEScheduler as DPMSolverSDEScheduler
    from embdiff.schedulers import EmbeddingScheduler as EmbeddingScheduler
    from embdiff.schedulers import EulerAncestralScheduler as EulerAncestralScheduler
    from embdiff.schedulers import EulerScheduler as EulerScheduler
    from embdiff.schedulers import HeunScheduler as HeunScheduler
    from embdiff.schedulers import RenoiseScheduler as RenoiseScheduler
    from embdiff.schedulers import UniPCScheduler as UniPCScheduler
    from embdiff.schedulers import from_diffusers as from_diffusers
    from embdiff.schedulers import to_diffusers as to_diffusers
    from embdiff.training import train as train

__version__ = "0.1.0"

HOMES = {
    "ChurnScheduler": "schedulers",
    "ClassifierFreeGuidance": "guidance",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DPMSolver3SDEScheduler": "schedulers",
    "DPMSolver3Scheduler": "schedulers",
    "DPMSolverSDEScheduler": "schedulers",
    "DPMSolverScheduler": "schedulers",
    "Denoiser": "denoiser",
    "EmbeddingScheduler": "schedulers",
    "EulerAncestralScheduler": "schedulers",
    "EulerScheduler": "schedulers",
    "Guidance": "guidance",
    "HeunScheduler": "schedulers",
    "RenoiseScheduler": "schedulers",
    "TextDiffusionPipeline": "pipeline",
    "TrainConfig": "config",
    "UniPCScheduler": "schedulers",
    "UserError": "errors",
    "from_diffusers": "schedulers",
    "to_diffusers": "schedulers",
    "train": "training",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'embdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"embdiff.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
