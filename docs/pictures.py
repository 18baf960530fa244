"""Draws docs/emerging.svg: a sentence emerging from noise, as `embdiff sample --show-steps` shows it.

python docs/pictures.py MODEL --prompt "..." --seed 3
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
import typer
from rich.console import Console

from embdiff.cli.common import load_pipeline, quiet
from embdiff.cli.sample import StepsView


def main(
    model: str,
    prompt: str | None = typer.Option(None, help="Prompt, for a model trained on pairs."),
    steps: int = typer.Option(16, help="Denoising steps."),
    seed: int = typer.Option(0, help="Seed of the sample."),
    width: int = typer.Option(130, help="Characters a line."),
    output: Path = typer.Option(Path("docs/emerging.svg"), help="Where the picture goes."),
) -> None:
    """Draws one sample and saves every step of it."""
    quiet()
    pipe = load_pipeline(model)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    pipe(
        prompt,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed)],
        callback_on_step_end=StepsView(pipe, steps, console),
    )
    picture = console.export_svg(title="embdiff sample --show-steps")
    output.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))  # fonts from elsewhere


if __name__ == "__main__":
    typer.run(main)
