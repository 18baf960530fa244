"""The E2E forms on hand-made examples, and BLEU on both of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.evaluation import e2e, metrics

texts = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), min_size=1, max_size=8)
plain = st.text(alphabet="ab1 .,-'£?!", max_size=30)


def test_meaning_to_source_names_orders_and_tokenises():
    meaning = (
        "name[The Eagle], eatType[coffee shop], priceRange[£20-25], food[French], near[Café Rouge], "
        "customer rating[3 out of 5], familyFriendly[yes], area[riverside]"
    )
    assert e2e.meaning_to_source(meaning) == (
        "name : The Eagle | Type : coffee shop | food : French | price : £ 20 - 25 | "
        "customer rating : 3 out of 5 | area : riverside | family friendly : yes | near : Café Rouge"
    )
    assert e2e.meaning_to_source("priceRange[less than £20]") == "price : less than £ 20"


@pytest.mark.parametrize("meaning", ["", "The Eagle", "name[A], colour[red]", "name[A], here", "name[A"])
def test_a_strange_meaning_is_a_user_error(meaning):
    with pytest.raises(UserError, match="not an E2E meaning"):
        e2e.meaning_to_source(meaning)


def test_references_are_grouped_by_meaning_in_file_order(tmp_path):
    path = tmp_path / "refs.csv"
    path.write_text('"mr","ref"\nname[B],"B, here."\nname[A],A.\nname[B],Café B.\n', encoding="utf-8")
    assert e2e.read_e2e_references(path) == [("name[B]", ["B, here.", "Café B."]), ("name[A]", ["A."])]


def test_unreadable_references_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        e2e.read_e2e_references(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("source,target\na,b\n")
    with pytest.raises(UserError, match="no column 'mr'"):
        e2e.read_e2e_references(tmp_path / "other.csv")


WRITTEN = [
    ("It's a kid-friendly, 5-star pub.", "It 's a kid - friendly , 5-star pub ."),
    ("It isn't cheap: £20-25 or £30.50!", "It is n't cheap : £ 20 - 25 or £ 30.50 !"),
    ("Go to 'The Mill' near Café Rouge.", "Go to ' The Mill ' near Café Rouge ."),
]


@pytest.mark.parametrize(("written", "tokenised"), WRITTEN)
def test_tokenize_and_detokenize_invert_each_other(written, tokenised):
    assert e2e.tokenize(written) == tokenised
    assert e2e.detokenize(tokenised) == written


def test_both_cuts_of_a_negation_become_one():
    assert e2e.tokenize("It isn 't near") == e2e.tokenize("It isn't near") == "It is n't near"


@given(plain)
def test_tokenize_only_sets_blanks(text):
    assert "".join(e2e.tokenize(text).split()) == "".join(text.split())


@given(texts, st.sampled_from(["13a", "e2e"]))
def test_bleu_of_a_text_with_itself_is_100(texts, scheme):
    hypotheses = [*texts, "There is a kid - friendly pub ."]
    references = [[e2e.detokenize(text), "Another one."] for text in hypotheses]
    assert e2e.corpus_bleu(hypotheses, references, tokenize=scheme) == pytest.approx(100)


@pytest.mark.parametrize("scheme", ["13a", "e2e"])
@pytest.mark.parametrize(("written", "tokenised"), WRITTEN)
def test_bleu_takes_written_and_tokenised_text(scheme, written, tokenised):
    assert e2e.corpus_bleu([tokenised], [[written]], tokenize=scheme) == pytest.approx(100)


def test_bleu_takes_the_best_of_uneven_references_and_ignores_case():
    references = [["the mill is a pub", "another text"], ["the vaults is cheap"]]
    assert e2e.corpus_bleu(["The Mill is a pub", "The Vaults is cheap"], references) == pytest.approx(100)
    strict = e2e.corpus_bleu(["The Mill is a pub", "The Vaults is cheap"], references, lowercase=False)
    assert strict < 100


def test_written_text_without_case_is_what_it_scores():
    hypotheses, references = ["The Mill is n't a pub ."], [["the mill isn't a cheap - pub ."]]
    plain = metrics.corpus_bleu(["The Mill isn't a pub."], references, lowercase=True)
    assert e2e.corpus_bleu(hypotheses, references) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("hypotheses", "references", "scheme"),
    [([], [], "13a"), (["a"], [], "13a"), (["a"], [[]], "13a"), (["a"], ["a"], "13a"), (["a"], [["a"]], "none")],
)
def test_bad_input_to_bleu_is_a_user_error(hypotheses, references, scheme):
    with pytest.raises(UserError):
        e2e.corpus_bleu(hypotheses, references, tokenize=scheme)
