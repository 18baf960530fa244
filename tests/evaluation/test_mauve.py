"""Laws of MAUVE: of the curve's area, of clusters, and of word n-grams as features."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.sparse import csr_array

from embdiff.errors import UserError
from embdiff.evaluation.mauve import divergence, kmeans, main_directions, mauve, mauve_from_histograms
from tests.conftest import WORDS, sentences

counts = arrays(np.int64, 5, elements=st.integers(0, 20)).filter(lambda h: h.sum() > 0)


@given(counts, counts)
def test_area_is_symmetric_and_one_only_for_equal_histograms(p, q):
    area = mauve_from_histograms(p, q)
    assert 1 / math.comb(10, 5) - 1e-9 <= area <= 1 + 1e-9
    assert mauve_from_histograms(q, p) == pytest.approx(area)
    equal = np.allclose(p / p.sum(), q / q.sum())
    assert area == pytest.approx(1) if equal else area < 1 - 1e-6


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_area_of_disjoint_histograms_is_a_beta_integral(scale):
    """The curve is (w^c, (1 - w)^c), whose area is c B(c + 1, c) = 1 / binomial(2c, c)."""
    area = mauve_from_histograms([1, 2, 0], [0, 0, 3], scale)
    assert area == pytest.approx(1 / math.comb(2 * scale, scale), abs=2e-4)


@given(counts, counts, st.permutations(range(5)), st.integers(2, 9))
def test_area_depends_on_shares_and_not_on_names_or_sizes(p, q, order, times):
    area = mauve_from_histograms(p, q)
    assert mauve_from_histograms(p[order], q[order]) == pytest.approx(area)
    assert mauve_from_histograms(p * times, q / q.sum()) == pytest.approx(area)


@given(counts, counts, st.floats(0.1, 0.9))
def test_cutting_a_cluster_alike_tells_nothing_and_joining_two_hides_something(p, q, share):
    area = mauve_from_histograms(p, q)
    cut = [np.append(h[:4], [share * h[4], (1 - share) * h[4]]) for h in (p, q)]
    assert mauve_from_histograms(*cut) == pytest.approx(area)
    joined = [np.append(h[:3], h[3:].sum()) for h in (p, q)]
    assert mauve_from_histograms(*joined) >= area - 1e-9


def area_by_quadrature(p, q):
    """The integral of y dx along the curve of the paper, x' from d KL(q | r) / dw = -sum q (p - q) / r."""
    p, q = (h / h.sum() for h in (p, q))

    def point(w):
        r = w * p + (1 - w) * q
        x, y = (math.exp(-5 * sum(a * math.log(a / b) for a, b in zip(h, r, strict=True) if a)) for h in (q, p))
        return x, y, 5 * x * sum(b * (a - b) / c for a, b, c in zip(p, q, r, strict=True) if c)

    inner, _ = quad(lambda w: -point(w)[1] * point(w)[2], 1e-9, 1 - 1e-9)
    return inner + point(1 - 1e-9)[0]  # to the left of w = 1, y is 1


@given(counts, counts)
def test_area_is_the_integral_along_the_papers_curve(p, q):
    """Published code takes 25 mixtures, which are within 0.002 of it; ours are 101."""
    assert mauve_from_histograms(p, q) == pytest.approx(area_by_quadrature(p, q), abs=2e-4)


@pytest.mark.parametrize(("p", "q"), [([], []), ([1], [1, 2]), ([0, 0], [1, 0]), ([-1, 2], [1, 1]), ([np.nan], [1])])
def test_bad_histograms_are_user_errors(p, q):
    with pytest.raises(UserError, match="pass"):
        mauve_from_histograms(p, q)


def blobs(counts, seed):
    """Rows around far corners, so many around each."""
    rng = np.random.default_rng(seed)
    corners = np.repeat(100 * np.eye(len(counts)), counts, axis=0)
    return corners + rng.normal(size=corners.shape)


def test_clusters_far_apart_are_found_and_counted():
    p, q = np.array([30, 5, 10, 0]), np.array([10, 20, 0, 40])
    found = mauve(blobs(p, 0), blobs(q, 1), clusters=4)
    assert found == pytest.approx(mauve_from_histograms(p + 0.5, q + 0.5))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 9))
def test_a_row_is_nearest_to_the_mean_of_its_own_cluster(size, clusters, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(size, 3))
    labels = kmeans(rows, clusters, rng)
    used = np.unique(labels)
    means = np.stack([rows[labels == label].mean(0) for label in used])
    distances = np.linalg.norm(rows[:, None] - means, axis=2)
    assert (used[distances.argmin(1)] == labels).all()
    assert len(used) <= min(size, clusters)


