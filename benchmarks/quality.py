"""Text quality in the same budget: ours, masked diffusion (MDLM) and an autoregressive model.

    python benchmarks/quality.py TRAIN VALID --output runs/quality --max-time 15m
    python benchmarks/quality.py TRAIN VALID --output runs/quality --max-steps 3900      or so many steps
    python benchmarks/quality.py TRAIN VALID --output runs/quality                      again: goes on, or measures
    python benchmarks/quality.py TRAIN VALID --output runs/quality --only ce            anew, beside the others' figures

TRAIN and VALID are text files, one text a line.

Protocol. The three have the same blocks, tokenizer, data, optimiser and learning rates (chosen for ours), and the same
training time (or steps), but that the autoregressive one may stop before it has learned TRAIN by heart. Where ours and
masked diffusion look at windows, a step has as many more texts; the autoregressive model trims its batches to their
longest text instead, so its steps cost less. Ours has more parameters, for its blocks are told the noise level. Each is
judged on VALID by nats per word and end: exact for the autoregressive one, bounds for the others. Texts too long for
the models are left out everywhere. Samples are drawn over temperatures, from the same number of seeds; a sampler's
cross-entropy under the 5-gram of TRAIN is read off, between temperatures, at the entropy of as many real texts, with
the length and the share of different 4-grams there. Ours is drawn by the solvers named, as `embdiff frontier` draws
them; the temperature of masked diffusion leaves the end of text and padding alone, as that of ours does. MFU counts 6
operations for each parameter and text token, and so neither padding nor the second pass of self-conditioning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from common import chosen, finish, generators, keep, training_facts
from peers import matrix_rate
from rich.console import Console
from rich.table import Table

from embdiff import baselines, ops
from embdiff.batches import Encoded, encode
from embdiff.cli.common import device as device_of
from embdiff.cli.common import load_pipeline, run_config, seconds
from embdiff.config import TrainConfig
from embdiff.data import Example, read_examples
from embdiff.errors import UserError
from embdiff.evaluation.frontier import Point, at_entropy, frontier, picture, point
from embdiff.evaluation.judges import Judge, NGramJudge
from embdiff.evaluation.likelihood import bound
from embdiff.evaluation.report import versions
from embdiff.evaluation.samples import as_written, some
from embdiff.vocabulary import decode, fingerprint

BATCH = 50
DRAWS = 12  # noise levels, or masks, of a text
BASELINES = ("masked", "autoregressive")


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
    window: float = typer.Option(
        0.9, help="Share of steps that look at windows; the autoregressive model cuts its own."
    ),
    autoregressive_time: str | None = typer.Option(None, help="Training time of the autoregressive model, if shorter."),
    ours: Path | None = typer.Option(None, help="Our model, where it is trained already, in the same budget."),
    steps: list[int] = typer.Option([8, 16, 32], help="Sampling steps."),
    solver: list[str] = typer.Option(["unipc"], help="Of ours."),
    temperature: list[float] = typer.Option([0.5, 0.65, 0.8, 0.9, 1.0, 1.2], help="Temperatures."),
    samples: int = typer.Option(400, help="Texts for each point."),
    only: list[str] = typer.Option([], help="ce (ours), masked, autoregressive: figures of the others stay."),
    device: str = typer.Option("auto", help="Of what is measured, and of the rate behind MFU: that of training."),
    results: Path = typer.Option(Path("benchmarks/results/quality.json"), help="Where the figures go."),
) -> None:
    """Trains what is not trained yet, measures, prints and writes one table."""
    config = TrainConfig(
        data=str(train), validation=str(valid), tokenizer=tokenizer, min_count=min_count, size=size,
        batch_size=batch_size, max_length=max_length, on_long="drop", infill=0.0, window=window, save_every=200,
        max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    folders = {name: output / name for name in ("ce", *BASELINES)}
    if ours is not None:
        folders["ce"] = ours
    measured = chosen(only, folders)
    for name in measured:
        own = replace(config, objective=name)
        if name == "autoregressive" and autoregressive_time is not None:
            own = replace(own, max_steps=None, max_time=seconds(autoregressive_time))
        finish(folders[name], own)
    place = device_of(device)
    pipe = load_pipeline(str(folders["ce"]), device)
    known, others = (
        as_written(pipe.tokenizer, [e.text for e in read_examples(str(path))], max_length) for path in (valid, train)
    )
    judge, real = NGramJudge(others), some(known, samples)
    texts = encode([Example(text) for text in known], pipe.tokenizer, max_length)
    words = sum(len(text.split()) + 1 for text in known)
    rate = matrix_rate(ops.fast_dtype(place.type), place)
    figures: dict[str, Any] = {
        "samples": samples, "seeds": f"0 to {samples - 1}", "temperatures": temperature, "max_length": max_length,
        "judge": judge.name, "versions": versions(),
        "real": point(judge, real)._asdict(), "models": {},
    }  # fmt: skip
    figures["models"], points = others_figures(results, figures, measured)
    for name in measured:
        folder = folders[name]
        if name == "ce":
            model: torch.nn.Module = pipe.denoiser
            facts = training_facts(folder, model)
            # Of the others, which may be finished.
            check_alike(facts, run_config(folders["masked"]) or config, run_config(folders["autoregressive"]) or config)
            found = bound(pipe.denoiser, texts, pipe.scheduler.noise_schedule, samples=DRAWS)
            nats = found.nats_per_token * found.tokens
            noise: float | None = found.noise_error * found.tokens
            drawn = frontier(
                pipe, judge, [None] * samples, solvers=solver, steps=steps, temperatures=temperature, report=told
            )
        else:
            model, its_tokenizer = baselines.load(folder)
            if fingerprint(its_tokenizer) != fingerprint(pipe.tokenizer):
                raise UserError(f"{folder} has another vocabulary than {folders['ce']}: train both on the same texts")
            nats, noise = baseline_nats(model.to(place).eval(), texts)
            facts = training_facts(folder, model)
            counts = steps if name == "masked" else [max_length]
            drawn = [
                baseline_point(model, its_tokenizer, judge, name, n, t, samples) for n in counts for t in temperature
            ]
        points = sorted([*points, *drawn], key=lambda p: list(folders).index(maker(p)))
        speed = facts["tokens"] / facts["seconds"]
        figures["models"][name] = {
            "nats_per_word": round(nats / words, 4),
            "noise_error": None if noise is None else round(noise / words, 4), "tokens_per_second": round(speed),
            "matrix_rate": rate, "mfu": round(6 * facts["parameters"] * speed / rate, 4), "training": facts,
        }  # fmt: skip
        figures["models"] = {each: figures["models"][each] for each in folders if each in figures["models"]}
        figures["points"] = [p._asdict() for p in points]
        keep(results, figures)
    entropy = figures["real"]["entropy"]
    curves = {key: [p for p in points if p[:2] == key] for key in dict.fromkeys(p[:2] for p in points)}
    read = {key: at_entropy(curve, entropy) for key, curve in curves.items()}
    figures["at_real_entropy"] = {
        f"{name}, {n} steps": None if found is None else found._asdict() for (name, n), found in read.items()
    }
    keep(results, figures)
    picture(points, point(judge, real), judge.name, results.with_suffix(".svg"))
    Console().print(table(figures))


def others_figures(
    results: Path, figures: dict[str, Any], measured: Sequence[str]
) -> tuple[dict[str, Any], list[Point]]:
    """What the file has of the models that are not measured now, if it is of the same texts."""
    known = json.loads(results.read_text()) if results.exists() else {}
    if known.get("samples") != figures["samples"] or not alike(known["real"], figures["real"]):
        return {}, []
    models = {name: found for name, found in known["models"].items() if name not in measured}
    points = [Point(**found) for found in known["points"]]
    return models, [found for found in points if maker(found) in models]


def maker(found: Point) -> str:
    """The name of the model that wrote the texts."""
    return found.solver if found.solver in BASELINES else "ce"


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two points are the same; sums on other numbers of threads differ in their last digit."""
    return all(math.isclose(one[k], other[k]) for k in ("cross_entropy", "entropy", "distinct_4", "mean_words"))


