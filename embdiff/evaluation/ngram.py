"""Interpolated Kneser-Ney n-gram model, a likelihood yardstick for real and generated text.

Kneser & Ney (1995), "Improved backing-off for m-gram language modeling"; the notation is that of
Chen & Goodman (1999), "An empirical study of smoothing techniques for language modeling".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embdiff.errors import UserError

UNKNOWN = "<unk>"

Line = str | Sequence[str]
Gram = tuple[int, ...]

# Ids beside the words'. The start only ever conditions, so it lies outside the predicted range.
_START, _END, _UNKNOWN, _FIRST_WORD = -1, 0, 1, 2


@dataclass(frozen=True)
class _Level:
    """The counts of one order: c(hw) by gram, and by history h the sums c(h.) and types N1+(h.)."""

    count: Mapping[Gram, int]
    total: Mapping[Gram, int]
    types: Mapping[Gram, int]


@dataclass(frozen=True)
class NGram:
    """Interpolated Kneser-Ney model over words, <unk> and the end of the sentence; see `fit`.

    For a history h, and h' which is h without its oldest word (Chen & Goodman 1999, Kneser-Ney
    section, interpolated form):

        p(w|h) = (max(c(hw) - D, 0) + D N1+(h.) p(w|h')) / c(h.)

    c counts occurrences at the highest order; below it counts the distinct words seen in front,
    N1+(.hw). The recursion ends in the uniform distribution over the vocabulary, <unk> and the end.
    Each sentence starts from `order - 1` start symbols, which are never predicted.
    """

    order: int
    discount: float
    vocabulary: tuple[str, ...]
    _ids: Mapping[str, int]
    _levels: tuple[_Level, ...]

    @classmethod
    def fit(
        cls,
        lines: Iterable[Line],
        *,
        order: int = 5,
        min_count: int = 1,
        vocabulary: Iterable[str] | None = None,
        discount: float = 0.75,
    ) -> NGram:
        """Count `lines`, each a string of blank-separated words or a sequence of words.

        The vocabulary is the words seen `min_count` times or more, unless `vocabulary` names it;
        every other word becomes <unk>. `discount` is D, one for all orders: fixed, because Chen &
        Goodman's estimate n1/(n1 + 2 n2) does not exist for small corpora and moves E2E's 5-gram
        cross-entropy by less than 0.005 nats.

        Raises UserError for no lines, order < 1, or a discount outside (0, 1).
        """
        if order < 1:
            raise UserError(f"order={order}: an n-gram has one word or more; pass order >= 1")
        if not 0 < discount < 1:
            raise UserError(f"discount={discount}: it is part of one count; pass 0 < discount < 1")
        sentences = [_words(line) for line in lines]
        if not sentences:
            raise UserError("no lines: an n-gram model needs text to count; pass at least one line")
        words = _frequent(sentences, min_count) if vocabulary is None else vocabulary
        kept = tuple(sorted(set(words) - {UNKNOWN}))
        ids = {word: _FIRST_WORD + i for i, word in enumerate(kept)}
        return cls(order, discount, kept, ids, _count((_encode(s, ids) for s in sentences), order))

    def logprob(self, line: Line) -> NDArray[np.float64]:
        """Log-probability in nats of each word of `line` and of its end: (words + 1,)."""
        sentence = _encode(_words(line), self._ids)
        return np.array([math.log(self._probability(gram)) for gram in _grams(sentence, self.order)])

    def cross_entropy(self, lines: Iterable[Line]) -> float:
        """Mean negative log-probability of `lines`, in nats per token, ends of sentence included.

        Raises UserError for no lines.
        """
        scores = [self.logprob(line) for line in lines]
        if not scores:
            raise UserError("no lines: a mean needs at least one; pass the text to score")
        return -float(np.concatenate(scores).mean())

    def distribution(self, history: Line) -> NDArray[np.float64]:
        """Probabilities of what follows `history` from the start of a sentence: (2 + vocabulary,).

        Entries are the end of the sentence, <unk>, then the words of `vocabulary` in order.
        """
        past = _history(_encode(_words(history), self._ids), self.order)
        return np.array([self._probability((*past, i)) for i in range(_FIRST_WORD + len(self.vocabulary))])

    def _probability(self, gram: Gram) -> float:
        """p of the last id of `gram` (order,) given the others, from the shortest history up."""
        probability = 1 / (_FIRST_WORD + len(self.vocabulary))
        for size, level in enumerate(self._levels, start=1):
            suffix = gram[-size:]
            total = level.total.get(suffix[:-1])
            if total is None:  # this history is new, and so is every longer one
                break
            kept = max(level.count.get(suffix, 0) - self.discount, 0)
            probability = (kept + self.discount * level.types[suffix[:-1]] * probability) / total
        return probability


def _words(line: Line) -> list[str]:
    return line.split() if isinstance(line, str) else list(line)


def _frequent(sentences: Iterable[list[str]], min_count: int) -> list[str]:
    counts = Counter(word for sentence in sentences for word in sentence)
    return [word for word, count in counts.items() if count >= min_count]


def _encode(words: Iterable[str], ids: Mapping[str, int]) -> list[int]:
    return [ids.get(word, _UNKNOWN) for word in words]


def _history(sentence: list[int], order: int) -> Gram:
    """The last `order - 1` ids of a sentence, starts included."""
    padded = [_START] * (order - 1) + sentence
    return tuple(padded[len(sentence) :])


def _grams(sentence: list[int], order: int) -> Iterable[Gram]:
    """One gram of `order` ids for each id of the sentence and for its end."""
    padded = [_START] * (order - 1) + sentence + [_END]
    return zip(*(padded[i:] for i in range(order)), strict=False)


def _count(sentences: Iterable[list[int]], order: int) -> tuple[_Level, ...]:
    """The levels of orders 1 to `order`; each gram of an order lends one count to the one below."""
    counts = Counter(gram for sentence in sentences for gram in _grams(sentence, order))
    levels = [_level(counts)]
    for _ in range(order - 1):
        counts = Counter(gram[1:] for gram in counts)
        levels.append(_level(counts))
    return tuple(reversed(levels))


def _level(counts: Mapping[Gram, int]) -> _Level:
    total: Counter[Gram] = Counter()
    for gram, count in counts.items():
        total[gram[:-1]] += count
    return _Level(counts, total, Counter(gram[:-1] for gram in counts))
