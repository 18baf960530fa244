"""The loop of fused steps equals the predictor and the scheduler, step by step."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from embdiff import ops
from embdiff.guidance import Autoguidance, ClassifierFreeGuidance, Length, TopK
from embdiff.prediction import Predictor
from embdiff.schedulers import with_solver

pytest.importorskip("triton", reason="no triton on this platform")
from embdiff import kernels
from embdiff.loop import Loop, Loops, bucket, fits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = ["a cat", "the dog sees", "tree"]
CFG = ClassifierFreeGuidance


def prepared(pipe, guidance, steps, solver="renoise", prompts=PROMPTS, quantile=(0.1, 0.6, 0.95), **options):
    """A scheduler at its start, its levels, and the predictor of a run."""
    pipe.to(DEVICE)
    scheduler = with_solver(pipe.scheduler, solver)
    scheduler.set_timesteps(steps, device=DEVICE)
    scheduler.set_begin_index(0)
    gammas = scheduler.gammas.tolist()
    given = {"temperature": 0.7, "draw_above": gammas[0] - 1.0, "length_bias": 1.0, **options}
    drawn = None if quantile is None else torch.tensor(quantile, device=DEVICE)
    predictor = Predictor(
        pipe._run(prompts, None, 1, 12), guidance, gammas=gammas, kept=pipe._kept_tokens(), quantile=drawn, **given
    )
    return scheduler, gammas, predictor


def stepped(scheduler, gammas, predictor, seeds, scale=1.0):
    """The last latents of the plain loop, with the kernels' noise."""
    z, x0, draw = scale * kernels.normal(seeds, 0, 12, predictor.denoiser.dim), None, 1
    for i, t in enumerate(scheduler.timesteps):
        x0 = predictor(z, gammas[i], x0)
        noise = scale * kernels.normal(seeds, draw, 12, predictor.denoiser.dim) if scheduler.noisy[i] else None
        draw += bool(scheduler.noisy[i])
        z = scheduler.step(x0, t, z, variance_noise=noise, return_dict=False)[0]
    return z


GUIDANCE = [
    [], [CFG(2.0)], [CFG(-1.0)], [CFG(2.0, space="logits", max_gamma=1.0)], [CFG(1.5, min_gamma=0.0)],
    [Autoguidance(1.5)], [Autoguidance(2.0, space="logits")],
    [CFG(2.0, every=2)], [CFG(2.0, space="logits", every=3, max_gamma=2.0)], [Autoguidance(1.5, every=2)],
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("solver", ["renoise", "ddim", "dpm++3m-sde", "unipc", "heun"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_the_loop_equals_predictor_and_scheduler(pipe, solver, guidance):
    scheduler, gammas, predictor = prepared(pipe, guidance, 5, solver)
    seeds = torch.tensor([5, 6, 2**61], device=DEVICE)
    assert fits(predictor, gammas)
    fused = Loops().run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)[0]
    assert torch.allclose(fused, stepped(scheduler, gammas, predictor, seeds), atol=1e-3)


@torch.no_grad()
# Interpreted, a case takes a second, and shrinking would take hundreds.
@settings(max_examples=12, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    temperature=st.sampled_from([0.5, 1.0]), bias=st.sampled_from([0.0, 1.0, -2.0]), drawn=st.booleans(),
    steps=st.integers(1, 4), seed=st.integers(0, 2**62), scale=st.sampled_from([1.0, 0.5, 0.0]),
)  # fmt: skip
def test_lengths_temperatures_and_noise_are_as_in_the_predictor(pipe, temperature, bias, drawn, steps, seed, scale):
    quantile = (0.05, 0.5, 0.99) if drawn else None
    scheduler, gammas, predictor = prepared(
        pipe, [CFG(1.5)], steps, quantile=quantile, temperature=temperature, length_bias=bias
    )
    if not fits(predictor, gammas):
        assert (temperature, bias, drawn) == (1.0, 0.0, False)
        return
    seeds = torch.tensor([seed, 1, 2], device=DEVICE)
    fused = Loops().run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds, scale)[0]
    assert torch.allclose(fused, stepped(scheduler, gammas, predictor, seeds, scale), atol=1e-3)


@torch.no_grad()
def test_a_loop_serves_further_batches_and_changed_weights(pipe):
    loops = Loops()
    texts = [PROMPTS, ["cat", "a", "the small tree"]]
    for prompts, seed in zip(texts, (0, 9), strict=True):
        scheduler, gammas, predictor = prepared(pipe, [CFG(2.0)], 3, prompts=prompts)
        seeds = torch.tensor([seed, seed + 1, seed + 2], device=DEVICE)
        fused, _ = loops.run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)
        assert torch.allclose(fused, stepped(scheduler, gammas, predictor, seeds), atol=1e-3)
        pipe.denoiser.head.weight.mul_(0.5)
        pipe.denoiser.space.weight.mul_(-1.0)
    assert len(loops.kept) == 1


@torch.no_grad()
@pytest.mark.parametrize("guidance", [[], [CFG(2.0)]])
def test_thin_tiles_change_nothing(pipe, monkeypatch, guidance):
    scheduler, gammas, predictor = prepared(pipe, guidance, 3)
    args = (predictor, scheduler.table, gammas, pipe._kept_tokens(), torch.tensor([5, 6, 7], device=DEVICE))
    wide, _ = Loops().run(*args)
    monkeypatch.setattr(kernels, "thin", lambda device: 4)
    assert torch.allclose(Loops().run(*args)[0], wide, atol=1e-4)


