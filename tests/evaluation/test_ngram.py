"""Laws of the Kneser-Ney model: it is a distribution, and it depends on counts alone."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.evaluation.ngram import NGram

words = st.sampled_from(["a", "b", "c", "<s>", "</s>", "<unk>"])
sentences = st.lists(words, max_size=6)
corpora = st.lists(sentences, min_size=1, max_size=8)
orders = st.integers(1, 4)


def test_probabilities_worked_by_hand():
    model = NGram.fit(["a b"], order=2)
    after_nothing = (1 - 0.75 + 0.75 * 3 / 4) / 3  # one of three bigram types ends in "a"; four outcomes
    assert math.exp(model.logprob("a")[0]) == pytest.approx(1 - 0.75 + 0.75 * after_nothing)
    assert model.distribution("z") == pytest.approx([after_nothing, 0.75 / 4, after_nothing, after_nothing])


@settings(deadline=None)
@given(corpora, orders, sentences, st.integers(1, 3))
def test_probabilities_sum_to_one_after_any_history(corpus, order, history, min_count):
    distribution = NGram.fit(corpus, order=order, min_count=min_count).distribution(history)
    assert distribution.sum() == pytest.approx(1)
    assert (distribution > 0).all()


@settings(deadline=None)
@given(corpora, orders, sentences)
def test_logprob_reads_the_distribution_along_the_line(corpus, order, line):
    model = NGram.fit(corpus, order=order)
    outcomes = {word: i for i, word in enumerate(model.vocabulary, start=2)}
    ids = [*(outcomes.get(word, 1) for word in line), 0]
    expected = [model.distribution(line[:i])[outcome] for i, outcome in enumerate(ids)]
    assert np.exp(model.logprob(line)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.data(), corpora, orders)
def test_order_of_lines_does_not_matter(data, corpus, order):
    shuffled = data.draw(st.permutations(corpus))
    assert NGram.fit(corpus, order=order) == NGram.fit(shuffled, order=order)


@settings(deadline=None)
@given(corpora, orders, st.floats(0.05, 0.95))
def test_repeating_the_text_never_raises_its_cross_entropy(corpus, order, discount):
    """The discount then takes a smaller part of each count, so the model nears the text's own frequencies."""
    once = NGram.fit(corpus, order=order, discount=discount).cross_entropy(corpus)
    twice = NGram.fit(corpus * 2, order=order, discount=discount).cross_entropy(corpus)
    assert twice <= once + 1e-9


@settings(deadline=None)
@given(corpora)
def test_unigram_cross_entropy_is_at_least_the_entropy(corpus):
    counts = Counter(word for line in corpus for word in [*line, None])
    total = counts.total()
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert NGram.fit(corpus, order=1).cross_entropy(corpus) >= entropy - 1e-9


def test_strings_and_lists_of_words_are_the_same_line():
    model = NGram.fit(["a b c", "a c"], order=3)
    assert model == NGram.fit([["a", "b", "c"], ["a", "c"]], order=3)
    assert (model.logprob(" a  b ") == model.logprob(["a", "b"])).all()


def test_words_outside_the_vocabulary_are_unknown():
    rare = NGram.fit(["a b", "a c"], min_count=2)
    assert rare.vocabulary == ("a",)
    assert rare == NGram.fit(["a b", "a c"], vocabulary=["a", "<unk>"])
    assert (rare.logprob("a b") == rare.logprob("a <unk>")).all()


def test_real_text_is_likelier_in_its_order():
    lines = ["the mill is a pub near the river", "the vaults is a pub near the mill"] * 3
    model = NGram.fit(lines)
    assert model.cross_entropy(lines) < model.cross_entropy([line.split()[::-1] for line in lines])


@pytest.mark.parametrize(
    ("lines", "options"),
    [([], {}), (["a"], {"order": 0}), (["a"], {"discount": 1.0}), (["a"], {"discount": 0.0})],
)
def test_bad_input_to_fit_is_a_user_error(lines, options):
    with pytest.raises(UserError):
        NGram.fit(lines, **options)


def test_cross_entropy_of_no_lines_is_a_user_error():
    with pytest.raises(UserError, match="no lines"):
        NGram.fit(["a"]).cross_entropy([])
