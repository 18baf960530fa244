"""The share of samples whose text is the same whatever batch they were drawn in.

    python benchmarks/batch_invariance.py MODEL --samples 224

Seeds 0 .. n - 1 are drawn in batches of 1, 7 and 32, in fp32 and in bf16. Expected: all in fp32, at least 99 % in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from common import generators, write

from embdiff.cli.common import quiet
from embdiff.pipeline import TextDiffusionPipeline, load


def main(
    model: str,
    samples: int = 224,
    steps: int = 16,
    prompt: str | None = None,
    cfg_scale: float = 1.0,
    results: Path = Path("benchmarks/results/batch_invariance.json"),
) -> None:
    """Prints and writes the share for each precision."""
    quiet()
    figures: dict[str, Any] = {"samples": samples, "steps": steps, "cfg_scale": cfg_scale}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipe = load(model)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(dtype)
        texts = [draw(pipe, samples, size, steps, prompt, cfg_scale) for size in (1, 7, 32)]
        figures[name] = round(sum(len(set(row)) == 1 for row in zip(*texts, strict=True)) / samples, 4)
    write(results, figures)


def draw(
    pipe: TextDiffusionPipeline, samples: int, batch_size: int, steps: int, prompt: str | None, cfg_scale: float
) -> list[str]:
    """Texts of all seeds, drawn `batch_size` at a time."""
    texts: list[str] = []
    for start in range(0, samples, batch_size):
        each = generators(start, min(batch_size, samples - start))
        out: Any = pipe(
            prompt,
            num_samples=len(each),
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            generator=each,
        )
        texts += out.texts
    return texts


if __name__ == "__main__":
    typer.run(main)
