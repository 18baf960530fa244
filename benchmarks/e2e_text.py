"""E2E restaurant descriptions without prompts: the bound on validation text, and samples judged by a 5-gram.

    python benchmarks/e2e_text.py DATA --output runs/e2e                 train 15 minutes on two idle cores
    python benchmarks/e2e_text.py DATA --output runs/e2e --max-steps 3900       or so many steps where cores are slow
    python benchmarks/e2e_text.py DATA --output runs/e2e                        again: continues, or only measures

DATA is a folder with the E2E set's train.txt and valid.txt, one word-tokenised text a line.

Protocol. The vocabulary is every word seen more than 10 times in training, the rest `<unk>`, and four specials: 821
entries. The bound is `embdiff.losses.variational_bound` over every line of valid.txt, cut at 64 tokens, 4 strata a
line, with two-pass self-conditioning. All 64 positions are charged, and the sum is divided by words and ends of
text, so padding and recognised `<unk>` are paid for by the words. Samples are drawn at the defaults of
`embdiff sample`. The judge is an interpolated Kneser-Ney 5-gram fitted on train.txt over the same words. Real text
means 1,000 lines drawn at random from valid.txt: the file is sorted by meaning, so its head is not typical.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
import typer
from common import generators, trained, training_facts, write

from embdiff.batches import encode
from embdiff.cli.common import seconds
from embdiff.config import TrainConfig
from embdiff.data import Example
from embdiff.evaluation.metrics import distinct_n, mean_length, unigram_entropy
from embdiff.evaluation.ngram import NGram
from embdiff.losses import variational_bound
from embdiff.pipeline import TextDiffusionPipeline


def main(
    data: Path,
    output: Path = typer.Option(..., help="Folder of the run."),
    max_time: str = typer.Option("15m", help="Training time."),
    max_steps: int | None = typer.Option(None, help="Training steps, instead of a time."),
    size: str = typer.Option("mini", help="Model size."),
    samples: int = typer.Option(1000, help="Samples to judge."),
    steps: list[int] = typer.Option([32], help="Sampling steps; give it several times."),
    lines: int | None = typer.Option(None, help="Validation lines for the bound; all by default."),
    results: Path = typer.Option(Path("benchmarks/results/e2e_text.json"), help="Where the figures go."),
) -> None:
    """Trains, evaluates, prints a table and writes it to --results."""
    config = TrainConfig(
        data=str(data / "train.txt"), validation=str(data / "valid.txt"), tokenizer="word", min_count=11,
        size=size, max_length=64, batch_size=64, infill=0.0, save_every=200,
        max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    pipe = trained(output, config)
    real_train, real_valid = ((data / f"{part}.txt").read_text().splitlines() for part in ("train", "valid"))
    figures: dict[str, Any] = {"bound": bound(pipe, real_valid[:lines])}
    judge = NGram.fit(real_train, order=5, min_count=11)
    real = random.Random(0).sample(real_valid, 1000)
    figures["real"] = judged(judge, real)
    for n in steps:
        start = time.monotonic()
        texts = draw(pipe, samples, n)
        figures[f"samples_{n}_steps"] = judged(judge, texts) | {"seconds": round(time.monotonic() - start, 1)}
        (output / f"samples-{n}.txt").write_text("\n".join(texts) + "\n")
    figures["training"] = training_facts(output, pipe.denoiser)
    write(results, figures)


def bound(pipe: TextDiffusionPipeline, lines: list[str], batch_size: int = 64) -> dict[str, float]:
    """Nats per word and end of text, with the standard error over lines."""
    encoded = encode([Example(line) for line in lines], pipe.tokenizer, pipe.denoiser.config.max_length)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded.batch(range(start, min(start + batch_size, len(encoded))))
        result = variational_bound(pipe.denoiser, batch, pipe.scheduler.noise_schedule, generator, samples=4)
        parts.append(torch.stack(tuple(result)))
    per_line = torch.cat(parts, 1).double()
    diffusion, reconstruction, prior = (per_line.sum(1) / encoded.tokens).tolist()
    error = float(per_line.sum(0).std() * len(encoded) ** 0.5 / encoded.tokens)
    total = diffusion + reconstruction + prior
    return {"nats_per_token": round(total, 4), "standard_error": round(error, 4), "diffusion": round(diffusion, 4),
            "reconstruction": round(reconstruction, 4), "prior": round(prior, 4), "lines": len(encoded)}  # fmt: skip


def draw(pipe: TextDiffusionPipeline, count: int, steps: int, batch_size: int = 50, **options: Any) -> list[str]:
    """Samples with seeds 0 .. count - 1."""
    texts: list[str] = []
    for start in range(0, count, batch_size):
        each = generators(start, min(batch_size, count - start))
        out: Any = pipe(num_samples=len(each), num_inference_steps=steps, generator=each, **options)
        texts += out.texts
    return texts


def judged(judge: NGram, texts: list[str]) -> dict[str, float]:
    """What the figures ask for. Words outside the vocabulary count as `<unk>`, in real text and in samples."""
    known = [" ".join(w if w in judge.vocabulary else "<unk>" for w in text.split()) for text in texts]
    return {"cross_entropy": round(judge.cross_entropy(known), 4), "unigram_entropy": round(unigram_entropy(known), 4),
            "mean_words": round(mean_length(known), 2), "distinct_4": round(distinct_n(known, 4), 4)}  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
