"""embdiff train"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

from embdiff.cli.common import duration, quiet, reuse_memory, seconds
from embdiff.errors import UserError

OBJECTIVE_HELP = "ce (cross-entropy), vlb (variational bound), mixed (both), or a baseline: autoregressive, masked."
DATA_HELP = "A .txt, .jsonl, .csv, .tsv or .parquet file, a folder of them, `docstrings`, or a data set on the hub."


def train(
    context: typer.Context,
    data: str = typer.Argument(None, help=DATA_HELP),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the model and its checkpoints."),
    config: Path | None = typer.Option(None, help="YAML file of options; the command line overrides it."),
    resume: bool = typer.Option(False, help="Continue the run in --output."),
    overwrite: bool = typer.Option(False, help="Delete an earlier run in --output first."),
    max_steps: int | None = typer.Option(None, help="Stop after this many steps."),
    max_time: str | None = typer.Option(None, help="Stop after this time: 90s, 15m, 1h30m."),
    size: str | None = typer.Option(None, help="tiny, mini, small, medium or base."),
    dim: int | None = typer.Option(None, help="Of the embeddings, instead of the size's."),
    width: int | None = typer.Option(None, help="Of the Transformer, instead of the size's."),
    depth: int | None = typer.Option(None, help="Layers, instead of the size's."),
    heads: int | None = typer.Option(None, help="Of attention, instead of the size's."),
    batch_size: int | None = typer.Option(None, help="Examples a step and device."),
    accumulate: int | None = typer.Option(None, help="Batches whose gradients are added up to one step."),
    max_length: int | None = typer.Option(None, help="Tokens of text, the end included."),
    max_prompt_length: int | None = typer.Option(None, help="Tokens of prompt."),
    on_long: str | None = typer.Option(None, help="Texts that are too long: truncate or drop."),
    validation: str | None = typer.Option(None, help="Validation data, instead of a share of DATA."),
    valid_share: float | None = typer.Option(None, help="Share of DATA held out for validation."),
    limit: int | None = typer.Option(None, help="Use only the first examples of DATA."),
    text_column: str | None = typer.Option(None, help="Column of the text."),
    prompt_column: str | None = typer.Option(None, help="Column of the prompt."),
    separator: str | None = typer.Option(None, help="What stands between prompt and text in the lines of a .txt."),
    tokenizer: str | None = typer.Option(None, help="bpe, word, or a tokenizer's folder or name on the hub."),
    vocab_size: int | None = typer.Option(None, help="Vocabulary of a bpe tokenizer."),
    min_count: int | None = typer.Option(None, help="Rarer words become <unk> in a word tokenizer."),
    optimizer: str | None = typer.Option(None, help="muon or adamw."),
    lr: float | None = typer.Option(None, help="Learning rate of AdamW's parameters."),
    matrix_lr: float | None = typer.Option(None, help="Learning rate of Muon's matrices."),
    ema: float | None = typer.Option(None, help="Decay of the weight average, 0 = off."),
    dropout: float | None = typer.Option(None, help="Share of each layer's output that is dropped, for small data."),
    window: float | None = typer.Option(None, help="Share of steps that look at the first positions only."),
    self_condition: float | None = typer.Option(None, help="Share of steps with self-conditioning."),
    objective: str | None = typer.Option(None, help=OBJECTIVE_HELP),
    schedule: str | None = typer.Option(None, help="Noise schedule fitted while training: gumbel or table."),
    infill: float | None = typer.Option(None, help="Share of texts of which a part is given as context."),
    drop_prompt: float | None = typer.Option(None, help="Share of prompts dropped, for guidance."),
    dtype: str | None = typer.Option(None, help="auto, bf16 or fp32."),
    compile: bool | None = typer.Option(None, help="torch.compile; by default for runs that it pays for."),
    gradient_checkpointing: bool | None = typer.Option(
        None, help="Compute activations again in the backward pass: a third slower, for long texts that don't fit."
    ),
    save_every: int | None = typer.Option(None, help="Steps between checkpoints."),
    validate_every: int | None = typer.Option(None, help="Steps between validations."),
    seed: int | None = typer.Option(None, help="Seed of everything random."),
    tracker: str | None = typer.Option(None, help="tensorboard or wandb, if installed."),
) -> None:
    """Train a model on DATA and write it to --output.

    [bold]embdiff train docstrings --output runs/docstrings --max-time 15m[/bold]
    """
    options = {
        k: v
        for k, v in context.params.items()
        if v is not None and k not in ("output", "config", "resume", "overwrite")
    }
    if max_time is not None:
        options["max_time"] = seconds(max_time)
    run(options, config, output, resume, overwrite)


def run(options: dict[str, Any], config_file: Path | None, output: Path, resume: bool, overwrite: bool) -> None:
    """Merges the options (the run's own if resumed, then the file's, then the command line's), trains, reports."""
    quiet()
    reuse_memory()
    from embdiff.baselines import BASELINES
    from embdiff.config import TrainConfig, read_config
    from embdiff.training import train

    merged: dict[str, Any] = {}
    if resume and (output / "run.yaml").exists():
        merged |= read_config(output / "run.yaml")
    if config_file is not None:
        merged |= read_config(config_file)
    if isinstance(merged.get("max_time"), str):
        merged["max_time"] = seconds(merged["max_time"])
    merged |= options
    if "data" not in merged and resume:
        raise UserError(f"there is no run in {output} to resume: name DATA to start one")
    if "data" not in merged:
        raise UserError("no data is named: give DATA, for instance `embdiff train docstrings --output DIR`")
    config = TrainConfig(**merged)
    with StopSignal() as stop, Display() as display, stop.reported(display, output):
        train(config, output, resume=resume, overwrite=overwrite, reporter=display, should_stop=stop)
    display.note(f"model written to {output}")
    if config.objective in BASELINES:
        display.note(f'a baseline; load it in Python with: embdiff.baselines.load("{output}")')
        if config.objective == "autoregressive":
            display.note(f"or let it judge another model: embdiff eval MODEL --judge {output}")
    else:
        display.note(f"sample from it with: embdiff sample {output} --num-samples 5")


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step.

    Before the first step is done there is nothing to save, and then, or the second time, it stops at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.asked = False

    def __call__(self) -> bool:
        self.asked = True
        return self.number != 0

    @contextmanager
    def reported(self, display: Display, output: Path) -> Iterator[None]:
        """Says what was saved and how to go on, and leaves with the exit code of the signal."""
        from embdiff.training import Stopped

        try:
            yield
        except Stopped:
            display.note(f"stopped and saved; continue with: embdiff train --output {output} --resume")
            raise typer.Exit(128 + self.number) from None
        except KeyboardInterrupt:
            resume = (
                f"; continue with: embdiff train --output {output} --resume" if (output / "run.yaml").exists() else ""
            )
            display.note(f"stopped at once, nothing new was saved{resume}")
            raise typer.Exit(128 + self.number) from None

    def __enter__(self) -> StopSignal:
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.number != 0
        self.number = number
        if again or not self.asked:
            raise KeyboardInterrupt


class Display:
    """The run in the terminal: a live progress bar, or one line now and then where there is no terminal.

    Of several processes only the first speaks.
    """

    def __init__(self, every: float = 20.0) -> None:
        from rich.console import Console

        # accelerate and torchrun number their processes in RANK.
        quiet = os.environ.get("RANK", "0") != "0"
        self.console = Console(stderr=True, highlight=False, emoji=False, quiet=quiet)
        # Where stderr is closed, rich would end the run.
        self.console.on_broken_pipe = lambda: setattr(self.console, "quiet", True)  # type: ignore[method-assign]
        self.every = every
        self._last = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def progress(self, metrics: dict[str, float]) -> None:
        """Loss, speed and time left."""
        import time

        text = (
            f"step {metrics['step']:,}  loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{duration(metrics['seconds_left'])} left"
        )
        if self.console.is_terminal and self._bar is None:
            self._start_bar()
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics["share"], text=text)
        elif time.monotonic() - self._last >= self.every or metrics["share"] >= 1:
            self._last = time.monotonic()
            self.note(text)

    def _start_bar(self) -> None:
        """Only now, for the data may have had a bar of their own before."""
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=False,
        )
        self._task = self._bar.add_task("training", total=1.0, text="starting")
        self._bar.start()

    def validation(self, metrics: dict[str, float], previews: list[tuple[str | None, str]]) -> None:
        """The bound, and a few samples."""
        self.note(f"step {metrics['step']:,.0f}  validation bound {metrics['bound']:.3f} nats/token")
        for prompt, text in previews:
            self.note(f"  {prompt + ' -> ' if prompt else ''}{text}")
