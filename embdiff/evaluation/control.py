"""How well control works: what share of texts has what was asked for, and what that costs in fluency, variety and time.

Every controlled sample stands beside unguided ones of the same model, with the same steps, in the same run. Fluency
depends on length (short texts are likelier a word), so unguided texts are weighted to the lengths of the controlled.
"""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.evaluation import metrics
from embdiff.evaluation.judges import Judge, cross_entropy
from embdiff.evaluation.report import scheduler_options
from embdiff.evaluation.samples import outputs
from embdiff.evaluation.scorer import Scorer
from embdiff.guidance import ClassifierFreeGuidance, ClassifierGuidance, Guidance, Length, Lexical
from embdiff.guidance.language import Sentences
from embdiff.guidance.lexical import check_spelling, matcher

if TYPE_CHECKING:
    from embdiff.pipeline import TextDiffusionPipeline


class Sample(NamedTuple):
    """A text as it was drawn. tokens: before its end; the text tokenised anew may have fewer."""

    text: str
    tokens: int


Check = Callable[[Sample], float]


@dataclass(frozen=True)
class Trial:
    """One demand on some samples. check: whether a sample has it, or how much of it, from 0 to 1; count: samples;
    prompt: of all, None = none."""

    guidance: Sequence[Guidance]
    check: Check
    count: int
    prompt: str | None = None


class Outcome(NamedTuple):
    """Of all trials of a control. Shares are of texts; fluency is nats a word and end, by judge.

    success: texts that have what was asked for, or how much of it they have; by_chance: unguided ones. ended: texts
    that end with a sentence. plain_fluency: of unguided texts of the same lengths; distinct_4, entropy: of as many, of
    these lengths.
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
    """How samples are drawn in every trial. options: of the pipeline's call, beside steps and guidance."""

    steps: int = 32
    seed: int = 0
    batch_size: int = 50
    options: dict[str, Any] = field(default_factory=dict)

    def draw(
        self, pipe: TextDiffusionPipeline, prompts: Sequence[str | None], seed: int, *guidance: Guidance
    ) -> list[Sample]:
        """One for each prompt; seed: of the first one, counted from `self.seed` on."""
        drawn = outputs(
            pipe, prompts, seed=self.seed + seed, batch_size=self.batch_size, num_inference_steps=self.steps,
            guidance=guidance, **self.options,
        )  # fmt: skip
        return [
            Sample(text, len(vocabulary.before_end(pipe.tokenizer, ids)))
            for output in drawn
            for text, ids in zip(output.texts, output.sequences.tolist(), strict=True)
        ]


