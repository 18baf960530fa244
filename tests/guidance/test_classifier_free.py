"""Classifier-free guidance: neutral values, intervals, and the equality of its cheap form."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import pipeline
from embdiff.errors import UserError
from embdiff.guidance import Autoguidance, ClassifierFreeGuidance
from embdiff.guidance.base import Branch
from embdiff.prediction import Predictor, as_means
from embdiff.transitions import Transitions


@given(st.floats(-3, 5), st.integers(0, 99))
def test_guidance_is_linear_neutral_at_one_and_unconditional_at_zero(scale, seed):
    c, u = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(ClassifierFreeGuidance(1.0).combine(c, u), c, atol=1e-6)
    assert torch.allclose(ClassifierFreeGuidance(0.0).combine(c, u), u)
    assert torch.allclose(ClassifierFreeGuidance(scale).combine(c, c), c, atol=1e-5)


def test_it_acts_only_inside_its_interval():
    module = ClassifierFreeGuidance(2.0, min_gamma=-1.0, max_gamma=3.0)
    assert [module.active(g) for g in (-1.1, -1.0, 3.0, 3.1)] == [False, True, True, False]


def test_it_does_nothing_at_scale_one_and_without_a_prompt(pipe):
    assert not list(ClassifierFreeGuidance(1.0).parts(run_of(pipe)))
    assert list(ClassifierFreeGuidance(2.0).parts(run_of(pipe)))
    assert not list(ClassifierFreeGuidance(2.0).parts(pipe._run([None], None, 1, 12)))


def test_seldom_is_for_one_model():
    with pytest.raises(UserError, match="every 0"):
        ClassifierFreeGuidance(2.0, every=0)
    with pytest.raises(UserError, match="leave it out, or the model"):
        Autoguidance(2.0, every=2, model="weaker")


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(UserError, match="finite"):
        ClassifierFreeGuidance(scale)
    with pytest.raises(UserError, match="space"):
        ClassifierFreeGuidance(2.0, "epsilon")


def run_of(pipe):
    return pipe._run(["the cat .", "a dog"], None, 1, 12)


def test_logit_guidance_by_hidden_states_equals_guidance_of_the_logits(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    model, run = pipe.denoiser, run_of(pipe)
    guided = Predictor(run, [ClassifierFreeGuidance(2.5, "logits")])(z, 0.3, self_cond)
    gamma, empty = torch.full((2,), 0.3), run.encode(["", ""])
    c, u = (model.logits(model(z, gamma, k, self_cond)) for k in (run.context, empty))
    assert torch.allclose(guided, (u + 2.5 * (c - u)).softmax(-1) @ model.space.table(), atol=1e-4)


def test_x0_guidance_combines_means_and_outside_its_interval_nothing_happens(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    run = run_of(pipe)

    def predict(run, *modules):
        return Predictor(run, modules)(z, 0.3, self_cond)

    c, u = predict(run), predict(replace(run, context=run.encode(["", ""])))
    assert torch.allclose(predict(run, ClassifierFreeGuidance(2.5)), u + 2.5 * (c - u), atol=1e-4)
    assert torch.equal(predict(run, ClassifierFreeGuidance(2.5, max_gamma=0.0)), c)
    assert torch.equal(predict(run, ClassifierFreeGuidance(1.0)), c)


def watched(predictor):
    """The sizes of the batches that the network will be given."""
    batches, call = [], predictor.network.call
    predictor.network.call = lambda z, *args, **options: batches.append(len(z)) or call(z, *args, **options)
    return batches


@pytest.mark.parametrize(("space", "rows"), [("x0", None), ("logits", None), ("logits", [0, 1, 2, 5, 12, 13])])
def test_between_two_predictions_of_a_branch_the_change_of_features_is_what_it_was(pipe, space, rows):
    """Of four predictions the first and the last are new."""
    z, run = torch.randn(4, 2, 12, 16), run_of(pipe)
    # Positions are left out where padding is told apart, which a bias this small changes nothing about.
    ends = (pipe.tokenizer.pad_token_id, pipe.tokenizer.eos_token_id)
    kept = {"kept": ends, "length_bias": 1e-9} if rows else {}
    predictor = Predictor(run, [ClassifierFreeGuidance(2.5, space, every=3)], **kept)
    always = Predictor(run, [ClassifierFreeGuidance(2.5, space)], **kept)
    batches = watched(predictor)
    found, exact = [], []
    for i, gamma in enumerate([3.0, 1.0, 0.5, 0.0]):
        if rows is not None and i < 3:
            predictor.rows = always.rows = torch.tensor(rows)
        if i == 3:
            predictor.rows = always.rows = None
        found.append(predictor(z[i], gamma, None))
        exact.append(always(z[i], gamma, None))
    assert batches == [4, 2, 2, 4]
    assert torch.equal(found[0], exact[0])
    assert torch.equal(found[3], exact[3])

    def features(i, gamma, context):
        where = None if rows is None else torch.tensor(rows)
        return pipe.denoiser(z[i], torch.full((2 if rows is None else 1,), gamma), context, rows=where)

    first, second = run.context, run.encode(["", ""])
    change = features(0, 3.0, first) - features(0, 3.0, second)
    main = features(2, 0.5, first)
    if space == "logits":
        expected = pipe.denoiser.x0(main + 1.5 * change)
    else:
        mean, other = pipe.denoiser.x0(main), pipe.denoiser.x0(main - change)
        expected = other + 2.5 * (mean - other)
    here = found[2].flatten(0, 1)[slice(None) if rows is None else rows]
    assert torch.allclose(here, expected.view_as(here), atol=1e-4)


@pytest.mark.parametrize("space", ["x0", "logits"])
def test_the_weaker_self_tells_nothing_before_there_is_an_x0(pipe, space):
    """So the second prediction is new too."""
    z, last = torch.randn(2, 2, 12, 16)
    run = pipe._run([None], None, 2, 12)
    seldom, always = (Predictor(run, [Autoguidance(3.0, space, every=n)]) for n in (9, 1))
    assert torch.allclose(seldom(z, 1.0, None), Predictor(run)(z, 1.0, None), atol=1e-4)
    assert torch.equal(seldom(z, 0.3, last), always(z, 0.3, last))
    assert not torch.allclose(seldom(z, 0.3, last), Predictor(run)(z, 0.3, last), atol=1e-3)


def test_a_branch_is_predicted_anew_after_its_interval_and_where_latents_were_changed(pipe):
    z, run = torch.randn(2, 12, 16), run_of(pipe)
    predictor = Predictor(run, [ClassifierFreeGuidance(2.5, every=3, max_gamma=2.0)])
    batches = watched(predictor)
    for gamma in (1.0, 5.0, 5.0, 1.0, 1.0):
        predictor(z, gamma, None)
    predictor.forget()
    predictor(z, 1.0, None)
    assert batches == [4, 2, 2, 4, 2, 4]


def test_the_order_of_branches_does_not_matter(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    run = replace(run_of(pipe), negative_prompts=["red", "a blue house"])
    plain = ClassifierFreeGuidance(2.5)
    modules = [plain, ClassifierFreeGuidance(1.7), ClassifierFreeGuidance(0.5, "logits")]
    one, two = (Predictor(run, order)(z, 0.3, self_cond) for order in (modules, modules[::-1]))
    assert torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(one, Predictor(run, [plain])(z, 0.3, self_cond), atol=1e-2)


@given(st.floats(1.1, 5), st.integers(0, 99))
def test_remedies_against_large_scales(scale, seed):
    c, u = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
    plain = ClassifierFreeGuidance(scale).combine_means(c, u)
    lengths = ClassifierFreeGuidance(scale, rescale=1.0).combine_means(c, u).norm(dim=-1)
    assert torch.allclose(lengths, c.norm(dim=-1), atol=1e-4)
    across = ClassifierFreeGuidance(scale, parallel=0.0).combine_means(c, u) - c
    assert torch.allclose((across * c).sum(-1), torch.zeros(3), atol=1e-3)
    assert torch.allclose(ClassifierFreeGuidance(scale, parallel=1.0, radius=1e6).combine_means(c, u), plain, atol=1e-4)
    near = ClassifierFreeGuidance(scale, radius=0.1).combine_means(c, u) - c
    assert torch.all(near.norm(dim=-1) <= (scale - 1) * 0.1 * 8**0.5 + 1e-4)


def test_the_weaker_self_is_the_model_without_self_conditioning(pipe):
    z, self_cond = torch.randn(2, 2, 12, 16)
    run = pipe._run([None], None, 2, 12)
    c, u = (Predictor(run)(z, 0.3, given) for given in (self_cond, None))
    guided = Predictor(run, [Autoguidance(1.5)])(z, 0.3, self_cond)
    assert torch.allclose(guided, u + 1.5 * (c - u), atol=1e-4)


@pytest.mark.parametrize("prompt", [None, "the cat"])
def test_a_weaker_model_of_the_same_space_guides(pipe, prompt, tmp_path):
    pipe.save_pretrained(tmp_path)
    options = {"num_inference_steps": 3, "output_type": "latent"}

    def latents(*guidance):
        return pipe(prompt, generator=torch.Generator().manual_seed(0), guidance=guidance, **options).latents

    # Guided by itself: no change. By another state of itself: one.
    assert torch.allclose(latents(Autoguidance(2.0, model=str(tmp_path))), latents(), atol=1e-4)
    with torch.no_grad():
        pipe.denoiser.head.weight.mul_(2.0)
    assert not torch.allclose(latents(Autoguidance(2.0, model=str(tmp_path))), latents(), atol=1e-2)
    with torch.no_grad():
        pipe.denoiser.space.weight.normal_()
    with pytest.raises(UserError, match="another embedding space"):
        latents(Autoguidance(2.0, model=str(tmp_path)))


def test_a_weaker_model_is_loaded_once_as_long_as_it_is_the_same(pipe, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(pipeline, "load", lambda folder, load=pipeline.load: loaded.append(folder) or load(folder))

    def draw():
        pipe(num_inference_steps=1, guidance=[Autoguidance(2.0, model=str(tmp_path / "weaker"))])
        return len(loaded)

    pipe.save_pretrained(tmp_path / "weaker")
    assert [draw(), draw()] == [1, 1]
    pipe.save_pretrained(tmp_path / "weaker")
    assert draw() == 2


@given(st.floats(-3, 5), st.integers(0, 99))
def test_features_are_combined_as_means_were(scale, seed):
    c, u, h, less = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(seed))
    linear = as_means(Branch(torch.lerp, "x0", means=ClassifierFreeGuidance(scale).combine), c, u)
    assert torch.allclose(linear(h, less), less + scale * (h - less), atol=1e-4)
    # Shortened to nothing, or with what is orthogonal alone left of a change along c: no change.
    for module, other in (
        (ClassifierFreeGuidance(scale, radius=1e-9), u),
        (ClassifierFreeGuidance(scale, parallel=0.0), 2 * c),
    ):
        assert torch.allclose(as_means(module.branch(None), c, other)(h, less), h, atol=1e-4)


def test_a_remedy_reaches_a_text_that_is_rounded_as_a_chain(pipe):
    pipe.denoiser.transitions = Transitions(len(pipe.tokenizer), 2)
    z, self_cond = torch.randn(2, 2, 12, 16)

    def features(**options):
        predictor = Predictor(run_of(pipe), [ClassifierFreeGuidance(6.0, **options)])
        with torch.no_grad():
            predictor(z, 0.3, self_cond)
        return predictor.seen.whole()

    alone = Predictor(run_of(pipe))
    with torch.no_grad():
        alone(z, 0.3, self_cond)
    assert torch.allclose(features(radius=1e-9), alone.seen.whole(), atol=1e-4)
    assert not torch.allclose(features(), alone.seen.whole(), atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"rescale": 2.0}, {"parallel": -1.0}, {"radius": 0.0}, {"rescale": 0.5, "space": "logits"}]
)
def test_remedies_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        ClassifierFreeGuidance(2.0, **options)
