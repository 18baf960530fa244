"""The command line. Each command is thin: it turns options into a call and errors into one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import typer

from embdiff.cli.classifier import train_classifier
from embdiff.cli.control import eval_control
from embdiff.cli.evaluate import evaluate
from embdiff.cli.frontier import frontier
from embdiff.cli.quickstart import quickstart
from embdiff.cli.sample import sample
from embdiff.cli.train import train
from embdiff.cli.tune import tune_steps

app = typer.Typer(
    name="embdiff",
    help="Text diffusion in a continuous embedding space: train, sample, steer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(quickstart)
app.command()(train)
app.command()(train_classifier)
app.command()(sample)
app.command(name="eval")(evaluate)
app.command()(eval_control)
app.command()(frontier)
app.command()(tune_steps)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    """Text diffusion in a continuous embedding space: train, sample, steer."""
    if version:
        from embdiff import __version__

        typer.echo(f"embdiff {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script: bad input is one line on stderr and exit code 2."""
    from embdiff.errors import UserError, is_out_of_memory

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every terminal has every character
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        print(f"embdiff: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written to
        where = f" {error.filename}" if error.filename else ""
        print(f"embdiff: cannot read or write{where}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # of options: typer has its own click, or another's
            if type(error).__name__ != "NoArgsIsHelpError":  # which was shown
                print(f"embdiff: {usage(error)}", file=sys.stderr)
            sys.exit(2)
        if not is_out_of_memory(error):
            raise
        print(
            "embdiff: out of memory: lower --batch-size or --max-length; training also needs less with "
            "--gradient-checkpointing. What was written is kept, and --resume goes on from there",
            file=sys.stderr,
        )
        sys.exit(2)


def usage(error: Any) -> str:
    """What is wrong with the options, in one line."""
    command = getattr(getattr(error, "ctx", None), "command_path", "embdiff")
    return f"{' '.join(error.format_message().split()).rstrip('.')}: see {command} --help"
