"""Likelihoods: exact where the answer is known, the flow against scipy's adaptive integrator, honest errors."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from embdiff import vocabulary
from embdiff.batches import Batch, Encoded, encode
from embdiff.data import Example
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.evaluation import likelihood
from embdiff.evaluation.likelihood import bound, flow, flow_bound, flow_nats, integrate
from embdiff.noise import CosineSchedule, GumbelSchedule, alpha_sigma
from tests.conftest import lively, sentences
from tests.test_losses import Uniform


def tokens(texts: int, length: int, vocabulary: int, seed: int = 0) -> Encoded:
    ids = np.random.default_rng(seed).integers(vocabulary, size=(texts, length)).astype(np.int32)
    none = np.zeros((texts, 0), dtype=np.int32)
    return Encoded(ids, np.full(texts, length, dtype=np.int32), none, np.zeros(texts, dtype=np.int32))


def small_model(**sizes: int) -> Denoiser:
    torch.manual_seed(0)
    model = lively(Denoiser(12, **({"dim": 4, "width": 16, "depth": 1, "heads": 2, "condition_width": 8} | sizes)))
    with torch.no_grad():
        for p in model.condition.parameters():  # random weights of gamma's fast waves change all too fast with it
            p.mul_(0.1)
    return model


@pytest.mark.parametrize("schedule", [GumbelSchedule.initial(16, 20), CosineSchedule(-5, 8)])
def test_both_bounds_of_the_exact_denoiser_are_the_entropy_of_uniform_tokens(schedule):
    torch.manual_seed(0)
    model = Uniform(20, dim=16, width=8, depth=1, heads=2, condition_width=8).eval()
    texts = tokens(200, 4, 20)
    for found in (bound(model, texts, schedule, samples=8), flow_bound(model, texts, schedule, passes=1)):
        assert found.nats_per_token == pytest.approx(math.log(20), abs=4 * found.noise_error + 0.02)
        assert found.tokens == 800
        assert found.texts == 200
        assert sum(found.parts.values()) == pytest.approx(found.nats_per_token)


@pytest.mark.parametrize("self_condition", [False, True])
def test_the_flow_agrees_with_scipys_adaptive_integrator_and_the_exact_divergence(self_condition):
    model, schedule = small_model(), CosineSchedule(-2, 4)
    batch = Batch(torch.tensor([[3, 7]]))
    size = 2 * model.dim
    start = torch.randn(1, 2, model.dim, generator=torch.Generator().manual_seed(1))
    unit = torch.eye(size).reshape(size, 2, model.dim)  # probing every direction gives the divergence itself

    def slope(gamma: float, state: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(state[:-1]).float().reshape(1, 2, model.dim).expand(size, -1, -1)
        velocity, divergence = flow(model, None, z, gamma, unit, self_condition)
        return np.append(velocity[0].reshape(-1).numpy(), float(divergence.sum()))

    state = np.append(start.numpy().reshape(-1), 0.0)
    exact = solve_ivp(slope, (-2, 4), state, method="LSODA", rtol=1e-7, atol=1e-7).y[:, -1]
    rows = Batch(batch.ids.expand(size, -1))
    z, divergence = integrate(model, rows, schedule, start.expand(size, -1, -1), unit, 1e-4, self_condition)
    assert np.allclose(z[0].reshape(-1).numpy(), exact[:-1], atol=2e-3)
    assert float(divergence.sum()) == pytest.approx(exact[-1], abs=1e-2)


def test_the_flow_of_one_token_with_its_whole_divergence_gives_the_entropy_without_noise():
    """Every direction probed, so nothing is left to chance but z at the clean end."""
    V, D, texts = 40, 16, 24
    torch.manual_seed(0)
    model, schedule = Uniform(V, dim=D, width=8, depth=1, heads=2, condition_width=8).eval(), CosineSchedule(-3, 8)
    ids = torch.randint(V, (texts, 1))
    alpha, sigma = (float(v) for v in alpha_sigma(torch.tensor(-3.0)))
    eps = torch.randn(texts, 1, D)
    z = (alpha * model.space.embed(ids) + sigma * eps).detach().repeat_interleave(D, 0)
    probes = torch.eye(D).reshape(D, 1, D).repeat(texts, 1, 1)
    end, along = integrate(model, Batch(ids.repeat_interleave(D, 0)), schedule, z, probes, self_condition=False)
    log_p = -0.5 * end[::D].square().sum((1, 2)) + along.reshape(texts, D).sum(1)
    nats = -0.5 * eps.square().sum((1, 2)) - D * math.log(sigma) - log_p
    assert float(nats.mean()) == pytest.approx(math.log(V), abs=0.12)


def test_the_divergence_goes_through_both_passes():
    """It is that of the field, by finite differences; with the first pass taken as constant it would not be."""
    model = small_model()
    z = torch.randn(1, 2, model.dim, generator=torch.Generator().manual_seed(2))
    size, step = z.numel(), 1e-2
    unit = torch.eye(size).reshape(size, *z.shape[1:])
    _, divergence = flow(model, None, z.expand(size, -1, -1), 0.5, unit)
    sides = [flow(model, None, z + sign * step * unit, 0.5, unit)[0] for sign in (1, -1)]
    differences = ((sides[0] - sides[1]) * unit).sum() / (2 * step)
    assert float(divergence.sum()) == pytest.approx(float(differences), rel=2e-3, abs=2e-3)


def test_the_flow_leaves_the_weights_as_they_were():
    model = small_model()
    model.requires_grad_(True)
    model.head.weight.requires_grad_(False)
    flow_nats(model, Batch(torch.tensor([[1, 2]])), CosineSchedule(-2, 2), torch.Generator(), tolerance=0.5)
    assert not model.head.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "head.weight")
    assert all(p.grad is None for p in model.parameters())


def test_the_noise_error_says_how_far_other_seeds_lie():
    model, schedule, texts = small_model(dim=8), CosineSchedule(-2, 5), tokens(96, 5, 12)
    found = [bound(model, texts, schedule, samples=2, seed=s, batch_size=4) for s in range(12)]
    spread = np.std([f.nats_per_token for f in found], ddof=1)
    claimed = np.sqrt(np.mean([f.noise_error**2 for f in found]))
    assert 0.7 < claimed / spread < 4


def test_the_standard_error_falls_with_the_root_of_the_texts():
    model, schedule = small_model(dim=8), CosineSchedule(-2, 5)
    few, many = (bound(model, tokens(n, 5, 12, seed=n), schedule).standard_error for n in (64, 576))
    assert few / many == pytest.approx(3, rel=0.35)
    assert math.isnan(bound(model, tokens(1, 5, 12), schedule).standard_error)


def test_more_texts_of_the_same_prompts_make_nothing_surer():
    """Each text twice, under one prompt: the mean is no surer than that of each once."""

    def errors(times, prompted):
        texts = [Example(f"a {'b ' * i}", f"c {i}" if prompted else None) for i in range(20) for _ in range(times)]
        encoded = encode(texts, vocabulary.train_word(["a b c", " ".join(map(str, range(20)))], 1), 24, 4)
        nats = torch.from_numpy(encoded.text_length**2).float()
        return likelihood._over(encoded, lambda batch: nats.expand(2, 1, -1), ("all",), 1000, lambda n: None, "cpu")

    once, again = errors(1, True), errors(3, True)
    assert again.standard_error == pytest.approx(once.standard_error)
    assert errors(3, False).standard_error == pytest.approx(once.standard_error / 3**0.5, rel=0.05)


def test_prompts_are_context_and_not_charged(denoiser, tokenizer):
    texts = [Example(text, prompt="the cat") for text in sentences(8)]
    encoded = encode(texts, tokenizer, 12, 8)
    schedule = GumbelSchedule.initial(denoiser.dim, len(tokenizer))
    found = bound(denoiser, encoded, schedule)
    assert found.tokens == sum(len(text.text.split()) + 1 for text in texts)
    bare = encode([Example(text.text) for text in texts], tokenizer, 12)
    assert found.nats_per_token != bound(denoiser, bare, schedule).nats_per_token
    assert math.isfinite(flow_bound(denoiser, encoded, schedule, tolerance=0.1).nats_per_token)


def test_bad_input_is_refused():
    model, schedule = small_model(), CosineSchedule(-2, 2)
    with pytest.raises(UserError, match="at least one"):
        bound(model, tokens(1, 3, 12).first(0), schedule)
    with pytest.raises(UserError, match="even number"):
        bound(model, tokens(2, 3, 12), schedule, samples=3)
    with pytest.raises(UserError, match="tolerance 0"):
        flow_bound(model, tokens(2, 3, 12), schedule, tolerance=0)
    known = Batch(torch.tensor([[1, 2]]), known=torch.tensor([[True, False]]))
    with pytest.raises(UserError, match="whole texts"):
        flow_nats(model, known, schedule, torch.Generator())
