"""Sampling fitted to a model: the solver, its noise, its levels and the temperature with which a few steps write best.

What a text is worth is asked of texts: each candidate draws the same seeds, and is charged

    H(samples, real) + H(real, samples)   nats a word,                                                  (4)

the cross-entropy of the samples under a 5-gram of real texts, and of real texts under a 3-gram of the samples. The
first punishes texts that nobody writes, the second what real texts hold and the samples lack. First come all solvers at
all temperatures over even levels, then other levels t_k = (1 - k / N)^p for the best of them.

The bound (Kingma et al. 2021, arXiv:2107.00630, equation 13) is no guide here: the levels that lose the least of it, a
shortest path (Watson et al. 2021, arXiv:2106.03802), crowd where embeddings are already certain, and write worse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.evaluation.ngram import NGram
from embdiff.evaluation.samples import FEWEST, as_written, draw
from embdiff.schedulers import EmbeddingScheduler, scheduler_class, with_solver

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline

SOLVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}), ("ddpm", {}), ("renoise", {}), ("unipc", {}), ("dpm++3m-sde", {"eta": 0.5}),
    ("dpm++3m-sde", {"eta": 1.0}),
)  # fmt: skip
TEMPERATURES = (0.5, 0.76)
POWERS = (0.8, 1.2, 1.5)
BATCH = 48


class Trial(NamedTuple):
    """A candidate for N steps, and the two parts of (4): lower is better."""

    steps: int
    solver: str
    options: dict[str, Any]
    temperature: float
    power: float
    fluency: float
    coverage: float

    @property
    def charge(self) -> float:
        """Equation (4)."""
        return self.fluency + self.coverage


class Examiner:
    """Draws texts from a pipeline and judges them by (4).

    Args:
        train: texts for the judge. valid: real texts, and the prompts of the samples where there are prompts.
        samples: texts to draw for each candidate. options: of the pipeline's call (guidance_scale, ..).
    """

    def __init__(
        self,
        pipe: TextDiffusionPipeline,
        train: Sequence[Example],
        valid: Sequence[Example],
        *,
        samples: int = 192,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(pipe.scheduler, EmbeddingScheduler):
            name = type(pipe.scheduler).__name__
            raise UserError(f"the model has {name}, which has no levels to tune: give it an embdiff scheduler first")
        if len(train) < FEWEST or len(valid) < FEWEST:
            raise UserError(
                f"{len(train)} texts for a judge and {len(valid)} held out are too few to judge by: name a file with "
                "some hundred of them"
            )
        self.pipe, self.samples, self.seed, self.options = pipe, samples, seed, options
        self.trained = pipe.scheduler
        read, held_out = (as_written(pipe.tokenizer, [e.text for e in part]) for part in (train, valid))
        self.judge, self.real = NGram.fit(read, order=5, min_count=2), held_out
        prompts = [example.prompt for example in valid] if pipe.denoiser.config.max_prompt_length else []
        self.prompts = [prompts[i % len(prompts)] if prompts else None for i in range(samples)]

    def __call__(
        self, steps: int, solver: str, options: dict[str, Any], temperature: float, power: float = 1.0
    ) -> Trial:
        """One candidate."""
        texts = self.draw(self.scheduler(solver, options, {steps: power}), steps, temperature)
        return Trial(steps, solver, options, temperature, power, *self.charged(texts))

    def charged(self, texts: Sequence[str]) -> tuple[float, float]:
        """The two parts of (4)."""
        coverage = NGram.fit(texts, order=3, vocabulary=self.judge.vocabulary).cross_entropy(self.real)
        return self.judge.cross_entropy(texts), coverage

    def scheduler(self, solver: str, options: dict[str, Any], powers: dict[int, float]) -> EmbeddingScheduler:
        """The solver over the trained noise schedule, with levels t_k = (1 - k / N)^p for each N in `powers`.

        Levels that were tuned before stay where they were so for this solver with these options.
        """
        schedule, before = self.trained.noise_schedule, self.trained.config
        same = type(self.trained) is scheduler_class(solver) and {**before, **options} == {**before}
        levels = dict(before.levels or {}) if same else {}
        levels |= {str(n): schedule.gamma((1 - np.arange(n) / n) ** p).tolist() for n, p in powers.items()}
        return with_solver(self.trained, solver, levels=levels, nodes=None, **options)

    def with_seeds(self, seed: int, samples: int) -> Examiner:
        """The same, with other samples."""
        other = copy.copy(self)
        other.seed, other.samples = seed, samples
        other.prompts = [self.prompts[i % len(self.prompts)] for i in range(samples)]
        return other

    def draw(self, scheduler: EmbeddingScheduler, steps: int, temperature: float) -> list[str]:
        """The texts of seeds `seed`, `seed + 1`, ..."""
        self.pipe.scheduler = scheduler
        try:
            options = {"num_inference_steps": steps, "temperature": temperature, **self.options}
            return draw(self.pipe, self.prompts, seed=self.seed, batch_size=BATCH, **options)
        finally:
            self.pipe.scheduler = self.trained


def tune(
    examiner: Callable[..., Trial], steps: Sequence[int], report: Callable[[Trial], None] = lambda trial: None
) -> dict[int, Trial]:
    """The best trial for each number of steps; all of one solver at one temperature, the best over all of `steps`."""

    def tried(*candidate: Any) -> list[Trial]:
        trials = []
        for n in steps:
            trials.append(examiner(n, *candidate))
            report(trials[-1])
        return trials

    even = [tried(*solver, temperature) for solver in SOLVERS for temperature in TEMPERATURES]
    chosen = min(even, key=lambda trials: sum(trial.charge for trial in trials))
    _, solver, options, temperature, *_ = chosen[0]
    others = [tried(solver, options, temperature, power) for power in POWERS]
    return {
        trials[0].steps: min(trials, key=lambda trial: trial.charge) for trials in zip(chosen, *others, strict=True)
    }