def test_there_are_no_more_clusters_than_different_rows():
    rows = np.repeat(np.eye(3), 5, axis=0)
    labels = kmeans(rows, 10, np.random.default_rng(0))
    assert len(np.unique(labels)) == labels.max() + 1 == 3


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (40, 90), (90, 40)])
@pytest.mark.parametrize("size", [1, 8, 100])
def test_main_directions_hold_what_the_largest_singular_values_do(shape, size):
    dense = np.maximum(np.random.default_rng(0).normal(size=shape) - 0.5, 0)
    reduced = main_directions(csr_array(dense), size)
    values = np.linalg.svd(dense, compute_uv=False)[:size]
    assert reduced.shape == (shape[0], len(values))
    assert np.linalg.norm(reduced, axis=0) == pytest.approx(values, rel=0.02)
    apart = reduced.T @ reduced
    assert apart == pytest.approx(np.diag(np.diag(apart)), abs=1e-8)


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(400, 6)), rng.normal(size=(400, 6)), rng.normal(size=(400, 6)) + 5


def test_equal_samples_score_near_one_and_distant_ones_near_zero(features):
    here, alike, distant = features
    assert mauve(here, here) == pytest.approx(1)
    assert mauve(here, alike) > 0.9
    assert mauve(here, distant) < 0.02


def test_the_further_apart_the_lower(features):
    here, alike, _ = features
    scores = [mauve(here, alike + shift) for shift in (0, 0.5, 1, 2)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.5


def test_features_may_be_swapped_shuffled_and_scaled(features):
    here, alike, _ = features
    score = mauve(here, alike)
    assert mauve(alike, here) == pytest.approx(score)
    assert mauve(here[::-1], np.roll(alike, 7, axis=0)) == score
    assert mauve(here / 4, alike / 4) == score


def test_a_seed_is_a_clustering(features):
    here, alike, _ = features
    scores = [mauve(here, alike, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("p", "q", "clusters"),
    [
        (np.zeros((0, 2)), np.zeros((3, 2)), None),
        (np.zeros((3, 2)), np.zeros((3, 1)), None),
        (np.zeros(3), np.zeros(3), None),
        (np.zeros((3, 0)), np.zeros((3, 0)), None),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), None),
        (np.zeros((3, 2)), np.zeros((3, 2)), 0),
    ],
)
def test_bad_features_are_user_errors(p, q, clusters):
    with pytest.raises(UserError, match=r"pass|leave out"):
        mauve(p, q, clusters)


@pytest.fixture(scope="module")
def lines():
    return sentences(1_000)


def test_halves_of_a_corpus_are_closer_than_corpora(lines):
    renamed = [" ".join(word.upper() if WORDS.index(word) % 2 else word for word in line.split()) for line in lines]
    halves, across = divergence(lines[::2], lines[1::2]), divergence(lines[::2], renamed[1::2])
    assert halves > 0.9
    assert across < halves - 0.3
    assert divergence(lines[::2], [line.upper().replace(".", "!") for line in lines[1::2]]) < 0.02


def test_order_of_words_and_lack_of_variety_are_seen(lines):
    fixed = [" ".join(sorted(line.split())) for line in lines]
    halves = divergence(fixed[::2], fixed[1::2])
    assert divergence(lines[::2], fixed[1::2]) < halves - 0.2  # the same words in another order
    assert divergence(lines[:20] * 25, lines[500:]) < halves - 0.5


def test_texts_may_be_swapped_and_shuffled(lines):
    here, there = lines[:200], lines[200:350]
    score = divergence(here, there)
    assert divergence(there, here) == pytest.approx(score)
    assert divergence(here[::-1], there[::-1]) == score


def test_a_text_has_the_same_features_in_both_sets(lines):
    assert divergence(lines[:50], lines[:50]) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "a", "猫 が 好き", "a b " * 5_000], ids=["empty", "word", "unicode", "long"])
def test_strange_texts_are_compared(text):
    assert divergence([text], [text]) == pytest.approx(1)
    assert 0 < divergence([text, "x y"], ["z"]) < 1
    assert 0 < divergence([text] * 30, ["x y z"] * 30) < 0.1


@pytest.mark.parametrize(("texts", "real"), [([], ["a"]), (["a"], []), ("a", ["a"]), (["a"], "a")])
def test_no_texts_on_a_side_are_a_user_error(texts, real):
    with pytest.raises(UserError, match="no texts"):
        divergence(texts, real)
