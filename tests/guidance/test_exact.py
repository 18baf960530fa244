"""Exact controls end to end: whatever a model with random weights says, its texts are what was asked for."""

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embdiff import TextDiffusionPipeline, vocabulary
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.guidance import parse
from embdiff.guidance.base import Run
from embdiff.guidance.length import Length
from embdiff.guidance.lexical import Lexical, always, finder, matcher, read
from embdiff.noise import GumbelSchedule
from embdiff.prediction import Predictor
from embdiff.schedulers import RenoiseScheduler
from tests.conftest import lively, sentences


def pipe_of(tokenizer, length=24):
    denoiser = lively(Denoiser(len(tokenizer), dim=16, width=32, depth=1, heads=2, max_length=length))
    schedule = GumbelSchedule.initial(16, len(tokenizer))
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler(noise_schedule=schedule.config()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["word", "bpe"])
def any_pipe(request):
    texts = sentences(300)
    return pipe_of(vocabulary.train_word(texts) if request.param == "word" else vocabulary.train_bpe(texts, 330))


def drawn(pipe, *guidance, samples=6, steps=3):
    generator = torch.Generator().manual_seed(0)
    out = pipe(num_samples=samples, num_inference_steps=steps, generator=generator, guidance=guidance)
    ends = [vocabulary.before_end(pipe.tokenizer, ids) for ids in out.sequences.tolist()]
    return out.texts, [len(ids) for ids in ends]


@settings(max_examples=8)
@given(n=st.integers(0, 24), strength=st.sampled_from([1.0, 0.5, 0.0]))
def test_exact_tokens(any_pipe, n, strength):
    _, tokens = drawn(any_pipe, Length(tokens=n, complete=False, strength=strength))
    assert tokens == [n] * 6


@settings(max_examples=8)
@given(n=st.integers(1, 8))
def test_exact_words_in_complete_sentences(any_pipe, n):
    texts, _ = drawn(any_pipe, Length(words=n))
    assert [len(text.split()) for text in texts] == [n] * 6
    assert all(text.rstrip().rstrip("\"')]}").endswith((".", "!", "?")) for text in texts)


@settings(max_examples=8)
@given(n=st.integers(3, 40))
def test_exact_characters(any_pipe, n):
    texts, _ = drawn(any_pipe, Length(characters=n, complete=False))
    assert [len(text) for text in texts] == [n] * 6


def test_ranges_and_a_length_for_each_sample(any_pipe):
    texts, tokens = drawn(any_pipe, Length(words="2-4", tokens="-12"))
    assert all(2 <= len(text.split()) <= 4 for text in texts)
    assert max(tokens) <= 12
    texts, _ = drawn(any_pipe, Length(words=[1, 2, 3, 4, (5, 6), "5-"], complete=False))
    assert [len(text.split()) for text in texts][:4] == [1, 2, 3, 4]
    assert all(len(text.split()) >= 5 for text in texts[4:])


def test_phrases_appear_and_banned_words_do_not(any_pipe):
    plain, _ = drawn(any_pipe)
    common = sorted(
        {word for text in plain for word in text.split() if word.isalpha()} & {"cat", "dog", "red", "the", "a"}
    )
    guidance = Lexical(include=["Small tree", "house"], exclude=["the", *common])
    texts, _ = drawn(any_pipe, guidance, Length(tokens=20))
    for text in texts:
        assert matcher(["small tree"]).search(text)
        assert matcher(["house"]).search(text)
        assert not matcher(["the", *common]).search(text)


def test_ordered_phrases_come_in_order(any_pipe):
    texts, _ = drawn(any_pipe, Lexical(include=["tree", "cat", "house"], ordered=True))
    for text in texts:
        places = [matcher([word]).search(text).start() for word in ("tree", "cat", "house")]
        first = min(m.start() for m in matcher(["tree"]).finditer(text))
        last = max(m.start() for m in matcher(["house"]).finditer(text))
        assert any(first < m.start() < last for m in matcher(["cat"]).finditer(text)), places


def test_kept_positions_are_kept(any_pipe):
    words = any_pipe.tokenizer
    out = any_pipe(num_samples=3, num_inference_steps=3, guidance=[Lexical(keep={2: " the red cat", 9: " dog"})])
    ids = words(" the red cat", add_special_tokens=False)["input_ids"]
    dog = words(" dog", add_special_tokens=False)["input_ids"]
    assert torch.equal(out.sequences[:, 2 : 2 + len(ids)], torch.tensor([ids] * 3))
    assert torch.equal(out.sequences[:, 9 : 9 + len(dog)], torch.tensor([dog] * 3))


