"""Classifier-free guidance: neutral values, intervals, and the equality of its cheap form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.guidance import ClassifierFreeGuidance
from embdiff.pipeline import Predictor


@given(st.floats(-3, 5), st.integers(0, 99))
def test_guidance_is_linear_neutral_at_one_and_unconditional_at_zero(scale, seed):
    c, u = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(ClassifierFreeGuidance(1.0).combine(c, u), c, atol=1e-6)
    assert torch.allclose(ClassifierFreeGuidance(0.0).combine(c, u), u)
    assert torch.allclose(ClassifierFreeGuidance(scale).combine(c, c), c, atol=1e-5)


def test_it_acts_only_inside_its_interval_and_off_scale_one():
    module = ClassifierFreeGuidance(2.0, min_gamma=-1.0, max_gamma=3.0)
    assert [module.active(g) for g in (-1.1, -1.0, 3.0, 3.1)] == [False, True, True, False]
    assert not ClassifierFreeGuidance(1.0).active(0.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(UserError, match="finite"):
        ClassifierFreeGuidance(scale)
    with pytest.raises(UserError, match="space"):
        ClassifierFreeGuidance(2.0, "epsilon")


def contexts(pipe):
    return pipe._contexts(["the cat .", "a dog"], None, 1, True)


def test_logit_guidance_by_hidden_states_equals_guidance_of_the_logits(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    model = pipe.denoiser
    context, other = contexts(pipe)
    guided = Predictor(model, (context, other), [ClassifierFreeGuidance(2.5, "logits")], 1.0, ())(z, 0.3, self_cond)
    gamma = torch.full((2,), 0.3)
    c, u = (model.logits(model(z, gamma, k, self_cond)) for k in (context, other))
    assert torch.allclose(guided, (u + 2.5 * (c - u)).softmax(-1) @ model.space.table(), atol=1e-4)


def test_x0_guidance_combines_means_and_outside_its_interval_nothing_happens(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    context, other = contexts(pipe)

    def predict(context, *modules):
        return Predictor(pipe.denoiser, (context, other), modules, 1.0, ())(z, 0.3, self_cond)

    c, u = predict(context), predict(other)
    assert torch.allclose(predict(context, ClassifierFreeGuidance(2.5)), u + 2.5 * (c - u), atol=1e-4)
    assert torch.equal(predict(context, ClassifierFreeGuidance(2.5, max_gamma=0.0)), c)
    assert torch.equal(predict(context, ClassifierFreeGuidance(1.0)), c)