def check_alike(facts: dict[str, Any], config: TrainConfig, other: TrainConfig) -> None:
    """Refuses models of other data, sizes and batches, and ours if its budget was another."""
    if replace(other, objective=config.objective, max_time=config.max_time, max_steps=config.max_steps) != config:
        raise UserError("the runs of the two baselines have different options: train both anew, in another folder")
    texts = len(read_examples(str(config.data)))
    for name, value in (("size", config.size), ("batch_size", config.batch_size), ("texts", texts)):
        if facts[name] != value:
            raise UserError(f"our model has {name} {facts[name]}, the others {value}: compare what is alike")
    budget = facts["steps"] / config.max_steps if config.max_steps else facts["seconds"] / (config.max_time or 1.0)
    if not 0.9 < budget < 1.1:
        raise UserError(
            f"our model had {facts['steps']} steps in {facts['seconds']} s, which is {budget:.2f} times the budget of "
            "the others: give --max-time or --max-steps accordingly"
        )


def table(figures: dict[str, Any]) -> Table:
    """Models, and what their samplers write at the entropy of real texts."""
    real = figures["real"]
    shown = Table(
        "", "nats a word", "cross-entropy", "words", "distinct-4", "training",
        title=f"at the entropy of real texts, {real['entropy']:.2f}",
    )  # fmt: skip
    for name, model in figures["models"].items():
        facts = model["training"]
        trained = (
            f"{facts['steps']:,} steps, {facts['parameters']:,} parameters, {model['tokens_per_second']:,} tokens/s"
        )
        shown.add_row(name, f"{model['nats_per_word']:.3f}", "", "", "", trained)
    for name, found in {**figures["at_real_entropy"], "real texts": real}.items():
        places = (
            [""] * 3 if found is None else [f"{found[k]:.3f}" for k in ("cross_entropy", "mean_words", "distinct_4")]
        )
        shown.add_row(name, "", *places, "")
    return shown