@pytest.mark.parametrize(
    ("guidance", "cause"),
    [
        (
            lambda: [
                Length(tokens=5),
                Lexical(include=["cat", "dog", "tree", "red", "blue", "small", "large", "house"]),
            ],
            "no text",
        ),
        (lambda: [Lexical(include=["a cat"], exclude=["cat"])], "'cat' is excluded"),
        (lambda: [Lexical(include=["cat"]), Lexical(exclude=["Cat"])], "cat"),
        (lambda: [Length(words=99)], "words 99"),
        (lambda: [Length(words="7-5")], "empty range"),
        (lambda: [Length()], "words=12"),
        (lambda: [Length(words="many")], "many"),
        (lambda: [Length(words=[1, 2])], "2 lengths"),
        (lambda: [Length(words=(8.7, 12.2))], "is no length"),
        (lambda: [Length(tokens=(-1, 3))], "negative"),
        (lambda: [Lexical(exclude=["cat"], gradient=1.0)], "what must appear"),
        (lambda: [Length(words=3, strength=0.0, gradient=1.0)], "at strength 0 does nothing"),
        (lambda: [Length(words=-3)], "words -3 is negative: .* '-3' for at most"),
        (lambda: [Length(tokens=[1, 2, 3, 4, 5, -6])], "tokens -6 is negative"),
        (lambda: [Lexical()], "without words"),
        (lambda: [Lexical(include=[""])], "empty"),
        (lambda: [Lexical(keep={30: "cat"})], "position 30"),
        (lambda: [Lexical(keep={3: ""})], "no word to keep"),
        (lambda: [Length(words=5, min_gamma=2.0, max_gamma=1.0)], "min_gamma"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(any_pipe, guidance, cause):
    steps = []
    with pytest.raises(UserError, match=cause):
        any_pipe(num_samples=6, guidance=guidance(), callback_on_step_end=lambda *state: steps.append(state))
    assert not steps


def test_words_that_a_word_tokenizer_lacks_are_refused():
    pipe = pipe_of(vocabulary.train_word(sentences(50)))
    with pytest.raises(UserError, match="zebra"):
        pipe(guidance=[Lexical(include=["a zebra"])])


def test_kept_words_are_kept_as_they_are_written():
    pipe = pipe_of(vocabulary.train_word(sentences(50)))
    assert all(text.startswith("the ") for text in drawn(pipe, Lexical(keep={0: "the"}))[0])
    with pytest.raises(UserError, match="no 'The'"):
        pipe(guidance=[Lexical(keep={0: "The"})])


def test_a_kept_word_is_a_word_of_its_own(any_pipe):
    out = any_pipe(num_samples=4, num_inference_steps=3, guidance=[parse("lexical:keep=0=red|3=cat")])
    pieces = vocabulary.pieces(any_pipe.tokenizer)
    assert all(text.startswith("red") for text in out.texts)
    assert all(pieces[row[3]] == " cat" for row in out.sequences.tolist())


@pytest.fixture(scope="module")
def byte_pipe():
    """Of a tokenizer that spells ï and é byte by byte."""
    return pipe_of(vocabulary.train_bpe(sentences(300), 330))


def row_of(pipe, tokens, length=24):
    """[1, length]: the tokens and the end."""
    return torch.tensor([[*tokens, *[pipe.tokenizer.eos_token_id] * length][:length]])


PARTS = ["naïve", " naïve", " naïve café", "é", "ï", " cat", "s", ".", " "]


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(0, 9), st.integers(1, 9)), max_size=4))
def test_phrases_are_found_where_the_decoded_text_has_them(byte_pipe, cuts):
    tokenizer = byte_pipe.tokenizer
    tokens = [t for text, first, last in cuts for t in vocabulary.tokens(tokenizer, text)[first % 3 : last]][:20]
    run, row = Run(byte_pipe.denoiser, tokenizer, samples=1, length=24), row_of(byte_pipe, tokens)
    text = vocabulary.decode(tokenizer, tokens)
    assert "".join(read(tokens, run)) == text
    banned = matcher(["naïve", "café", "é."])
    begins, whole = finder(banned, run)(row), finder(banned, run, whole=True)(row)
    assert begins.sum() == len({m.start() for m in banned.finditer(text)})
    assert not (begins & ~whole).any()


def test_words_of_bytes_can_be_asked_for_at_a_position_alone(byte_pipe):
    with pytest.raises(UserError, match="spells 'ï' by parts of a character"):
        byte_pipe(guidance=[Lexical(include=["naïve cat"])])


