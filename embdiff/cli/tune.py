"""embdiff tune-steps"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from embdiff.cli.common import (
    PROMPT_COLUMN_HELP,
    SEPARATOR_HELP,
    TEXT_COLUMN_HELP,
    Reading,
    check_counts,
    check_local,
    check_reading,
    check_seed,
    like_run,
    load_pipeline,
    note_prompts,
    quiet,
    run_corpus,
)

if TYPE_CHECKING:
    from embdiff.data import Corpus, Example
    from embdiff.schedulers import EmbeddingScheduler
    from embdiff.tuning import Trial


def tune_steps(
    model: Path = typer.Argument(..., help="Folder that embdiff train wrote; its scheduler is changed."),
    steps: list[int] = typer.Option([8], help="Sampling steps to tune; give it several times."),
    samples: int = typer.Option(192, help="Texts to draw for each candidate."),
    cfg_scale: float = typer.Option(1.0, help="Of the samples, as you will draw them."),
    data: str | None = typer.Option(None, help="Texts to judge by; by default the run's own data."),
    separator: str | None = typer.Option(None, help=SEPARATOR_HELP),
    text_column: str | None = typer.Option(None, help=TEXT_COLUMN_HELP),
    prompt_column: str | None = typer.Option(None, help=PROMPT_COLUMN_HELP),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    seed: int = typer.Option(0, help="Seed of the first sample."),
) -> None:
    """Find the solver, noise, levels and temperature with which MODEL writes best in a few steps; save them with it.

    [bold]embdiff tune-steps runs/docstrings --steps 8 --steps 16[/bold]
    """
    check_counts(samples=samples, steps=min(steps))
    check_seed(seed)
    quiet()
    from embdiff.checkpoint import save_folder
    from embdiff.tuning import Examiner, tune

    pipe = load_pipeline(str(model), device)
    check_local(model)
    reading = Reading(separator, text_column, prompt_column)
    check_reading(reading, data)
    texts = run_corpus(model) if data is None else halves(like_run(model, data, reading))
    note_prompts(pipe, texts.train)
    examiner = Examiner(
        pipe, texts.train, some(texts.valid or texts.train, 500), samples=samples, seed=seed, guidance_scale=cfg_scale
    )
    typer.echo(
        "steps  solver               temperature  power  fluency  coverage     sum   (nats a word, less is better)"
    )
    best = tune(examiner, sorted(set(steps)), lambda trial: typer.echo(line(trial)))
    chosen = next(iter(best.values()))
    scheduler = examiner.scheduler(chosen.solver, chosen.options, {n: trial.power for n, trial in best.items()})
    dropped = {*(pipe.scheduler.config.levels or {})} - {*(scheduler.config.levels or {})}
    if dropped:
        typer.echo(f"the levels for {', '.join(sorted(dropped, key=int))} steps were tuned for another solver: dropped")
    save_folder(model / "scheduler", scheduler.save_pretrained)
    note_in_index(model / "model_index.json", scheduler, chosen.temperature)
    typer.echo("best:")
    for trial in best.values():
        typer.echo(line(trial))
    typer.echo(f"saved in {model / 'scheduler'}; used by: embdiff sample {model} --steps {steps[-1]}")


def note_in_index(index: Path, scheduler: EmbeddingScheduler, temperature: float) -> None:
    """Writes the scheduler's class and the temperature into a pipeline's index, whole or not at all."""
    parts = json.loads(index.read_text())
    parts["scheduler"] = [type(scheduler).__module__, type(scheduler).__name__]
    parts["temperature"] = temperature
    fresh = index.with_name(f".{index.name}.tmp")
    fresh.write_text(json.dumps(parts, indent=2) + "\n")
    fresh.replace(index)


def line(trial: Trial) -> str:
    """A row of the table."""
    name = " ".join([trial.solver, *(f"{key} {value:g}" for key, value in trial.options.items())])
    figures = f"{trial.power:5.2f}  {trial.fluency:7.3f}  {trial.coverage:8.3f}  {trial.charge:6.3f}"
    return f"{trial.steps:5d}  {name:20s} {trial.temperature:11g}  {figures}"


def some(examples: list[Example], count: int) -> list[Example]:
    """At most `count` of them, from the whole list."""
    from embdiff.batches import spread

    return [examples[i] for i in spread(len(examples), count)]


def halves(examples: list[Example]) -> Corpus:
    """Most of the examples for the judge, the rest to be judged."""
    from embdiff.data import Corpus, split

    train, valid, notes = split(examples, 0.2)
    return Corpus(train, valid, notes)