class Kept:
    """Samples on disk, so that those of a trial are drawn once, however often it is asked for.

    path: of a jsonl with a line for each trial, made when there is one. A line that isn't whole, of a run that was
    killed, doesn't count. Samples go by model, trial and seed: to be deleted when files that modules name change, or
    how samples are drawn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Sample]] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines:
            with suppress(ValueError):
                row = json.loads(line)
                self.known[row["of"]] = [Sample(*each) for each in row["samples"]]

    def samples(self, of: str, drawn: Callable[[], list[Sample]]) -> list[Sample]:
        """Those kept under `of`, or else what `drawn` gives, kept from now on."""
        if of not in self.known:
            self.known[of] = drawn()
            line = json.dumps({"of": of, "samples": self.known[of]})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # not behind a line that isn't whole
        return self.known[of]


def draw_trials(
    pipe: TextDiffusionPipeline,
    trials: Sequence[Trial],
    sampling: Sampling,
    advance: Callable[[int, int], None] = lambda done, total: None,
    kept: Kept | None = None,
) -> list[list[Sample]]:
    """The samples of each trial; those that are kept are not drawn anew."""
    found = list[list[Sample]]()
    total = sum(trial.count for trial in trials)
    model = "" if kept is None else fingerprint(pipe)
    for trial in trials:
        done = sum(map(len, found))

        def drawn(trial: Trial = trial, done: int = done) -> list[Sample]:
            return sampling.draw(pipe, [trial.prompt] * trial.count, done, *trial.guidance)

        of = f"{model}, {sampling}, {trial.count} from {done}, {trial.prompt!r}, {list(trial.guidance)}"
        found.append(drawn() if kept is None else kept.samples(of, drawn))
        advance(done + trial.count, total)
    return found


def fingerprint(pipe: TextDiffusionPipeline) -> str:
    """A hash of what samples depend on beside the call: weights, tokenizer, solver, temperature."""
    solver = sorted(scheduler_options(pipe.scheduler).items(), key=repr)
    rest = [vocabulary.fingerprint(pipe.tokenizer), solver]
    digest = blake2b(repr([*rest, pipe.config.temperature]).encode(), digest_size=8)
    parts: list[Any] = [pipe.denoiser, *(pipe.classifiers[name] for name in sorted(pipe.classifiers))]
    for part in parts:
        for name, weight in part.state_dict().items():
            digest.update(name.encode() + weight.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def outcome(
    control: str,
    trials: Sequence[Trial],
    drawn: Sequence[Sequence[Sample]],
    plain: Sequence[Sample],
    judges: Sequence[Judge],
) -> Outcome:
    """What the samples of all trials are worth.

    plain: unguided samples, at least as many as guided ones make a fair comparison of variety; under prompts, if the
    trials have any.
    """
    texts, plain_texts = [sample.text for part in drawn for sample in part], [sample.text for sample in plain]
    success = sum(sum(map(trial.check, part)) for trial, part in zip(trials, drawn, strict=True)) / len(texts)
    chance = statistics.fmean(share(trial.check, plain) for trial in trials)
    fewest = min(len(texts), len(plain))
    order = np.random.default_rng(0).permutation(len(texts))[:fewest]
    some = [texts[i] for i in order]
    guided_part, plain_part = variety(some), variety(of_lengths(plain_texts, some))
    return Outcome(
        control, len(texts), success, chance, ended(texts),
        {judge.name: cross_entropy(judge, texts) for judge in judges},
        {judge.name: fluency_at_lengths(judge, plain_texts, texts) for judge in judges},
        guided_part[0], plain_part[0], guided_part[1], plain_part[1],
    )  # fmt: skip


def share(check: Check, samples: Sequence[Sample]) -> float:
    """The share of samples that pass, or the mean of what they have."""
    return sum(map(check, samples)) / len(samples)


def variety(texts: Sequence[str]) -> tuple[float, float]:
    """Distinct 4-grams and entropy, which both depend on how many texts there are, and how long they are."""
    return metrics.distinct_n(texts, 4), metrics.unigram_entropy(texts)


def of_lengths(plain: Sequence[str], like: Sequence[str]) -> list[str]:
    """For each text of `like` one of `plain`, none twice: of those that are left, the nearest to it in words."""
    left = sorted(plain, key=lambda text: len(text.split()))
    lengths = [len(text.split()) for text in left]
    found = []
    for wanted in (len(text.split()) for text in like):
        i = bisect_left(lengths, wanted)
        if i == len(left) or (i > 0 and wanted - lengths[i - 1] < lengths[i] - wanted):
            i -= 1
        del lengths[i]
        found.append(left.pop(i))
    return found


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
    count, limit = counter(unit), int(pipe.denoiser.config.max_length)
    samples = [Sample(text, len(vocabulary.tokens(pipe.tokenizer, text))) for text in real]
    lengths = [count(sample) for sample in samples if 0 < sample.tokens < limit]
    if not lengths:
        raise UserError(f"no real text is short enough for the model's {limit} tokens: give others")
    chosen = np.random.default_rng((seed, 1)).choice(lengths, targets)

    def trial(n: int) -> Trial:
        given: dict[str, Any] = {unit: n}
        return Trial([Length(**given)], lambda sample: count(sample) == n, each)

    # In order, so that the middle one has the median length, see `cost`.
    return [trial(int(n)) for n in sorted(chosen)]


def counter(unit: str) -> Callable[[Sample], int]:
    """How long a sample is, in tokens, words or characters."""
    counts: dict[str, Callable[[Sample], int]] = {
        "tokens": lambda sample: sample.tokens,
        "words": lambda sample: len(sample.text.split()),
        "characters": lambda sample: len(sample.text),
    }
    if unit not in counts:
        raise UserError(f"length in {unit!r} is unknown: choose {', '.join(counts)}")
    return counts[unit]


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
        trials.append(Trial([Lexical(include, exclude)], by_text(having(include, exclude)), each))
    return trials


def having(include: Sequence[str], exclude: Sequence[str] = ()) -> Callable[[str], bool]:
    """Whether a text has all of the one and none of the other, as whole words."""
    wanted, banned = [matcher([phrase]) for phrase in include], matcher(exclude)

    def check(text: str) -> bool:
        found = all(pattern is not None and pattern.search(text) for pattern in wanted)
        return found and (banned is None or not banned.search(text))

    return check


def by_text(has: Callable[[str], float]) -> Check:
    """A check that looks at texts alone."""
    return lambda sample: has(sample.text)


def free_of(phrases: Sequence[str]) -> Check:
    """Whether a text has none of the phrases, as whole words."""
    return by_text(having((), phrases))


def known_words(pipe: TextDiffusionPipeline) -> Callable[[str], bool]:
    """Whether the model's tokenizer can spell a word as it is, and wherever it may come to stand."""
    tokenizer = pipe.tokenizer

    def known(word: str) -> bool:
        try:
            check_spelling(tokenizer, word)
        except UserError:
            return False
        return tokenizer.unk_token_id not in vocabulary.tokens(tokenizer, word)

    return cache(known)


