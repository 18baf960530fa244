"""The frontier of samplers: how likely texts are against how varied they are.

Either alone can be had for nothing: a lower temperature makes texts likelier and poorer. So samplers are compared by
the curve that each draws over temperatures, on the same seeds: one is better than another where its curve lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from embdiff.errors import UserError
from embdiff.evaluation import metrics
from embdiff.evaluation.judges import Judge, cross_entropy
from embdiff.evaluation.samples import draw
from embdiff.schedulers import EmbeddingScheduler, with_solver

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline


class Point(NamedTuple):
    """A sampler and its texts. cross_entropy: nats a word and end under the judge; entropy: of single words, nats."""

    solver: str
    steps: int
    temperature: float
    cross_entropy: float
    entropy: float
    distinct_4: float
    mean_words: float


def point(judge: Judge, texts: Sequence[str], solver: str = "real", steps: int = 0, temperature: float = 1.0) -> Point:
    """The place of texts."""
    return Point(
        solver,
        steps,
        temperature,
        cross_entropy(judge, texts),
        metrics.unigram_entropy(texts),
        metrics.distinct_n(texts, 4),
        metrics.mean_length(texts),
    )


def frontier(
    pipe: TextDiffusionPipeline,
    judge: Judge,
    prompts: Sequence[str | None],
    *,
    solvers: Sequence[str],
    steps: Sequence[int],
    temperatures: Sequence[float],
    seed: int = 0,
    batch_size: int = 50,
    report: Callable[[Point], None] = lambda found: None,
    **options: Any,
) -> list[Point]:
    """A point for each solver, number of steps and temperature.

    solvers: names, for their defaults over the model's noise schedule; "own" = the pipeline's scheduler as it is, tuned
    or not.

    prompts: one for each text, None = from nothing. options: of the pipeline's call.
    """
    own, points = pipe.scheduler, list[Point]()
    others = schedulers(pipe, solvers)
    try:
        for name, n, temperature in product(solvers, steps, temperatures):
            pipe.scheduler = others[name]
            texts = draw(
                pipe,
                prompts,
                seed=seed,
                batch_size=batch_size,
                num_inference_steps=n,
                temperature=temperature,
                **options,
            )
            points.append(point(judge, texts, name, n, temperature))
            report(points[-1])
    finally:
        pipe.scheduler = own
    return points


def schedulers(pipe: TextDiffusionPipeline, solvers: Sequence[str]) -> dict[str, EmbeddingScheduler]:
    """The solvers that `frontier` compares, by name."""
    own = pipe.scheduler
    if not isinstance(own, EmbeddingScheduler):
        raise UserError(f"the model has {type(own).__name__}: solvers are compared over an embdiff scheduler's levels")
    return {name: own if name == "own" else with_solver(own, name) for name in solvers}


def at_entropy(points: Sequence[Point], entropy: float) -> Point | None:
    """The place of a curve at an entropy, on lines between neighbours in temperature.

    That of the lowest cross-entropy where it passes there more than once, None where it never does.
    """
    found = []
    for one, two in pairwise(sorted(points, key=lambda point: point.temperature)):
        if min(one.entropy, two.entropy) <= entropy <= max(one.entropy, two.entropy):
            width = two.entropy - one.entropy
            share = (entropy - one.entropy) / width if width else 0.0
            figures = (a + share * (b - a) for a, b in zip(one[2:], two[2:], strict=True))
            found.append(Point(one.solver, one.steps, *figures))
    return min(found, key=lambda point: point.cross_entropy, default=None)


def picture(points: Sequence[Point], real: Point, judge: str, path: Path) -> None:
    """Draws the curves; the kind of picture goes by the ending of `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for solver, n in dict.fromkeys((found.solver, found.steps) for found in points):
        curve = [found for found in points if (found.solver, found.steps) == (solver, n)]
        axes.plot(
            [found.entropy for found in curve],
            [found.cross_entropy for found in curve],
            marker="o",
            markersize=3,
            label=f"{solver}, {n} steps",
        )
        for found in curve:
            axes.annotate(f"{found.temperature:g}", (found.entropy, found.cross_entropy), fontsize=6)
    axes.plot([real.entropy], [real.cross_entropy], "k*", markersize=12, label="real texts")
    axes.set_xlabel("entropy of words, nats (more is more varied)")
    axes.set_ylabel(f"cross-entropy under {judge}, nats a word (less is more likely)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from error
    finally:
        pyplot.close(figure)
