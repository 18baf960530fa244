"""How well control works: what share of texts has what was asked for, and what that costs in fluency, variety and time.

Every controlled sample stands beside unguided ones of the same model, with the same steps, in the same run. Fluency
depends on length (short texts are likelier a word), so unguided texts are weighted to the lengths of the controlled.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.evaluation import metrics
from embdiff.evaluation.judges import Judge, cross_entropy
from embdiff.evaluation.samples import draw
from embdiff.evaluation.scorer import Scorer
from embdiff.guidance import ClassifierGuidance, Guidance, Length, Lexical
from embdiff.guidance.language import Sentences
from embdiff.guidance.lexical import matcher

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline

Check = Callable[[str], bool]


@dataclass(frozen=True)
class Trial:
    """One demand on some texts. check: whether a text has it; count: texts; prompts: of each text, None = none."""

    guidance: Sequence[Guidance]
    check: Check
    count: int
    prompt: str | None = None


class Outcome(NamedTuple):
    """Of all trials of a control. Shares are of texts; fluency is nats a word and end, by judge.

    success: texts that have what was asked for; by_chance: unguided texts that have it. ended: texts that end with a
    sentence. plain_fluency: of unguided texts of the same lengths; distinct_4, entropy: of as many texts.
    """

    control: str
    texts: int
    success: float
    by_chance: float
    ended: float
    fluency: dict[str, float]
    plain_fluency: dict[str, float]
    distinct_4: float
    plain_distinct_4: float
    entropy: float
    plain_entropy: float


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn in every trial."""

    steps: int = 32
    seed: int = 0
    batch_size: int = 50
    options: dict[str, Any] = field(default_factory=dict)

    def draw(
        self, pipe: TextDiffusionPipeline, prompts: Sequence[str | None], seed: int, *guidance: Guidance
    ) -> list[str]:
        """One text for each prompt."""
        options = dict(self.options)
        before = options.pop("guidance", ())
        return draw(
            pipe, prompts, seed=self.seed + seed, batch_size=self.batch_size, num_inference_steps=self.steps,
            guidance=[*before, *guidance], **options,
        )  # fmt: skip


def draw_trials(
    pipe: TextDiffusionPipeline,
    trials: Sequence[Trial],
    sampling: Sampling,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[str]]:
    """The texts of each trial."""
    found = list[list[str]]()
    total = sum(trial.count for trial in trials)
    for trial in trials:
        done = sum(map(len, found))
        found.append(sampling.draw(pipe, [trial.prompt] * trial.count, done, *trial.guidance))
        advance(done + trial.count, total)
    return found


def outcome(
    control: str, trials: Sequence[Trial], drawn: Sequence[Sequence[str]], plain: Sequence[str], judges: Sequence[Judge]
) -> Outcome:
    """What the texts of all trials are worth.

    plain: unguided texts, at least as many as guided ones make a fair comparison of variety.
    """
    texts = [text for part in drawn for text in part]
    success = sum(sum(map(trial.check, part)) for trial, part in zip(trials, drawn, strict=True)) / len(texts)
    chance = float(np.mean([sum(map(trial.check, plain)) / len(plain) for trial in trials]))
    fewest = min(len(texts), len(plain))
    guided_part, plain_part = (metrics_of(part, fewest) for part in (texts, list(plain)))
    return Outcome(
        control, len(texts), success, chance, ended(texts),
        {judge.name: cross_entropy(judge, texts) for judge in judges},
        {judge.name: fluency_at_lengths(judge, plain, texts) for judge in judges},
        guided_part[0], plain_part[0], guided_part[1], plain_part[1],
    )  # fmt: skip


def metrics_of(texts: Sequence[str], count: int) -> tuple[float, float]:
    """Distinct 4-grams and entropy of the first `count` texts in a random order, for both depend on how many."""
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    chosen = [texts[i] for i in order]
    return metrics.distinct_n(chosen, 4), metrics.unigram_entropy(chosen)


def ended(texts: Sequence[str]) -> float:
    """The share of texts that end with a sentence; an empty one does not."""
    language = Sentences()
    return sum(bool(language.step(False, language.symbol(text))) for text in texts) / len(texts)


def fluency_at_lengths(judge: Judge, plain: Sequence[str], like: Sequence[str]) -> float:
    """The cross-entropy of `plain` texts, weighted so that its lengths in words are distributed as those of `like`.

    Lengths that no plain text has take the nearest one that some have.
    """
    by_length: dict[int, list[float]] = defaultdict(list)
    for text, nats in zip(plain, judge.nats(plain), strict=True):
        by_length[len(text.split())].append(float(nats))
    lengths = np.array(sorted(by_length))
    total, words = 0.0, 0
    for text in like:
        nearest = int(lengths[np.abs(lengths - len(text.split())).argmin()])
        total += statistics.fmean(by_length[nearest])
        words += nearest + 1
    return total / words


# ------------------------------------------------------------------------------------------------- protocols