def label_trials(
    classifier: str, labels: Sequence[str], each: int, strength: float, check: Callable[[str], Check]
) -> list[Trial]:
    """A demand for each label of the model's classifier. check: gives a label's check."""
    return [Trial([ClassifierGuidance(label, classifier, strength=strength)], check(label), each) for label in labels]


def scale_trials(sources: Sequence[str], scale: float, each: int) -> list[Trial]:
    """Meanings as prompts, under classifier-free guidance. What is asked of a text is its meaning's slots."""
    guidance = [ClassifierFreeGuidance(scale)]
    return [Trial(guidance, by_text(partial(realised, source)), each, source) for source in sources]


def mentioned(label: str) -> Check:
    """Whether a text has a label's value word by word, as Diffusion-LM's protocol: `Italian` of `food : Italian`."""
    return by_text(having([label.rpartition(" : ")[2]]))


def scored(scorer: Scorer, label: str, least: float = 0.5) -> Check:
    """Whether the scorer finds the label likelier than `least`. Raises UserError for a label that it doesn't know."""
    scorer.number(label)
    return by_text(cache(lambda text: bool(scorer([text], label)[0] > least)))


def weakest(successes: Mapping[float, float], enough: float) -> float:
    """The smallest strength with enough success; where none has, the one with most, and of equals the smallest."""
    strengths = sorted(successes)
    most = max(strengths, key=successes.__getitem__)
    return next((strength for strength in strengths if successes[strength] >= enough), most)


# ------------------------------------------------------------------------------------------------------ cost


class Cost(NamedTuple):
    """Time of guided sampling over that of unguided: the median of several rounds, and their quartiles."""

    ratio: float
    low: float
    high: float


class Costs(NamedTuple):
    """What a module costs. run: whole runs, with what is prepared before the first step and looked after in the last
    rounding; step: their steps alone; outside: steps outside the module's interval."""

    run: Cost
    step: Cost
    outside: Cost


def costs(pipe: TextDiffusionPipeline, trials: Sequence[Trial], sampling: Sampling, rounds: int = 5) -> Costs:
    """What the middle one of the trials costs. Guided and unguided runs take turns, after a round to warm up.

    All sides compute all positions: where padding is skipped, shorter texts would be cheaper, guided or not. A side's
    step is the median of its run behind the first, which has what is done once; runs have three steps at least.
    Steps are timed one by one, on a GPU launch by launch: a recorded loop has no steps to be seen.
    Machines are slower at some times than at others, so only neighbours in time are compared, in changing order.
    """
    trial = trials[len(trials) // 2]
    sides = (trial.guidance, (), outside(trial).guidance)

    def seconds(modules: Sequence[Guidance]) -> tuple[float, float]:
        """Of a run, and of its median step, two neighbours at a time: not all need do the same."""
        ends = [time.perf_counter()]

        def ended(*_: Any) -> dict[str, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return {}

        options = sampling.options | {"skip_padding": False, "callback_on_step_end": ended}
        run = replace(sampling, steps=max(3, sampling.steps), options=options)
        run.draw(pipe, [trial.prompt] * run.batch_size, 0, *modules)
        steps = np.diff(ends)[1:]
        return time.perf_counter() - ends[0], statistics.median((steps[1:] + steps[:-1]) / 2)

    def turn(first: int) -> list[float]:
        found = {i % 3: seconds(sides[i % 3]) for i in range(first, first + 3)}
        (guided, step), (plain, plain_step), (_, step_beyond) = (found[i] for i in range(3))
        return [guided / plain, step / plain_step, step_beyond / plain_step]

    with settled(pipe):
        ratios = [turn(i) for i in range(rounds + 1)][1:]
    quartiles = np.quantile(ratios, (0.5, 0.25, 0.75), axis=0).T.tolist()
    return Costs(*(Cost(*each) for each in quartiles))


@contextmanager
def settled(pipe: TextDiffusionPipeline) -> Iterator[None]:
    """Here the denoiser is compiled if that was asked for, and doesn't come to be midway."""
    wanted, pipe.compile = pipe.compile, bool(pipe.compile)
    try:
        yield
    finally:
        pipe.compile = wanted


def outside(trial: Trial) -> Trial:
    """The trial with modules that act in no step: their interval lies beyond all noise levels."""
    return replace(trial, guidance=[replace(module, min_gamma=1e9) for module in trial.guidance])


# ------------------------------------------------------------------------------------------- meanings of E2E


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
