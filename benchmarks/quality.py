"""Text quality in the same budget: ours, masked diffusion (MDLM) and an autoregressive model.

    python benchmarks/quality.py TRAIN VALID --output runs/quality --max-time 15m
    python benchmarks/quality.py TRAIN VALID --output runs/quality --max-steps 3900      or so many steps
    python benchmarks/quality.py TRAIN VALID --output runs/quality                      again: goes on, or measures

TRAIN and VALID are text files, one text a line.

Protocol. The three have the same blocks, tokenizer, data, batches, optimiser and learning rates, and the same training
time (or steps; an autoregressive step costs less, since it trims its batches to their longest text). Each is judged on
VALID by nats per word and end: exact for the autoregressive one, bounds for the others. Samples are drawn over
temperatures, from the same number of seeds; a sampler's cross-entropy under the 5-gram of TRAIN is read off, between
temperatures, at the entropy of as many real texts. Ours is drawn by the solvers named, as `embdiff frontier` draws
them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from common import finish, generators, training_facts, write

from embdiff import baselines
from embdiff.batches import Encoded, encode
from embdiff.cli.common import load_pipeline, seconds
from embdiff.config import TrainConfig
from embdiff.data import read_examples
from embdiff.errors import UserError
from embdiff.evaluation.frontier import Point, cross_entropy_at, frontier, picture, point
from embdiff.evaluation.judges import Judge, NGramJudge
from embdiff.evaluation.likelihood import bound
from embdiff.evaluation.samples import as_written, some
from embdiff.vocabulary import decode, fingerprint

BATCH = 50


def main(
    train: Path,
    valid: Path,
    output: Path = typer.Option(..., help="Folder of the three runs."),
    max_time: str = typer.Option("15m", help="Training time of each."),
    max_steps: int | None = typer.Option(None, help="Training steps of each, instead of a time."),
    size: str = typer.Option("mini", help="Model size."),
    batch_size: int = typer.Option(64, help="Texts a step."),
    tokenizer: str = typer.Option("word", help="word or bpe."),
    min_count: int = typer.Option(11, help="Rarer words become <unk>."),
    max_length: int = typer.Option(64, help="Tokens of a text."),
    ours: Path | None = typer.Option(None, help="Our model, where it is trained already."),
    steps: list[int] = typer.Option([8, 16, 32], help="Sampling steps."),
    solver: list[str] = typer.Option(["unipc"], help="Of ours."),
    temperature: list[float] = typer.Option([0.5, 0.65, 0.8, 0.9, 1.0, 1.2], help="Temperatures."),
    samples: int = typer.Option(400, help="Texts for each point."),
    results: Path = typer.Option(Path("benchmarks/results/quality.json"), help="Where the figures go."),
) -> None:
    """Trains what is not trained yet, measures, prints and writes one table."""
    config = TrainConfig(
        data=str(train), validation=str(valid), tokenizer=tokenizer, min_count=min_count, size=size,
        batch_size=batch_size, max_length=max_length, infill=0.0, save_every=200, max_steps=max_steps,
        max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    folders = {name: output / name for name in ("ce", "masked", "autoregressive")}
    if ours is not None:
        folders["ce"] = ours
    for name, folder in folders.items():
        finish(folder, replace(config, objective=name))
    pipe = load_pipeline(str(folders["ce"]))
    known, others = (
        as_written(pipe.tokenizer, [e.text for e in read_examples(str(path))], max_length) for path in (valid, train)
    )
    judge, real = NGramJudge(others), some(known, samples)
    figures: dict[str, Any] = {"samples": samples, "real": point(judge, real)._asdict(), "models": {}}
    texts = encode(read_examples(str(valid)), pipe.tokenizer, max_length, on_long="drop")
    points = list[Point]()
    for name, folder in folders.items():
        if name == "ce":
            model: torch.nn.Module = pipe.denoiser
            nats = bound(pipe.denoiser, texts, pipe.scheduler.noise_schedule).nats_per_token
            found = frontier(
                pipe, judge, [None] * samples, solvers=solver, steps=steps, temperatures=temperature, report=told
            )
        else:
            model, words = baselines.load(folder)
            if fingerprint(words) != fingerprint(pipe.tokenizer):
                raise UserError(f"{folder} has another vocabulary than {folders['ce']}: train both on the same texts")
            nats = baseline_nats(model.eval(), texts)
            counts = steps if name == "masked" else [max_length]
            found = [baseline_point(model, words, judge, name, n, t, samples) for n in counts for t in temperature]
        points += found
        figures["models"][name] = {"nats_per_token": round(nats, 4), "training": training_facts(folder, model)}
        write(results, figures | {"points": [p._asdict() for p in points]})
    real_entropy = figures["real"]["entropy"]
    curves = dict.fromkeys((p.solver, p.steps) for p in points)
    figures["at_real_entropy"] = {
        f"{name}, {n} steps": cross_entropy_at([p for p in points if p[:2] == (name, n)], real_entropy)
        for name, n in curves
    }
    write(results, figures | {"points": [p._asdict() for p in points]})
    picture(points, point(judge, real), judge.name, results.with_suffix(".svg"))


def told(found: Point) -> None:
    """One line for each point."""
    print(*(f"{value:.4g}" if isinstance(value, float) else value for value in found), flush=True)


def baseline_nats(model: Any, texts: Encoded) -> float:
    """Nats per word and end of all texts."""
    total, generator = 0.0, torch.Generator().manual_seed(0)
    for start in range(0, len(texts), BATCH):
        batch = texts.batch(range(start, min(start + BATCH, len(texts))))
        with torch.no_grad():
            nats = model.bound(batch, generator, 12) if hasattr(model, "bound") else -model.log_probs(batch).sum(1)
        total += float(nats.double().sum())
    return total / texts.tokens


def baseline_point(
    model: Any, tokenizer: Any, judge: Judge, name: str, steps: int, temperature: float, samples: int
) -> Point:
    """Texts of a baseline at one temperature."""
    options = {"steps": steps} if name == "masked" else {}
    drawn = list[str]()
    for start in range(0, samples, BATCH):
        ids = model.sample(generators(start, min(BATCH, samples - start)), temperature=temperature, **options)
        drawn += [decode(tokenizer, row) for row in ids.tolist()]
    found = point(judge, drawn, name, steps, temperature)
    told(found)
    return found


if __name__ == "__main__":
    typer.run(main)
