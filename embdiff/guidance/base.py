"""The guidance protocol.

Guidance is apart from solvers: a module changes what the denoiser predicts, never how a step is taken. Modules are
given to the pipeline as a list; a module outside its interval of gamma costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from embdiff.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """A module that combines branches of the prediction.

    Every branch is one forward pass of the denoiser under its own context; all of them run in one batch. `combine`
    is called with the value under the prompt and the value of the extra branch: features (logits are linear in
    them) if `space` is "logits", mean embeddings if it is "x0".

    scale: 1 = off. min_gamma, max_gamma: the interval of noise levels in which the module acts.
    """

    scale: float = 1.0
    space: str = "x0"
    min_gamma: float = -math.inf
    max_gamma: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance scale {self.scale} is not a finite number: 1 is off, 1.5 to 3 are usual")
        if self.space not in ("x0", "logits"):
            raise UserError(f"guidance space {self.space!r} is unknown: choose x0 or logits")

    def active(self, gamma: float) -> bool:
        """Whether the module acts at this noise level."""
        return self.scale != 1.0 and self.min_gamma <= gamma <= self.max_gamma

    def combine(self, conditional: Tensor, other: Tensor) -> Tensor:
        """The guided value, shaped like its arguments."""
        raise NotImplementedError
