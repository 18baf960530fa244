"""The embedding space: tokens as points on a sphere, and the way back.

Rows of the table E [V, D] are normalised to length sqrt(D), so one coordinate has unit variance, the norm carries no
information, and embeddings trained by cross-entropy cannot collapse or escape the noise by growing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff import ops


class EmbeddingSpace(nn.Module):
    """A learned table of V token embeddings in D dimensions."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def table(self) -> Tensor:
        """E [V, D] in fp32, each row of length sqrt(D)."""
        return self._on_sphere(self.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings [.., D] of token ids [..]."""
        return self._on_sphere(F.embedding(ids, self.weight))

    def round(self, x: Tensor) -> Tensor:
        """The nearest token [..] to each point x [.., D]. All rows are equally long, so nearest is largest product."""
        return ops.argmax(x.float(), self.table())

    def _on_sphere(self, rows: Tensor) -> Tensor:
        length: float = self.dim**0.5
        return F.normalize(rows.float(), dim=-1) * length
