"""Judges: text in, nats out, whatever the tokenizer."""

import math
import shutil

import numpy as np
import pytest
import torch

from embdiff.baselines import AutoregressiveModel
from embdiff.errors import UserError
from embdiff.evaluation.judges import AutoregressiveJudge, NGramJudge, TransformersJudge, cross_entropy, judge_of
from tests.conftest import sentences


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    """A small GPT-2 with random weights, as a local folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("judge") / "little"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_ngram_judge_gives_the_models_cross_entropy():
    texts = sentences(60)
    judge = NGramJudge(texts[:40], order=3, min_count=1)
    assert cross_entropy(judge, texts[40:]) == pytest.approx(judge.model.cross_entropy(texts[40:]))
    assert judge.nats(texts[40:]).shape == (20,)


def test_a_likelier_text_is_cheaper():
    judge = judge_of("3-gram", sentences(100))
    shuffled = [" ".join(sorted(text.split())) for text in sentences(20, seed=1)]
    assert cross_entropy(judge, sentences(20, seed=1)) < cross_entropy(judge, shuffled)
    assert judge.name == "3-gram"


def test_a_transformers_judge_gives_the_sum_over_its_own_tokens(gpt2):
    judge = TransformersJudge(str(gpt2))
    text = "the cat sees a dog ."
    ids = [judge.tokenizer.bos_token_id, *judge.tokenizer(text)["input_ids"], judge.tokenizer.eos_token_id]
    logp = judge.model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    by_hand = -sum(float(logp[i, token]) for i, token in enumerate(ids[1:]))
    assert judge.nats([text])[0] == pytest.approx(by_hand, rel=1e-5)
    assert cross_entropy(judge, [text]) == pytest.approx(by_hand / 7, rel=1e-5)


def test_a_judge_that_sees_what_it_judges_is_refused(gpt2, tokenizer, tmp_path):
    """BERT has a head for each word and no mask: the word itself is among what it reads. So would random weights be
    a judge of nothing."""
    from transformers import BertConfig, BertLMHeadModel, GPT2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), is_decoder=False, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="sees the words that it judges"):
        TransformersJudge(str(tmp_path / "bert"))
    shutil.copytree(gpt2, tmp_path / "untied")
    config = GPT2Model.from_pretrained(gpt2).config
    config.tie_word_embeddings = False
    GPT2Model(config).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="lacks the weights"):
        TransformersJudge(str(tmp_path / "untied"))


def test_another_tokenizer_of_the_same_model_of_words_changes_nothing(gpt2):
    """Text is scored, not ids: a uniform model pays ln V for each of its own tokens, however many words they are."""
    judge = TransformersJudge(str(gpt2))
    with torch.no_grad():
        for p in judge.model.parameters():
            p.zero_()
    words = len(judge.tokenizer)
    assert np.allclose(judge.nats(["the cat", "a"]), [3 * math.log(words), 2 * math.log(words)])


def test_an_autoregressive_judge_pays_for_words_and_ends(tokenizer):
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, "max_length": 12}
    ends = {"end_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    model = AutoregressiveModel(len(tokenizer), **sizes, **ends)
    with torch.no_grad():
        model.head.weight.zero_()
    judge = AutoregressiveJudge(model, tokenizer, "uniform")
    texts = ["the cat", "the cat sees a dog .", ""]
    assert np.allclose(judge.nats(texts), [n * math.log(len(tokenizer) - 1) for n in (3, 7, 1)])
    with pytest.raises(UserError, match="1 texts are longer than the 12 tokens of the judge uniform"):
        judge.nats(["the " * 13, "a"])
    assert judge.nats(["the " * 12])[0] == pytest.approx(13 * math.log(len(tokenizer) - 1))  # fills it, and ends
    prompted = AutoregressiveModel(len(tokenizer), **sizes, **ends, max_prompt_length=4)
    with pytest.raises(UserError, match="trained with prompts"):
        AutoregressiveJudge(prompted, tokenizer)


def test_texts_do_not_change_each_others_scores(gpt2):
    texts = sentences(6)
    for judge in (TransformersJudge(str(gpt2)), NGramJudge(sentences(50))):
        assert np.allclose(judge.nats(texts)[::-1], judge.nats(texts[::-1]))
        assert judge.nats(texts[:1])[0] == pytest.approx(judge.nats(texts)[0])


def test_empty_texts_pay_for_their_end(gpt2):
    for judge in (TransformersJudge(str(gpt2)), NGramJudge(sentences(50))):
        assert judge.nats([""])[0] > 0
        assert cross_entropy(judge, [""]) == pytest.approx(judge.nats([""])[0])


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("0-gram", "1-gram to 9-gram"),
        ("²-gram", "1-gram to 9-gram"),
        ("x-gram", "1-gram to 9-gram"),
        ("./nowhere", "no judge"),
    ],
)
def test_what_is_no_judge_is_refused(spec, cause):
    with pytest.raises(UserError, match=cause):
        judge_of(spec, sentences(20))


def test_texts_longer_than_the_judge_reads_are_refused(gpt2):
    with pytest.raises(UserError, match="longer than the judge little reads"):
        TransformersJudge(str(gpt2)).nats(["the " * 20])


def test_no_texts_are_refused():
    with pytest.raises(UserError, match="at least one"):
        cross_entropy(NGramJudge(sentences(20)), [])
