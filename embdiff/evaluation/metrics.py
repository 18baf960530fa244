"""Measures of texts: of a sample alone, of a sample beside real texts, and of texts against their references.

A text is a string of blank-separated words, an empty one a text of no words. Measures take the texts
alone: a prompt, where there is one, must not be part of them, or it is counted as written by the model.
Shares lie in [0, 1]; BLEU, chrF and ROUGE, which compare texts, from 0 to 100.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from types import ModuleType
from typing import TypeVar

import numpy as np

from embdiff.errors import UserError

Gram = tuple[str, ...]
Utility = Callable[[str, str], float]
Item = TypeVar("Item")

TOKENIZATIONS = ("13a", "intl", "char", "none")
SPLITS = 20  # into halves, for a standard error


def unigram_entropy(texts: Sequence[str]) -> float:
    """Entropy in nats of the words of all `texts` pooled, without an end token; 0 for no words.

    It grows with the variety of texts, so compare equal numbers drawn alike: E2E's validation text,
    words seen at most 10 times in training as <unk>, gives 4.58, 512 random lines of it 4.55, and
    the first 512, which are of few meanings, 4.26.

    Raises UserError for no texts.
    """
    counts = Counter(word for words in _words(texts) for word in words)
    total = counts.total()
    return sum((count / total * math.log(total / count) for count in counts.values()), 0.0)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of `texts`, in (0, 1]; 0 if there is none.

    Li et al. (2016), "A diversity-promoting objective function for neural conversation models".
    Raises UserError for no texts or n < 1.
    """
    _check_size(n)
    grams = [gram for words in _words(texts) for gram in _grams(words, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def standard_error(items: Sequence[Item], figure: Callable[[list[Item]], float], seed: int = 0) -> float:
    """How far the figure of as many others would lie: half the difference of that of two random halves, root mean
    square over SPLITS splits. Both halves are of one size, so it serves figures too that go by the number of texts.

    NaN for fewer than 4 items.
    """
    if len(items) < 4:
        return math.nan
    random, half, squares = np.random.default_rng((seed, 0x73706C74)), len(items) // 2, list[float]()
    for _ in range(SPLITS):
        order = random.permutation(len(items))
        one, two = (figure([items[i] for i in part]) for part in (order[:half], order[half : 2 * half]))
        squares.append((one - two) ** 2)
    return math.sqrt(sum(squares) / SPLITS) / 2


def repetition(texts: Sequence[str]) -> float:
    """Share of words equal to the word before, of all that have one before; 0 if none has.

    Raises UserError for no texts.
    """
    repeated = [a == b for words in _words(texts) for a, b in pairwise(words)]
    return sum(repeated) / len(repeated) if repeated else 0.0


def rep_n(texts: Sequence[str], n: int) -> float:
    """Share of the n-grams of a text that it has said before, mean over texts, in [0, 1).

    seq-rep-n of Welleck et al. (2020), "Neural text generation with unlikelihood training",
    arXiv:1908.04319: 1 - |different n-grams| / |n-grams|, here without texts of fewer than n words;
    0 if all are. It grows with length, so compare it with that of real texts.

    Raises UserError for no texts or n < 1.
    """
    _check_size(n)
    grams = [list(_grams(words, n)) for words in _words(texts)]
    shares = [1 - len(set(found)) / len(found) for found in grams if found]
    return sum(shares) / len(shares) if shares else 0.0


def self_bleu(texts: Sequence[str], n: int = 4, references: int = 200, seed: int = 0) -> float:
    """Mean BLEU-n of each text against `references` of the others, from 0 to 100: lower is more diverse.

    Zhu et al. (2018), "Texygen: a benchmarking platform for text generation models",
    arXiv:1802.01886. More references give a higher score, so their number is fixed: each text meets
    the next ones of a cyclic order that `seed` draws, or all others where there are no more. BLEU is
    that of `sentence_bleu`, smoothing included (Texygen's counts 0.1 for no match instead).

    Raises UserError for fewer than two texts, n < 1 or references < 1.
    """
    _check_size(n)
    if references < 1:
        raise UserError(f"references={references}: a text is compared with others; pass references >= 1")
    if len(_words(texts)) < 2:
        raise UserError("one text: self-BLEU compares texts with each other; pass two or more")
    count = len(texts)
    references = min(references, count - 1)
    ordered = sorted(texts)
    drawn = [ordered[i] for i in np.random.default_rng(seed).permutation(count)]
    counted = [_counted(text, n) for text in drawn]
    lengths = np.array([len(text.split()) for text in drawn] * 2)
    # Walking the cycle backwards, `seen` knows the nearest later text with a gram, which is a
    # reference if it is near enough: each gram of each text is looked up once.
    seen: dict[tuple[Gram, int], int] = {}
    scores = []
    for place in reversed(range(2 * count)):
        grams = counted[place % count]
        if place < count:
            last = place + references
            correct = [sum(seen.get(gram, last + 1) <= last for gram in found) for found in grams]
            others = lengths[place + 1 : last + 1]
            own = lengths[place]
            closest = others[np.argmin(2 * abs(others - own) + (others > own))]  # of two as close, the shorter
            scores.append(_bleu(correct, [len(found) for found in grams], int(own), int(closest)))
        for found in grams:
            seen.update(dict.fromkeys(found, place))
    return math.fsum(scores) / count


def mean_length(texts: Sequence[str]) -> float:
    """Mean number of words of a text. Raises UserError for no texts."""
    lengths = _lengths(texts)
    return sum(lengths) / len(lengths)


def length_quantiles(texts: Sequence[str], shares: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
    """The lengths in words below which these shares of `texts` lie, interpolated; 0 is the shortest, 1 the longest.

    Raises UserError for no texts or a share outside [0, 1].
    """
    lengths = _lengths(texts)
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"shares={tuple(shares)}: parts of all texts; pass numbers from 0 to 1")
    return [float(length) for length in np.quantile(lengths, shares)]


def length_distance(texts: Sequence[str], real: Sequence[str]) -> float:
    """Wasserstein-1 distance between the lengths of `texts` and of `real`, in words.

    The words by which texts must grow or shrink, on average, to have the lengths of real ones: the
    area between the two distribution functions. Raises UserError for no texts on either side.
    """
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(_lengths(texts), _lengths(real)))


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> float:
    """BLEU-4 of `hypotheses` against one or more references each, from 0 to 100.

    Papineni et al. (2002), "BLEU: a method for automatic evaluation of machine translation": one
    score for the corpus, closest reference length, no smoothing. `tokenize` is sacrebleu's: "13a"
    (mteval's), "intl" (any script), "char", or "none" for words as they are.

    Raises UserError for no hypotheses, another number of reference lists, an empty one, an unknown
    tokenisation, or sacrebleu not installed.
    """
    if tokenize not in TOKENIZATIONS:
        raise UserError(f"tokenize={tokenize!r}: not a tokenisation; pass one of {', '.join(TOKENIZATIONS)}")
    check_references(hypotheses, references)
    score = _sacrebleu().corpus_bleu(
        list(hypotheses),
        _streams(references),
        smooth_method="none",
        force=True,  # silences a warning about tokenised text
        lowercase=lowercase,
        tokenize=tokenize,
    )
    return float(score.score)


def corpus_chrf(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = False,
    word_order: int = 0,
) -> float:
    """chrF2 of `hypotheses` against the best of one or more references each, from 0 to 100.

    Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation": n-grams of 1 to 6
    characters without blanks, recall twice as important. `word_order=2` is chrF++. Of references as
    good, the first counts, as in sacrebleu: for an empty hypothesis that decides the number to miss.

    Raises UserError for no hypotheses, another number of reference lists, an empty one, or sacrebleu
    not installed.
    """
    check_references(hypotheses, references)
    scorer = _sacrebleu().CHRF(lowercase=lowercase, word_order=word_order)
    return float(scorer.corpus_score(list(hypotheses), _streams(references)).score)


def rouge_n(hypotheses: Sequence[str], references: Sequence[Sequence[str]], n: int) -> float:
    """ROUGE-n: F-measure of common n-grams with the best reference, mean over texts, from 0 to 100.

    Lin (2004), "ROUGE: a package for automatic evaluation of summaries", section 2; words as in
    `rouge_l`. Raises UserError as `rouge_l` does, and for n < 1.
    """
    _check_size(n)

    def common(a: list[str], b: list[str]) -> tuple[int, int]:
        here, there = Counter(_grams(a, n)), Counter(_grams(b, n))
        return (here & there).total(), here.total() + there.total()

    return _rouge(hypotheses, references, common)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L: F-measure of the longest common subsequence with the best reference, mean over texts, from 0 to 100.

    Lin (2004), section 3.1, with equal weight for precision and recall. Words are runs of letters
    and digits, in lower case and not stemmed: on ASCII text that is what the rouge-score package does, which
    drops other letters.

    Raises UserError for no hypotheses, another number of reference lists or an empty one.
    """
    return _rouge(hypotheses, references, lambda a, b: (_common_subsequence(a, b), len(a) + len(b)))


def sentence_bleu(hypothesis: str, reference: str, n: int = 4) -> float:
    """BLEU-n of one text against another, from 0 to 100: words as they are, smoothed, effective order.

    An order without a match counts 1/2, the next one 1/4, .. of a match, and orders longer than the
    hypothesis are left out, as in sacrebleu (Chen & Cherry 2014, "A systematic comparison of smoothing
    techniques for sentence-level BLEU", method 3). Raises UserError for n < 1.
    """
    _check_size(n)
    here, there = _counted(hypothesis, n), _counted(reference, n)
    correct = [len(a & b) for a, b in zip(here, there, strict=True)]
    return _bleu(correct, [len(a) for a in here], len(hypothesis.split()), len(reference.split()))


def sentence_chrf(hypothesis: str, reference: str) -> float:
    """chrF2 of one text against another, from 0 to 100; see `corpus_chrf`. UserError without sacrebleu."""
    return float(_sacrebleu().sentence_chrf(hypothesis, [reference]).score)


def mbr(candidates: Sequence[Sequence[str]], utility: Utility = sentence_bleu) -> list[str]:
    """For each prompt's candidates, the one of highest mean `utility` against the others; the first of equals.

    Minimum Bayes risk: Kumar & Byrne (2004), "Minimum Bayes-risk decoding for statistical machine
    translation"; Eikema & Aziz (2020), "Is MAP decoding all you need?", arXiv:2005.10283, where the
    candidates are samples, as here: equal ones vote for each other. `utility` is called with a
    candidate and another one in the place of its reference: `sentence_bleu`, `sentence_chrf`, ..

    Raises UserError for a prompt without candidates.
    """
    if not all(candidates) or any(isinstance(texts, str) for texts in candidates):
        raise UserError("a prompt without candidates: nothing to choose from; pass a list of texts for each prompt")
    return [_central(texts, utility) for texts in candidates]


def check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises UserError unless each hypothesis has its list of one reference or more."""
    if isinstance(hypotheses, str) or any(isinstance(texts, str) for texts in references):
        raise UserError("a string where a list of texts is due: pass a list of hypotheses and a list of lists")
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise UserError(
            f"{len(hypotheses)} hypotheses, {len(references)} lists of references: "
            "pass one list, not empty, for each hypothesis"
        )


def _check_size(n: int) -> None:
    if n < 1:
        raise UserError(f"n={n}: an n-gram has one word or more; pass n >= 1")


def _words(texts: Sequence[str]) -> list[list[str]]:
    if isinstance(texts, str):
        raise UserError("one string: a measure of texts would take its letters for texts; pass a list of texts")
    words = [text.split() for text in texts]
    if not words:
        raise UserError("no texts: a measure of texts needs at least one; pass a list that is not empty")
    return words


def _lengths(texts: Sequence[str]) -> list[int]:
    return [len(words) for words in _words(texts)]


def _grams(words: list[str], n: int) -> zip[Gram]:
    return zip(*(words[i:] for i in range(n)), strict=False)


@lru_cache(maxsize=64)  # the candidates of a prompt meet each other again and again
def _counted(text: str, n: int) -> tuple[frozenset[tuple[Gram, int]], ...]:
    """For sizes 1 to n the grams of `text`, each with how many like it stand before it.

    So counts are sets, and the smaller of two counts is an intersection.
    """
    words, sizes = text.split(), []
    for size in range(1, n + 1):
        counts: Counter[Gram] = Counter()
        found = set()
        for gram in _grams(words, size):
            found.add((gram, counts[gram]))
            counts[gram] += 1
        sizes.append(frozenset(found))
    return tuple(sizes)


def _bleu(correct: Sequence[int], total: Sequence[int], length: int, reference_length: int) -> float:
    """BLEU from 0 to 100, of the matches and the n-grams of each size from 1 on; see `sentence_bleu`."""
    if not any(correct):
        return 0.0
    matches, logs = 1.0, []
    for found, grams in zip(correct, total, strict=True):
        if not grams:
            break
        if not found:
            matches /= 2
        logs.append(math.log((found or matches) / grams))
    brevity = min(0.0, 1 - reference_length / length)
    return 100 * math.exp(brevity + sum(logs) / len(logs))


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("sacrebleu is not installed: BLEU and chrF need it; pip install 'embdiff[eval]'") from error
    module: ModuleType = sacrebleu
    return module


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """As sacrebleu takes them: the first reference of every text, then the second, with None where there is none."""
    return [list(stream) for stream in zip_longest(*references)]


def _rouge(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    common: Callable[[list[str], list[str]], tuple[int, int]],
) -> float:
    """`common` gives what two texts share and what they have together: precision s/h, recall s/r, F = 2s / (h + r)."""
    check_references(hypotheses, references)
    best = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        own = _letters(hypothesis)
        pairs = [common(own, _letters(text)) for text in texts]
        best.append(max(2 * shared / together if together else 0.0 for shared, together in pairs))
    return 100 * sum(best) / len(best)


def _letters(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence.

    Hyyrö (2004), "Bit-parallel LCS-length computation revisited": bit i of `row` is 0 where the
    table's row of `b` so far rises at word i of `a`. A row is one addition of long integers.
    """
    places: dict[str, int] = defaultdict(int)
    for i, word in enumerate(a):
        places[word] |= 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def _central(texts: Sequence[str], utility: Utility) -> str:
    """The text of highest utility. The sum is exact, so that equal candidates are equal in any order."""
    gains = [math.fsum(utility(text, other) for j, other in enumerate(texts) if j != i) for i, text in enumerate(texts)]
    return texts[gains.index(max(gains))]
