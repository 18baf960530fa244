"""Muon, the optimiser of the Transformer's matrices.

torch has one from 2.9 on; it orthogonalises in bf16 one matrix at a time, which a CPU without bf16 units does ten times
slower than fp32. This one works in the precision that suits the device and takes equal shapes in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), scaled to the size of an AdamW update.

    Every update has root mean square 0.2 (Liu et al. 2025, arXiv:2502.16982, equation 4), so the learning rates of
    AdamW carry over.

    Args:
        params: matrices only.
        lr: learning rate. momentum: of the Nesterov average. weight_decay: decoupled.
        dtype: of the orthogonalisation; bf16 is precise enough where the device has it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for params in by_shape.values():
                self._update(params, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        rows, columns = params[0].shape
        directions = params[0].new_empty(len(params), rows, columns)
        for p, direction in zip(params, directions, strict=True):
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"].lerp_(p.grad, 1 - momentum)
            torch.lerp(p.grad, average, momentum, out=direction)
        scale = 0.2 * max(rows, columns) ** 0.5
        for p, direction in zip(params, orthogonalise(directions, self.dtype), strict=True):
            p.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * scale)


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to `matrices` [n, rows, columns], roughly: singular values in [0.7, 1.2].

    Five rounds of a quintic Newton-Schulz iteration whose coefficients trade precision for slope at 0 (Jordan et al.):
    X <- (a + b G + c G^2) X with G = X X^T.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # Contiguous, and sums by baddbmm: a view or a sum apart costs as much as a product does.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).contiguous()
    if dtype is torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        # All factors are polynomials of the first G: they commute, and X itself is needed at the end only. Half the
        # work for a long matrix; in bf16 G's small eigenvalues would be noise.
        gram = x @ x.mT
        product = torch.eye(len(gram[0]), dtype=dtype, device=x.device)
        for left in reversed(range(steps)):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor @ product
            gram = factor @ (factor @ gram) if left else gram
        x = product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    result: Tensor = x.mT if tall else x
    return result
