"""embdiff tune-steps"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from embdiff.cli.common import load_pipeline, quiet
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example


def tune_steps(
    model: Path = typer.Argument(..., help="Folder that embdiff train wrote; its scheduler is changed."),
    steps: list[int] = typer.Option([8], help="Sampling steps to tune; give it several times."),
    data: str | None = typer.Option(None, help="Texts to tune on; by default the run's own validation data."),
    texts: int = typer.Option(64, help="How many of them."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    seed: int = typer.Option(0, help="Seed of the noise."),
) -> None:
    """Find the noise levels with which MODEL loses the least in a few steps, and save them with it.

    [bold]embdiff tune-steps runs/docstrings --steps 8 --steps 16[/bold]
    """
    if texts < 1:
        raise UserError(f"--texts {texts} is too small: give at least 1")
    if min(steps) < 1:
        raise UserError(f"--steps {min(steps)} is too small: give at least 1")
    quiet()
    import torch

    from embdiff.batches import encode, spread
    from embdiff.checkpoint import save_folder
    from embdiff.tuning import tune

    pipe = load_pipeline(str(model), device)
    examples = validation_texts(model, data)
    config = pipe.denoiser.config
    encoded = encode(examples, pipe.tokenizer, config.max_length, config.max_prompt_length)
    batch = encoded.batch(spread(len(encoded), texts)).to(pipe.device)
    levels = dict(pipe.scheduler.config.levels or {})
    typer.echo("steps  nats lost a text  with even levels")
    for tuned in tune(pipe, batch, steps, torch.Generator().manual_seed(seed)):
        levels[str(tuned.steps)] = tuned.levels
        typer.echo(f"{tuned.steps:5d}  {tuned.lost:16.2f}  {tuned.lost_even:16.2f}")
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, levels=levels)
    save_folder(model / "scheduler", scheduler.save_pretrained)
    typer.echo(f"saved in {model / 'scheduler'}; used by: embdiff sample {model} --steps {steps[-1]}")


def validation_texts(model: Path, data: str | None) -> list[Example]:
    """The validation texts of `data`, or of what the model was trained on."""
    from embdiff.config import TrainConfig, read_config
    from embdiff.data import load_corpus

    run = model / "run.yaml"
    if data is None and not run.exists():
        raise UserError(f"{model} does not say what it was trained on: name texts with --data")
    config = TrainConfig(**(read_config(run) if run.exists() else {}))
    corpus = load_corpus(
        config.data if data is None else data,
        text_column=config.text_column,
        prompt_column=config.prompt_column,
        separator=config.separator,
        validation=config.validation if data is None else None,
        valid_share=config.valid_share,
    )
    return corpus.valid or corpus.train