def length_trials(
    pipe: TextDiffusionPipeline, real: Sequence[str], unit: str, targets: int, each: int, seed: int = 0
) -> list[Trial]:
    """Exact lengths, as real texts have them. unit: tokens, words or characters."""
    count, tokens = counter(pipe, unit), counter(pipe, "tokens")
    limit = int(pipe.denoiser.config.max_length)
    lengths = [count(text) for text in real if 0 < tokens(text) < limit]
    if not lengths:
        raise UserError(f"no real text is short enough for the model's {limit} tokens: give others")
    chosen = np.random.default_rng((seed, 1)).choice(lengths, targets)
    # Samples of one length come together, so that one automaton serves many.

    def trial(n: int) -> Trial:
        given: dict[str, Any] = {unit: n}
        return Trial([Length(**given)], lambda text: count(text) == n, each)

    return [trial(int(n)) for n in sorted(chosen)]


def counter(pipe: TextDiffusionPipeline, unit: str) -> Callable[[str], int]:
    """How long a text is."""
    if unit == "words":
        return lambda text: len(text.split())
    if unit == "characters":
        return len
    if unit != "tokens":
        raise UserError(f"length in {unit!r} is unknown: choose tokens, words or characters")
    return lambda text: len(vocabulary.tokens(pipe.tokenizer, text))


def lexical_trials(
    real: Sequence[str], known: Callable[[str], bool], targets: int, each: int, seed: int = 0
) -> list[Trial]:
    """Three words of a real text that must appear, and three of another one that must not.

    known: whether the model has a word. Words are of letters, four at least, so that they mean something.
    """
    generator = np.random.default_rng((seed, 2))
    trials = list[Trial]()
    pools = [sorted({w for w in text.split() if len(w) > 3 and w.isalpha() and known(w)}) for text in real]
    pools = [pool for pool in pools if len(pool) >= 3]
    if not pools:
        raise UserError("no real text has three words of four letters that the model knows: give others")
    while len(trials) < targets:
        first, second = (pools[i] for i in generator.integers(len(pools), size=2))
        include = [str(word) for word in generator.choice(first, 3, replace=False)]
        lowered = {word.casefold() for word in include}
        rest = [word for word in second if word.casefold() not in lowered]
        exclude = [str(word) for word in generator.choice(rest, min(3, len(rest)), replace=False)]
        trials.append(Trial([Lexical(include, exclude)], having(include, exclude), each))
    return trials


def having(include: Sequence[str], exclude: Sequence[str] = ()) -> Check:
    """Whether a text has all of the one and none of the other, as whole words."""
    wanted, banned = [matcher([phrase]) for phrase in include], matcher(exclude)

    def check(text: str) -> bool:
        found = all(pattern is not None and pattern.search(text) for pattern in wanted)
        return found and (banned is None or not banned.search(text))

    return check


def known_words(pipe: TextDiffusionPipeline) -> Callable[[str], bool]:
    """Whether the model's tokenizer can spell a word."""
    tokenizer = pipe.tokenizer
    return cache(lambda word: tokenizer.unk_token_id not in vocabulary.tokens(tokenizer, word))


def label_trials(
    classifier: str, labels: Sequence[str], each: int, strength: float, check: Callable[[str], Check], **options: Any
) -> list[Trial]:
    """A demand for each label of the model's classifier. check: gives a label's check; options: of the guidance."""
    return [
        Trial([ClassifierGuidance(label, classifier, strength=strength, **options)], check(label), each)
        for label in labels
    ]


def mentioned(label: str) -> Check:
    """Whether a text has a label's value word by word, as Diffusion-LM's protocol: `Italian` of `food : Italian`."""
    return having([label.rpartition(" : ")[2]])


def scored(scorer: Scorer, label: str) -> Check:
    """Whether the scorer finds the label likelier than not."""
    return lambda text: bool(scorer([text], label)[0] > 0.5)


# ------------------------------------------------------------------------------------------------------ cost


def cost(pipe: TextDiffusionPipeline, trial: Trial, sampling: Sampling, rounds: int = 5) -> float:
    """Time of a guided run over that of an unguided one: the median of ratios of neighbours, after one to warm up."""

    def seconds(modules: Sequence[Guidance]) -> float:
        start = time.perf_counter()
        sampling.draw(pipe, [trial.prompt] * sampling.batch_size, 0, *modules)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ratios = [seconds(trial.guidance) / seconds(()) for _ in range(rounds + 1)]
    return statistics.median(ratios[1:])


def slots(source: str) -> dict[str, str]:
    """The slots of a meaning `name : The Mill | Type : pub | ..`."""
    pairs = (part.split(" : ", 1) for part in source.split(" | ") if " : " in part)
    return {name.strip(): value.strip() for name, value in pairs}


def realised(source: str, text: str) -> float:
    """The share of a meaning's slots whose value a text has word by word; those that are told otherwise don't count."""
    values = [value for name, value in slots(source).items() if name != "family friendly"]
    if not values:
        raise UserError(f"{source!r} has no slots: give meanings as 'name : value | name : value'")
    return sum(having([value])(text) for value in values) / len(values)
