"""Exact controls end to end: whatever a model with random weights says, its texts are what was asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embdiff import TextDiffusionPipeline, vocabulary
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.guidance.length import Length
from embdiff.guidance.lexical import Lexical, matcher
from embdiff.noise import GumbelSchedule
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
        (lambda: [Lexical()], "without words"),
        (lambda: [Lexical(include=[""])], "empty"),
        (lambda: [Lexical(keep={30: "cat"})], "position 30"),
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
