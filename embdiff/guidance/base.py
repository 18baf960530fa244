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

    There are two branches, the prediction under the prompt and the one without it or under the negative prompt; they
    run in one batch. `combine` is called with both values: features (logits are linear in them) if `space` is
    "logits", mean embeddings if it is "x0". Without a prompt there is nothing to combine, and modules do not act.

    scale: 1 = off, at most 1e4 in size. min_gamma, max_gamma: the interval of noise levels in which the module acts.
    """

    scale: float = 1.0
    space: str = "x0"
    min_gamma: float = -math.inf
    max_gamma: float = math.inf

    def __post_init__(self) -> None:
        if not abs(self.scale) <= 1e4:
            what = "out of range" if math.isfinite(self.scale) else "not a finite number"
            raise UserError(f"guidance scale {self.scale} is {what}: 1 is off, 1.5 to 3 are usual")
        if not self.min_gamma <= self.max_gamma:
            raise UserError(f"min_gamma {self.min_gamma} must not be above max_gamma {self.max_gamma}")
        if self.space not in ("x0", "logits"):
            raise UserError(f"guidance space {self.space!r} is unknown: choose x0 or logits")

    def active(self, gamma: float) -> bool:
        """Whether the module acts at this noise level."""
        return self.scale != 1.0 and self.min_gamma <= gamma <= self.max_gamma

    def combine(self, conditional: Tensor, other: Tensor) -> Tensor:
        """The guided value, shaped like its arguments."""
        raise NotImplementedError
