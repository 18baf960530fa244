"""Laws of the solvers: limits, orders of convergence, variances, diffusers' contract."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from embdiff.errors import UserError
from embdiff.noise import SCHEDULES as NOISE_SCHEDULES
from embdiff.noise import GumbelSchedule
from embdiff.schedulers import SCHEDULERS, DDIMScheduler, DDPMScheduler, DPMSolverScheduler, RenoiseScheduler

diffusers_logging.set_verbosity_error()

RANGE = {"gamma_min": -7.0, "gamma_max": 9.0}
DETERMINISTIC = ("ddim", "euler", "heun", "dpm++", "dpm++3m", "unipc")
STOCHASTIC = ("ddpm", "euler-a", "churn", "dpm++sde", "dpm++3m-sde")
solvers = st.sampled_from(sorted(SCHEDULERS))
noises = st.sampled_from(sorted(NOISE_SCHEDULES))
every_solver = pytest.mark.parametrize("name", sorted(SCHEDULERS))
precisions = st.sampled_from(["float32", "bfloat16"])
every_noise = pytest.mark.parametrize("noise", sorted(NOISE_SCHEDULES))
one_evaluation = sorted(set(SCHEDULERS) - {"heun", "churn"})


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


@every_solver
@every_noise
@settings(max_examples=5)
@given(
    st.sampled_from([1, 2, 3, 1000]) | st.integers(1, 200), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 99)
)
def test_with_the_true_x0_every_solver_ends_at_it(name, noise, steps, dtype, seed):
    """Exactly, from any start, for models of either precision; latents stay fp32 and finite on the way."""
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, 2, 3, 4, generator=generator)
    x = x.to(getattr(torch, dtype))
    scheduler = make(name, noise)
    path = run(scheduler, lambda z, gamma: x, z, steps, generator)
    assert len(path) == steps + 1
    assert all(z.dtype == torch.float32 and z.isfinite().all() for z in path)
    assert torch.equal(path[-1], x.float())
    # And near it before: what is left is the noise of the last level.
    gamma = scheduler.gammas[-1]
    left = (path[-2] - torch.sigmoid(-gamma).sqrt() * x) / torch.sigmoid(gamma).sqrt()
    assert steps == 1 or left.abs().max() < 8


@every_solver
@every_noise
@settings(max_examples=3)
@given(st.integers(1, 40), st.integers(0, 99))
def test_a_bf16_model_is_a_model_whose_predictions_are_rounded(name, noise, steps, seed):
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))

    def end(back):
        generator = torch.Generator().manual_seed(seed)
        return run(make(name, noise), lambda z, gamma: back(torch.tanh(z + gamma).bfloat16()), z, steps, generator)[-1]

    assert torch.equal(end(lambda x: x), end(lambda x: x.float()))


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
@every_noise
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
    assert ancestral.table == eta_one.table
    gammas = ancestral.gammas.double()
    for (a, b, *_, s), now, to in zip(ancestral.table, gammas, gammas[1:], strict=False):
        # q(z' | z, x0) by Bayes' rule from the two Gaussian factors, in textbook form.
        alpha2, alpha2_to = torch.sigmoid(-now), torch.sigmoid(-to)
        ratio2 = alpha2 / alpha2_to
        variance = (1 - ratio2) * (1 - alpha2_to) / (1 - alpha2)
        assert s**2 == pytest.approx(variance.item(), rel=1e-3, abs=1e-9)
        assert a == pytest.approx((ratio2.sqrt() * (1 - alpha2_to) / (1 - alpha2)).item(), rel=1e-3, abs=1e-9)
        assert b == pytest.approx((alpha2_to.sqrt() * (1 - ratio2) / (1 - alpha2)).item(), rel=1e-3, abs=1e-9)


@every_solver
@every_noise
@settings(max_examples=3)
@given(st.integers(3, 12), st.integers(0, 99))
def test_steps_commute_with_permutations_and_rotations(name, noise, steps, seed):
    """Two consecutive steps from the same row, with the noise turned and permuted like everything else."""
    generator = torch.Generator().manual_seed(seed)
    z, x, y, eps = torch.randn(4, 3, 4, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    samples, positions = torch.randperm(3, generator=generator), torch.randperm(4, generator=generator)

    def move(v):
        return v[samples][:, positions] @ turn

    def two_steps(z, x, y, eps):
        scheduler = make(name, noise)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(steps - 3)
        z = scheduler.step(x, scheduler.timesteps[-3], z, variance_noise=eps).prev_sample
        return scheduler.step(y, scheduler.timesteps[-2], z, variance_noise=eps).prev_sample

    assert torch.allclose(two_steps(*map(move, (z, x, y, eps))), move(two_steps(z, x, y, eps)), atol=1e-9)


@every_solver
@every_noise
@settings(max_examples=3)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12), st.integers(1, 9))
def test_timesteps_off_the_schedule_in_any_order(name, noise, asked, steps):
    """The first call takes the row of the nearest timestep, later ones follow; after the last row it looks up again."""
    scheduler = make(name, noise)
    scheduler.set_timesteps(steps)
    levels, row = scheduler.timesteps.double(), None
    for t in asked:
        scheduler.step(torch.ones(1, 2, 3), t, torch.zeros(1, 2, 3))
        if row is None:
            row = steps - 1 if scheduler.step_index is None else scheduler.step_index - 1
            assert (levels[row] - t).abs() <= (levels - t).abs().min() + 1e-3
        else:
            row += 1
            assert scheduler.step_index == (row + 1 if row + 1 < steps else None)
        row = None if scheduler.step_index is None else row


@every_solver
def test_a_step_reads_nothing_from_the_device(name):
    """On the meta device tensors have no values, so any read raises."""
    scheduler = make(name)
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    z = torch.empty(2, 3, 4, device="meta")
    for t in scheduler.timesteps:
        z = scheduler.step(torch.empty_like(z), t, scheduler.scale_model_input(z, t)).prev_sample
    assert z.shape == (2, 3, 4)


def test_reads_are_noticed():
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    scheduler.set_timesteps(6, device="meta")
    z = torch.empty(2, 3, 4, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        scheduler.step(z, scheduler.timesteps[0], z)


@pytest.mark.parametrize("name", one_evaluation)
@given(noises, st.integers(1, 8), st.integers(0, 99))
def test_every_position_may_follow_its_own_levels(name, noise, calls, seed):
    """Positions that fall at their own pace, wait, and are clean early: each ends where it would alone."""
    random = np.random.default_rng(seed)
    columns = [own_pace(random, calls) for _ in range(5)]
    x, z, *eps = torch.randn(calls + 2, 2, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def predict(z, gamma):  # of each position alone
        return torch.tanh(x + z + 0.1 * gamma[..., None])

    scheduler = make(name, noise)
    scheduler.set_timesteps(timesteps=np.stack(columns, 1))
    together = z
    for k, t in enumerate(scheduler.timesteps):
        x0 = predict(together, scheduler.gammas[k].double())
        together = scheduler.step(x0, t, together, variance_noise=eps[k]).prev_sample
    for position, column in enumerate(columns):
        # The calls that move this position: the last one at each level.
        moving = [k for k in range(calls) if column[k] > 0 and (k == calls - 1 or column[k + 1] < column[k])]
        alone = z[:, [position]]
        if moving:
            one = make(name, noise)
            one.set_timesteps(timesteps=column[moving])
            for k, gamma, t in zip(moving, one.gammas.double(), one.timesteps, strict=True):
                x0 = torch.tanh(x[:, [position]] + alone + 0.1 * gamma)
                alone = one.step(x0, t, alone, variance_noise=eps[k][:, [position]]).prev_sample
        assert torch.allclose(together[:, [position]], alone, atol=1e-5)


def own_pace(random, calls: int):
    """Timesteps that fall or stay, and may reach 0 before the end."""
    falls = random.choice([0.0, 1.0, 2.0], calls)
    return np.maximum(0.0, 990.0 * (1 - np.cumsum(falls) / calls))


@given(solvers.filter(one_evaluation.__contains__), noises, st.integers(1, 30), st.integers(0, 99))
def test_given_timesteps_of_the_schedule_change_nothing(name, noise, steps, seed):
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    ends = []
    for shape in ((), (steps,), (steps, 3), (steps, 2, 3)):
        scheduler, generator = make(name, noise), torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(steps)
        if shape:
            own = scheduler._times * 1000
            scheduler.set_timesteps(timesteps=np.broadcast_to(own.reshape(-1, *[1] * (len(shape) - 1)), shape))
        assert scheduler.num_inference_steps == steps
        sample = z
        for gamma, t in zip(scheduler.gammas, scheduler.timesteps, strict=True):
            level = gamma.mean()
            noise_now = torch.randn(z.shape, generator=generator)
            sample = scheduler.step(torch.tanh(sample + level), t, sample, variance_noise=noise_now).prev_sample
        ends.append(sample)
    assert all(torch.allclose(ends[0], end, atol=2e-4) for end in ends[1:])


@pytest.mark.parametrize(
    ("timesteps", "cause"),
    [
        ([100.0, 500.0], "do not fall"),
        ([500.0, 500.0], "do not fall"),
        ([500.0, 0.0], "do not fall"),
        ([[500.0, 100.0], [500.0, 200.0]], "do not fall"),
        ([1001.0, 500.0], "out of range"),
        ([float("nan")], "out of range"),
        ([], "shape"),
    ],
)
def test_timesteps_that_cannot_be_followed_are_refused(timesteps, cause):
    with pytest.raises(UserError, match=cause):
        make("ddim").set_timesteps(timesteps=timesteps)


def test_a_solver_that_evaluates_between_levels_takes_no_timesteps():
    with pytest.raises(UserError, match="HeunScheduler"):
        make("heun").set_timesteps(timesteps=[500.0, 100.0])


def test_a_new_schedule_forgets_where_the_last_one_began():
    scheduler = make("renoise")
    scheduler.set_begin_index(0)
    scheduler.set_timesteps(10)
    scheduler.step(torch.zeros(1, 2, 3), scheduler.timesteps[4], torch.zeros(1, 2, 3))
    assert scheduler.step_index == 5


@every_solver
@every_noise
def test_a_generator_decides_everything_and_each_sample_may_have_its_own(name, noise):
    x, z = torch.randn(2, 3, 2, 4)
    runs = [run(make(name, noise), lambda z, g: 0.5 * x, z, 5, torch.Generator().manual_seed(1))[-2] for _ in range(2)]
    assert torch.equal(*runs)
    together = run(make(name, noise), lambda z, g: 0.5 * x, z, 5, [torch.Generator().manual_seed(i) for i in range(3)])[
        -2
    ]
    alone = run(make(name, noise), lambda z, g: 0.5 * x[1:2], z[1:2], 5, [torch.Generator().manual_seed(1)])[-2]
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
        # Whatever the first one's options are, the other takes its own steps.
        fresh = other(noise_schedule=scheduler.config.noise_schedule, num_train_timesteps=500)
        for each in (moved, fresh):
            each.set_timesteps(6)
        assert moved.table == fresh.table


def test_options_go_along_to_the_same_solver_and_those_that_extend_it():
    tuned = SCHEDULERS["dpm++sde"](eta=0.5)
    assert type(tuned).from_config(tuned.config).config.eta == 0.5
    assert SCHEDULERS["dpm++3m-sde"].from_config(tuned.config).config.eta == 0.5
    assert "eta" not in SCHEDULERS["dpm++"].from_config(tuned.config).config
    assert SCHEDULERS["ddim"].from_config(tuned.config).config.eta == 0.0


@pytest.mark.parametrize(
    "spec", [GumbelSchedule(mu=1.0), {"name": "table", "gammas": np.linspace(-8, 10, 9)}, {"name": "cosine"}]
)
def test_any_way_to_name_a_noise_schedule_can_be_saved(spec, tmp_path):
    scheduler = SCHEDULERS["ddim"](noise_schedule=spec)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert loaded.noise_schedule == scheduler.noise_schedule
    assert loaded.config.noise_schedule == scheduler.config.noise_schedule


@pytest.mark.parametrize(
    "nodes", ["table", {"name": "karras", "gamma_min": -20.0}, {"name": "linear", "gamma_max": 20}]
)
def test_levels_beyond_the_noise_schedule_are_refused(nodes):
    with pytest.raises(UserError, match="reach beyond"):
        SCHEDULERS["unipc"](noise_schedule={"name": "gumbel", "gamma_min": -3.0, "gamma_max": 9.0}, nodes=nodes)


@pytest.mark.parametrize("timesteps", [["a", "b"], [None, 1.0], torch.tensor([900.0, 100.0], dtype=torch.bfloat16)])
def test_timesteps_may_be_of_any_type_of_numbers(timesteps):
    scheduler = make("ddim")
    if isinstance(timesteps, torch.Tensor):
        scheduler.set_timesteps(timesteps=timesteps)
        assert scheduler.timesteps.tolist() == timesteps.tolist()
    else:
        with pytest.raises(UserError, match=r"no numbers|out of range"):
            scheduler.set_timesteps(timesteps=timesteps)


def test_ancestral_steps_over_any_gap():
    scheduler = SCHEDULERS["euler-a"](noise_schedule={"name": "log-linear", "gamma_min": -50.0, "gamma_max": 50.0})
    scheduler.set_timesteps(2)
    assert all(np.isfinite(list(row)).all() for row in scheduler.table)


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
    assert scheduler.step_index == (6 if name == "heun" else 5)  # of two rows at one timestep, the second
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


@pytest.mark.parametrize("steps", [0, -3, 2.5, float("nan"), float("inf"), None, "ten"])
def test_steps_must_be_whole_and_positive(steps):
    with pytest.raises(UserError, match=str(steps)):
        make("ddim").set_timesteps(steps)


@pytest.mark.parametrize(
    ("levels", "cause"),
    [
        ({2: [5.0, 1.0]}, "as a string"),
        ({"3": [5.0, 1.0]}, "are 2 numbers"),
        ({"0": []}, "as a string"),
        ({"2": [1.0, 5.0]}, "must fall"),
        ({"2": [float("nan"), 1.0]}, "must fall"),
        ({"2": [50.0, 1.0]}, "from 9"),
    ],
)
def test_levels_that_cannot_be_sampled_at_are_refused(levels, cause):
    with pytest.raises(UserError, match=cause):
        make("ddim", levels=levels)


def test_tuned_levels_are_for_solvers_of_one_evaluation_a_level():
    tuned, plain = (make("heun", levels=levels) for levels in ({"5": [8.0, 4.0, 2.0, 1.0, 0.0]}, None))
    for scheduler in (tuned, plain):
        scheduler.set_timesteps(9)  # which has five levels
    assert torch.equal(tuned.gammas, plain.gammas)


def test_shapes_and_timesteps_that_make_no_sense_are_refused():
    z, scheduler = torch.zeros(2, 3, 4), make("ddim")
    with pytest.raises(UserError, match="differ in shape"):
        scheduler.step(z[0], 500, z)
    with pytest.raises(UserError, match="no number"):
        scheduler.step(z, float("nan"), z)
    for t in (float("nan"), -3.0, 5000.0):
        with pytest.raises(UserError, match="out of range"):
            scheduler.add_noise(z, z, torch.tensor(t))
    with pytest.raises(UserError, match="num_train_timesteps 0"):
        DDIMScheduler(num_train_timesteps=0)


def test_options_out_of_range_are_refused():
    with pytest.raises(UserError, match="eta"):
        DDIMScheduler(eta=1.5)
    with pytest.raises(UserError, match="fresh"):
        RenoiseScheduler(fresh=-0.1)
    with pytest.raises(UserError, match="predict x0"):
        DDPMScheduler(prediction_type="epsilon")
    with pytest.raises(UserError, match="unknown"):
        RenoiseScheduler(noise_schedule="cubic").set_timesteps(3)


def test_the_second_order_solver_starts_with_a_first_order_step():
    scheduler = DPMSolverScheduler(noise_schedule={"name": "cosine", **RANGE})
    ddim = DDIMScheduler(noise_schedule={"name": "cosine", **RANGE})
    for s in (scheduler, ddim):
        s.set_timesteps(8)
    assert scheduler.table[0] == pytest.approx(ddim.table[0])
    assert scheduler.table[-1] == ddim.table[-1] == (0.0, 1.0, 0.0, 0.0, 0.0)
