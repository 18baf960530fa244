"""What each lever of sampling is worth: solvers, fresh noise, cuts of the posterior, lengths, guidance, best of n.

    python benchmarks/sampling.py models/e2e-text DATA
    python benchmarks/sampling.py models/e2e-text DATA --only renoise --only "best of 4 by own bound"

MODEL is what e2e_text.py trained, DATA its folder. One lever at a time differs from UniPC with a length bias of 1.6, as
in the README. A lower temperature makes any sampler likelier and poorer, so each is drawn over temperatures from the
same seeds, and its 5-gram cross-entropy is read off at the entropy of as many real lines. Steps are evaluations of the
denoiser, also where a solver takes two for a level; what costs more says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from common import chosen, keep, real_texts
from rich.console import Console
from rich.table import Table

from embdiff.batches import encode
from embdiff.cli.common import load_pipeline, quiet
from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.evaluation.frontier import at_entropy, point
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.samples import draw, some
from embdiff.guidance import Autoguidance, Guidance, MinP, TopK, TopP
from embdiff.losses import variational_bound
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.schedulers import with_solver

LEVELS = 8  # of noise, for a text's own bound
BIAS = 1.6


class Lever(NamedTuple):
    """What differs. solver, noise: a scheduler and its options. options: of the pipeline's call. best: that many texts
    are drawn for each that is kept. cost: times that of the sampler without it."""

    solver: str = "unipc"
    noise: dict[str, float] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    guidance: tuple[Guidance, ...] = ()
    best: int = 1
    cost: str = "1"


LEVERS: dict[str, Lever] = {
    "unipc": Lever(),
    "ddim": Lever("ddim"),
    "heun": Lever("heun"),
    "dpm++": Lever("dpm++"),
    "dpm++3m": Lever("dpm++3m"),
    "ddpm": Lever("ddpm"),
    "churn": Lever("churn"),
    "dpm++3m-sde": Lever("dpm++3m-sde"),
    "dpm++3m-sde, eta 0.5": Lever("dpm++3m-sde", {"eta": 0.5}),
    "renoise": Lever("renoise"),
    "renoise, half of the noise fresh": Lever("renoise", {"fresh": 0.5}),
    "renoise, half as loud": Lever("renoise", options={"noise_scale": 0.5}),
    "top-p 0.9": Lever(guidance=(TopP(0.9),)),
    "top-p 0.9 below gamma 2": Lever(guidance=(TopP(0.9, max_gamma=2.0),)),
    "top-k 20": Lever(guidance=(TopK(20),)),
    "min-p 0.05": Lever(guidance=(MinP(0.05),)),
    "lengths not drawn": Lever(options={"draw_length": False}),
    "length bias 1": Lever(options={"length_bias": 1.0}),
    "no length bias": Lever(options={"length_bias": 0.0}),
    "autoguidance 1.25": Lever(guidance=(Autoguidance(scale=1.25),), cost="2"),
    "best of 4 by own bound": Lever(best=4, cost="4, and 4 bounds"),
}


def main(
    model: Path,
    data: Path,
    samples: int = typer.Option(200, help="Texts for each point."),
    steps: list[int] = typer.Option([8, 16], help="Evaluations."),
    temperature: list[float] = typer.Option([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2], help="Temperatures."),
    only: list[str] = typer.Option([], help="These levers; all by default."),
    dtype: str = typer.Option("auto", help="fp32 or bf16; auto: the faster one."),
    results: Path = typer.Option(Path("benchmarks/results/sampling.json"), help="Where the figures go; added to."),
) -> None:
    """Draws, reads off, prints and writes a row for each lever."""
    quiet()
    pipe = load_pipeline(str(model), "cpu", dtype)
    judge = NGramJudge(real_texts(pipe, data / "train.txt"))
    real = point(judge, some(real_texts(pipe, data / "valid.txt"), samples))
    trained = pipe.scheduler
    protocol = {
        "model": model.name, "samples": samples, "temperatures": temperature, "length_bias": BIAS,
        "dtype": str(pipe.denoiser.dtype).removeprefix("torch."),
    }  # fmt: skip
    known = json.loads(results.read_text()) if results.exists() else protocol
    if any(known.get(key) != value for key, value in protocol.items()):
        raise UserError(f"{results} has figures of other options: name another file with --results")
    for name in chosen(only, LEVERS):
        lever = LEVERS[name]
        pipe.scheduler = with_solver(trained, lever.solver, **lever.noise)
        row: dict[str, Any] = {"cost": lever.cost}
        for n in steps:
            points = [point(judge, drawn(pipe, lever, samples, n, t), name, n, t) for t in temperature]
            found = at_entropy(points, real.entropy)
            row[f"{n} steps"] = None if found is None else found._asdict()
            print(name, found, flush=True)
        # Read anew: two processes may share the levers.
        rows = (json.loads(results.read_text())["levers"] if results.exists() else {}) | {name: row}
        keep(results, protocol | {"real": real._asdict(), "levers": rows})
    Console().print(table(rows, steps))


def drawn(pipe: TextDiffusionPipeline, lever: Lever, samples: int, steps: int, temperature: float) -> list[str]:
    """Texts, each the best of those that were drawn for it."""
    options = {"length_bias": BIAS, "guidance": lever.guidance} | lever.options
    texts = draw(pipe, [None] * (samples * lever.best), num_inference_steps=steps, temperature=temperature, **options)
    if lever.best == 1:
        return texts
    rounds = [texts[k :: lever.best] for k in range(lever.best)]
    best = torch.tensor([own_bounds(pipe, each) for each in rounds]).argmin(0)
    return [rounds[int(k)][i] for i, k in enumerate(best)]


@torch.no_grad()
def own_bounds(pipe: TextDiffusionPipeline, texts: list[str], batch_size: int = 64) -> list[float]:
    """Nats a token of each text; under the same noise in each call, so that texts of the same place can be compared."""
    encoded = encode(
        [Example(text) for text in texts], pipe.tokenizer, pipe.denoiser.config.max_length, on_long="truncate"
    )
    found = list[float]()
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        generator = torch.Generator().manual_seed(0)
        nats = variational_bound(pipe.denoiser, encoded.batch(rows), pipe.scheduler.noise_schedule, generator, LEVELS)
        found += (torch.stack(tuple(nats)).sum(0) / torch.from_numpy(encoded.text_length[start : rows.stop])).tolist()
    return found


def table(rows: dict[str, Any], steps: list[int]) -> Table:
    """A row for each lever."""
    found = Table("lever", "cost", *(f"{n} steps" for n in steps))
    for name, row in rows.items():
        cells = [row.get(f"{n} steps") for n in steps]
        found.add_row(name, row["cost"], *("-" if c is None else described(c) for c in cells))
    return found


def described(found: dict[str, float]) -> str:
    """A point in words."""
    return (
        f"{found['cross_entropy']:.2f} at T {found['temperature']:.2f}, distinct-4 {found['distinct_4']:.3f}, "
        f"{found['mean_words']:.1f} words"
    )


if __name__ == "__main__":
    typer.run(main)
