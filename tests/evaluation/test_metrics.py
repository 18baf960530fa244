"""Laws of the text measures: bounds, identities, and agreement with naive or published counting."""

import math
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.evaluation import metrics
from tests.conftest import sentences

text = st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join)
texts = st.lists(text, min_size=1, max_size=8)
several = st.lists(text, min_size=2, max_size=8)
referenced = st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=5)


@given(texts)
def test_entropy_lies_between_zero_and_that_of_equally_frequent_words(texts):
    kinds = len({word for text in texts for word in text.split()})
    assert -1e-12 <= metrics.unigram_entropy(texts) <= math.log(max(kinds, 1)) + 1e-9


def test_entropy_of_equally_frequent_words():
    assert metrics.unigram_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert metrics.unigram_entropy(["a a", "a"]) == 0


@given(texts, st.integers(1, 4))
def test_distinct_n_is_a_share(texts, n):
    has_grams = any(len(text.split()) >= n for text in texts)
    assert 0 < metrics.distinct_n(texts, n) <= 1 if has_grams else metrics.distinct_n(texts, n) == 0


@given(texts, st.integers(1, 4))
def test_saying_all_twice_halves_distinct_n_and_leaves_the_entropy(texts, n):
    assert metrics.distinct_n(texts * 2, n) == pytest.approx(metrics.distinct_n(texts, n) / 2)
    assert metrics.unigram_entropy(texts * 2) == pytest.approx(metrics.unigram_entropy(texts))


def test_distinct_n_counts_kinds_among_all():
    assert metrics.distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert metrics.distinct_n(["a b a", "a b"], 2) == 2 / 3


def test_length_and_repetition():
    assert metrics.mean_length(["a b c", "a"]) == 2
    assert metrics.repetition(["a a b b b", "b"]) == 3 / 4  # no pair across texts
    assert metrics.repetition(["a", ""]) == 0


@given(text, st.integers(1, 4))
def test_rep_n_of_one_text_is_what_distinct_n_leaves(text, n):
    expected = 1 - metrics.distinct_n([text], n) if len(text.split()) >= n else 0
    assert metrics.rep_n([text], n) == pytest.approx(expected)


def test_rep_n_is_a_mean_over_texts_that_have_n_grams():
    assert metrics.rep_n(["a a a a", "a b"], 1) == pytest.approx((3 / 4 + 0) / 2)
    assert metrics.rep_n(["a b a b", "a", ""], 2) == pytest.approx(1 / 3)


def bleu(hypothesis, references):
    options = {"smooth_method": "exp", "tokenize": "none", "use_effective_order": True}
    return sacrebleu.sentence_bleu(hypothesis, references, **options).score


@given(text, text)
def test_sentence_bleu_is_sacrebleus(hypothesis, reference):
    assert metrics.sentence_bleu(hypothesis, reference) == pytest.approx(bleu(hypothesis, [reference]))


