"""embdiff frontier"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import typer

from embdiff.cli.common import check_seed, load_pipeline, quiet
from embdiff.cli.evaluate import check_output, named_judges, real_texts
from embdiff.errors import UserError

HEAD = "solver        steps  temperature  cross-entropy  entropy  distinct-4  words"


def frontier(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    data: str | None = typer.Option(None, help="Held-out texts, as in training; by default the run's own."),
    judge: str = typer.Option("5-gram", help="As in embdiff eval."),
    judge_data: str | None = typer.Option(None, help="Texts for an N-gram judge; by default the run's training data."),
    steps: list[int] = typer.Option([8, 16, 32], help="Denoising steps; give it several times."),
    solver: list[str] = typer.Option(["own"], help="Solvers, `own` = the model's scheduler; give it several times."),
    temperature: list[float] = typer.Option([0.5, 0.65, 0.8, 1.0], help="Temperatures; give it several times."),
    samples: int = typer.Option(200, "--samples", "-n", help="Texts for each point."),
    cfg_scale: float = typer.Option(1.0, help="Classifier-free guidance; 1 = off."),
    length_bias: float = typer.Option(1.0, help="As in embdiff sample."),
    seed: int = typer.Option(0, help="Of the first sample of each point."),
    batch_size: int = typer.Option(50, help="Texts at a time; samples do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("auto", help="fp32, bf16, or auto: the faster one on this device."),
    picture: Path = typer.Option(Path("frontier.svg"), help="Where the picture goes: svg, png or pdf."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of a table."),
    overwrite: bool = typer.Option(False, help="Replace --picture."),
) -> None:
    """Compare samplers of MODEL honestly: likely texts against varied ones, over temperatures, steps and solvers.

    [bold]embdiff frontier runs/mine --steps 8 --steps 32 --solver renoise --solver dpm++3m-sde[/bold]
    """
    check_seed(seed)
    check(steps, temperature, samples)
    check_output(picture, overwrite)
    quiet()
    from embdiff.evaluation import frontier as frontiers
    from embdiff.evaluation.samples import as_written, some
    from embdiff.schedulers import scheduler_class

    for name in solver:
        if name != "own":
            scheduler_class(name)
    pipe = load_pipeline(model, device, dtype)
    valid, train = real_texts(model, data, judge_data)
    (judged,) = named_judges([judge], pipe, train)
    known = as_written(pipe.tokenizer, [example.text for example in valid], int(pipe.denoiser.config.max_length))
    if len(known) < samples:
        raise UserError(f"{len(known)} held-out texts for {samples} samples: entropies of as many are compared")
    real = frontiers.point(judged, some(known, samples, seed))
    if not as_json:
        typer.echo(HEAD)

    def report(found: frontiers.Point) -> None:
        if not as_json:
            typer.echo(line(found))

    report(real)
    points = frontiers.frontier(
        pipe,
        judged,
        prompts(pipe, valid, samples),
        solvers=solver,
        steps=steps,
        temperatures=sorted(temperature),
        seed=seed,
        batch_size=batch_size,
        report=report,
        guidance_scale=cfg_scale,
        length_bias=length_bias,
    )
    frontiers.picture(points, real, judged.name, picture)
    if as_json:
        rows = [found._asdict() for found in points]
        settings = {"model": model, "judge": judged.name, "samples": samples, "seed": seed, "cfg_scale": cfg_scale}
        print(json.dumps(settings | {"real": real._asdict(), "points": rows, "picture": str(picture)}))
    else:
        typer.echo(f"picture in {picture}")


def check(steps: list[int], temperatures: list[float], samples: int) -> None:
    """Refuses numbers out of range before anything is loaded."""
    if min(steps) < 1:
        raise UserError(f"--steps {min(steps)} is too small: give at least 1")
    if samples < 2:
        raise UserError(f"--samples {samples} is too small: give at least 2, or better 200")
    for value in temperatures:
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--temperature {value} is out of range: give a number above 0")


def prompts(pipe: Any, valid: list[Any], count: int) -> list[str | None]:
    """A prompt for each sample, from the held-out texts in turn; None for a model that takes none."""
    if not int(pipe.denoiser.config.max_prompt_length):
        return [None] * count
    from embdiff.batches import spread

    given = [valid[i].prompt for i in spread(len(valid), count)]
    return [given[i % len(given)] for i in range(count)]


def line(found: Any) -> str:
    """A row of the table."""
    name = f"{found.solver:12s}  {found.steps or '-':>5}  {found.temperature if found.steps else '-':>11}"
    return (
        f"{name}  {found.cross_entropy:13.3f}  {found.entropy:7.3f}  {found.distinct_4:10.3f}  {found.mean_words:5.1f}"
    )
