"""Encoding, batches and masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embdiff.batches import Batch, Mixture, Prompts, Window, batch_index, encode
from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.vocabulary import decode
from tests.conftest import sentences


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5), st.floats(0, 1))
def test_every_example_comes_once_an_epoch(size, batch_size, seed, share):
    window = Window(8, 32, share)
    seen: list[int] = []
    step = 0
    while len(seen) < 2 * size:
        assert window.start(batch_size, step) == len(seen)
        seen += batch_index(size, len(seen), window.count(batch_size, step), seed).tolist()
        step += 1
    assert sorted(seen[:size]) == list(range(size))
    assert sorted(seen[size : 2 * size]) == list(range(size))


def test_windows_have_their_share_and_fit_the_texts(tokenizer):
    window = Window(8, 32, 0.6)
    assert sum(window.at(k) == 8 for k in range(1000)) == 600
    encoded = encode([Example(t) for t in sentences(40)], tokenizer, 32)
    assert Window.fitting(encoded, 0.5) == Window(16, 32, 0.5)
    assert Window.fitting(encode([Example("the cat sees a dog .")], tokenizer, 8), 0.5).at(3) == 8


def test_texts_survive_encoding(tokenizer):
    texts = sentences(40)
    encoded = encode([Example(t) for t in texts], tokenizer, 16)
    assert [decode(tokenizer, ids) for ids in encoded.text] == texts
    assert encoded.text_length.tolist() == [len(t.split()) + 1 for t in texts]


def test_long_texts_are_truncated_or_dropped_and_counted(tokenizer):
    examples = [Example("the cat ."), Example("the " * 30)]
    cut = encode(examples, tokenizer, 8)
    assert (len(cut), cut.truncated, cut.dropped) == (2, 1, 0)
    assert tokenizer.eos_token_id not in cut.text[1]
    rest = encode(examples, tokenizer, 8, on_long="drop")
    assert (len(rest), rest.truncated, rest.dropped) == (1, 0, 1)
    with pytest.raises(UserError, match="every validation text is longer than"):
        encode(examples[1:], tokenizer, 8, on_long="drop", what="validation text")


def test_cut_prompts_are_counted(tokenizer):
    examples = [Example("the cat .", "a dog"), Example("the cat .", "a small dog"), Example("the " * 30, "a small dog")]
    assert encode(examples, tokenizer, 8, 2).cut == 2
    assert encode(examples, tokenizer, 8, 2, on_long="drop").cut == 1
    assert encode(examples, tokenizer, 8).cut == 0


def test_fingerprints_tell_sets_apart(tokenizer):
    def fingerprint(*examples: Example) -> str:
        return encode(examples, tokenizer, 8, 4).fingerprint()

    a, b = Example("the cat .", "a dog"), Example("the dog .", "a dog")
    prints = [fingerprint(a, b), fingerprint(b, a), fingerprint(a), fingerprint(a, Example("the dog .", "a cat"))]
    assert len(set(prints)) == 4
    assert fingerprint(a, b) == prints[0]


def test_a_prompt_ends_where_the_text_begins(tokenizer):
    encoded = encode([Example("the cat .", "a dog"), Example("the cat .", "a small dog sees")], tokenizer, 6, 4)
    batch = encoded.batch([0, 1])
    assert batch.prompts.positions[0, :2].tolist() == [-2, -1]
    assert batch.prompts.positions[1].tolist() == [-4, -3, -2, -1]
    assert batch.prompts.present.sum(1).tolist() == [2, 4]
    assert batch.target().shape == (2, 6)
    assert batch.target().all()


def test_prompts_of_strings_are_those_of_encoded_examples(tokenizer):
    texts = ["a dog", "a small dog sees the red cat", ""]
    ours = Prompts.tokenized(tokenizer, texts, 4)
    theirs = encode([Example("the cat .", t) for t in texts], tokenizer, 6, 4).batch(range(3)).prompts
    assert torch.equal(ours.present, theirs.present)
    assert torch.equal(ours.positions, theirs.positions)
    assert torch.equal(ours.ids, theirs.ids)
    assert Prompts.tokenized(tokenizer, ["", ""], 4).ids.shape == (2, 1)  # as wide as it takes to be a prompt


def test_several_draws_of_a_text_share_its_prompt(tokenizer):
    encoded = encode([Example("the cat .", "a dog"), Example("a tree .", "a small dog sees")], tokenizer, 6, 4)
    batch = encoded.batch([1, 0], draws=3)
    assert batch.draws == 3
    assert batch.ids.shape == (6, 6)
    assert batch.prompts.ids.shape == (2, 4)
    assert torch.equal(batch.ids[0], batch.ids[2])
    part = batch.take(slice(3, 6))
    assert torch.equal(part.ids, batch.ids[3:])
    assert torch.equal(part.prompts.ids, batch.prompts.ids[1:])


@given(st.integers(0, 200), st.booleans())
def test_the_mixture_leaves_something_to_generate(seed, prompted):
    B, P, L = 16, 3, 10
    ids = torch.zeros(B, L, dtype=torch.long)
    prompts = Prompts.aligned(torch.zeros(B // 2, P, dtype=torch.long), torch.full((B // 2,), 2)) if prompted else None
    mixed = Mixture(drop_prompt=0.5, infill=1.0).apply(Batch(ids, prompts=prompts), np.random.default_rng(seed))
    assert mixed.target().any(1).all()
    assert (mixed.prompted is not None) == prompted


def test_the_mixture_draws_its_shares(tokenizer):
    encoded = encode([Example("the cat .", "a dog")] * 4000, tokenizer, 8, 2)
    mixed = Mixture(drop_prompt=0.1, infill=0.3).apply(encoded.batch(range(4000)), np.random.default_rng(0))
    assert (~mixed.prompted).float().mean().item() == pytest.approx(0.1, abs=0.02)
    # A prefix of length 0 gives nothing, so the share with something given is a little below.
    assert mixed.known.any(1).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert Mixture(infill=0.0).apply(Batch(mixed.ids), np.random.default_rng(0)).known is None


@pytest.fixture
def prompted():
    ids = torch.arange(12).view(4, 3)
    prompts = Prompts.aligned(ids[:2], torch.tensor([1, 3]))
    return Batch(ids, known=ids > 5, prompts=prompts, prompted=None)


def tensors(batch):
    return [batch.ids, batch.known, batch.prompts.ids, batch.prompts.present, batch.prompts.positions]


def test_a_batch_moves_whole_and_unchanged(prompted):
    same = prompted.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(prompted), strict=True))
    moved = prompted.to("meta")
    assert moved.prompted is None
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(prompted)]


def test_a_gpu_copies_from_pinned_memory_while_the_host_goes_on(prompted, monkeypatch):
    copies, pinned = [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: copies.append((device.type, non_blocking)))
    prompted.to("cuda")
    assert len(pinned) == len(tensors(prompted))
    assert copies == [("cuda", True)] * len(pinned)
