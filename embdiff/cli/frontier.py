"""embdiff frontier"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from embdiff.cli.common import (
    COMPILE_HELP,
    DTYPE_HELP,
    PROMPT_COLUMN_HELP,
    SEPARATOR_HELP,
    TEXT_COLUMN_HELP,
    Reading,
    check_counts,
    check_output,
    check_reading,
    check_seed,
    check_temperature,
    load_pipeline,
    note_prompts,
    quiet,
)
from embdiff.cli.evaluate import named_judges, real_texts
from embdiff.errors import UserError

HEAD = "solver        steps  temperature  cross-entropy  entropy  distinct-4  words"


def frontier(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    data: str | None = typer.Option(None, help="Held-out texts, as in training; by default the run's own."),
    separator: str | None = typer.Option(None, help=SEPARATOR_HELP),
    text_column: str | None = typer.Option(None, help=TEXT_COLUMN_HELP),
    prompt_column: str | None = typer.Option(None, help=PROMPT_COLUMN_HELP),
    judge: str = typer.Option("5-gram", help="As in embdiff eval."),
    judge_data: str | None = typer.Option(None, help="Texts for an N-gram judge; by default the run's training data."),
    steps: list[int] = typer.Option([8, 16, 32], help="Denoising steps; give it several times."),
    solver: list[str] = typer.Option(["own"], help="Solvers, `own` = the model's scheduler; give it several times."),
    temperature: list[float] = typer.Option([0.5, 0.65, 0.8, 1.0], help="Temperatures; give it several times."),
    samples: int = typer.Option(200, "--samples", "-n", help="Texts for each point."),
    cfg_scale: float = typer.Option(1.0, help="Classifier-free guidance; 1 = off."),
    length_bias: float = typer.Option(1.0, help="As in embdiff sample."),
    noise_scale: float = typer.Option(1.0, help="As in embdiff sample."),
    shortlist: int | None = typer.Option(None, help="As in embdiff sample."),
    seed: int = typer.Option(0, help="Of the first sample of each point."),
    batch_size: int = typer.Option(50, help="Texts at a time; samples do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    compile: bool | None = typer.Option(None, help=COMPILE_HELP),
    picture: Path = typer.Option(Path("frontier.svg"), help="Where the picture goes: svg, png or pdf."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of a table."),
    overwrite: bool = typer.Option(False, help="Replace --picture."),
) -> None:
    """Compare samplers of MODEL honestly: likely texts against varied ones, over temperatures, steps and solvers.

    A named solver has its defaults; `own` is the model's scheduler as it was tuned.

    [bold]embdiff frontier runs/mine --steps 8 --steps 32 --solver unipc --solver dpm++3m-sde[/bold]
    """
    check_seed(seed)
    check(steps, temperature, samples, batch_size)
    check_output(picture, overwrite)
    check_kind(picture)
    reading = Reading(separator, text_column, prompt_column)
    check_reading(reading, data, judge_data)
    quiet()
    from embdiff.evaluation import frontier as frontiers
    from embdiff.evaluation import report as reports
    from embdiff.evaluation.judges import check_judges
    from embdiff.evaluation.samples import as_written, endable, some
    from embdiff.schedulers import scheduler_class

    for name in solver:
        if name != "own":
            scheduler_class(name)
    pipe = load_pipeline(model, device, dtype, compile)
    valid, train, sources = real_texts(model, data, judge_data, reading=reading, judges=[judge])
    note_prompts(pipe, valid)
    (judged,) = named_judges([judge], pipe, train, valid)
    check_judges([judged], pipe, as_written(pipe.tokenizer, [example.text for example in valid]))
    valid = endable(pipe, valid)
    if len(valid) < samples:
        raise UserError(
            f"{len(valid)} held-out texts that the model can end for {samples} samples: entropies of as many are "
            "compared"
        )
    chosen = some(valid, samples, seed)
    real = frontiers.point(judged, as_written(pipe.tokenizer, [example.text for example in chosen]))
    prompted = int(pipe.denoiser.config.max_prompt_length) > 0
    if not as_json:
        typer.echo(HEAD)

    def report(found: frontiers.Point) -> None:
        if not as_json:
            typer.echo(line(found))

    report(real)
    start = time.monotonic()
    options = {"length_bias": length_bias, "noise_scale": noise_scale, "shortlist": shortlist}
    points = frontiers.frontier(
        pipe,
        judged,
        [example.prompt if prompted else None for example in chosen],
        solvers=list(dict.fromkeys(solver)),
        steps=sorted(set(steps)),
        temperatures=sorted(set(temperature)),
        seed=seed,
        batch_size=batch_size,
        report=report,
        guidance_scale=cfg_scale,
        **options,
    )
    if as_json:
        figures = {
            "model": model, **sources, "judge": judge,
            "samples": samples, "seed": seed, "batch_size": batch_size, "cfg_scale": cfg_scale, **options,
            "solvers": {name: reports.scheduler_options(made) for name, made in
                        frontiers.schedulers(pipe, solver).items()},
            "real": real._asdict(), "points": [found._asdict() for found in points], "picture": str(picture),
            "run": reports.environment(pipe, time.monotonic() - start),
        }  # fmt: skip
        print(json.dumps(reports.finite(figures), allow_nan=False), flush=True)
    frontiers.picture(points, real, judged.name, picture)
    if not as_json:
        typer.echo(f"picture in {picture}")


def check(steps: list[int], temperatures: list[float], samples: int, batch_size: int) -> None:
    """Refuses numbers out of range before anything is loaded."""
    check_counts(steps=min(steps), batch_size=batch_size)
    if samples < 2:
        raise UserError(f"--samples {samples} is too small: give at least 2, or better 200")
    for value in temperatures:
        check_temperature(value)


def check_kind(picture: Path) -> None:
    """Refuses what matplotlib can't draw; it would add an ending of its own to a name without one."""
    kinds = (".svg", ".png", ".pdf")
    if picture.suffix.lower() not in kinds:
        raise UserError(f"picture {picture} is of no known kind: end its name in {', '.join(kinds)}")


def line(found: Any) -> str:
    """A row of the table."""
    name = f"{found.solver:12s}  {found.steps or '-':>5}  {found.temperature if found.steps else '-':>11}"
    return (
        f"{name}  {found.cross_entropy:13.3f}  {found.entropy:7.3f}  {found.distinct_4:10.3f}  {found.mean_words:5.1f}"
    )
