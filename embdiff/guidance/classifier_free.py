"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from embdiff.guidance.base import Guidance


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guidance):
    """u + scale (c - u) (Ho & Salimans 2022, arXiv:2207.12598, equation 6, with diffusers' scale: 1 = off).

    c is the prediction under the prompt, u the one without it or under the negative prompt.
    """

    def combine(self, conditional: Tensor, other: Tensor) -> Tensor:
        return other + self.scale * (conditional - other)