class Copies(TorchDispatchMode):
    """Counts what is copied in place, as large as something at least."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.copy_.default and args[0].numel() >= self.numel
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_tables_are_copied_once_for_all_batches_after_weights_change(pipe, monkeypatch):
    loops, found, take = Loops(), [], Loop._take

    def counted(self, inputs):
        with Copies(pipe.denoiser.space.weight.numel()) as copies:
            take(self, inputs)
        found.append(copies.count)

    monkeypatch.setattr(Loop, "_take", counted)
    for changed in (True, False, True, False, False):
        if changed:
            pipe.denoiser.head.weight.mul_(0.5)
        scheduler, gammas, predictor = prepared(pipe, [], 2, prompts=[None] * 3)
        seeds = torch.tensor([1, 2, 3], device=DEVICE)
        loops.run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)
    assert found == [0, 0, 2, 0, 0]


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_loop_made_in_one_mode_serves_another(pipe, modes):
    loops, seeds, found = Loops(), [5, 6, 7], []
    for mode in modes:
        with mode():
            scheduler, gammas, predictor = prepared(pipe, [CFG(2.0)], 2)
            args = (scheduler.table, gammas, pipe._kept_tokens(), torch.tensor(seeds, device=DEVICE))
            found.append(loops.run(predictor, *args)[0].clone())
    assert torch.equal(*found)
    assert len(loops.kept) == 1


@torch.no_grad()
def test_a_batch_as_large_as_its_bucket_is_not_kept_but_copied(pipe):
    seeds, loops = torch.tensor([1, 2], device=DEVICE), Loops()
    scheduler, gammas, predictor = prepared(pipe, [], 2, prompts=PROMPTS[:2], quantile=[0.2, 0.7])
    first, _ = loops.run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)
    loops.run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds + 10)
    assert seeds.tolist() == [1, 2]
    assert torch.equal(loops.run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)[0], first)


def failing(error, found):
    """A recording that counts its tries and fails."""

    def record(self, stream, pool):
        found.append(self)
        raise error

    return record


@torch.no_grad()
@pytest.mark.parametrize(
    ("error", "says", "tries"),
    [
        (torch.OutOfMemoryError("full"), "out of memory: a smaller batch or max_length", 2),
        (RuntimeError("no"), "no", 1),
    ],
)
def test_a_recording_that_fails_is_told_once_and_others_are_tried_only_after_lack_of_memory(
    pipe, monkeypatch, error, says, tries
):
    loops, found = Loops(), []
    loops.stream = loops.pool = object()
    monkeypatch.setattr(Loop, "record", failing(error, found))
    scheduler, gammas, predictor = prepared(pipe, [], 2)
    args = (predictor, scheduler.table, gammas, pipe._kept_tokens())
    seeds = torch.arange(3, device=DEVICE)
    loops.run(*args, seeds)
    own = next(iter(loops.kept.values()))
    with pytest.warns(UserWarning, match=says):
        loops._record(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loops._record(own)  # not again
    assert len(found) == 1
    loops.run(*args, seeds, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loops._record(list(loops.kept.values())[-1])
    assert len(found) == tries
    assert loops.recording == (tries == 2)


@torch.no_grad()
def test_the_size_of_the_batch_changes_nothing(pipe):
    seeds = torch.tensor([3, 4, 5], device=DEVICE)
    scheduler, gammas, predictor = prepared(pipe, [CFG(2.0)], 3)
    together, features = Loops().run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)
    scheduler, gammas, predictor = prepared(pipe, [CFG(2.0)], 3, prompts=PROMPTS[1:2], quantile=[0.6])
    alone, own = Loops().run(predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-3)
    assert torch.allclose(features[1:2], own, atol=1e-3)


@pytest.mark.parametrize("guidance", [[Length(words=3)], [TopK(3)], [CFG(2.0), CFG(1.5)], [CFG(2.0, rescale=0.5)]])
def test_what_a_loop_cannot_hold_is_left_to_the_predictor(pipe, guidance):
    _, gammas, predictor = prepared(pipe, guidance, 3)
    assert not fits(predictor, gammas)


OPTIONS = [
    {},
    {"guidance_scale": 2.0},
    {"guidance": [Length(words=3)]},
    {"length_bias": 0.0},
    {"noise_scale": 0.4},
    {"shortlist": 6},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rounding", ["pipe", "chained"])
def test_the_pipeline_writes_the_same_texts_by_the_loop_and_step_by_step(request, monkeypatch, options, rounding):
    pipe = request.getfixturevalue(rounding)
    pipe.to(DEVICE)
    monkeypatch.setattr(ops, "has_kernels", lambda device_type: True)

    def drawn(**more):
        generator = torch.Generator().manual_seed(1)
        more = {"skip_padding": False} | more
        return pipe(PROMPTS, num_inference_steps=4, generator=generator, **options, **more).sequences

    looped = drawn()
    assert torch.equal(looped, drawn(callback_on_step_end=lambda *_: None))
    assert bool(pipe._loops) == (not {"guidance", "shortlist"} & set(options))
    if DEVICE.type == "cpu":
        monkeypatch.undo()
        assert not torch.equal(looped, drawn())  # other noise


def test_buckets_hold_their_batches():
    assert [bucket(n) for n in (1, 2, 3, 5, 33, 64, 65, 200)] == [1, 2, 4, 8, 64, 64, 128, 256]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_recorded_loop_equals_the_same_steps(pipe, guidance):
    loops, seeds = Loops(), torch.tensor([5, 6, 7], device=DEVICE)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        scheduler, gammas, predictor = prepared(pipe, guidance, 6, "dpm++3m-sde", prompts)
        args = (predictor, scheduler.table, gammas, pipe._kept_tokens(), seeds)
        for recorded, plain in zip(loops.run(*args), Loops().run(*args), strict=True):
            assert torch.allclose(recorded, plain, atol=1e-4)
    assert [loop.graph is not None for loop in loops.kept.values()] == [True]