@given(several, st.integers(1, 9), st.integers(0, 3))
def test_self_bleu_is_sacrebleus_against_the_next_of_a_drawn_cycle(texts, references, seed):
    drawn = [sorted(texts)[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    count = min(references, len(texts) - 1)
    expected = [bleu(drawn[i], (drawn * 2)[i + 1 : i + 1 + count]) for i in range(len(drawn))]
    assert metrics.self_bleu(texts, references=references, seed=seed) == pytest.approx(np.mean(expected))


@given(st.data(), several, st.integers(1, 8))
def test_self_bleu_does_not_depend_on_the_order_of_texts(data, texts, references):
    shuffled = data.draw(st.permutations(texts))
    assert metrics.self_bleu(shuffled, references=references) == metrics.self_bleu(texts, references=references)


def test_self_bleu_falls_with_diversity():
    lines = sentences(120)
    alike, varied = lines[:10] * 12, lines
    assert metrics.self_bleu(["a b c", "a b c"]) == pytest.approx(100)
    assert metrics.self_bleu(alike) == pytest.approx(100)
    assert metrics.self_bleu(varied) < 60
    assert metrics.self_bleu(["a b", "c d", "e f"]) == 0


@given(texts)
def test_a_word_more_in_every_text_is_a_distance_of_one(texts):
    longer = [text + " x" for text in texts]
    assert metrics.length_distance(texts, longer) == pytest.approx(1)
    quantiles = metrics.length_quantiles(texts)
    assert metrics.length_quantiles(longer) == pytest.approx([length + 1 for length in quantiles])


@given(texts, texts)
def test_length_distance_is_the_area_between_distributions_and_symmetric(texts, real):
    shares = [[sum(len(t.split()) <= n for t in part) / len(part) for n in range(9)] for part in (texts, real)]
    expected = sum(abs(a - b) for a, b in zip(*shares, strict=True))
    assert metrics.length_distance(texts, real) == pytest.approx(expected)
    assert metrics.length_distance(real, texts) == pytest.approx(expected)


@given(texts)
def test_length_quantiles_rise_from_the_shortest_to_the_longest(texts):
    lengths = [len(text.split()) for text in texts]
    quantiles = metrics.length_quantiles(texts, [0, 0.1, 0.5, 0.9, 1])
    assert quantiles == sorted(quantiles)
    assert (quantiles[0], quantiles[-1]) == (min(lengths), max(lengths))


def test_a_share_outside_all_is_a_user_error():
    with pytest.raises(UserError, match="shares="):
        metrics.length_quantiles(["a"], [0.5, 95])


@given(texts, st.sampled_from(metrics.TOKENIZATIONS))
def test_bleu_of_a_text_with_itself_is_100(texts, scheme):
    hypotheses = [*texts, "four words at least"]
    references = [["another text", text] for text in hypotheses]
    assert metrics.corpus_bleu(hypotheses, references, tokenize=scheme) == pytest.approx(100)


def test_bleu_takes_case_and_uneven_references():
    hypotheses, references = ["The mill is a pub", "a b c d"], [["the mill is a pub", "other"], ["a b c d"]]
    assert metrics.corpus_bleu(hypotheses, references) < 100
    assert metrics.corpus_bleu(hypotheses, references, lowercase=True) == pytest.approx(100)


def test_bleu_is_not_smoothed():
    assert metrics.corpus_bleu(["a b c d"], [["d c b a"]]) == 0


OVERLAPS = {
    "bleu": metrics.corpus_bleu,
    "chrf": metrics.corpus_chrf,
    "chrf++": lambda h, r: metrics.corpus_chrf(h, r, word_order=2),
    "rouge-1": lambda h, r: metrics.rouge_n(h, r, 1),
    "rouge-2": lambda h, r: metrics.rouge_n(h, r, 2),
    "rouge-l": metrics.rouge_l,
}
overlaps = pytest.mark.parametrize("overlap", OVERLAPS.values(), ids=OVERLAPS.keys())


@overlaps
@given(cases=referenced)
def test_overlap_lies_between_0_and_100_and_does_not_depend_on_the_order(overlap, cases):
    hypotheses, references = zip(*cases, strict=True)
    score = overlap(hypotheses, references)
    assert 0 <= score <= 100 + 1e-9
    assert overlap(hypotheses[::-1], references[::-1]) == pytest.approx(score)


@overlaps
@pytest.mark.parametrize(
    ("hypotheses", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a"], ["a"]), ("a", [["a"]])]
)
def test_bad_references_are_a_user_error(overlap, hypotheses, references):
    with pytest.raises(UserError, match="pass"):
        overlap(hypotheses, references)


def test_unknown_tokenisation_is_a_user_error():
    with pytest.raises(UserError, match="tokenize='e2e'"):
        metrics.corpus_bleu(["a"], [["a"]], tokenize="e2e")


@pytest.mark.parametrize("needing", [metrics.corpus_bleu, metrics.corpus_chrf])
def test_without_sacrebleu_one_is_told_how_to_install_it(needing, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'embdiff\[eval\]'"):
        needing(["a"], [["a"]])


def test_chrf_of_a_text_with_itself_is_100_and_favours_recall():
    assert metrics.corpus_chrf(["abc def", "g"], [["x", "abc def"], ["g"]]) == pytest.approx(100)
    assert metrics.sentence_chrf("abcdef", "abcdef") == pytest.approx(100)
    assert metrics.sentence_chrf("abcdef xyzuvw", "abcdef") > metrics.sentence_chrf("abcdef", "abcdef xyzuvw")
    assert metrics.corpus_chrf(["ABC"], [["abc"]]) < metrics.corpus_chrf(["ABC"], [["abc"]], lowercase=True)


def test_rouge_of_lins_examples():
    """Lin (2004), section 3.1: two candidates with the same ROUGE-2, told apart by ROUGE-L."""
    reference = [["Police killed the gunman."]]
    kill, reverse = ["police kill the gunman"], ["the gunman kill police"]
    assert metrics.rouge_l(kill, reference) == pytest.approx(75)
    assert metrics.rouge_l(reverse, reference) == pytest.approx(50)
    assert metrics.rouge_n(kill, reference, 2) == metrics.rouge_n(reverse, reference, 2) == pytest.approx(100 / 3)
    assert metrics.rouge_n(kill, reference, 1) == pytest.approx(75)


def common_subsequence(a, b):
    """Length by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(text, st.lists(text, min_size=1, max_size=3))
def test_rouge_l_is_that_of_the_textbook_with_the_best_reference(hypothesis, references):
    scores = [0.0]
    for reference in references:
        a, b = hypothesis.split(), reference.split()
        if shared := common_subsequence(a, b):
            precision, recall = shared / len(a), shared / len(b)
            scores.append(2 * precision * recall / (precision + recall))
    assert metrics.rouge_l([hypothesis], [references]) == pytest.approx(100 * max(scores))


@given(text, text)
def test_rouge_n_clips_counts(a, b):
    score = metrics.rouge_n([a], [[b]], 1)
    assert score == pytest.approx(metrics.rouge_n([b], [[a]], 1))
    words = max(len(a.split()) + len(b.split()), 1)
    assert score == pytest.approx(200 * sum(min(a.count(w), b.count(w)) for w in "abcde") / words)


def test_rouge_reads_letters_of_every_script_and_no_punctuation():
    assert metrics.rouge_l(["Café, Ärger!"], [["café ärger"]]) == pytest.approx(100)
    assert metrics.rouge_l(["кот видит"], [["кот"]]) == pytest.approx(200 / 3)
    assert metrics.rouge_l(["..."], [["!"]]) == 0


@given(st.lists(texts, max_size=4))
def test_mbr_chooses_the_candidate_that_the_others_vote_for(candidates):
    chosen = metrics.mbr(candidates)
    for choice, group in zip(chosen, candidates, strict=True):
        votes = [np.mean([bleu(a, [b]) for b in group[:i] + group[i + 1 :]] or [0]) for i, a in enumerate(group)]
        assert max(votes) - votes[group.index(choice)] < 1e-9


@pytest.mark.parametrize("utility", [metrics.sentence_bleu, metrics.sentence_chrf])
def test_mbr_takes_the_middle_one(utility):
    group = ["a dog sees a cat", "a dog sees a tree", "the bird sees a tree", "moo"]
    assert metrics.mbr([group, ["only"], group[::-1]], utility) == [group[1], "only", group[1]]


@given(st.permutations(["a b", "b a", "a b", "c", "b a"]))
def test_mbr_takes_the_first_of_equals(group):
    """Rounding must not decide between texts that were drawn equally often."""
    assert metrics.mbr([group], lambda a, b: 0.1 * (a == b) + 0.7) == [next(text for text in group if text != "c")]


def test_mbr_lets_nobody_vote_for_itself():
    def vain(a, b):
        return 9.0 if a == b == "me" else float(a == b)

    assert metrics.mbr([["me", "us", "us"]], vain) == ["us"]


def some_texts(count, random):
    return [" ".join(f"w{k}" for k in random.zipf(1.5, random.integers(3, 12)) if k < 300) for _ in range(count)]


@pytest.mark.parametrize(
    "figure", [metrics.mean_length, metrics.unigram_entropy, lambda texts: metrics.distinct_n(texts, 2)]
)
def test_a_standard_error_is_the_spread_of_other_samples(figure):
    random = np.random.default_rng(0)
    spread = np.std([figure(some_texts(200, random)) for _ in range(60)])
    errors = [metrics.standard_error(some_texts(200, random), figure, seed) for seed in range(20)]
    assert 0.7 * spread < math.sqrt(np.mean(np.square(errors))) < 1.4 * spread


def test_a_standard_error_needs_texts_that_differ():
    assert metrics.standard_error(["a b"] * 8, metrics.mean_length) == 0
    assert math.isnan(metrics.standard_error(["a", "b", "c"], metrics.unigram_entropy))


def test_mbr_without_candidates_is_a_user_error():
    assert metrics.mbr([]) == []
    with pytest.raises(UserError, match="without candidates"):
        metrics.mbr([["a"], []])
    with pytest.raises(UserError, match="without candidates"):
        metrics.mbr(["abc"])


MEASURES = {
    "entropy": metrics.unigram_entropy,
    "distinct": lambda t: metrics.distinct_n(t, 1),
    "mean length": metrics.mean_length,
    "quantiles": metrics.length_quantiles,
    "distance": lambda t: metrics.length_distance(t, ["a b"]),
    "distance of real": lambda t: metrics.length_distance(["a b"], t),
    "repetition": metrics.repetition,
    "rep": lambda t: metrics.rep_n(t, 2),
    "self-BLEU": metrics.self_bleu,
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


@measures
def test_no_texts_and_a_bare_string_are_user_errors(measure):
    with pytest.raises(UserError, match="no texts"):
        measure([])
    with pytest.raises(UserError, match="one string"):
        measure("a text")


@measures
@pytest.mark.parametrize(
    "texts",
    [["", ""], ["", "a"], ["  ", "\t\n"], ["猫 が 好き", "naïve\u00a0🙂 ‮x"], ["a b " * 20_000, "a"]],
    ids=["empty", "one empty", "blank", "unicode", "long"],
)
def test_strange_texts_have_finite_measures(measure, texts):
    assert np.isfinite(measure(texts)).all()


@overlaps
@pytest.mark.parametrize("hypothesis", ["", "  ", "🙂 ‮x", "a b " * 2_000], ids=["empty", "blank", "unicode", "long"])
def test_strange_texts_have_finite_overlaps(overlap, hypothesis):
    for references in (["a b"], [""], ["", hypothesis]):
        assert 0 <= overlap([hypothesis, "a b"], [references, ["a b"]]) <= 100 + 1e-9


def sentence_bleu(texts, n):
    return metrics.sentence_bleu(*texts, n)


@pytest.mark.parametrize("sized", [metrics.distinct_n, metrics.rep_n, metrics.self_bleu, sentence_bleu])
def test_grams_of_no_words_are_a_user_error(sized):
    with pytest.raises(UserError, match="n=0"):
        sized(["a", "b"], 0)


def test_self_bleu_needs_others():
    with pytest.raises(UserError, match="two or more"):
        metrics.self_bleu(["a"])
    with pytest.raises(UserError, match="references=0"):
        metrics.self_bleu(["a", "b"], references=0)
