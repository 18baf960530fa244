"""Posteriors over few words: right on average, the same for a text in every batch, and all words where they must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import ops
from embdiff.forward import Forward
from embdiff.guidance import ClassifierFreeGuidance, Length
from embdiff.guidance.sampling import TopK
from embdiff.shortlist import Shortlist, Shortlists
from tests.test_pipeline import seeds


def drawn(mass, count, seed=0, draws=1):
    """Shortlists of words with the mass [V], as many as there are draws; features are no matter."""
    noise = torch.rand(draws, len(mass), generator=torch.Generator().manual_seed(seed))
    return Shortlist.draw(mass.expand(draws, -1), noise, count, torch.zeros(len(mass), 2), torch.zeros(len(mass), 3))


@given(count=st.integers(1, 30), sharp=st.floats(0.1, 20.0), seed=st.integers(0, 2**16))
def test_sums_over_the_vocabulary_are_right_on_average(count, sharp, seed):
    generator = torch.Generator().manual_seed(seed)
    mass = (sharp * torch.randn(40, generator=generator)).softmax(0)
    values = mass * torch.rand(40, generator=generator)
    words, lift, *_ = drawn(mass, count, seed, draws=4000)
    sums = (values[words].double() * lift.double().exp()).sum(1)
    assert abs(sums.mean() - values.double().sum()) <= 5 * sums.std() / 4000**0.5 + 1e-6


@given(words=st.integers(3, 40), kept=st.integers(1, 2), seed=st.integers(0, 2**16), data=st.data())
def test_a_list_holds_words_once_and_what_is_likely_counts_once(words, kept, seed, data):
    count = data.draw(st.integers(1, words - 1))
    mass = torch.rand(words, generator=torch.Generator().manual_seed(seed)) + 1e-3
    mass[0] = 1e6
    mass = torch.cat([torch.zeros(kept), mass])
    found = drawn(mass, count, seed, draws=5)
    assert (found.lift >= 0).all()
    assert (found.words >= kept).all()
    assert all(len(set(row)) == count for row in found.words.tolist())
    assert (found.lift[found.words == kept] < 1e-4).all()
    assert (found.words == kept).any(1).all()


@torch.no_grad()
@given(temperature=st.floats(0.2, 3.0), kept=st.sampled_from([(), (0, 2)]), seed=st.integers(0, 2**16))
def test_a_list_of_all_words_is_the_vocabulary(temperature, kept, seed):
    torch.manual_seed(seed)
    h, weight, table = 3 * torch.randn(2, 4, 5), torch.randn(20, 5), torch.randn(20, 3)
    order = torch.tensor([[v for v in row if v not in kept] for row in (torch.randperm(20).tolist() for _ in range(2))])
    every = Shortlist(order, torch.zeros(order.shape), weight[order].mT.contiguous(), table[order])
    found = every.posterior(h, weight[list(kept)], temperature)
    expected = ops.expectation_reference(h.double(), weight.double(), table.double(), temperature, kept)
    assert torch.allclose(found.mean, expected.mean.float(), atol=1e-4)
    assert torch.allclose(found.kept, expected.kept.float(), atol=1e-5)
    tokens = every.most_probable(h, weight[list(kept)], kept, 6)
    assert torch.equal(tokens, (h @ weight.T).topk(6, -1).indices)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 1, 4, 5, 6, 11])])
def test_masses_are_sums_of_probabilities(pipe, monkeypatch, rows, int8):
    from embdiff import forward

    monkeypatch.setattr(forward, "ROWS", 5)
    monkeypatch.setattr(forward, "WORDS", 7)
    h, weight, table = torch.randn(12, 8), torch.randn(30, 8), torch.randn(30, 4)
    h, places = (h, torch.arange(12)) if rows is None else (h[rows], rows)
    texts = (places // 4 == torch.arange(3)[:, None]).float()
    found, mass = Forward(pipe.denoiser, False, int8).masses(h, places // 4, 3, weight, table, 0.7, (0, 2))
    logits = (h @ weight.T / 0.7).index_fill(1, torch.tensor([0, 2]), -torch.inf)
    assert torch.allclose(mass.sum(1), texts.sum(1), atol=1e-4)
    assert torch.allclose(mass, texts @ logits.softmax(1), atol=0.1 if int8 else 1e-4)
    if not int8:
        expected = ops.expectation_reference(h, weight, table, 0.7, (0, 2))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[:2], expected[:2], strict=True))


@pytest.mark.parametrize("rounding", ["pipe", "chained"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"skip_padding": False, "length_bias": 3.0}])
def test_a_text_does_not_depend_on_its_batch(request, rounding, options):
    pipe = request.getfixturevalue(rounding)
    prompts = ["the cat .", "a dog", "a red house"]
    options = {"num_inference_steps": 6, "shortlist": 8, **options}
    together = pipe(prompts, generator=seeds(0, 1, 2), **options)
    for i, prompt in enumerate(prompts):
        assert torch.equal(pipe(prompt, generator=seeds(i), **options).sequences[0], together.sequences[i])


def test_the_vocabulary_is_looked_at_twice(pipe, monkeypatch):
    calls, forgotten = [], lambda _, step, t, state: {"latents": state["latents"]} if step == 5 else None
    masses, short = Forward.masses, Shortlist.posterior
    monkeypatch.setattr(Forward, "masses", lambda *args: calls.append("all") or masses(*args))
    monkeypatch.setattr(Shortlist, "posterior", lambda *args: calls.append("few") or short(*args))
    monkeypatch.setattr(ops, "expectation", None)
    pipe(num_inference_steps=8, shortlist=8)
    assert calls == ["all", *["few"] * 3, "all", *["few"] * 3]
    calls.clear()
    pipe(num_inference_steps=8, shortlist=8, callback_on_step_end=forgotten)
    assert calls == ["all", *["few"] * 3, "all", "few", "all", "few"]


def test_branches_see_the_words_of_the_main_prediction(pipe, monkeypatch):
    """And all words where it does: else guidance would enlarge what was left to chance."""
    calls, short, whole = [], Shortlists.posterior, ops.expectation
    monkeypatch.setattr(
        Shortlists, "posterior", lambda self, *args: calls.append((found := short(self, *args)) is not None) or found
    )
    monkeypatch.setattr(ops, "expectation", lambda *args: calls.append("all") or whole(*args))
    pipe("the cat .", num_inference_steps=4, shortlist=8, guidance=[ClassifierFreeGuidance(2.0)])
    assert calls == [True, False, "all", True, True, True, False, "all", True, True]


def test_a_chain_is_rounded_to_words_of_the_list(chained, monkeypatch):
    lists, draw = [], Shortlist.draw
    monkeypatch.setattr(Shortlist, "draw", lambda *args: lists.append(draw(*args)) or lists[-1])
    chained.denoiser.transitions.candidates = 6
    monkeypatch.setattr(ops, "most_probable", None)
    found = chained(num_inference_steps=6, num_samples=3, shortlist=5, generator=seeds(0, 1, 2)).sequences
    for words, text in zip(lists[-1].words.tolist(), found.tolist(), strict=True):
        assert set(text) <= {*words, *chained._kept_tokens()}


@pytest.mark.parametrize("guidance", [[Length(words=4)], [TopK(5)]])
def test_what_changes_logits_sees_all_words(pipe, guidance):
    options = {"num_inference_steps": 4, "guidance": guidance}
    plain, listed = (pipe(generator=seeds(3), shortlist=count, **options).sequences for count in (None, 6))
    assert torch.equal(plain, listed)


def test_a_list_as_long_as_the_vocabulary_is_none(pipe):
    plain, listed = (pipe(num_inference_steps=4, generator=seeds(3), shortlist=n).sequences for n in (None, 23))
    assert torch.equal(plain, listed)
