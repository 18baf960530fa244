"""Laws of the text measures, and the E2E forms on hand-made examples."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.evaluation import metrics

texts = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), min_size=1, max_size=8)
plain = st.text(alphabet="ab1 .,-'£?!", max_size=30)


@settings(deadline=None)
@given(texts)
def test_entropy_lies_between_zero_and_that_of_equally_frequent_words(texts):
    kinds = len({word for text in texts for word in text.split()})
    assert -1e-12 <= metrics.unigram_entropy(texts) <= math.log(max(kinds, 1)) + 1e-9


def test_entropy_of_equally_frequent_words():
    assert metrics.unigram_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert metrics.unigram_entropy(["a a", "a"]) == 0


@settings(deadline=None)
@given(texts, st.integers(1, 4))
def test_distinct_n_is_a_share(texts, n):
    has_grams = any(len(text.split()) >= n for text in texts)
    assert 0 < metrics.distinct_n(texts, n) <= 1 if has_grams else metrics.distinct_n(texts, n) == 0


@settings(deadline=None)
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


def distinct_1(texts):
    return metrics.distinct_n(texts, 1)


@pytest.mark.parametrize("measure", [metrics.unigram_entropy, metrics.mean_length, metrics.repetition, distinct_1])
def test_no_texts_is_a_user_error(measure):
    with pytest.raises(UserError, match="no texts"):
        measure([])


def test_distinct_zero_is_a_user_error():
    with pytest.raises(UserError, match="n=0"):
        metrics.distinct_n(["a"], 0)


def test_meaning_to_source_names_orders_and_tokenises():
    meaning = (
        "name[The Eagle], eatType[coffee shop], priceRange[£20-25], food[French], near[Café Rouge], "
        "customer rating[3 out of 5], familyFriendly[yes], area[riverside]"
    )
    assert metrics.meaning_to_source(meaning) == (
        "name : The Eagle | Type : coffee shop | food : French | price : £ 20 - 25 | "
        "customer rating : 3 out of 5 | area : riverside | family friendly : yes | near : Café Rouge"
    )
    assert metrics.meaning_to_source("priceRange[less than £20]") == "price : less than £ 20"


@pytest.mark.parametrize("meaning", ["", "The Eagle", "name[A], colour[red]", "name[A], here", "name[A"])
def test_a_strange_meaning_is_a_user_error(meaning):
    with pytest.raises(UserError, match="not an E2E meaning"):
        metrics.meaning_to_source(meaning)


def test_references_are_grouped_by_meaning_in_file_order(tmp_path):
    path = tmp_path / "refs.csv"
    path.write_text('"mr","ref"\nname[B],"B, here."\nname[A],A.\nname[B],Café B.\n', encoding="utf-8")
    assert metrics.read_e2e_references(path) == [("name[B]", ["B, here.", "Café B."]), ("name[A]", ["A."])]


def test_unreadable_references_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        metrics.read_e2e_references(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("source,target\na,b\n")
    with pytest.raises(UserError, match="no column 'mr'"):
        metrics.read_e2e_references(tmp_path / "other.csv")


WRITTEN = [
    ("It's a kid-friendly, 5-star pub.", "It 's a kid - friendly , 5-star pub ."),
    ("It isn't cheap: £20-25 or £30.50!", "It is n't cheap : £ 20 - 25 or £ 30.50 !"),
    ("Go to 'The Mill' near Café Rouge.", "Go to ' The Mill ' near Café Rouge ."),
]


@pytest.mark.parametrize(("written", "tokenised"), WRITTEN)
def test_tokenize_and_detokenize_invert_each_other(written, tokenised):
    assert metrics.tokenize(written) == tokenised
    assert metrics.detokenize(tokenised) == written


def test_both_cuts_of_a_negation_become_one():
    assert metrics.tokenize("It isn 't near") == metrics.tokenize("It isn't near") == "It is n't near"


@settings(deadline=None)
@given(plain)
def test_tokenize_only_sets_blanks(text):
    assert "".join(metrics.tokenize(text).split()) == "".join(text.split())


@settings(deadline=None)
@given(texts, st.sampled_from(["13a", "e2e"]))
def test_bleu_of_a_text_with_itself_is_100(texts, scheme):
    hypotheses = [*texts, "There is a kid - friendly pub ."]
    references = [[text, "Another one ."] for text in hypotheses]
    assert metrics.corpus_bleu(hypotheses, references, tokenize=scheme) == pytest.approx(100)


@pytest.mark.parametrize("scheme", ["13a", "e2e"])
@pytest.mark.parametrize(("written", "tokenised"), WRITTEN)
def test_bleu_takes_written_and_tokenised_text(scheme, written, tokenised):
    assert metrics.corpus_bleu([tokenised], [[written]], tokenize=scheme) == pytest.approx(100)


def test_bleu_takes_the_best_of_uneven_references_and_ignores_case():
    references = [["the mill is a pub", "another text"], ["the vaults is cheap"]]
    assert metrics.corpus_bleu(["The Mill is a pub", "The Vaults is cheap"], references) == pytest.approx(100)
    strict = metrics.corpus_bleu(["The Mill is a pub", "The Vaults is cheap"], references, lowercase=False)
    assert strict < 100


def test_bleu_is_not_smoothed():
    assert metrics.corpus_bleu(["a b c d"], [["d c b a"]]) == 0


@pytest.mark.parametrize(
    ("hypotheses", "references", "scheme"),
    [([], [], "13a"), (["a"], [], "13a"), (["a"], [[]], "13a"), (["a"], [["a"]], "intl")],
)
def test_bad_input_to_bleu_is_a_user_error(hypotheses, references, scheme):
    with pytest.raises(UserError):
        metrics.corpus_bleu(hypotheses, references, tokenize=scheme)


def test_bleu_without_sacrebleu_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'embdiff\[eval\]'"):
        metrics.corpus_bleu(["a"], [["a"]])
