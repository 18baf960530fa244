"""Classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embdiff.errors import UserError
from embdiff.guidance.base import Branch, Guidance, Part, Run


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guidance):
    """u + scale (c - u) (Ho & Salimans 2022, arXiv:2207.12598, equation 6, with diffusers' scale: 1 = off).

    c is the prediction under the prompt, u the one without it or under the negative prompt. Without a prompt there is
    nothing to combine, and the module does nothing.

    scale: 1 = off, at most 1e4 in size. space: of mean embeddings ("x0") or of features, and so of logits ("logits").
    """

    name: ClassVar[str] = "cfg"

    scale: float = 1.0
    space: str = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.scale) <= 1e4:
            what = "out of range" if math.isfinite(self.scale) else "not a finite number"
            raise UserError(f"guidance scale {self.scale} is {what}: 1 is off, 1.5 to 3 are usual")
        if self.space not in ("x0", "logits"):
            raise UserError(f"guidance space {self.space!r} is unknown: choose x0 or logits")

    def combine(self, conditional: Tensor, other: Tensor) -> Tensor:
        """The guided value, shaped like its arguments."""
        return other + self.scale * (conditional - other)

    def parts(self, run: Run) -> Iterable[Part]:
        if self.scale == 1.0 or run.context is None:
            return
        if run.negative_prompts is None:
            other = run.context.hidden_from(torch.zeros_like(run.context.mask[:, 0]))
        else:
            other = run.encode(run.negative_prompts)
        yield Branch(self.combine, self.space, other)
