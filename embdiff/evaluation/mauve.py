"""MAUVE: how close a sample of texts is to real ones, as distributions.

Pillutla et al. (2021), "MAUVE: measuring the gap between neural text and human text using divergence
frontiers", arXiv:2102.01454. Both sets are cut into the same clusters of features; the histograms P
and Q over clusters give a curve of two divergences from their mixtures, and MAUVE is the area under it.

The paper's features are hidden states of GPT-2. Without a model there are word n-grams here: they see
which words and pairs of words go together, and neither length nor what holds a long text together. So
values compare samples of one data set with each other, and not with published ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import rel_entr

from embdiff.errors import UserError

Floats = NDArray[np.float64]

SCALE = 5.0  # c of the paper
MIXTURES = 101
CLUSTERINGS = 5
DIMENSIONS = 64
MAX_CLUSTERS = 500  # the paper's number, for 5,000 texts


def mauve_from_histograms(p: ArrayLike, q: ArrayLike, scale: float = SCALE) -> float:
    """Area under the divergence curve of two histograms (K,), counts or shares: in (0, 1], 1 if they are equal.

    The paper's divergence curve is (exp(-c KL(q | r)), exp(-c KL(p | r))) over mixtures
    r = w p + (1 - w) q, c = `scale`, and ends on both axes. Symmetric in p and q. Histograms without
    a common cluster give c B(c + 1, c), which is 0.004 for c = 5.

    Raises UserError for histograms of different lengths, a negative or not finite entry, or a sum of 0.
    """
    first, second = _shares(p), _shares(q)
    if first.shape != second.shape:
        raise UserError(f"histograms of shapes {first.shape} and {second.shape}: pass two over the same clusters")
    weight = np.linspace(0, 1, MIXTURES)[:, None]
    mixture = weight * first + (1 - weight) * second
    x, y = (np.exp(-scale * rel_entr(shares, mixture).sum(1)) for shares in (second, first))
    return float(-np.trapezoid([0, *y, 1], [1, *x, 0]))


def _shares(histogram: ArrayLike) -> Floats:
    counts: Floats = np.asarray(histogram, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or counts.sum() <= 0:
        raise UserError("a histogram that is empty, negative or not finite: pass counts (K,), not all of them 0")
    shares: Floats = counts / counts.sum()
    return shares


def mauve(features_p: ArrayLike, features_q: ArrayLike, clusters: int | None = None, seed: int = 0) -> float:
    """MAUVE of two sets of features (N, F) and (M, F), one row a text, in (0, 1].

    Rows are clustered together by k-means, `clusters` is a tenth of the smaller set unless given, at
    least 2 and at most 500, and half a text is added to every cluster of both (Krichevsky & Trofimov, as
    in Pillutla et al. 2023, arXiv:2212.14578). One clustering makes a difference of some hundredths, so
    this is the mean over 5. Symmetric, and the order of rows does not matter. Features are taken as
    they are: divide hidden states by their norm first, as the paper does.

    It falls with the noise of small sets: compare equal numbers of texts, some hundreds at least.

    Raises UserError for arrays that are not (N, F) and (M, F) with N, M, F >= 1, for numbers that are
    not finite, or clusters < 1.
    """
    p, q = (np.asarray(features, dtype=np.float64) for features in (features_p, features_q))
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1] or not p.size or not q.size:
        raise UserError(f"features of shapes {p.shape} and {q.shape}: pass (N, F) and (M, F), one row a text")
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise UserError("features that are not finite: clusters need distances; leave out nan and inf")
    if clusters is None:
        clusters = min(max(2, round(min(len(p), len(q)) / 10)), MAX_CLUSTERS)
    if clusters < 1:
        raise UserError(f"clusters={clusters}: a histogram has one bar or more; pass clusters >= 1")
    rows = np.concatenate([p, q])
    order = np.lexsort(rows.T)  # any order that both sets and their swap agree on
    ours = order < len(p)
    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(CLUSTERINGS):
        labels = kmeans(rows[order], clusters, rng)
        p_counts, q_counts = (np.bincount(labels[part], minlength=labels.max() + 1) for part in (ours, ~ours))
        areas.append(mauve_from_histograms(p_counts + 0.5, q_counts + 0.5))
    return float(np.mean(areas))


def divergence(texts: Sequence[str], real: Sequence[str], clusters: int | None = None, seed: int = 0) -> float:
    """MAUVE of `texts` against `real` texts on word n-grams, in (0, 1]: 1 is the same distribution.

    As many are drawn from the larger set as the smaller one has. Symmetric, and the order of texts
    does not matter. See `mauve`, and the head of this module for what n-grams do not see.

    On 1,000 lines of E2E's training text against 1,000 others, words seen at most 10 times as <unk>:
    0.96; with 5, 10 and 20 % of the words replaced by others at random 0.96, 0.93 and 0.80; cut to
    their first half 0.71; words of each line shuffled 0.11; 100 lines ten times 0.02. Subjects count:
    real validation lines, which are of other meanings, get 0.25. So put the value of real text drawn
    like the sample beside it, and leave single wrong words to `NGram.cross_entropy`.

    Raises UserError for no texts on either side, or clusters < 1.
    """
    if isinstance(texts, str) or isinstance(real, str) or not len(texts) or not len(real):
        raise UserError("no texts on one side: a comparison needs two lists of texts; pass lists that are not empty")
    count = min(len(texts), len(real))
    here, there = _draw(texts, count, seed), _draw(real, count, seed)
    both = sorted(here + there)
    row = dict(zip(both, _features(both), strict=True))
    return mauve([row[text] for text in here], [row[text] for text in there], clusters, seed)


def _draw(texts: Sequence[str], count: int, seed: int) -> list[str]:
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    ordered = sorted(texts)
    return [ordered[i] for i in chosen]


def _features(texts: Sequence[str]) -> Floats:
    """tf-idf of words and pairs of words, of length 1, in the main directions of `texts`: (N, F), F <= DIMENSIONS.

    Not brought back to length 1 there: a text of rare pairs, as a bad model writes, is one that the
    main directions hold little of.
    """
    rows: list[int] = []
    columns: list[int] = []
    values: list[int] = []
    ids: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(texts):
        words = text.split()
        for gram, count in Counter([*((word,) for word in words), *pairwise(words)]).items():
            rows.append(i)
            columns.append(ids.setdefault(gram, len(ids)))
            values.append(count)
    if not ids:
        return np.zeros((len(texts), 1))
    rarity = np.log(len(texts) / np.bincount(columns)) + 1
    weights = np.array(values) * rarity[columns]
    weights /= np.sqrt(np.bincount(rows, weights**2, minlength=len(texts)))[rows]
    return main_directions(csr_array((weights, (rows, columns)), shape=(len(texts), len(ids))), DIMENSIONS)


def main_directions(matrix: csr_array, size: int) -> Floats:
    """`matrix` (N, V) along its right singular vectors of the largest values: (N, F), F <= `size`.

    Halko, Martinsson & Tropp (2011), "Finding structure with randomness", arXiv:0909.4061, algorithm
    4.4: subspace iteration from a fixed draw, for any shape and rank, where Lanczos needs more rows
    than directions.
    """
    drawn = np.random.default_rng(0).standard_normal((matrix.shape[1], min(2 * size, *matrix.shape)))
    basis, _ = np.linalg.qr(matrix @ drawn)
    for _ in range(4):
        basis, _ = np.linalg.qr(matrix @ (matrix.T @ basis))
    left, values, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    directions: Floats = basis @ (left * values)[:, :size]
    return directions


def kmeans(rows: Floats, clusters: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The cluster of each row (N,), by Lloyd's iteration from a k-means++ start (Arthur & Vassilvitskii 2007).

    Fewer clusters than asked for where there are fewer different rows.
    """
    centres = _spread(rows, clusters, rng)
    labels = _nearest(rows, centres)
    for _ in range(100):
        counts = np.bincount(labels, minlength=len(centres))
        members = csr_array((np.ones(len(rows)), (labels, np.arange(len(rows)))), shape=(len(centres), len(rows)))
        centres = np.where(counts[:, None] > 0, members @ rows / np.maximum(counts, 1)[:, None], centres)
        labels, before = _nearest(rows, centres), labels
        if (labels == before).all():
            break
    return labels


def _spread(rows: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """Starting centres (K, F): each a row drawn by its squared distance from those before."""
    centres = [rows[rng.integers(len(rows))]]
    distance = ((rows - centres[0]) ** 2).sum(1)
    while len(centres) < clusters and distance.max() > 1e-12:
        centres.append(rows[rng.choice(len(rows), p=distance / distance.sum())])
        distance = np.minimum(distance, ((rows - centres[-1]) ** 2).sum(1))
    return np.stack(centres)


def _nearest(rows: Floats, centres: Floats) -> NDArray[np.int64]:
    nearest: NDArray[np.int64] = ((centres**2).sum(1) - 2 * rows @ centres.T).argmin(1)
    return nearest
