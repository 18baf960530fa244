"""Sampling controls that people know from autoregressive models, on the posterior of all positions at once.

What they cut is the distribution of words; the end of text and padding keep their probabilities. Where an
autoregressive sampler looks at the words before, these look at the last draft of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.guidance.base import Ban, Guidance, Part, Run, Tilt, Veto, Words

LIKELIEST = 256  # words that are sorted at first: most nuclei lie within, and to sort 8,192 takes six times as long


@dataclass(frozen=True)
class TopK(Guidance):
    """The k most probable words of each position."""

    name: ClassVar[str] = "top-k"

    k: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"top-k {self.k} is out of range: give 1 or more")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.k < run.vocabulary:
            yield Tilt(lambda words: cut(words.logits, words.logits.topk(self.k).values[:, -1:]))


@dataclass(frozen=True)
class TopP(Guidance):
    """The most probable words that together reach the probability p (the nucleus, Holtzman 2020, arXiv:1904.09751)."""

    name: ClassVar[str] = "top-p"

    p: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise UserError(f"top-p {self.p} is out of range: give a probability above 0, up to 1")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.p < 1:
            yield Tilt(self._cut)

    def _cut(self, words: Words) -> Tensor:
        logits, total = words.logits, words.logits.logsumexp(-1, keepdim=True)
        lowest, reached = self._lowest(logits.topk(min(LIKELIEST, logits.shape[-1])).values, total)
        flat = (~reached).nonzero()[:, 0]
        if len(flat):
            lowest[flat] = self._lowest(logits[flat].sort(-1, descending=True).values, total[flat])[0]
        return cut(logits, lowest)

    def _lowest(self, ordered: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest logit [R, 1] that stays, and whether the ordered ones [R, K] reach p, [R]. total: of all words."""
        p = (ordered - total).exp()
        reached = p.cumsum(-1)
        # A word stays if those above it do not reach p: the first always does.
        last = ((reached - p) < self.p).sum(-1, keepdim=True) - 1
        last = last.clamp(min=0)  # in a row without words there is no first
        return ordered.gather(-1, last), reached[:, -1] >= self.p


