"""Drawing many samples, and texts as a model could have written them."""

import pytest

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.evaluation.samples import as_written, draw, some
from embdiff.guidance import Length
from tests.conftest import sentences


def test_texts_do_not_depend_on_their_batch(pipe):
    together = draw(pipe, [None] * 7, seed=3, num_inference_steps=4)
    told: list[int] = []
    apart = draw(pipe, [None] * 7, seed=3, batch_size=2, advance=told.append, num_inference_steps=4)
    assert together == apart
    assert told == [2, 2, 2, 1]
    assert draw(pipe, [None] * 5, seed=5, num_inference_steps=4) == together[2:]


def test_each_text_has_its_own_length_whatever_its_batch(pipe):
    lengths = [1, 2, 3, 4, 5]
    texts = draw(
        pipe, [None] * 5, batch_size=2, num_inference_steps=2, guidance=[Length(words=lengths, complete=False)]
    )
    assert [len(text.split()) for text in texts] == lengths
    with pytest.raises(UserError, match="2 lengths in words for 5 samples"):
        draw(pipe, [None] * 5, batch_size=2, guidance=[Length(words=[1, 2])])


def test_each_prompt_has_its_own_text(pipe):
    prompts = ["the cat", "a red dog", "the cat"]
    texts = draw(pipe, prompts, num_inference_steps=4)
    assert texts[1] == draw(pipe, prompts[1:2], seed=1, num_inference_steps=4)[0]


def test_words_that_the_tokenizer_does_not_know_are_unk(tokenizer):
    assert as_written(tokenizer, ["the zebra sees a dog ."]) == ["the <unk> sees a dog ."]
    known = sentences(20)
    assert as_written(tokenizer, known) == known
    assert as_written(tokenizer, as_written(tokenizer, ["the zebra"])) == ["the <unk>"]
    assert as_written(tokenizer, []) == []


def test_bytes_lose_nothing():
    bpe = vocabulary.train_bpe(sentences(50), 300)
    texts = ["  Größe — 7 €\n", "the zebra"]
    assert as_written(bpe, texts) == texts


def test_texts_that_the_model_cannot_end_are_left_out(tokenizer):
    assert as_written(tokenizer, ["the cat", "the cat sees a dog ."], max_length=4) == ["the cat"]


def test_some_texts_are_a_random_part_in_order():
    texts = [str(i) for i in range(1000)]
    chosen = some(texts, 100)
    assert chosen == some(texts, 100)
    assert chosen != some(texts, 100, seed=1)
    assert sorted(set(chosen), key=int) == chosen
    assert 300 < sum(map(int, chosen)) / 100 < 700
    assert some(texts, 1000) == texts
    with pytest.raises(UserError, match="1001 texts are wanted of 1000"):
        some(texts, 1001)
