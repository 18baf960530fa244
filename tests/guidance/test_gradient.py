"""The gradient of constraints: that of the probability that a text fulfils them, bounded, free unless wanted."""

import copy
from itertools import product

import pytest
import torch

from embdiff import UserError
from embdiff.guidance import ClassifierFreeGuidance, Length, Lexical, parse
from embdiff.prediction import FARTHEST, UNCHANGED, Predictor

B, L, GAMMA = 2, 4, 2.5


def predictor(pipe, *guidance, prompts=(None, None)):
    run = pipe._run(list(prompts), None, 1, L)
    # What no text may have is no part of q: here texts may have all.
    kept = pipe._kept_tokens()
    run.__dict__["pieces"] = [None if i in kept else piece or " <unk>" for i, piece in enumerate(run.pieces)]
    return Predictor(run, guidance, kept=kept)


def latents(pipe):
    z, last = torch.randn(2, B, L, pipe.denoiser.dim, generator=torch.Generator().manual_seed(3))
    return z, 0.5 * last


def log_probability(predictor, z, last):
    """log p(demand | z) by all sequences of classes, each alone."""
    automaton, denoiser = predictor.automaton, predictor.denoiser
    D, C, S = denoiser.dim, len(automaton.sizes), len(automaton.next)
    h = denoiser(z, torch.full((B,), GAMMA), predictor.run.context, last)
    h = torch.cat([h[..., :-D], h[..., -D:].detach()], -1)  # the matched filter's share is left out
    words = (h @ denoiser.output_weight().T).softmax(-1)
    of_tokens = predictor._class_of_tokens(automaton)
    q = torch.stack([words[..., of_tokens == c].sum(-1) for c in range(C + 2)], -1)

    def accepted(classes):
        state = 0
        for i, c in enumerate(classes):
            if c == C:
                return bool(automaton.accepts[0, state]) and all(later == C + 1 for later in classes[i + 1 :])
            if c > C or (state := int(automaton.next[state, c])) == S:
                return False
        return bool(automaton.accepts[0, state])

    texts = torch.tensor([classes for classes in product(range(C + 2), repeat=L) if accepted(classes)])
    each = torch.stack([q[:, i, texts[:, i]] for i in range(L)])
    return each.prod(0).sum(-1).log()


@pytest.mark.parametrize("module", [Lexical(["cat"], gradient=1.0), Lexical(["the cat", "dog"]), Length(words=2)])
@pytest.mark.parametrize("prompts", [(None, None), ("the cat .", "a dog")])
def test_it_is_that_of_the_log_probability(pipe, module, prompts):
    guided, (z, last) = predictor(pipe, module, prompts=prompts), latents(pipe)
    plan = guided.plan(GAMMA)
    found = guided._slope(guided._traced(z, GAMMA, last), None, plan, UNCHANGED)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(log_probability(guided, z, last).sum(), z)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    rows = guided.rows = torch.arange(B * L)
    by_rows = guided._slope(guided._traced(z, GAMMA, last), rows, plan, UNCHANGED)
    assert torch.allclose(by_rows, found, rtol=1e-3, atol=1e-5)


def test_it_moves_no_position_too_far_and_none_where_it_is_not_wanted(pipe, monkeypatch):
    z, last = latents(pipe)
    wild, plain = (predictor(pipe, Lexical(["cat"], gradient=gradient)) for gradient in (100.0, 0.0))
    moved = (wild(z, GAMMA, last) - plain(z, GAMMA, last)).norm(dim=-1)
    assert moved.max() <= FARTHEST * pipe.denoiser.dim**0.5 * 1.001
    assert moved.max() > 0.01
    monkeypatch.setattr(Predictor, "_traced", lambda *_: pytest.fail("it was not asked for"))
    plain(z, GAMMA, last)
    predictor(pipe, Lexical(["cat"], gradient=1.0, max_gamma=0.0))(z, GAMMA, last)


def test_a_faint_gradient_changes_little(pipe):
    """The denoiser runs otherwise where its pass is traced; what it predicts is the same, with a prompt or without."""
    (z, last), rows = latents(pipe), torch.tensor([0, 1, 2, 4, 5])
    for prompts, scale in (((None, None), 1.0), (("the cat .", "a dog"), 2.0)):
        cfg = ClassifierFreeGuidance(scale)
        for some in (None, rows):
            faint, plain = (predictor(pipe, Lexical(["cat"], gradient=g), cfg, prompts=prompts) for g in (1e-9, 0.0))
            faint.rows = plain.rows = some
            assert torch.allclose(faint(z, GAMMA, last), plain(z, GAMMA, last), atol=1e-5)


def test_dropout_does_not_act(pipe):
    z, last = latents(pipe)
    pipe.denoiser.train()
    for block in pipe.denoiser.blocks:
        block.dropout = 0.5
    try:
        guided = predictor(pipe, Lexical(["cat"], gradient=1.0))
        assert torch.equal(guided(z, GAMMA, last), guided(z, GAMMA, last))
        assert pipe.denoiser.training
    finally:
        pipe.denoiser.eval()
        for block in pipe.denoiser.blocks:
            block.dropout = 0.0


def test_weights_without_gradients_are_refused(pipe):
    with torch.inference_mode():
        other = copy.deepcopy(pipe)
        with pytest.raises(UserError, match="inference_mode"):
            other(num_inference_steps=1, guidance=[Lexical(["cat"], gradient=1.0)])


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("prompt", [None, "the cat ."])
def test_demands_hold_as_without(pipe, prompt, inference):
    guidance = [Lexical(["cat", "red dog"], exclude=["the"], gradient=1.0), Length(words="6-9", gradient=1.0)]
    with torch.inference_mode(inference):
        texts = pipe(prompt, num_samples=3, num_inference_steps=4, guidance=guidance, guidance_scale=1.5).texts
    for text in texts:
        words = text.split()
        assert "cat" in words
        assert "red dog" in text
        assert "the" not in words
        assert 6 <= len(words) <= 9


def test_it_is_named_like_other_options(pipe):
    assert parse("lexical:include=cat|dog,gradient=0.5").gradient == 0.5
    for wrong in (-1.0, 1e3, float("nan")):
        with pytest.raises(UserError, match="gradient"):
            Lexical(["cat"], gradient=wrong)
        with pytest.raises(UserError, match="gradient"):
            Length(words=3, gradient=wrong)
