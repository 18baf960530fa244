"""Training tokens/s: ours against the same model in eager fp32 with torch's own operators, in one run.

    python benchmarks/training_speed.py DATA.txt --size mini

Both take steps of the same number of positions: forward, backward, update by AdamW. The baseline is what a plain script
does: eager fp32, whole texts, materialised logits, F.scaled_dot_product_attention. Ours is what `embdiff train` does:
the device's faster dtype, torch.compile, chunked cross-entropy, and windows (`embdiff.batches.Window`). Both sides
count words and ends of text, not padding. `step_ratio` is the same without windows: whole texts on both sides. Steps
of the two alternate and medians are compared, since machines are shared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import write
from torch import Tensor

from embdiff import losses, ops, vocabulary
from embdiff.batches import Batch, Window, encode
from embdiff.compilation import compiled
from embdiff.config import TrainConfig
from embdiff.data import load_corpus
from embdiff.denoiser import SIZES, Denoiser


def main(
    data: Path,
    size: str = "mini",
    min_count: int = 11,
    length: int = 64,
    batch_size: int = 64,
    rounds: int = 15,
    results: Path = Path("benchmarks/results/training_speed.json"),
) -> None:
    """Prints and writes medians and their ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = load_corpus(str(data))
    tokenizer = vocabulary.build("word", (e.text for e in corpus.train), min_count=min_count)
    texts = encode(corpus.train, tokenizer, length)
    window = Window.fitting(texts, TrainConfig().window)
    torch.manual_seed(0)
    model = Denoiser(len(tokenizer), max_length=length, **SIZES[size]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    dtype = ops.fast_dtype(device.type)
    network = losses.Network(compiled(model, print), model.encode_context)

    def ours(batch: Batch) -> Tensor:
        autocast = torch.autocast(device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
        with autocast:
            return losses.cross_entropy(model, batch, *draw(batch), False, network).total

    def plain(batch: Batch) -> Tensor:
        with plain_operators():
            return losses.cross_entropy(model, batch, *draw(batch), False).total

    def draw(batch: Batch) -> tuple[Tensor, Tensor]:
        return torch.randn(len(batch.ids), device=device), torch.randn(*batch.ids.shape, model.dim, device=device)

    def step(loss: Callable[[Batch], Tensor], batch: Batch) -> float:
        start = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def rate(positions: int) -> float:
        """Text tokens in a step that looks at the first `positions` of its texts."""
        return batch_size * length // positions * float(texts.text_length.clip(max=positions).mean())

    whole = texts.batch(range(batch_size)).to(device)
    short = texts.batch(range(batch_size * length // window.length), window.length).to(device)
    kinds = ((ours, whole), (ours, short), (plain, whole))
    for loss, batch in kinds:
        for _ in range(3):
            step(loss, batch)
    times = [[step(loss, batch) for loss, batch in kinds] for _ in range(rounds)]
    fast_whole, fast_short, slow = (statistics.median(column) for column in zip(*times, strict=True))
    share = window.share
    fast = (share * rate(window.length) + (1 - share) * rate(length)) / (share * fast_short + (1 - share) * fast_whole)
    write(
        results,
        {
            "ours_tokens_per_second": round(fast),
            "eager_fp32_tokens_per_second": round(rate(length) / slow),
            "ratio": round(fast * slow / rate(length), 2),
            "step_ratio": round(slow / fast_whole, 2),
            "window": window.length,
            "dtype": str(dtype),
            "size": size,
            "vocab_size": len(tokenizer),
        },
    )


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
