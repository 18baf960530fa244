"""Classifier-free guidance and its kin: away from a prediction that knows less."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from embdiff import ops
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.guidance.base import Branch, Guidance, Part, Run

if TYPE_CHECKING:
    from embdiff.denoiser import Context


@dataclass(frozen=True)
class Away(Guidance):
    """Abstract. u + scale (c - u): from the prediction u of one who knows less, past the main one, c.

    scale: 1 = off, at most 1e4 in size. space: of mean embeddings ("x0") or of features, and so of logits ("logits").
    every: 1 to 100 steps from one u to the next; between, c - u stays what it was as features of the denoiser, where
        it changes slowly (Lv et al. 2024, arXiv:2410.19355, keep parts of it likewise).
    Three remedies against what large scales spoil, for x0, position by position (a text that is rounded with
    transitions follows them as far as they shorten or lengthen c - u):

    rescale: 0 to 1, how far the guided value gets the length that c has (Lin et al. 2023, arXiv:2305.08891,
        equations 15 and 16); 0 = off.
    parallel: the share that is kept of the change along c, which only makes it longer; 1 = all (adaptive projected
        guidance, Sadat et al. 2024, arXiv:2410.02416, equation 9).
    radius: what c - u is shortened to, in embedding lengths (their equation 10); none by default.
    """

    scale: float = 2.0
    space: str = "x0"
    rescale: float = 0.0
    parallel: float = 1.0
    radius: float = math.inf
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.scale) <= 1e4:
            what = "out of range" if math.isfinite(self.scale) else "not a finite number"
            raise UserError(f"guidance scale {self.scale} is {what}: 1 is off, 1.5 to 3 are usual")
        if self.space not in ("x0", "logits"):
            raise UserError(f"guidance space {self.space!r} is unknown: choose x0 or logits")
        if self.every != int(self.every) or not 1 <= self.every <= 100:
            raise UserError(f"every {self.every} is out of range: give 1 (each step) to 100 steps")
        if not (0 <= self.rescale <= 1 and 0 <= self.parallel <= 1 and self.radius > 0):
            raise UserError(
                f"rescale {self.rescale}, parallel {self.parallel}, radius {self.radius}: "
                "give shares from 0 to 1, and a radius above 0"
            )
        if self.space == "logits" and not self.linear:
            raise UserError("rescale, parallel and radius are for mean embeddings: leave them out, or use space x0")

    @property
    def linear(self) -> bool:
        """Whether no remedy is on."""
        return (self.rescale, self.parallel, self.radius) == (0.0, 1.0, math.inf)

    def branch(
        self, context: Context | None, denoiser: Denoiser | None = None, self_conditioned: bool = True
    ) -> Branch:
        """The branch of who knows less."""
        own = type(self).combine is Away.combine and type(self).combine_means is Away.combine_means
        scale = self.scale if self.linear and own else None
        means, space = self.combine_means, self.space
        return Branch(self.combine, space, context, denoiser, self_conditioned, means, scale, self.every)

    def combine(self, main: Tensor, other: Tensor) -> Tensor:
        """The guided value, shaped like its arguments."""
        return other + self.scale * (main - other)

    def combine_means(self, main: Tensor, other: Tensor) -> Tensor:
        """The guided mean embeddings [.., D]."""
        if self.linear:
            return self.combine(main, other)
        change = ops.limited(main - other, self.radius * main.shape[-1] ** 0.5)
        length = main.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        along = (change * main).sum(-1, keepdim=True) / length**2 * main
        guided = main + (self.scale - 1) * (change - (1 - self.parallel) * along)
        as_long = guided * (length / guided.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        return torch.lerp(guided, as_long, self.rescale)


@dataclass(frozen=True)
class ClassifierFreeGuidance(Away):
    """Away from the prediction without the prompt, or under the negative prompt (Ho & Salimans 2022, arXiv:2207.12598,
    equation 6, with diffusers' scale: 1 = off).

    Without a prompt there is nothing to compare, and the module does nothing.
    """

    name: ClassVar[str] = "cfg"

    def parts(self, run: Run) -> Iterable[Part]:
        if self.scale == 1.0 or run.context is None:
            return
        other = None if run.negative_prompts is None else run.encode(run.negative_prompts)
        yield self.branch(other)


@dataclass(frozen=True)
class Autoguidance(Away):
    """Away from a weaker version of the model (Karras et al. 2024, arXiv:2406.02507).

    model: the folder of a weaker one in the same embedding space, such as an earlier checkpoint's; of it nothing is
    known when a text is rounded with transitions. By default the weaker version is the model itself without
    self-conditioning.
    """

    name: ClassVar[str] = "autoguidance"

    model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.space != "x0":
            raise UserError("the logits of two models are no features of one: leave the model out, or use space x0")
        if self.model is not None and self.every != 1:
            raise UserError("every is for what one model predicts: leave it out, or the model")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.scale == 1.0:
            return
        weaker = None if self.model is None else weaker_denoiser(self.model, run)
        if weaker is None and not run.denoiser.self_conditions:
            raise UserError(
                "autoguidance takes the model without self-conditioning, and this one was trained without: name a "
                "weaker version with model=FOLDER"
            )
        context = run.context
        if weaker is not None and run.prompts is not None:
            context = run.encode(run.prompts, weaker)
        yield self.branch(context, weaker, weaker is not None)


def weaker_denoiser(folder: str, run: Run) -> Denoiser:
    """The denoiser in a folder; UserError if it lives in another embedding space."""
    index = Path(folder) / "model_index.json"
    changed = index.stat().st_mtime_ns if index.exists() else 0
    weaker = loaded_denoiser(folder, changed, run.device, run.denoiser.dtype)
    ours, theirs = run.denoiser.space.table(), weaker.space.table()
    if ours.shape != theirs.shape or float(torch.cosine_similarity(ours, theirs).mean()) < 0.9:
        raise UserError(
            f"{folder} has another embedding space: autoguidance needs an earlier state of the same run, or none"
        )
    return weaker


@lru_cache(maxsize=1)
def loaded_denoiser(folder: str, changed: int, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Loaded once for all batches, as long as the folder is the same."""
    from embdiff.pipeline import load

    denoiser: Denoiser = load(folder).denoiser.to(device, dtype).eval()
    return denoiser