def told(found: Point) -> None:
    """One line for each point."""
    print(*(f"{value:.4g}" if isinstance(value, float) else value for value in found), flush=True)


@torch.no_grad()
def baseline_nats(model: Any, texts: Encoded) -> tuple[float, float | None]:
    """Nats of all texts together, and how far other random numbers would move a bound: None of what is exact."""
    total, squares, generator = 0.0, 0.0, torch.Generator().manual_seed(0)
    bounded = hasattr(model, "bound")
    for start in range(0, len(texts), BATCH):
        batch = texts.batch(range(start, min(start + BATCH, len(texts)))).to(model.device)
        if bounded:
            one, two = (model.bound(batch, generator, DRAWS // 2).double() for _ in range(2))
            nats, squares = (one + two) / 2, squares + float((one - two).square().sum())
        else:
            nats = -model.log_probs(batch).double().sum(1)
        total += float(nats.sum())
    return total, math.sqrt(squares) / 2 if bounded else None


def baseline_point(
    model: Any, tokenizer: Any, judge: Judge, name: str, steps: int, temperature: float, samples: int
) -> Point:
    """Texts of a baseline at one temperature."""
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    options = {"steps": steps, "keep": ends} if name == "masked" else {}
    drawn = list[str]()
    for start in range(0, samples, BATCH):
        ids = model.sample(generators(start, min(BATCH, samples - start)), temperature=temperature, **options)
        drawn += [decode(tokenizer, row) for row in ids.tolist()]
    found = point(judge, drawn, name, steps, temperature)
    told(found)
    return found


if __name__ == "__main__":
    typer.run(main)