@dataclass(frozen=True)
class MinP(Guidance):
    """The words at least p times as probable as the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""

    name: ClassVar[str] = "min-p"

    p: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p <= 1:
            raise UserError(f"min-p {self.p} is out of range: give a share from 0 to 1")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.p > 0:
            low = torch.tensor(self.p).log().item()
            yield Tilt(lambda words: cut(words.logits, words.logits.amax(-1, keepdim=True) + low))


@dataclass(frozen=True)
class RepetitionPenalty(Guidance):
    """Words that stand earlier in the draft get `penalty` times their negative log-probability (CTRL, arXiv:1909.05858,
    equation 2, on log-probabilities, whose sign is known). penalty: 1 = off."""

    name: ClassVar[str] = "repetition-penalty"

    penalty: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.penalty <= 100:
            raise UserError(f"repetition-penalty {self.penalty} is out of range: give 1 (off) to 100")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.penalty > 1:
            yield Tilt(self._lowered, looks_around=True)

    def _lowered(self, words: Words) -> Tensor:
        if words.draft is None:
            return words.logits
        L = words.draft.shape[1]
        earlier = torch.arange(L, device=words.rows.device)[None] < (words.rows % L)[:, None]
        texts = words.draft[words.rows // L]
        seen = torch.zeros_like(words.logits).scatter_add_(1, texts, earlier.to(words.logits)) > 0
        logs = words.logits.log_softmax(-1)
        return torch.where(seen, logs * self.penalty, logs)


@dataclass(frozen=True)
class NoRepeatNgram(Guidance):
    """No run of n tokens occurs twice in a text."""

    name: ClassVar[str] = "no-repeat-ngram"

    n: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise UserError(f"no-repeat-ngram {self.n} is out of range: give 1 or more")

    def parts(self, run: Run) -> Iterable[Part]:
        yield Veto(
            lambda ids: repeated(ids, self.n, run.tokenizer),
            f"no {self.n}-gram twice",
            lambda ids: repeated(ids, self.n, run.tokenizer, whole=True),
        )


def repeated(ids: Tensor, n: int, tokenizer: Any, whole: bool = False) -> Tensor:
    """[B, L] bool: where a run of n tokens ends that occurred before in the text [B, L]; whole: all tokens of runs that
    occur twice."""
    marked = torch.zeros(ids.shape, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        text = vocabulary.before_end(tokenizer, row)
        seen = defaultdict[tuple[int, ...], list[int]](list)  # where each run ends
        for i in range(n, len(text) + 1):
            places = seen[tuple(text[i - n : i])]
            marked[b, i - 1] |= bool(places)
            places.append(i)
        for end in (i for places in seen.values() if whole and len(places) > 1 for i in places):
            marked[b, end - n : end] = True
    return marked.to(ids.device)


def cut(logits: Tensor, lowest: Tensor) -> Tensor:
    """Without the words whose logit is below `lowest` [R, 1]."""
    return logits.masked_fill(logits < lowest, -torch.inf)


# ------------------------------------------------------------------------------- transformers' LogitsProcessor


@dataclass(frozen=True)
class Processors(Guidance):
    """transformers' LogitsProcessor objects, in their order, after those that always suppress the same tokens.

    Those that look at scores alone (top-k, top-p, min-p, typical, epsilon, eta, suppressed tokens, ..) are called as
    they are; repetition penalty and no-repeat n-grams are ours, with the processor's number. Others look at the words
    before a position, which are not decided when it is: they are refused. Whether one does is tried, not believed.
    """

    name: ClassVar[str] = "processors"

    processors: Sequence[Any] = ()

    def parts(self, run: Run) -> Iterable[Part]:
        for processor in self.processors:
            yield from parts_of(processor, run)


INSTEAD = {
    "MinLength": "Length", "MinNewTokens": "Length", "ForcedEOS": "Length", "ExponentialDecayLength": "Length",
    "NoBadWords": "Lexical", "SequenceBias": "Lexical",
}  # fmt: skip


def parts_of(processor: Any, run: Run) -> Iterable[Part]:
    """What a processor does here; UserError where it makes no sense."""
    kind = type(processor).__name__
    if kind == "RepetitionPenaltyLogitsProcessor":
        yield from RepetitionPenalty(float(processor.penalty)).parts(run)
    elif kind == "NoRepeatNGramLogitsProcessor":
        yield from NoRepeatNgram(int(processor.ngram_size)).parts(run)
    elif (ours := next((i for theirs, i in INSTEAD.items() if kind.startswith(theirs)), None)) or looks_back(
        processor, run.vocabulary
    ):
        raise UserError(
            f"{kind} looks at the words before a position, and in diffusion all positions are decided at once"
            + (f": use {ours}" if ours else "")
        )
    else:
        tokens = suppressed(processor, run.vocabulary)
        yield Ban(tokens) if tokens else Tilt(called(processor))


def called(processor: Any) -> Callable[[Words], Tensor]:
    """The processor as a tilt."""

    def apply(words: Words) -> Tensor:
        nothing = torch.zeros((len(words.logits), 0), dtype=torch.long, device=words.logits.device)
        scores: Tensor = processor(nothing, words.logits.clone())  # theirs may write into it
        # Theirs may fill with the lowest number: what was out stays out.
        return scores.masked_fill(words.logits == -torch.inf, -torch.inf)

    return apply


def suppressed(processor: Any, vocabulary: int) -> list[int]:
    """The tokens that it puts -inf on whatever the scores are; none where it does anything else."""
    scores = 5 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([scores, -scores])
    found = processor(torch.zeros((len(scores), 0), dtype=torch.long), scores.clone())
    out = found == -torch.inf
    always = torch.equal(found, scores.masked_fill(out, -torch.inf)) and bool((out == out[:1]).all())
    return out[0].nonzero()[:, 0].tolist() if always else []


def looks_back(processor: Any, vocabulary: int) -> bool:
    """Whether scores come out otherwise after other words, or the processor fails without any."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, vocabulary, generator=generator)
    results = []
    try:
        for length in (0, 1, 9, 9, 40):
            before = torch.randint(vocabulary, (2, length), generator=generator)
            results.append(processor(before, scores.clone()))
        words = torch.randperm(vocabulary, generator=generator)[:500, None]
        each = processor(words, scores[:1].repeat(len(words), 1))
    except Exception:  # a processor may fail in every way where it finds no words
        return True
    return not all(torch.equal(results[0], result) for result in results[1:]) or bool((each != each[:1]).any())
