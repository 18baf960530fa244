"""Laws of the solvers: limits, orders of convergence, variances, diffusers' contract."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from embdiff.errors import UserError
from embdiff.noise import SCHEDULES as NOISE_SCHEDULES
from embdiff.schedulers import SCHEDULERS, DDIMScheduler, DDPMScheduler, DPMSolverScheduler, RenoiseScheduler

diffusers_logging.set_verbosity_error()

RANGE = {"gamma_min": -7.0, "gamma_max": 9.0}
DETERMINISTIC = ("ddim", "euler", "heun", "dpm++", "dpm++3m", "unipc")
STOCHASTIC = ("ddpm", "euler-a", "churn", "dpm++sde", "dpm++3m-sde")
solvers = st.sampled_from(sorted(SCHEDULERS))
noises = st.sampled_from(sorted(NOISE_SCHEDULES))
every_solver = pytest.mark.parametrize("name", sorted(SCHEDULERS))


def make(name: str, noise: str = "cosine", **options):
    return SCHEDULERS[name](noise_schedule={"name": noise, **RANGE}, **options)


def run(scheduler, denoise, z, steps: int, generator=None):
    """The sampling loop with denoise(z, gamma) -> x0; returns every z."""
    scheduler.set_timesteps(steps)
    path = [z]
    for gamma, t in zip(scheduler.gammas.double(), scheduler.timesteps, strict=True):
        z = scheduler.step(denoise(z, gamma), t, z, generator=generator).prev_sample
        path.append(z)
    return path


@given(solvers, noises, st.sampled_from([1, 2, 3, 10, 1000]), st.integers(0, 99))
def test_with_the_true_x0_every_solver_ends_at_it(name, noise, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, 2, 3, 4, generator=generator)
    end = run(make(name, noise), lambda z, gamma: x, z, steps, generator)[-1]
    assert torch.allclose(end, x, atol=1e-6)


@given(noises, st.integers(2, 40), st.integers(0, 99))
def test_with_the_true_x0_a_deterministic_solver_stays_on_the_straight_path(noise, steps, seed):
    """z_k = alpha_k x + sigma_k eps with one and the same eps, at every level that is evaluated."""
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)
    for name in DETERMINISTIC:
        scheduler = make(name, noise)
        scheduler.set_timesteps(steps)
        start = scheduler.add_noise(x, eps, scheduler.timesteps[0])
        for z, t in zip(run(scheduler, lambda z, gamma: x, start, steps), scheduler.timesteps, strict=False):
            assert torch.allclose(z, scheduler.add_noise(x, eps, t), atol=1e-5)


def gaussian_denoiser(variance: float):
    """E[x | z] for x ~ N(0, variance)."""

    def denoise(z, gamma):
        alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        return alpha2.sqrt() * variance / (alpha2 * variance + sigma2) * z

    return denoise


def deviation(gamma: float, variance: float) -> float:
    """The standard deviation of z for such x."""
    return math.sqrt(variance / (1 + math.exp(gamma)) + 1 / (1 + math.exp(-gamma)))


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("dpm++", 2), ("heun", 2), ("dpm++3m", 3), ("unipc", 3)]
)
def test_error_on_gaussian_data_falls_with_the_declared_order(name, order):
    """The probability flow of Gaussian data is linear: z(gamma) is z_0 times a ratio of standard deviations.

    From gamma = 18 down to 1: so high up nothing depends on the low order of a multistep solver's first steps.
    """
    variance, errors = 0.3, []
    for steps in (257, 513, 1025):
        scheduler = SCHEDULERS[name](noise_schedule={"name": "log-linear", "gamma_min": -4.0, "gamma_max": 18.0})
        z = run(scheduler, gaussian_denoiser(variance), torch.ones(1, 1, 1, dtype=torch.float64), steps)
        plan = scheduler._plan(steps)
        there = 2 * (7 * (len(plan) // 2) // 9)  # Heun is at a level after every second evaluation
        expected = deviation(plan[there].gamma, variance) / deviation(plan[0].gamma, variance)
        errors.append(abs(z[there].item() - expected))
    slopes = np.diff(np.log2(errors))
    assert slopes[-1] == pytest.approx(-order, abs=0.25)


def variances(scheduler, variance: float, steps: int) -> list[float]:
    """Var z before every evaluation and at the end for Gaussian data, without sampling: a step is linear in
    (z, x0_prev, x0_prev2), so their covariance is carried through the table."""
    covariance = np.zeros((3, 3))
    plan = scheduler._plan(steps)
    covariance[0, 0] = deviation(plan[0].gamma, variance) ** 2
    result = [covariance[0, 0]]
    for gamma, (a, b, c, d, s) in plan:
        alpha2 = 1 / (1 + math.exp(gamma))
        predict = math.sqrt(alpha2) * variance / (alpha2 * variance + 1 - alpha2)
        matrix = np.array([[a + b * predict, c, d], [predict, 0, 0], [0, 1, 0]])
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += s**2
        result.append(covariance[0, 0])
    return result


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("noise", sorted(set(NOISE_SCHEDULES) - {"table"}))
def test_every_solver_reproduces_the_marginal_variance_at_every_level(name, noise):
    """Up to a discretisation error that falls with the number of steps and is small at 1,000."""
    variance, errors = 0.25, []
    for steps in (500, 1000):
        scheduler = make(name, noise)
        plan = scheduler._plan(steps)
        got = variances(scheduler, variance, steps)
        levels = range(len(plan)) if scheduler.order == 1 else range(1 - steps % 2, len(plan), 2)
        errors.append(max(abs(got[i] / deviation(plan[i].gamma, variance) ** 2 - 1) for i in levels))
    assert errors[1] < min(0.05, errors[0])


@pytest.mark.parametrize("name", [*STOCHASTIC, "renoise"])
def test_with_the_true_x0_stochastic_solvers_keep_the_marginal_at_every_level(name):
    """z | x is N(alpha x, sigma^2): exact at any number of steps for those that draw from the posterior or forward
    process; a second-order correction is 0 here, so all of them are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((40000, 1, 1), 0.7)
    scheduler = make(name)
    path = run(scheduler, lambda z, gamma: x, torch.randn(x.shape, generator=generator), 9, generator)
    for z, (gamma, _) in list(zip(path, scheduler._plan(9), strict=False))[1:]:
        alpha, sigma = 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma))
        # False alarms once in 10^6 for each of the levels; seeded, so the outcome never changes. The start lacks
        # the mean alpha_0 x with alpha_0 = 0.01, which fades.
        assert stats.kstest(z.flatten().numpy(), stats.norm(0.7 * alpha, sigma).cdf).pvalue > 1e-6


