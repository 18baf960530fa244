"""embdiff quickstart"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from embdiff.cli.common import check_seed, duration, quiet, reuse_memory, seconds
from embdiff.cli.train import Display, StopSignal
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.config import TrainConfig
    from embdiff.data import Corpus, Example

# What building the corpus and the tokenizer, sampling and drawing take beside training.
OVERHEAD = 45.0
LEAST = 5.0  # of training


def quickstart(
    output: Path = typer.Option(Path("runs/quickstart"), "--output", "-o", help="Folder for the model and pictures."),
    max_time: str = typer.Option("5m", help="Time for everything: data, training, samples, pictures."),
    overwrite: bool = typer.Option(False, help="Delete an earlier run in --output first."),
    seed: int = typer.Option(0, help="Seed of everything random."),
) -> None:
    """Train a small model on the docstrings of your own Python packages and watch it write, in five minutes."""
    import time

    started = time.monotonic()
    total = seconds(max_time)
    if total < OVERHEAD + LEAST:
        raise UserError(f"--max-time {max_time} leaves no time to train: give 2m or more")
    check_seed(seed)
    quiet()
    reuse_memory()
    from embdiff import training
    from embdiff.data import load_corpus

    training.check_output(output, resume=False, overwrite=overwrite)
    with StopSignal() as stop, Display() as display, stop.reported(display, output):
        display.note("building the corpus from the Python packages on this machine")
        corpus = load_corpus("docstrings")
        display.note(f"{len(corpus.train) + len(corpus.valid):,} pairs (signature -> first sentence of the docstring)")
        remaining = total - (time.monotonic() - started) - OVERHEAD
        if remaining < LEAST:
            needed = duration(total - remaining + LEAST)
            raise UserError(f"--max-time {max_time} leaves no time to train: {needed} would do")
        config = recipe(remaining, seed)
        training.train(config, output, overwrite=overwrite, corpus=corpus, reporter=display, should_stop=stop)
    show_samples(output, held_out(corpus, 4), seed)
    picture = draw(output)
    typer.echo(f"\nDone in {duration(time.monotonic() - started)}. The loss and the learned noise schedule: {picture}")
    typer.echo("Next:")
    typer.echo(f'  embdiff sample {output} --prompt "def mean(values, axis=None)" --cfg-scale 2 --show-steps')
    typer.echo(f'  embdiff sample {output} --prompt "class Cache(dict)" --num-samples 5 --scheduler ddim --json')
    typer.echo("  embdiff train docstrings --output runs/docstrings --max-time 1h")
    typer.echo("  embdiff train my_texts.txt --output runs/mine --max-time 15m")


def recipe(max_time: float, seed: int) -> TrainConfig:
    """A model that says something after three minutes on two cores.

    Short texts of whole words: the fewer tokens there are, the less there is to learn and to compute. One pass a step,
    since self-conditioning pays only later.
    """
    from embdiff.config import TrainConfig

    return TrainConfig(
        data="docstrings",
        size="tiny",
        tokenizer="bpe",
        vocab_size=8192,
        max_length=12,
        max_prompt_length=16,
        on_long="drop",
        batch_size=64,
        max_time=max_time,
        infill=0.0,
        self_condition=0.0,
        warmup=50,
        filter_ramp=100,
        ema=0.99,
        save_every=10**9,
        validate_every=100,
        previews=0,
        seed=seed,
    )


def held_out(corpus: Corpus, count: int) -> list[Example]:
    """Validation pairs of a readable size, the same ones every time."""
    fitting = [e for e in corpus.valid if e.prompt and len(e.prompt) <= 40 and len(e.text) <= 50]
    return (fitting or corpus.valid)[:: max(1, len(fitting) // count)][:count]


def show_samples(model: Path, examples: list[Example], seed: int) -> None:
    """Samples with and without guidance beside the real docstrings."""
    import torch

    from embdiff.cli.common import load_pipeline

    pipe = load_pipeline(str(model))
    prompts = [e.prompt or "" for e in examples]

    def write(scale: float) -> list[str]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        output: Any = pipe(prompts, guidance_scale=scale, generator=generators)
        return list(output.texts)

    plain, guided = write(1.0), write(2.0)
    typer.echo("\nSignatures that the model has not seen:")
    for example, without, with_guidance in zip(examples, plain, guided, strict=True):
        typer.echo(f"\n  {example.prompt}")
        typer.echo(f"    real          {example.text}")
        typer.echo(f"    no guidance   {without}")
        typer.echo(f"    --cfg-scale 2 {with_guidance}")


def draw(run: Path) -> Path:
    """The loss over the steps and the fitted noise schedule, as a picture in the run's folder."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from embdiff.noise import noise_schedule

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    schedule = noise_schedule(json.loads((run / "scheduler" / "scheduler_config.json").read_text())["noise_schedule"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, label in (("loss", "training loss (the noise schedule keeps it level)"), ("bound", "validation bound")):
        points = [(m["step"], m[name]) for m in log if name in m]
        left.plot(*zip(*points, strict=True), label=label)
    left.set(xlabel="step", ylabel="nats/token", title="loss", ylim=(0, None))
    left.legend()
    t = np.linspace(0.0, 1.0, 201)
    right.plot(t, schedule.gamma(t))
    right.set(
        xlabel="t",
        ylabel="gamma = log(noise / signal)",
        title="learned noise schedule",
        ylim=(schedule.gamma(0.01) - 1, schedule.gamma(0.99) + 1),
    )
    figure.tight_layout()
    path = run / "quickstart.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
