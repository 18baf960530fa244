"""Levels fitted to a model."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import tuning
from embdiff.batches import Batch
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError
from embdiff.schedulers import RenoiseScheduler
from tests.conftest import lively


@given(st.integers(1, 5), st.lists(st.floats(0.01, 2.0), min_size=7, max_size=7), st.integers(0, 99))
def test_the_path_is_the_best_of_all(steps, rises, seed):
    gammas = np.cumsum([-4.0, *rises])
    errors = np.sort(np.random.default_rng(seed).uniform(0, 5, len(gammas)))
    found = tuning.best_levels(gammas, errors, steps)
    assert len(found) == steps
    assert found[0] == gammas[-1]
    every = (np.array([gammas[-1], *inner[::-1]]) for inner in combinations(gammas[1:-1], steps - 1))
    least = min(tuning.loss(levels, gammas, errors, gammas[0]) for levels in every)
    assert tuning.loss(found, gammas, errors, gammas[0]) == pytest.approx(least)


@given(st.integers(2, 30))
def test_more_levels_lose_less_and_even_ones_more(steps):
    gammas = np.linspace(-6, 8, 60)
    errors = 64 / (1 + np.exp(-(gammas - 1)))
    fine, coarse = (tuning.best_levels(gammas, errors, n) for n in (steps + 1, steps))
    even = gammas[np.linspace(59, 1, steps).round().astype(int)]
    losses = [tuning.loss(levels, gammas, errors, -6.0) for levels in (fine, coarse, even)]
    assert losses[0] <= losses[1] <= losses[2] + 1e-12


@given(st.integers(1, 12))
def test_a_scheduler_samples_at_the_levels_that_were_found(steps):
    gammas = np.linspace(-5, 7, 40)
    levels = tuning.best_levels(gammas, 1 / (1 + np.exp(-gammas)), steps).tolist()
    noise = {"name": "cosine", "gamma_min": -5.0, "gamma_max": 7.0}
    tuned, even = (RenoiseScheduler(noise_schedule=noise, levels=table) for table in ({str(steps): levels}, None))
    tuned.set_timesteps(steps)
    assert tuned.gammas.tolist() == pytest.approx(levels, abs=1e-5)
    for scheduler in (tuned, even):
        scheduler.set_timesteps(steps + 1)
    assert torch.equal(tuned.gammas, even.gammas)


def test_the_error_of_a_model_rises_with_noise():
    model = lively(Denoiser(20, dim=8, width=16, depth=1, heads=2, condition_width=8))
    batch = Batch(torch.randint(20, (64, 6), generator=torch.Generator().manual_seed(0)))
    errors = tuning.error_curve(model, batch, np.array([-6.0, 0.0, 2.0, 6.0]), torch.Generator().manual_seed(0))
    assert errors[0] < 1e-3
    assert np.all(np.diff(errors[:3]) > 0)


@pytest.mark.parametrize("steps", [0, 4, 9])
def test_levels_that_are_not_there_are_refused(steps):
    with pytest.raises(UserError, match=f"{steps} levels"):
        tuning.best_levels(np.arange(4.0), np.arange(4.0), steps)
