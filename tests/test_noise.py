"""Laws of gamma, corruption and noise schedules."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from embdiff import noise
from embdiff.errors import UserError
from embdiff.noise import FITS, SCHEDULES, GumbelFit, GumbelSchedule, TableFit, alpha_sigma, corrupt, noise_schedule

gammas = st.floats(-15, 15)
names = st.sampled_from(sorted(set(SCHEDULES) - {"table"}))
rises = st.lists(st.floats(0.05, 3.0), min_size=1, max_size=8)
tables = st.builds(
    lambda lo, rise: noise_schedule({"name": "table", "gammas": np.cumsum([lo, *rise])}), st.floats(-8, -3), rises
)
schedules = tables | st.builds(
    lambda name, lo, width: noise_schedule({"name": name, "gamma_min": lo, "gamma_max": lo + width}),
    names,
    st.floats(-8, -3),
    st.floats(6, 14),
)


@given(gammas)
def test_gamma_is_log_noise_to_signal_and_variance_is_preserved(gamma):
    alpha, sigma = alpha_sigma(torch.tensor(gamma, dtype=torch.float64))
    assert torch.isclose(alpha**2 + sigma**2, torch.ones((), dtype=torch.float64))
    assert torch.isclose((sigma**2 / alpha**2).log(), torch.tensor(gamma, dtype=torch.float64), atol=1e-9)


@given(gammas.filter(lambda g: abs(g) < 10), st.integers(0, 1000))
def test_velocity_and_z_give_x_back(gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    level = torch.full((3,), gamma, dtype=torch.float64)
    z = corrupt(x, level, eps)
    alpha, sigma = alpha_sigma(level[:, None, None])
    assert torch.allclose(alpha * z - sigma * noise.velocity(x, eps, level), x, atol=1e-9)


def test_gamma_per_position_equals_gamma_per_example_position_by_position():
    x, eps = torch.randn(2, 3, 4, 5)
    level = torch.randn(3, 4)
    z = corrupt(x, level, eps)
    for position in range(4):
        assert torch.equal(
            z[:, position],
            corrupt(x[:, position : position + 1], level[:, position], eps[:, position : position + 1])[:, 0],
        )


def test_marginals_have_the_declared_mean_and_variance():
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-4 for each of three levels; seeded, so it never flips."""
    generator = torch.Generator().manual_seed(3)
    for gamma in (-3.0, 0.0, 4.0):
        level = torch.full((1,), gamma)
        alpha, sigma = (float(v) for v in alpha_sigma(level))
        z = corrupt(torch.full((1, 20000, 1), 1.5), level, torch.randn(1, 20000, 1, generator=generator))
        assert stats.kstest(z.flatten().numpy(), stats.norm(1.5 * alpha, sigma).cdf).pvalue > 1e-4


@given(schedules)
def test_schedules_rise_from_gamma_min_to_gamma_max(schedule):
    t = np.linspace(0, 1, 200)
    gamma = schedule.gamma(t)
    assert np.all(np.diff(gamma) > 0)
    assert gamma[-1] == pytest.approx(schedule.gamma_max, abs=1e-6)
    if schedule.name != "gumbel":  # its lower tail may lie below every float64 probability
        assert gamma[0] == pytest.approx(schedule.gamma_min, abs=1e-6)


@given(schedules, st.floats(0.001, 0.999))
def test_the_inverse_inverts_and_the_derivative_is_the_slope(schedule, t):
    assert schedule.t(schedule.gamma(t)) == pytest.approx(t, abs=1e-6)
    step = 1e-5 * min(t, 1 - t)
    slope = (schedule.gamma(t + step) - schedule.gamma(t - step)) / (2 * step)
    assert schedule.derivative(t) == pytest.approx(slope, rel=1e-3)


@given(schedules)
def test_a_schedule_comes_back_from_its_config(schedule):
    assert noise_schedule(schedule.config()) == schedule


@given(st.floats(-0.5, 2.0), st.floats(0.5, 1.5), st.floats(0.5, 6.0))
def test_the_fit_finds_the_curve_it_is_shown(mu_offset, beta, height):
    start = GumbelSchedule.initial(64, 1000)
    mu = start.mu - 0.8 + mu_offset
    fit = GumbelFit(start)
    generator = np.random.default_rng(0)
    for _ in range(60):
        gamma = generator.uniform(start.gamma_min, start.gamma_max, 64)
        fit.update(gamma, height * np.exp(-np.exp(-(gamma - mu) / beta)) + 0.01 * generator.standard_normal(64))
    found = fit.fit()
    assert found.mu == pytest.approx(mu, abs=0.1)
    assert found.beta == pytest.approx(beta, abs=0.1)
    assert fit.h_inf == pytest.approx(height, rel=0.05)


@given(st.floats(0.0, 3.0), st.floats(0.5, 1.5), st.floats(0.3, 0.7))
def test_a_table_is_fitted_to_any_rising_curve(mu, width, share):
    """Two steps of information, which no Gumbel curve has: t is the share of the cross-entropy below gamma."""
    start = GumbelSchedule.initial(64, 1000)
    fit = TableFit(start)

    def curve(gamma):
        low, high = (stats.norm(mu + offset, width).cdf(gamma) for offset in (-1.0, 2.0))
        return 5.0 * (share * low + (1 - share) * high)

    generator = np.random.default_rng(0)
    for _ in range(60):
        gamma = generator.uniform(start.gamma_min, start.gamma_max, 256)
        fit.update(gamma, curve(gamma) + 0.05 * generator.standard_normal(256))
    gamma = np.linspace(start.gamma_min + 0.5, start.gamma_max - 0.5, 40)
    assert fit.fit().t(gamma) == pytest.approx(curve(gamma) / curve(start.gamma_max), abs=0.06)


@pytest.mark.parametrize("kind", sorted(FITS))
def test_the_fit_continues_from_its_state(kind):
    generator = np.random.default_rng(0)
    one, two = (FITS[kind](GumbelSchedule.initial(64, 1000)) for _ in range(2))
    gamma, ce = generator.uniform(-1, 9, (2, 500))
    one.update(gamma, ce)
    one.fit()
    two.load_state_dict(one.state_dict())
    for fit in (one, two):
        fit.update(ce, gamma)
    assert one.fit() == two.fit()


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ({"gammas": [1.0, 1.0]}, "each above the one before"),
        ({"gammas": [1.0]}, "two or more"),
        ({"gammas": [0.0, float("nan")]}, "finite"),
        ({"gammas": [0.0, 1.0], "times": [0.0, 0.5]}, "from 0 to 1"),
        ({"gammas": [0.0, 1.0], "times": [0.0, 0.5, 1.0]}, "as many times"),
    ],
)
def test_tables_that_do_not_rise_are_refused(table, cause):
    with pytest.raises(UserError, match=cause):
        noise_schedule({"name": "table", **table})


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "gumbel", "beta": 0.0}, {"name": "gumbel", "mu": float("nan")}, {"name": "linear", "beta_start": -1.0},
        {"name": "cosine", "gamma_max": float("inf")}, {"name": "cosine", "gamma_min": "low"},
        {"name": "karras", "rho": 0.0}, {"name": "sigmoid", "start": 4.0},
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(spec):
    with pytest.raises(UserError):
        noise_schedule(spec)


@pytest.mark.parametrize("spec", ["cubic", {"name": "cosine", "beta": 1}, {"gamma_min": 0}])
def test_unknown_schedules_and_parameters_are_refused(spec):
    with pytest.raises(UserError, match=r"unknown|no parameter"):
        noise_schedule(spec)
