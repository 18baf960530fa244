"""Training tokens/s: ours against the same model in eager fp32 with torch's own operators, in one run.

    python benchmarks/training_speed.py --size small

Both do the same steps on the same random tokens: forward, backward, update. The baseline is what a plain script does:
eager fp32, materialised logits, F.scaled_dot_product_attention, one loop over parameters. Ours is what `embdiff
train` does: the device's faster dtype, torch.compile, chunked cross-entropy. Rounds alternate and medians are
compared, since machines are shared; every position counts as a token on both sides.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from embdiff import losses, ops
from embdiff.batches import Batch
from embdiff.denoiser import SIZES, Denoiser
from embdiff.training import compiled


def main(
    size: str = "small",
    vocab_size: int = 8192,
    length: int = 64,
    batch_size: int = 64,
    rounds: int = 5,
    results: Path = Path("benchmarks/results/training_speed.json"),
) -> None:
    """Prints and writes medians and their ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Denoiser(vocab_size, max_length=length, **SIZES[size]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(vocab_size, (batch_size, length), device=device)
    batch = Batch(ids)
    dtype = ops.fast_dtype(device.type)
    network = losses.Network(compiled(model, print), model.encode_context)

    def ours() -> Tensor:
        autocast = torch.autocast(device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
        with autocast:
            return losses.cross_entropy(model, batch, *draw(), False, network).total

    def plain() -> Tensor:
        with plain_operators():
            return losses.cross_entropy(model, batch, *draw(), False).total

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(batch_size, device=device), torch.randn(batch_size, length, model.dim, device=device)

    def step(loss: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for loss in (ours, plain):
        for _ in range(3):
            step(loss)
    times = [(step(ours), step(plain)) for _ in range(3 * rounds)]
    fast, slow = (statistics.median(column) for column in zip(*times, strict=True))
    tokens = batch_size * length
    figures = {
        "ours_tokens_per_second": round(tokens / fast),
        "eager_fp32_tokens_per_second": round(tokens / slow),
        "ratio": round(slow / fast, 2),
        "dtype": str(dtype),
        "size": size,
        "vocab_size": vocab_size,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device.type}",
    }
    results.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


class plain_operators:  # noqa: N801  used like a function
    """Swaps the fast operators for their plain forms while it is open."""

    def __enter__(self) -> None:
        self.saved = ops.attention, ops.cross_entropy
        ops.attention = F.scaled_dot_product_attention
        ops.cross_entropy = lambda h, weight, target: F.cross_entropy(
            F.linear(h, weight).flatten(0, -2), target.flatten(), reduction="none"
        ).view_as(target)

    def __exit__(self, *_: object) -> None:
        ops.attention, ops.cross_entropy = self.saved


if __name__ == "__main__":
    typer.run(main)
