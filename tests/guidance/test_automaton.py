"""Automata: marginals and best texts, each against all texts written out."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.guidance.automaton import Automaton, Shares, aligned
from embdiff.guidance.language import PART, CharacterCount, Kept, Phrases, Sentences, Span, TokenCount, WordCount
from embdiff.guidance.lexical import matcher

TEXTS = [" cat", " a", ".", "s", " ", None]  # None: a special token
LENGTH = 4


def is_in(language, text, sample=0):
    state = language.start
    for token in text:
        state = language.step(state, language.symbol(token, TEXTS.index(token) if token in TEXTS else -1))
        if state is None:
            return False
    return language.accepts(state, sample)


LANGUAGES = {
    "tokens": [TokenCount([Span(2, 3), Span(4, 4)])],
    "words": [WordCount([Span(2, 2), Span(1, 3)])],
    "characters": [CharacterCount([Span(5, 8)])],
    "sentence": [Sentences()],
    "phrases": [Phrases(["cat", "a"])],
    "in order": [Phrases(["a cat", "a"], ordered=True)],
    "several": [WordCount([Span(2, 2)]), Sentences(), Phrases(["cats"])],
    "kept": [Kept({0: 1, 2: 3})],
    "none": [],
}


@given(st.sampled_from(sorted(LANGUAGES)), st.integers(0, 99))
def test_marginals_and_the_best_text_are_those_of_all_texts_written_out(name, seed):
    languages, generator = LANGUAGES[name], torch.Generator().manual_seed(seed)
    automaton = Automaton.of(languages, TEXTS, 2, LENGTH, "it")
    C = len(automaton.sizes)
    tokens = automaton.order.tolist()
    first = dict(zip(itertools.accumulate((0, *automaton.sizes[:-1])), range(C), strict=True))
    shares = torch.rand(2, LENGTH, C + 2, generator=generator).softmax(-1)
    given_shares = Shares(shares[..., :C], shares[..., C], shares[..., C + 1])
    found = automaton.marginals(given_shares)
    best, score = automaton.best(Shares(*(s.log() for s in given_shares)))
    representative = {c: TEXTS[tokens[start]] for start, c in first.items()}
    for b in range(2):
        expected, highest = torch.zeros(LENGTH, C + 2), (0.0, ())
        for n in range(LENGTH + 1):
            for classes in itertools.product(range(C), repeat=n):
                if all(is_in(language, [representative[c] for c in classes], b) for language in languages):
                    whole = (*classes, *((C,) + (C + 1,) * LENGTH)[: LENGTH - n])
                    p = float(torch.stack([shares[b, i, c] for i, c in enumerate(whole)]).prod())
                    for i, c in enumerate(whole):
                        expected[i, c] += p
                    highest = max(highest, (p, whole))
        expected /= expected.sum(1, keepdim=True)
        torch.testing.assert_close(torch.cat([found.classes[b], found.end[b, :, None], found.padding[b, :, None]], 1),
                                   expected, atol=1e-4, rtol=1e-3)  # fmt: skip
        assert tuple(best[b].tolist()) == highest[1]
        assert score[b].exp().item() == pytest.approx(highest[0], rel=1e-4)


@pytest.mark.parametrize("likely", [0.0, 1e-30, 0.5])
@pytest.mark.parametrize(("language", "texts"), [(TokenCount, [" a", "s"]), (WordCount, [" a", " "])])
def test_what_is_improbable_in_a_long_text_is_planned_all_the_same(language, texts, likely):
    """Of 200 in 256 places, what must come may be less probable than any number."""
    L, n = 256, 200
    automaton = Automaton.of([language([Span(n, n)])], texts, 2, L, "it")
    C = len(automaton.sizes)
    shares = torch.full((2, L, C), likely / C, dtype=torch.float64)
    shares[1, ::2] = 0.0
    found = automaton.marginals(Shares(shares, torch.zeros(2, L), 1 - shares.sum(-1)))
    whole = torch.cat([found.classes, found.end[..., None], found.padding[..., None]], -1)
    assert torch.allclose(whole.sum(-1), torch.ones(2, L, dtype=torch.float64))
    counted = found.classes if language is TokenCount else found.classes[..., automaton.order.tolist().index(0)]
    assert torch.allclose(counted.flatten(1).sum(1), torch.full((2,), float(n), dtype=torch.float64))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(LANGUAGES)), st.integers(0, 99), st.sampled_from([1, 2**30]))
def test_products_and_logs_give_the_same_marginals_in_parts_too(monkeypatch, name, seed, most):
    monkeypatch.setattr("embdiff.guidance.automaton.MOST", most)
    L, generator = 21, torch.Generator().manual_seed(seed)
    found = Automaton.of(LANGUAGES[name], TEXTS, 2, L, "it")
    shares = (9 * torch.randn(2, L, len(found.sizes) + 2, generator=generator, dtype=torch.float64)).softmax(-1)
    given_shares = Shares(shares[..., :-2], shares[..., -2], shares[..., -1])
    for one, other in zip(found.marginals(given_shares), found._marginals_by_logs(given_shares), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 99))
def test_automata_over_common_classes_say_the_same_of_every_token(seed):
    apart = [Automaton.of(LANGUAGES[name], TEXTS, 2, LENGTH, "it") for name in ("words", "phrases", "kept")]
    words = [i for i, text in enumerate(TEXTS) if text is not None]
    p = torch.rand(2, LENGTH, len(TEXTS) + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)

    def marginals(automaton):
        """Of each token, and of the end."""
        groups = automaton.order.split(automaton.sizes)
        shares = torch.stack([p[..., group].sum(-1) for group in groups], -1)
        found = automaton.marginals(Shares(shares, p[..., -2], p[..., -1]))
        tokens = torch.zeros_like(p)
        for c, group in enumerate(groups):
            tokens[..., group] = p[..., group] / shares[..., c, None] * found.classes[..., c, None]
        return torch.cat([tokens[..., words], found.end[..., None]], -1)

    together = aligned(apart)
    assert all(torch.equal(each.order, together[0].order) and each.sizes == together[0].sizes for each in together)
    for one, other in zip(apart, together, strict=True):
        assert torch.allclose(marginals(one), marginals(other))


WORDS = st.text(st.sampled_from("ab. -"), min_size=1, max_size=4)


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=6))
def test_counts_are_those_of_the_whole_text_however_it_is_cut(pieces):
    text = "".join(pieces)
    assert is_in(WordCount([Span(len(text.split()), len(text.split()))]), pieces)
    assert not is_in(WordCount([Span(len(text.split()) + 1, 99)]), pieces)
    assert is_in(CharacterCount([Span(len(text), len(text))]), pieces)
    assert is_in(TokenCount([Span(len(pieces), len(pieces))]), pieces)


def test_words_are_not_counted_among_parts_of_characters():
    """Two of them may spell a blank."""
    for count in (1, 2):
        assert not is_in(WordCount([Span(count, count)]), ["a", PART, PART, "b"])


CASES = "ßẞsSσςΣİiIKkæÆ"


@settings(max_examples=300)
@given(st.text(CASES, min_size=1, max_size=3), st.text(CASES + " ", max_size=8), st.integers(0, 8))
def test_case_is_that_of_regular_expressions(phrase, text, cut):
    """So that what must appear is found by who looks for it, and cannot be in a text that it is excluded from."""
    if is_in(Phrases([phrase]), [text[:cut], text[cut:]]):
        assert matcher([phrase]).search(text)
    assert is_in(Phrases([phrase]), [phrase.swapcase()]) or len(phrase.swapcase()) != len(phrase)


def occurs(phrase, text):
    words = " ".join(text.split())
    places = [i for i in range(len(words)) if words.startswith(phrase, i)]
    return any((i == 0 or not words[i - 1].isalnum() or not phrase[0].isalnum())
               and (i + len(phrase) == len(words) or not words[i + len(phrase)].isalnum() or not phrase[-1].isalnum())
               for i in places)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(WORDS, max_size=6), st.lists(st.sampled_from(["a", "ab", "a b", "b - a", "ba", "."]), max_size=3))
def test_phrases_are_found_as_whole_words_however_the_text_is_cut(pieces, phrases):
    assert is_in(Phrases(phrases), pieces) == all(occurs(p, "".join(pieces)) for p in phrases)


def test_phrases_in_order_are_found_in_order_alone():
    language = Phrases(["a", "b"], ordered=True)
    assert is_in(language, ["a ", "b"])
    assert not is_in(language, ["b ", "a"])
    assert is_in(language, ["b a", " b"])


@pytest.mark.parametrize(
    ("text", "ends"),
    [("a .", True), ("a", False), ('a ."', True), ('"', True), ("a ) ", False), ("a ! )", True), ("", True)],
)
def test_sentences_end_with_their_mark(text, ends):
    assert is_in(Sentences(), text.split(" ")) == ends
    assert is_in(Sentences(), list(text)) == ends


def test_what_no_text_has_is_refused():
    with pytest.raises(UserError, match="length 9: no text of at most 4 tokens"):
        Automaton.of([WordCount([Span(9, 9)])], TEXTS, 1, LENGTH, "length 9")
    with pytest.raises(UserError, match="sample 1"):
        Automaton.of([WordCount([Span(2, 2), Span(5, 5)])], TEXTS, 2, LENGTH, "lengths")


def test_a_part_of_a_character_beside_a_phrase_may_become_a_letter():
    language = Phrases(["cat"])
    assert is_in(language, ["cat", " ", "\ufffd"])
    assert not is_in(language, ["\ufffd", "cat"])
    assert not is_in(language, ["cat", "\ufffd"])
