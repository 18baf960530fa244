"""The losses: limits that are known, and the bound against exact likelihoods."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from embdiff import losses
from embdiff.batches import Batch, Prompts
from embdiff.denoiser import Denoiser
from embdiff.noise import SCHEDULES, CosineSchedule, GumbelSchedule
from tests.conftest import lively


class Uniform(Denoiser):
    """A denoiser whose Transformer says nothing: the matched filter alone, the exact posterior of independent uniform
    tokens."""

    def forward(self, *args, **kwargs):
        h = super().forward(*args, **kwargs)
        return torch.cat([torch.zeros_like(h[..., : self.config.width]), h[..., self.config.width :]], -1)


def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_uniform_tokens():
    """For independent uniform tokens the bound is tight: ln V nats a position."""
    V, L = 50, 6
    torch.manual_seed(0)
    model = Uniform(V, dim=24, width=8, depth=1, heads=2, condition_width=8).eval()
    ids = torch.randint(V, (400, L))
    for schedule in (GumbelSchedule.initial(24, V), CosineSchedule(-6, 9)):
        bound = losses.variational_bound(model, Batch(ids), schedule, torch.Generator().manual_seed(0), samples=8)
        nats = bound.total / L
        error = nats.std().item() / math.sqrt(len(ids))
        assert nats.mean().item() == pytest.approx(math.log(V), abs=4 * error + 0.02)


def small_model() -> Denoiser:
    return lively(Denoiser(20, dim=16, width=32, depth=2, heads=2, condition_width=16))


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_each_pass_is_given_what_the_one_before_predicted(passes):
    model, ids = small_model(), torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    x, gamma, eps = model.space.embed(ids), torch.zeros(3), torch.randn(3, 6, 16)
    z = losses.corrupt(x, gamma, eps)
    expected = torch.zeros_like(z)
    for _ in range(passes):
        h = model(z, gamma, None, expected)
        expected = model.x0(h)
    found = losses.features(model, Batch(ids), x, gamma, eps, passes)
    assert torch.allclose(found, h, atol=1e-6)
    assert found.requires_grad


def test_context_is_neither_noised_nor_charged():
    model, L = small_model(), 6
    ids = torch.randint(20, (3, L), generator=torch.Generator().manual_seed(0))
    known = torch.zeros(3, L, dtype=torch.bool)
    known[:, :4] = True
    x = model.space.embed(ids)
    eps = torch.randn(2, *x.shape)
    eps[1, :, 4:] = eps[0, :, 4:]  # other noise on the context, the same on the target
    one, two = (losses.cross_entropy(model, Batch(ids, known), torch.zeros(3), e, True).total.item() for e in eps)
    assert one == pytest.approx(two, rel=1e-6)
    everything = Batch(ids, torch.ones_like(known))
    assert losses.cross_entropy(model, everything, torch.zeros(3), eps[0], True).total.item() == 0.0


def test_a_prompt_encoded_once_serves_all_draws_and_dropping_it_is_no_prompt():
    model, L = small_model(), 6
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (2, L), generator=generator)
    prompts = Prompts.aligned(torch.randint(20, (2, 4), generator=generator), torch.tensor([3, 4]))
    gamma, eps = torch.randn(4, generator=generator), torch.randn(4, L, 16, generator=generator)
    twice = Batch(ids.repeat_interleave(2, 0), prompts=prompts)
    together = losses.cross_entropy(model, twice, gamma, eps, True).cross_entropy
    for draw in range(2):
        alone = Batch(ids, prompts=prompts)
        separate = losses.cross_entropy(model, alone, gamma[draw::2], eps[draw::2], True).cross_entropy
        assert torch.allclose(together[draw::2], separate, atol=1e-5)
    hidden = Batch(twice.ids, prompts=prompts, prompted=torch.zeros(4, dtype=torch.bool))
    without = losses.cross_entropy(model, Batch(twice.ids), gamma, eps, True).cross_entropy
    assert torch.allclose(losses.cross_entropy(model, hidden, gamma, eps, True).cross_entropy, without, atol=1e-5)
    assert not torch.allclose(together, without)


def test_cross_entropy_is_the_average_over_target_positions():
    V, L = 20, 6
    model = lively(Denoiser(V, dim=16, width=32, depth=2, heads=2, condition_width=16))
    ids = torch.randint(V, (3, L))
    loss = losses.cross_entropy(model, Batch(ids), torch.randn(3), torch.randn(3, L, 16), False)
    assert loss.total.item() == pytest.approx(loss.cross_entropy.mean().item(), rel=1e-5)
    assert loss.total.requires_grad
    assert not loss.cross_entropy.requires_grad


def test_at_high_noise_no_model_knows_more_than_the_prior():
    """With z pure noise, a matched filter says nothing: cross-entropy ln V."""
    V = 50
    model = Uniform(V, dim=24, width=8, depth=1, heads=2, condition_width=8).eval()
    ids = torch.randint(V, (64, 4))
    loss = losses.cross_entropy(model, Batch(ids), torch.full((64,), 20.0), torch.randn(64, 4, 24), False)
    assert loss.total.item() == pytest.approx(math.log(V), abs=0.01)


def test_the_variational_loss_estimates_the_diffusion_term():
    V, L = 20, 4
    model = lively(Denoiser(V, dim=16, width=32, depth=1, heads=2, condition_width=16))
    torch.manual_seed(0)
    ids = torch.randint(V, (600, L))
    schedule = GumbelSchedule.initial(16, V)
    batch, runs = Batch(ids), 12
    generators = [torch.Generator().manual_seed(seed) for seed in range(runs)]
    bounds = [losses.variational_bound(model, batch, schedule, g, samples=4).diffusion.mean() / L for g in generators]
    values = []
    batch, rows = Batch(ids.repeat(4, 1)), 2400  # as many levels as there
    for _ in range(runs):
        t = ((torch.arange(rows, dtype=torch.float64) + torch.rand(1).double()) / rows).numpy()
        gamma, weight = (torch.from_numpy(v).float() for v in losses.levels(schedule, t))
        noise = torch.randn(rows, L, 16)
        values.append(losses.variational_loss(model, batch, gamma, noise, True, 1 / weight).total)
    assert torch.stack(values).mean().item() == pytest.approx(torch.stack(bounds).mean().item(), rel=0.1)


def test_the_mixed_loss_is_the_sum_of_the_others():
    model = lively(Denoiser(20, dim=16, width=32, depth=1, heads=2, condition_width=16))
    batch, gamma, noise = Batch(torch.randint(20, (6, 4))), torch.linspace(-1, 4, 6), torch.randn(6, 4, 16)
    density = torch.full((6,), 0.5)
    mixed = losses.mixed_loss(model, batch, gamma, noise, True, density)
    ce = losses.cross_entropy(model, batch, gamma, noise, True)
    bound = losses.variational_loss(model, batch, gamma, noise, True, density)
    assert mixed.total.item() == pytest.approx(ce.total.item() + bound.total.item(), rel=1e-5)
    torch.testing.assert_close(mixed.cross_entropy, ce.cross_entropy)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"table"}))
@given(st.floats(-3, 3), st.floats(0.3, 2))
def test_levels_and_their_weights_integrate_over_gamma(name, middle, width):
    schedule = SCHEDULES[name](gamma_min=-6.0, gamma_max=7.0)
    gamma, weight = losses.levels(schedule, (np.arange(20_000) + 0.5) / 20_000)
    assert np.all((gamma >= -6) & (gamma <= 7) & (weight <= 2 * 13 + 1e-9))
    bell = np.exp(-0.5 * ((gamma - middle) / width) ** 2)
    area = width * math.sqrt(2 * math.pi) * (norm.cdf((7 - middle) / width) - norm.cdf((-6 - middle) / width))
    assert float((bell * weight).mean()) == pytest.approx(area, rel=0.01)


def test_the_bound_draws_its_levels_in_strata_over_the_whole_batch(monkeypatch):
    model = lively(Denoiser(9, dim=8, width=16, depth=1, heads=2, condition_width=8))
    seen = []
    levels = losses.levels

    def spy(schedule, u):
        seen.extend(u)
        return levels(schedule, u)

    monkeypatch.setattr(losses, "levels", spy)
    schedule = GumbelSchedule.initial(8, 9)
    losses.variational_bound(model, Batch(torch.zeros(16, 3, dtype=torch.long)), schedule, torch.Generator(), samples=3)
    times = sorted(seen)
    gaps = [later - earlier for earlier, later in pairwise([*times, times[0] + 1])]
    assert max(gaps) == pytest.approx(1 / 48, abs=1e-3)
