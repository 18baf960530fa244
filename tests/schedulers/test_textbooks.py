"""The tables against the algorithms as their papers print them, in float64, with one and the same noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from embdiff.noise import SCHEDULES as NOISE_SCHEDULES
from embdiff.schedulers import SCHEDULERS

RANGE = {"gamma_min": -6.0, "gamma_max": 8.0}
noises = st.sampled_from(sorted(set(NOISE_SCHEDULES) - {"table"}))


class Problem:
    """Levels, a denoiser that is far from linear, a start and a stream of noise."""

    def __init__(self, name: str, noise: str, steps: int, seed: int, **options):
        self.scheduler = SCHEDULERS[name](noise_schedule={"name": noise, **RANGE}, **options)
        self.steps = steps
        levels = steps // 2 + 1 if self.scheduler.order == 2 else steps
        self.gamma = self.scheduler.noise_schedule.gamma(1 - np.arange(levels) / levels)
        self.alpha = np.sqrt(1 / (1 + np.exp(self.gamma)))
        self.sigma = np.sqrt(1 / (1 + np.exp(-self.gamma)))
        self.lam = -self.gamma / 2
        self.ratio = np.exp(self.gamma / 2)
        random = np.random.default_rng(seed)
        self.start = random.standard_normal((1, 2, 3))
        self.noise = random.standard_normal((steps, 1, 2, 3))

    def x0(self, z, gamma):
        return np.tanh(2 * z + 0.3 * gamma) + 0.1 * z**2 / (1 + z**2)

    def ours(self):
        """Our end point, with the same noise handed out in order."""
        self.scheduler.set_timesteps(self.steps)
        z, plan = torch.from_numpy(self.start), self.scheduler._plan(self.steps)
        noise = iter(torch.from_numpy(self.noise))
        for (gamma, row), t in zip(plan, self.scheduler.timesteps, strict=True):
            x0, eps = torch.from_numpy(self.x0(z.numpy(), gamma)), next(noise) if row.s else None
            z = self.scheduler.step(x0, t, z, variance_noise=eps).prev_sample
        return z.numpy()


def ddim(p, eta=0.0):
    z = p.start
    for k in range(len(p.gamma) - 1):
        x0 = p.x0(z, p.gamma[k])
        eps = (z - p.alpha[k] * x0) / p.sigma[k]
        s = eta * p.sigma[k + 1] / p.sigma[k] * math.sqrt(1 - p.alpha[k] ** 2 / p.alpha[k + 1] ** 2)
        z = p.alpha[k + 1] * x0 + np.sqrt(p.sigma[k + 1] ** 2 - s**2) * eps + s * p.noise[k]
    return p.x0(z, p.gamma[-1])


def ddpm(p):
    """Ho et al., equation (7), with alpha-bar = alpha^2 and beta = 1 - alpha-bar_t / alpha-bar_{t-1}."""
    z = p.start
    for k in range(len(p.gamma) - 1):
        bar, bar_prev = p.alpha[k] ** 2, p.alpha[k + 1] ** 2
        beta = 1 - bar / bar_prev
        mean = math.sqrt(bar_prev) * beta / (1 - bar) * p.x0(z, p.gamma[k])
        mean = mean + math.sqrt(1 - beta) * (1 - bar_prev) / (1 - bar) * z
        z = mean + math.sqrt((1 - bar_prev) / (1 - bar) * beta) * p.noise[k]
    return p.x0(z, p.gamma[-1])


def renoise(p, fresh=1.0):
    z = p.start
    for k in range(len(p.gamma) - 1):
        x0 = p.x0(z, p.gamma[k])
        eps = math.sqrt(1 - fresh) * (z - p.alpha[k] * x0) / p.sigma[k] + math.sqrt(fresh) * p.noise[k]
        z = p.alpha[k + 1] * x0 + p.sigma[k + 1] * eps
    return p.x0(z, p.gamma[-1])


def euler(p):
    y = p.start / p.alpha[0]
    for k in range(len(p.gamma) - 1):
        d = (y - p.x0(y * p.alpha[k], p.gamma[k])) / p.ratio[k]
        y = y + (p.ratio[k + 1] - p.ratio[k]) * d
    return p.x0(y * p.alpha[-1], p.gamma[-1])


def euler_ancestral(p):
    y = p.start / p.alpha[0]
    for k in range(len(p.gamma) - 1):
        r, to = p.ratio[k], p.ratio[k + 1]
        up = math.sqrt(to**2 * (r**2 - to**2) / r**2)
        d = (y - p.x0(y * p.alpha[k], p.gamma[k])) / r
        y = y + (math.sqrt(to**2 - up**2) - r) * d + up * p.noise[k]
    return p.x0(y * p.alpha[-1], p.gamma[-1])


def churn(p, amount):
    """EDM's algorithm 2 (Heun's method at amount 0), in y = z / alpha; the first step is Euler's where N is even."""
    y, n, noise = p.start / p.alpha[0], len(p.gamma), iter(p.noise)
    for k in range(n):
        r = p.ratio[k]
        if k and amount:
            hat = r * (1 + min(amount / n, math.sqrt(2) - 1))
            y, r = y + math.sqrt(hat**2 - r**2) * next(noise), hat
        x0 = p.x0(y / math.sqrt(1 + r**2), 2 * math.log(r))
        if k == n - 1:
            return x0
        d, to = (y - x0) / r, p.ratio[k + 1]
        ahead = y + (to - r) * d
        if k > 0 or p.steps % 2:
            d_ahead = (ahead - p.x0(ahead * p.alpha[k + 1], p.gamma[k + 1])) / to
            ahead = y + (to - r) * (d + d_ahead) / 2
        y = ahead
    return None


