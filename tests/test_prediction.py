"""One guided prediction: what is left out, and that the rest doesn't mind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import ops, prediction
from embdiff.guidance import ClassifierFreeGuidance, Length, Lexical, NoRepeatNgram, RepetitionPenalty, TopK

PROMPTS = ["a cat", "the dog sees", "tree"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.98, 0.995, 1.0]), min_size=9, max_size=9), min_size=1))
def test_what_is_left_out_is_surely_padding_to_the_end(padding):
    padding = torch.tensor(padding)
    rows = prediction.live(padding)
    kept = torch.ones_like(padding, dtype=torch.bool)
    if rows is not None:
        kept = torch.zeros(padding.numel(), dtype=torch.bool).index_fill(0, rows, True).view_as(padding)
        assert not kept.all()
    assert (padding[~kept] > prediction.SURE).all()
    assert (kept.long().diff(dim=1) <= 0).all()  # what is kept are the first positions
    assert (kept.sum(1) >= min(prediction.MARGIN, 9)).all()
    # No more than needed: the last position kept, but for the margin, is one that is not sure.
    last = kept.sum(1) - prediction.MARGIN - 1
    assert all(
        n < 0 or p[n] <= prediction.SURE or k.all() for n, p, k in zip(last.tolist(), padding, kept, strict=True)
    )


def test_a_posterior_of_some_rows_is_padding_elsewhere():
    rows = torch.tensor([0, 1, 3])
    part = ops.Posterior(torch.randn(3, 4), torch.rand(3, 2) / 2, torch.rand(3, 5), torch.randn(3, 5, 4))
    whole = prediction.spread(part, rows, (2, 3))
    for name in ops.Posterior._fields:
        assert torch.equal(getattr(whole, name).flatten(0, 1)[rows], getattr(part, name))
    assert whole.kept.flatten(0, 1)[[2, 4, 5]].tolist() == [[1.0, 0.0]] * 3


MODULES = [
    [], [ClassifierFreeGuidance(2.0)], [ClassifierFreeGuidance(2.0, "logits")], [Length(words=3)], [TopK(3)],
    [Lexical(["cat"], ["dog"]), RepetitionPenalty(2.0), NoRepeatNgram(1)],
]  # fmt: skip


@pytest.mark.parametrize("guidance", MODULES)
def test_left_out_positions_are_padding_and_guidance_holds(pipe, monkeypatch, guidance):
    monkeypatch.setattr(prediction, "SURE", -1.0)  # all but the first positions are cut off
    generator = torch.Generator().manual_seed(0)
    seen = []

    def watch(self, *args, original=prediction.Predictor.__call__):
        x0 = original(self, *args)
        seen.append(12 * 9 if self.rows is None else len(self.rows))
        return x0

    monkeypatch.setattr(prediction.Predictor, "__call__", watch)
    out = pipe(PROMPTS, num_samples=3, num_inference_steps=5, generator=generator, guidance=guidance)
    assert seen[0] == 12 * 9
    assert seen[-1] == prediction.MARGIN * 9
    if guidance and isinstance(guidance[0], Length):
        assert all(len(text.split()) == 3 for text in out.texts)
    if guidance and isinstance(guidance[0], Lexical):
        assert all("cat" in text and "dog" not in text for text in out.texts)


def test_nothing_is_left_out_unless_asked(pipe, monkeypatch):
    monkeypatch.setattr(prediction, "live", lambda padding: pytest.fail("asked what is padding"))
    pipe(num_inference_steps=3, skip_padding=False)


def test_left_out_positions_do_not_depend_on_the_batch(pipe, monkeypatch):
    monkeypatch.setattr(prediction, "SURE", -1.0)

    def drawn(seeds):
        return pipe(num_samples=len(seeds), num_inference_steps=5,
                    generator=[torch.Generator().manual_seed(s) for s in seeds]).sequences  # fmt: skip

    assert torch.equal(drawn(range(5))[3:], torch.cat([drawn([3]), drawn([4])]))


def test_tables_are_kept_until_a_weight_changes(denoiser):
    with torch.inference_mode():
        before = prediction.output_of(denoiser)
    assert prediction.output_of(denoiser) is before
    h = torch.randn(2, before.weight.shape[1], requires_grad=True)
    (h @ before.weight.T).square().sum().backward()  # whoever made them
    for change in (lambda: denoiser.space.weight[3].add_(1.0), lambda: denoiser.head.weight.zero_()):
        with torch.no_grad():
            change()
        found = prediction.output_of(denoiser)
        assert torch.equal(found.table, denoiser.space.table())
        assert torch.equal(found.weight, denoiser.output_weight())
    assert prediction.output_of(denoiser.to(torch.bfloat16)).weight.dtype is torch.bfloat16
    with torch.inference_mode():  # such weights don't tell of changes
        denoiser.head.weight = torch.nn.Parameter(torch.zeros_like(denoiser.head.weight))
        prediction.output_of(denoiser)
        denoiser.head.weight.fill_(1.0)
        assert torch.equal(prediction.output_of(denoiser).weight.float(), denoiser.output_weight().bfloat16().float())
