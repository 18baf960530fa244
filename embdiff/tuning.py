"""Sampling fitted to a model: the solver, its noise and its levels with which a few steps write best.

What a text is worth is asked of texts: each candidate draws the same seeds, and is charged

    H(samples, real) + H(real, samples)   nats a word,                                                  (4)

the cross-entropy of the samples under a 5-gram of real texts, and of real texts under a 3-gram of the samples. The
first punishes texts that nobody writes, the second what real texts hold and the samples lack. First come the solvers
over even levels, then other levels t_k = (1 - k / N)^p for the best of them.

The bound (Kingma et al. 2021, arXiv:2107.00630, equation 13) is no guide here: the levels that lose the least of it, a
shortest path (Watson et al. 2021, arXiv:2106.03802), crowd where embeddings are already certain, and write worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.evaluation.ngram import NGram
from embdiff.schedulers import SCHEDULERS, EmbeddingScheduler

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline

SOLVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}), ("dpm++", {}), ("unipc", {}), ("ddpm", {}), ("renoise", {"fresh": 0.5}), ("renoise", {"fresh": 1.0}),
)  # fmt: skip
POWERS = (0.7, 0.85, 1.2, 1.4)
BATCH = 48


class Trial(NamedTuple):
    """A candidate for N steps, and the two parts of (4): lower is better."""

    steps: int
    solver: str
    options: dict[str, Any]
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
        samples: texts to draw for each candidate. options: of the pipeline's call (temperature, guidance_scale, ..).
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
        if not train or not valid:
            raise UserError("no texts to judge by: name a file with some hundred of them")
        self.pipe, self.samples, self.seed, self.options = pipe, samples, seed, options
        self.trained = pipe.scheduler
        self.judge = NGram.fit([example.text for example in train], order=5, min_count=2)
        self.real = [self._known(example.text) for example in valid]
        prompts = [example.prompt for example in valid] if pipe.denoiser.config.max_prompt_length else []
        self.prompts = [prompts[i % len(prompts)] if prompts else None for i in range(samples)]

    def __call__(self, steps: int, solver: str, options: dict[str, Any], power: float = 1.0) -> Trial:
        """One candidate."""
        return self.judged(
            self.draw(self.scheduler(solver, options, {steps: power}), steps), steps, solver, options, power
        )

    def judged(self, texts: Sequence[str], steps: int, solver: str, options: dict[str, Any], power: float) -> Trial:
        """The trial of a candidate that drew `texts`."""
        texts = [self._known(text) for text in texts]
        coverage = NGram.fit(texts, order=3, vocabulary=self.judge.vocabulary).cross_entropy(self.real)
        return Trial(steps, solver, options, power, self.judge.cross_entropy(texts), coverage)

    def scheduler(self, solver: str, options: dict[str, Any], powers: dict[int, float]) -> EmbeddingScheduler:
        """The solver over the trained noise schedule, with levels t_k = (1 - k / N)^p for each N in `powers`."""
        schedule = self.trained.noise_schedule
        levels = dict(self.trained.config.levels or {})
        levels |= {str(n): schedule.gamma((1 - np.arange(n) / n) ** p).tolist() for n, p in powers.items()}
        changed: EmbeddingScheduler = SCHEDULERS[solver].from_config(self.trained.config, levels=levels, **options)
        return changed

    def draw(self, scheduler: EmbeddingScheduler, steps: int) -> list[str]:
        """The texts of seeds `seed`, `seed + 1`, ..."""
        texts = list[str]()
        self.pipe.scheduler = scheduler
        for start in range(0, self.samples, BATCH):
            prompts: Any = self.prompts[start : start + BATCH]
            seeds = range(self.seed + start, self.seed + start + len(prompts))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            out: Any = self.pipe(prompts, num_inference_steps=steps, generator=generators, **self.options)
            texts += out.texts
        self.pipe.scheduler = self.trained
        return texts

    def _known(self, text: str) -> str:
        return " ".join(word if word in self.judge.vocabulary else "<unk>" for word in text.split())


def tune(
    examiner: Callable[..., Trial], steps: Sequence[int], report: Callable[[Trial], None] = lambda trial: None
) -> dict[int, Trial]:
    """The best trial for each number of steps; all of one solver, the best over all of `steps`."""

    def tried(solver: str, options: dict[str, Any], power: float = 1.0) -> Iterator[Trial]:
        for n in steps:
            trial = examiner(n, solver, options, power)
            report(trial)
            yield trial

    solvers = [list(tried(*candidate)) for candidate in SOLVERS]
    best = {trial.steps: trial for trial in min(solvers, key=lambda trials: sum(trial.charge for trial in trials))}
    chosen = best[steps[0]]
    for power in POWERS:
        for trial in tried(chosen.solver, chosen.options, power):
            best[trial.steps] = min(best[trial.steps], trial, key=lambda trial: trial.charge)
    return best