def dpm_solver(p, eta=0.0):
    """Second order: k-diffusion's form, where the last two predictions give a slope at the midpoint."""
    z, before, h_before = p.start, None, None
    for k in range(len(p.gamma) - 1):
        x0, h = p.x0(z, p.gamma[k]), p.lam[k + 1] - p.lam[k]
        mean = x0 if before is None else x0 + 0.5 * h / h_before * (x0 - before)
        z = p.sigma[k + 1] / p.sigma[k] * math.exp(-eta * h) * z - p.alpha[k + 1] * math.expm1(-(1 + eta) * h) * mean
        z = z + p.sigma[k + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * p.noise[k]
        before, h_before = x0, h
    return p.x0(z, p.gamma[-1])


def parabola_weight(nodes, i, end, rate):
    """The integral of rate e^{rate (lambda - end)} times the Lagrange polynomial of node i, from nodes[0] to `end`."""
    others = np.delete(nodes, i)

    def integrand(lam):
        return rate * math.exp(rate * (lam - end)) * np.prod((lam - others) / (nodes[i] - others))

    return quad(integrand, nodes[0], end, epsabs=1e-13, epsrel=1e-12)[0]


def dpm_solver_3(p, eta=0.0):
    """Third order: the exact solution with x0(lambda) replaced by the parabola through three predictions, integrated
    numerically. The second step keeps to the midpoint form, as the paper's does."""
    z, history = p.start, []
    for k in range(len(p.gamma) - 1):
        history.append(p.x0(z, p.gamma[k]))
        h, scale = p.lam[k + 1] - p.lam[k], p.sigma[k + 1] / p.sigma[k] * math.exp(-eta * (p.lam[k + 1] - p.lam[k]))
        z_next = scale * z
        if k < 2:
            slope = 0 if k == 0 else 0.5 * h / (p.lam[1] - p.lam[0]) * (history[1] - history[0])
            z_next = z_next - p.alpha[k + 1] * math.expm1(-(1 + eta) * h) * (history[-1] + slope)
        else:
            nodes = p.lam[[k, k - 1, k - 2]]
            for i in range(3):
                z_next = z_next + p.alpha[k + 1] * parabola_weight(nodes, i, p.lam[k + 1], 1 + eta) * history[-1 - i]
        z = z_next + p.sigma[k + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * p.noise[k]
    return p.x0(z, p.gamma[-1])


def unipc(p):
    """Algorithms 5 to 8 with B(h) = e^h - 1: correct the last step with the new prediction, then predict the next."""
    z, m, h = p.start, [], []
    corrected = z
    for k in range(len(p.gamma)):
        new = p.x0(z, p.gamma[k])
        if k:
            D = [new - m[-1]] if k == 1 else [(m[-2] - m[-1]) / (-h[-2] / h[-1]), new - m[-1]]
            r = [1.0] if k == 1 else [-h[-2] / h[-1], 1.0]
            b = math.expm1(-h[-1])
            phi = [(b / -h[-1] - 1) / b]
            phi.append((phi[0] * b / -h[-1] - 0.5) * 2 / b)
            rho = [0.5] if k == 1 else np.linalg.solve([[1, 1], r], phi)
            corrected = p.sigma[k] / p.sigma[k - 1] * corrected - p.alpha[k] * b * (
                m[-1] + sum(w * d for w, d in zip(rho, D, strict=True))
            )
        m.append(new)
        if k + 1 < len(p.gamma):
            h.append(p.lam[k + 1] - p.lam[k])
            slope = 0 if k == 0 else 0.5 * (m[-2] - m[-1]) / (-h[-2] / h[-1])
            z = p.sigma[k + 1] / p.sigma[k] * corrected - p.alpha[k + 1] * math.expm1(-h[-1]) * (m[-1] + slope)
    return m[-1]


TEXTBOOKS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "renoise": renoise,
    "euler": euler,
    "euler-a": euler_ancestral,
    "heun": lambda p: churn(p, 0.0),
    "churn": lambda p: churn(p, 4.0),
    "dpm++": dpm_solver,
    "dpm++sde": lambda p: dpm_solver(p, 1.0),
    "dpm++3m": dpm_solver_3,
    "dpm++3m-sde": lambda p: dpm_solver_3(p, 1.0),
    "unipc": unipc,
}


def test_every_solver_has_a_textbook():
    assert set(TEXTBOOKS) == set(SCHEDULERS)


@pytest.mark.parametrize("name", sorted(TEXTBOOKS))
@given(noises, st.integers(1, 12), st.integers(0, 99))
def test_the_table_is_the_algorithm(name, noise, steps, seed):
    problem = Problem(name, noise, steps, seed)
    assert np.allclose(problem.ours(), TEXTBOOKS[name](problem), rtol=1e-7, atol=1e-8)


@given(noises, st.integers(1, 12), st.integers(0, 99), st.floats(0, 1))
def test_ddim_is_the_algorithm_at_every_eta(noise, steps, seed, eta):
    problem = Problem("ddim", noise, steps, seed, eta=eta)
    assert np.allclose(problem.ours(), ddim(problem, eta), rtol=1e-7, atol=1e-8)


@given(noises, st.integers(1, 12), st.integers(0, 99), st.floats(0, 3))
def test_dpm_solver_sde_is_the_algorithm_at_every_eta(noise, steps, seed, eta):
    for name, textbook in (("dpm++sde", dpm_solver), ("dpm++3m-sde", dpm_solver_3)):
        problem = Problem(name, noise, steps, seed, eta=eta)
        assert np.allclose(problem.ours(), textbook(problem, eta), rtol=1e-6, atol=1e-7)


@given(noises, st.integers(1, 12), st.integers(0, 99), st.floats(0, 1))
def test_renoise_is_the_algorithm_at_every_share_of_fresh_noise(noise, steps, seed, fresh):
    problem = Problem("renoise", noise, steps, seed, fresh=fresh)
    assert np.allclose(problem.ours(), renoise(problem, fresh), rtol=1e-7, atol=1e-8)
    if fresh == 0.0:
        assert np.allclose(problem.ours(), ddim(problem), rtol=1e-7, atol=1e-8)


@given(noises, st.integers(1, 40))
def test_euler_is_ddim_and_euler_ancestral_is_ddpm(noise, steps):
    for one, other in (("euler", "ddim"), ("euler-a", "ddpm")):
        rows, same = (
            np.array([step.row for step in Problem(name, noise, steps, 0).scheduler._plan(steps)])
            for name in (one, other)
        )
        assert np.allclose(rows, same, atol=1e-10)