@pytest.fixture(scope="module")
def piece_pipe():
    """Of a tokenizer that marks where words begin, and drops the first blank of a text."""
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
    learnt.pre_tokenizer, learnt.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    specials = list(vocabulary.SPECIALS.values())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    learnt.train_from_iterator(sentences(300), trainer)
    return pipe_of(vocabulary._wrap(learnt))


@settings(max_examples=8)
@given(n=st.integers(1, 30))
def test_exact_characters_of_texts_that_begin_within_a_word(piece_pipe, n):
    pieces = vocabulary.pieces(piece_pipe.tokenizer)
    assert len({text[0] == " " for text in pieces if text}) == 2
    texts, _ = drawn(piece_pipe, Length(characters=n, complete=False), samples=20)
    assert [len(text) for text in texts] == [n] * 20


def test_a_piece_that_may_go_on_is_no_word_by_itself(piece_pipe):
    pieces = vocabulary.pieces(piece_pipe.tokenizer)
    word = next(text.strip() for text in pieces if text and text[0] == " " and text.strip().isalpha())
    assert not always(piece_pipe.tokenizer, (word,))
    texts, _ = drawn(piece_pipe, Lexical(exclude=[word]), samples=20)
    assert not any(matcher([word]).search(text) for text in texts)


@given(st.data())
def test_what_steps_need_not_look_for_is_banned_token_by_token(any_pipe, data):
    pieces = vocabulary.pieces(any_pipe.tokenizer)
    words = [*sorted({text.strip() for text in pieces if text and text.strip()}), "unheard"]
    phrases = st.lists(st.sampled_from(words), min_size=1, max_size=3).map(" ".join)
    banned = data.draw(st.lists(phrases, min_size=1, max_size=4))
    ids = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=9))
    run = Run(any_pipe.denoiser, any_pipe.tokenizer, samples=1, length=len(ids))
    *bans, veto = Lexical(exclude=banned).parts(run)
    alone = {token for ban in bans for token in ban.tokens}
    within = vocabulary.before_end(any_pipe.tokenizer, ids)
    marked = veto.find(torch.tensor([ids]))[0, : len(within)].tolist()
    assert veto.drafts or marked == [token in alone for token in within]


@pytest.mark.parametrize(("phrase", "drafts"), [("cat", False), ("cat unheard", False), ("the cat", True)])
def test_steps_look_for_what_may_come_of_several_tokens(any_pipe, phrase, drafts):
    apart = all(text is None or text[0] == " " for text in vocabulary.pieces(any_pipe.tokenizer))
    run = Run(any_pipe.denoiser, any_pipe.tokenizer, samples=1, length=4)
    *_, veto = Lexical(exclude=["dog", phrase]).parts(run)
    assert veto.drafts is (drafts or not apart)


def test_words_of_bytes_are_excluded_and_kept(byte_pipe):
    tokens = vocabulary.tokens(byte_pipe.tokenizer, "a naïve cat")
    run = Run(byte_pipe.denoiser, byte_pipe.tokenizer, samples=1, length=24)
    z = byte_pipe.denoiser.space.embed(row_of(byte_pipe, tokens))
    rounded = Predictor(run, [Lexical(exclude=["naïve"])], kept=byte_pipe._kept_tokens()).round(z)
    (text,) = byte_pipe.decode(rounded)
    assert text.startswith("a")
    assert text.endswith(" cat")
    assert "naïve" not in text
    kept = vocabulary.tokens(byte_pipe.tokenizer, " naïve é")
    out = byte_pipe(num_samples=3, num_inference_steps=2, guidance=[Lexical(keep={2: " naïve é"})])
    assert torch.equal(out.sequences[:, 2 : 2 + len(kept)], torch.tensor([kept] * 3))


PHRASES = st.lists(st.sampled_from(["a", "ab", "a b", "b.", ".a", "-", "B", "bb"]), min_size=1, max_size=4)


@settings(max_examples=200)
@given(st.text("ab. -", max_size=12), PHRASES)
def test_many_phrases_are_found_where_any_of_them_is(text, phrases):
    found = matcher(phrases).search(text)
    each = [m.start() for phrase in phrases if (m := matcher([phrase]).search(text))]
    assert (found.start() if found else None) == min(each, default=None)


def test_a_lexicon_is_one_search(any_pipe):
    words = [f"word{i}" for i in range(400)] + ["cat"]
    assert matcher(words).pattern.count("(?<!") == 1  # what stands before is looked at once at each character
    run = Run(any_pipe.denoiser, any_pipe.tokenizer, samples=1, length=24)
    list(Lexical(exclude=words).parts(run))
    before = always.cache_info()
    list(Lexical(exclude=words).parts(run))
    after = always.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