@given(noises, st.integers(1, 60))
def test_ddim_at_eta_one_is_ddpm_and_its_posterior(noise, steps):
    ancestral, eta_one = make("ddpm", noise), make("ddim", noise, eta=1.0)
    ancestral.set_timesteps(steps)
    eta_one.set_timesteps(steps)
    assert ancestral._table == eta_one._table
    gammas = ancestral.gammas.double()
    for (a, b, *_, s), now, to in zip(ancestral._table, gammas, gammas[1:], strict=False):
        # q(z' | z, x0) by Bayes' rule from the two Gaussian factors, in textbook form.
        alpha2, alpha2_to = torch.sigmoid(-now), torch.sigmoid(-to)
        ratio2 = alpha2 / alpha2_to
        variance = (1 - ratio2) * (1 - alpha2_to) / (1 - alpha2)
        assert s**2 == pytest.approx(variance.item(), rel=1e-3, abs=1e-9)
        assert a == pytest.approx((ratio2.sqrt() * (1 - alpha2_to) / (1 - alpha2)).item(), rel=1e-3, abs=1e-9)
        assert b == pytest.approx((alpha2_to.sqrt() * (1 - ratio2) / (1 - alpha2)).item(), rel=1e-3, abs=1e-9)


@given(solvers, st.integers(3, 12), st.integers(0, 99))
def test_steps_commute_with_permutations_and_rotations(name, steps, seed):
    """Two consecutive steps from the same row, with the noise turned and permuted like everything else."""
    generator = torch.Generator().manual_seed(seed)
    z, x, y, eps = torch.randn(4, 3, 4, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    samples, positions = torch.randperm(3, generator=generator), torch.randperm(4, generator=generator)

    def move(v):
        return v[samples][:, positions] @ turn

    def two_steps(z, x, y, eps):
        scheduler = make(name)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(steps - 3)
        with mock.patch("embdiff.schedulers.base.randn_tensor", return_value=eps):
            z = scheduler.step(x, scheduler.timesteps[-3], z).prev_sample
            return scheduler.step(y, scheduler.timesteps[-2], z).prev_sample

    assert torch.allclose(two_steps(*map(move, (z, x, y, eps))), move(two_steps(z, x, y, eps)), atol=1e-9)


def test_a_new_schedule_forgets_where_the_last_one_began():
    scheduler = make("renoise")
    scheduler.set_begin_index(0)
    scheduler.set_timesteps(10)
    scheduler.step(torch.zeros(1, 2, 3), scheduler.timesteps[4], torch.zeros(1, 2, 3))
    assert scheduler.step_index == 5


@every_solver
def test_a_generator_decides_everything_and_each_sample_may_have_its_own(name):
    x, z = torch.randn(2, 3, 2, 4)
    runs = [run(make(name), lambda z, g: 0.5 * x, z, 5, torch.Generator().manual_seed(1))[-2] for _ in range(2)]
    assert torch.equal(*runs)
    together = run(make(name), lambda z, g: 0.5 * x, z, 5, [torch.Generator().manual_seed(i) for i in range(3)])[-2]
    alone = run(make(name), lambda z, g: 0.5 * x[1:2], z[1:2], 5, [torch.Generator().manual_seed(1)])[-2]
    assert torch.equal(together[1:2], alone)


@every_solver
def test_the_config_survives_saving_and_other_solvers(name, tmp_path):
    scheduler = make(name, "sqrt", num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    public = {k for k in scheduler.config if not k.startswith("_")}
    assert {k: loaded.config[k] for k in public} == {k: scheduler.config[k] for k in public}
    for other in SCHEDULERS.values():
        moved = other.from_config(scheduler.config)
        assert moved.noise_schedule == scheduler.noise_schedule
        assert len(moved) == 500
        back = type(scheduler).from_config(moved.config)
        assert back.noise_schedule == scheduler.noise_schedule


@every_solver
def test_diffusers_contract(name):
    scheduler = make(name)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.compatibles
    assert scheduler.order == (2 if name in ("heun", "churn") else 1)
    z = torch.randn(2, 3, 4)
    assert torch.equal(scheduler.scale_model_input(z, 3), z)
    scheduler.set_timesteps(10)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 10
    assert torch.all(scheduler.timesteps.diff() < 0) or scheduler.order == 2
    as_tuple = scheduler.step(
        z, int(scheduler.timesteps[4]), z, generator=torch.Generator().manual_seed(0), return_dict=False
    )
    assert scheduler.step_index == 5
    scheduler.set_timesteps(10)
    assert scheduler.step_index is None
    as_dict = scheduler.step(z, scheduler.timesteps[4], z, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_tuple[0], as_dict.prev_sample)
    assert torch.equal(as_dict.pred_original_sample, z)


@every_solver
def test_add_noise_takes_times_of_examples_and_of_positions(name):
    scheduler = make(name)
    x, eps = torch.randn(2, 3, 4, 5)
    by_example = scheduler.add_noise(x, eps, torch.tensor([10, 500, 990]))
    by_position = scheduler.add_noise(x, eps, torch.tensor([10, 500, 990])[:, None].expand(3, 4))
    assert torch.allclose(by_example, by_position)
    assert torch.equal(scheduler.add_noise(x[:1], eps[:1], torch.tensor(10))[0], by_example[0])


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_steps_must_be_whole_and_positive(steps):
    with pytest.raises(UserError, match=str(steps)):
        make("ddim").set_timesteps(steps)


def test_options_out_of_range_are_refused():
    with pytest.raises(UserError, match="eta"):
        DDIMScheduler(eta=1.5)
    with pytest.raises(UserError, match="predict x0"):
        DDPMScheduler(prediction_type="epsilon")
    with pytest.raises(UserError, match="unknown"):
        RenoiseScheduler(noise_schedule="cubic").set_timesteps(3)


def test_the_second_order_solver_starts_with_a_first_order_step():
    scheduler = DPMSolverScheduler(noise_schedule={"name": "cosine", **RANGE})
    ddim = DDIMScheduler(noise_schedule={"name": "cosine", **RANGE})
    for s in (scheduler, ddim):
        s.set_timesteps(8)
    assert scheduler._table[0] == pytest.approx(ddim._table[0])
    assert scheduler._table[-1] == ddim._table[-1] == (0.0, 1.0, 0.0, 0.0, 0.0)
