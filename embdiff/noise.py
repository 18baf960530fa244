"""Noise: gamma algebra, corruption, and noise schedules.

One number says how noisy a latent is, the log noise-to-signal ratio

    gamma = log(sigma^2 / alpha^2),   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma),          (1)

so alpha^2 + sigma^2 = 1 (variance preserving) and gamma grows with noise. Clean embeddings x [.., D] with unit
variance per coordinate become

    z = alpha x + sigma eps,   eps ~ N(0, I).                                                          (2)

A noise schedule maps time t in [0, 1] (0 = clean, 1 = noise) to gamma. Schedule maths is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from torch import Tensor

from embdiff.errors import UserError, reason

Array = NDArray[np.float64]

# --------------------------------------------------------------------------------------------- gamma algebra


def alpha_sigma(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of equation (1), each shaped like `gamma`; accurate in both tails."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def expand_gamma(gamma: Tensor, z: Tensor) -> Tensor:
    """gamma [B] or [B, L] as [B, 1, 1] or [B, L, 1], so that it broadcasts over z [B, L, D]."""
    return gamma.reshape(gamma.shape + (1,) * (z.ndim - gamma.ndim))


def corrupt(x: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """z = alpha x + sigma noise, equation (2). x, noise: [B, L, D]; gamma: [B] or [B, L]."""
    alpha, sigma = alpha_sigma(expand_gamma(gamma, x))
    return alpha * x + sigma * noise


def velocity(x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """v = alpha noise - sigma x (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
    alpha, sigma = alpha_sigma(expand_gamma(gamma, x))
    return alpha * noise - sigma * x


def critical_gamma(dim: int, vocab_size: int) -> float:
    """c = ln(D / (2 ln V)): the gamma around which a token of V becomes identifiable from D noisy coordinates."""
    return math.log(dim / (2 * math.log(vocab_size)))


# ------------------------------------------------------------------------------------------- noise schedules


@dataclass(frozen=True)
class NoiseSchedule:
    """gamma(t), strictly increasing from `gamma_min` at t = 0 to `gamma_max` at t = 1.

    A subclass gives the textbook curve `_curve` (time -> gamma), its inverse and its slope. Textbook curves run
    off to infinity at one end or both; here the part between gamma_min and gamma_max is used, stretched to [0, 1].
    """

    gamma_min: float = -8.0
    gamma_max: float = 10.0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UserError(f"{name} {value!r} of the {self.name} schedule is not a finite number")
        if not self.gamma_min < self.gamma_max:
            raise UserError(f"gamma_min {self.gamma_min} must be below gamma_max {self.gamma_max}")

    def _curve(self, t: Array) -> Array:
        raise NotImplementedError

    def _inverse(self, gamma: Array) -> Array:
        raise NotImplementedError

    def _slope(self, t: Array) -> Array:
        raise NotImplementedError

    def _ends(self) -> tuple[float, float]:
        lo, hi = self._inverse(np.array([self.gamma_min, self.gamma_max]))
        return float(lo), float(hi)

    def gamma(self, t: ArrayLike) -> Array:
        """gamma at times t in [0, 1] (clipped), any shape, float64."""
        lo, hi = self._ends()
        t = np.clip(np.asarray(t, dtype=np.float64), 0.0, 1.0)
        return np.clip(self._curve(lo + (hi - lo) * t), self.gamma_min, self.gamma_max)

    def t(self, gamma: ArrayLike) -> Array:
        """The time at which `gamma` is reached; the inverse of `gamma`, clipped to [0, 1]."""
        lo, hi = self._ends()
        gamma = np.clip(np.asarray(gamma, dtype=np.float64), self.gamma_min, self.gamma_max)
        return np.clip((self._inverse(gamma) - lo) / (hi - lo), 0.0, 1.0)

    def derivative(self, t: ArrayLike) -> Array:
        """d gamma / d t at times t in [0, 1]; above 0, but for the ends of a table, where it may be 0."""
        lo, hi = self._ends()
        return self._slope(lo + (hi - lo) * np.asarray(t, dtype=np.float64)) * (hi - lo)

    def config(self) -> dict[str, Any]:
        """A JSON-able description; `noise_schedule(config)` gives the schedule back."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"name": self.name, **plain}


@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """beta(t) linear in t (Ho et al. 2020, arXiv:2006.11239; continuous form Song et al. 2021, arXiv:2011.13456 (32)).

    alpha^2 = exp(-B(t)) with B(t) = b0 t + (b1 - b0) t^2 / 2, so gamma = log(exp(B) - 1).
    """

    beta_start: float = 0.1
    beta_end: float = 20.0
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start < self.beta_end:
            raise UserError(f"beta_start {self.beta_start} must be above 0 and below beta_end {self.beta_end}")

    def _integral(self, t: Array) -> Array:
        return self.beta_start * t + 0.5 * (self.beta_end - self.beta_start) * t**2

    def _curve(self, t: Array) -> Array:
        B = self._integral(t)
        return B + np.log(-np.expm1(-B))

    def _inverse(self, gamma: Array) -> Array:
        B = np.logaddexp(0.0, gamma)
        b0, slope = self.beta_start, self.beta_end - self.beta_start
        return 2 * B / (b0 + np.sqrt(b0**2 + 2 * slope * B))

    def _slope(self, t: Array) -> Array:
        beta = self.beta_start + (self.beta_end - self.beta_start) * t
        return beta / -np.expm1(-self._integral(t))


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """alpha = cos(pi t / 2), so gamma = 2 log tan(pi t / 2).

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equation (17), without its offset.
    """

    name: ClassVar[str] = "cosine"

    def _curve(self, t: Array) -> Array:
        return 2 * np.log(np.tan(np.pi * t / 2))

    def _inverse(self, gamma: Array) -> Array:
        return 2 / np.pi * np.arctan(np.exp(gamma / 2))

    def _slope(self, t: Array) -> Array:
        return 2 * np.pi / np.sin(np.pi * t)


@dataclass(frozen=True)
class SqrtSchedule(NoiseSchedule):
    """alpha^2 = 1 - sqrt(t + s) (Diffusion-LM, arXiv:2205.14217, section 4.2; s is absorbed by gamma_min)."""

    name: ClassVar[str] = "sqrt"

    def _curve(self, t: Array) -> Array:
        r = np.sqrt(t)
        return np.log(r) - np.log1p(-r)

    def _inverse(self, gamma: Array) -> Array:
        return (1 / (1 + np.exp(-gamma))) ** 2

    def _slope(self, t: Array) -> Array:
        r = np.sqrt(t)
        return np.asarray(1 / (2 * r**2 * (1 - r)))


@dataclass(frozen=True)
class GumbelSchedule(NoiseSchedule):
    """Quantiles of a Gumbel distribution over gamma (LangFlow 2026): gamma = mu - beta log(-log t).

    The cross-entropy of a text model at gamma follows H(gamma) = H_inf exp(-exp(-(gamma - mu) / beta)), so equal
    steps in t carry equal information. `fit` finds mu and beta from measured cross-entropies.
    """

    mu: float = 0.0
    beta: float = 0.85
    name: ClassVar[str] = "gumbel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"beta {self.beta} is out of range: give a width above 0")

    @classmethod
    def initial(cls, dim: int, vocab_size: int) -> GumbelSchedule:
        """Before anything is measured: mu = c + 0.8, beta = 0.85, the range [c - 4, c + 8] (see `critical_gamma`)."""
        c = critical_gamma(dim, vocab_size)
        return cls(gamma_min=c - 4, gamma_max=c + 8, mu=c + 0.8, beta=0.85)

    def _cdf(self, gamma: Array) -> Array:
        return np.asarray(np.exp(-np.exp(-(gamma - self.mu) / self.beta)))

    def _ends(self) -> tuple[float, float]:
        # At gamma_min the distribution function underflows; a floor keeps the quantile function finite there.
        lo, hi = self._cdf(np.array([self.gamma_min, self.gamma_max]))
        return max(float(lo), 1e-300), float(hi)

    def _curve(self, t: Array) -> Array:
        return self.mu - self.beta * np.log(-np.log(t))

    def _inverse(self, gamma: Array) -> Array:
        return self._cdf(gamma)

    def _slope(self, t: Array) -> Array:
        return -self.beta / (t * np.log(t))


@dataclass(frozen=True)
class SigmoidSchedule(NoiseSchedule):
    """alpha^2 falls like a sigmoid (Jabri et al. 2022, arXiv:2212.11972, algorithm 1, tau = 1).

    With S the logistic function and v = start + (end - start) t,  alpha^2 = (S(end) - S(v)) / (S(end) - S(start)).
    """

    start: float = -3.0
    end: float = 3.0
    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start < self.end:
            raise UserError(f"start {self.start} must be below end {self.end}")

    def _curve(self, t: Array) -> Array:
        rise = expit(self.start + (self.end - self.start) * t)
        return np.asarray(np.log(rise - expit(self.start)) - np.log(expit(self.end) - rise))

    def _inverse(self, gamma: Array) -> Array:
        lo, hi = expit(self.start), expit(self.end)
        return np.asarray((logit(lo + (hi - lo) * expit(gamma)) - self.start) / (self.end - self.start))

    def _slope(self, t: Array) -> Array:
        rise = expit(self.start + (self.end - self.start) * t)
        density = rise * (1 - rise) * (self.end - self.start)
        return np.asarray(density / (rise - expit(self.start)) + density / (expit(self.end) - rise))


@dataclass(frozen=True)
class LogLinearSchedule(NoiseSchedule):
    """gamma linear in t: the log signal-to-noise ratio falls evenly (Kingma et al. 2021, arXiv:2107.00630)."""

    name: ClassVar[str] = "log-linear"

    def _curve(self, t: Array) -> Array:
        return t

    def _inverse(self, gamma: Array) -> Array:
        return gamma

    def _slope(self, t: Array) -> Array:
        return np.ones_like(t)


@dataclass(frozen=True)
class KarrasSchedule(NoiseSchedule):
    """(sigma / alpha)^(1 / rho) linear in t (Karras et al. 2022, arXiv:2206.00364, equation (5))."""

    rho: float = 7.0
    name: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise UserError(f"rho {self.rho} is out of range: give a number above 0, the paper's is 7")

    def _curve(self, t: Array) -> Array:
        return 2 * self.rho * np.log(t)

    def _inverse(self, gamma: Array) -> Array:
        return np.exp(gamma / (2 * self.rho))

    def _slope(self, t: Array) -> Array:
        return 2 * self.rho / t


@dataclass(frozen=True)
class TableSchedule(NoiseSchedule):
    """Any rising curve, through given points: gamma `gammas[i]` at t `times[i]`, joined by monotone cubics (PCHIP).

    times: rising from 0 to 1; empty = evenly spaced. The ends of the table are gamma_min and gamma_max.
    """

    gammas: tuple[float, ...] = (-8.0, 10.0)
    times: tuple[float, ...] = ()
    name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        try:
            gammas, times = tuple(map(float, self.gammas)), tuple(map(float, self.times))
        except (TypeError, ValueError) as error:
            raise UserError(f"gammas or times of the table schedule are no numbers: {reason(error)}") from error
        object.__setattr__(self, "gammas", gammas)
        object.__setattr__(self, "times", times or tuple(np.linspace(0.0, 1.0, len(gammas)).tolist()))
        if len(gammas) < 2 or not np.all(np.diff(gammas) > 0) or not np.all(np.isfinite(gammas)):
            raise UserError("the gammas of a table must be two or more finite numbers, each above the one before")
        if len(self.times) != len(gammas) or not np.all(np.diff(self.times) > 0):
            raise UserError(f"a table of {len(gammas)} gammas needs as many times, each above the one before")
        if self.times[0] != 0.0 or self.times[-1] != 1.0:
            raise UserError(f"the times of a table go from 0 to 1, not from {self.times[0]} to {self.times[-1]}")
        object.__setattr__(self, "gamma_min", gammas[0])
        object.__setattr__(self, "gamma_max", gammas[-1])

    def _ends(self) -> tuple[float, float]:
        return 0.0, 1.0

    @cached_property
    def _spline(self) -> Any:
        from scipy.interpolate import PchipInterpolator

        return PchipInterpolator(self.times, self.gammas)

    def _curve(self, t: Array) -> Array:
        return np.asarray(self._spline(t))

    def _slope(self, t: Array) -> Array:
        return np.asarray(self._spline(t, 1))

    def _inverse(self, gamma: Array) -> Array:
        lo, hi = np.zeros_like(gamma), np.ones_like(gamma)
        for _ in range(60):  # bisection, to the last bit of t
            middle = 0.5 * (lo + hi)
            below = self._spline(middle) < gamma
            lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
        return 0.5 * (lo + hi)


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    cls.name: cls
    for cls in (
        LinearSchedule, CosineSchedule, SqrtSchedule, SigmoidSchedule, LogLinearSchedule, KarrasSchedule,
        GumbelSchedule, TableSchedule,
    )
}  # fmt: skip


def noise_schedule(spec: str | Mapping[str, Any] | NoiseSchedule) -> NoiseSchedule:
    """A schedule from its name, its `config()`, or itself. Unknown names and parameters raise UserError."""
    if isinstance(spec, NoiseSchedule):
        return spec
    config = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = config.pop("name", None)
    if name not in SCHEDULES:
        raise UserError(f"noise schedule {name!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    cls = SCHEDULES[name]
    unknown = set(config) - {field.name for field in fields(cls)}
    if unknown:
        raise UserError(f"noise schedule {name!r} has no parameter {', '.join(sorted(unknown))}")
    return cls(**config)


class ScheduleFit:
    """Fits a schedule online to the cross-entropy that training sees, so that equal steps in t carry equal information.

    Cross-entropies [nats/token] are binned by gamma with exponential forgetting; `fit` turns the bin means H(gamma)
    into a schedule with t = H(gamma) / H_inf.
    """

    bins = 96

    def __init__(self, schedule: GumbelSchedule, *, forget: float = 0.99) -> None:
        self.schedule: NoiseSchedule = schedule
        self.forget = forget
        self.edges = np.linspace(schedule.gamma_min, schedule.gamma_max, self.bins + 1)
        self.weight = np.zeros(self.bins)
        self.total = np.zeros(self.bins)

    def update(self, gamma: ArrayLike, cross_entropy: ArrayLike) -> None:
        """Takes one batch of (gamma, cross-entropy) pairs, both [n]."""
        gamma, ce = np.asarray(gamma, dtype=np.float64), np.asarray(cross_entropy, dtype=np.float64)
        finite = np.isfinite(ce)  # a run that has failed is told so by its loss, not here
        gamma, ce = gamma[finite], ce[finite]
        index = np.clip(np.searchsorted(self.edges, gamma) - 1, 0, self.bins - 1)
        self.weight = self.forget * self.weight + np.bincount(index, minlength=self.bins)
        self.total = self.forget * self.total + np.bincount(index, weights=ce, minlength=self.bins)

    def fit(self) -> NoiseSchedule:
        """Refits and returns the schedule; keeps the last one while fewer than eight bins have been seen."""
        seen = self.weight > 0
        if seen.sum() >= 8:
            centre = 0.5 * (self.edges[:-1] + self.edges[1:])[seen]
            self.schedule = self._fitted(centre, self.total[seen] / self.weight[seen], self.weight[seen])
        return self.schedule

    def _fitted(self, gamma: Array, mean: Array, weight: Array) -> NoiseSchedule:
        """The schedule for cross-entropies `mean` at rising `gamma`, of this much evidence each."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, JSON-able and exact."""
        return {"schedule": self.schedule.config(), "weight": self.weight.tolist(), "total": self.total.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.schedule = noise_schedule(state["schedule"])
        self.weight, self.total = np.array(state["weight"]), np.array(state["total"])


class GumbelFit(ScheduleFit):
    """(mu, beta, H_inf) of the Gumbel curve by weighted least squares: three numbers, so little data will do.

    mu stays within [c - 1, c + 3], where the information must lie (see `critical_gamma`).
    """

    def __init__(self, schedule: GumbelSchedule, *, forget: float = 0.99) -> None:
        super().__init__(schedule, forget=forget)
        self.h_inf = 1.0
        self._mu_bounds = (schedule.mu - 1.8, schedule.mu + 2.2)

    def _fitted(self, gamma: Array, mean: Array, weight: Array) -> GumbelSchedule:
        from scipy.optimize import least_squares

        root, last = np.sqrt(weight), cast(GumbelSchedule, self.schedule)

        def residual(p: Array) -> Array:
            mu, log_beta, h_inf = p
            return np.asarray(root * (h_inf * np.exp(-np.exp(-(gamma - mu) / np.exp(log_beta))) - mean))

        top = max(float(mean.max()), 1e-6)
        start = [last.mu, math.log(last.beta), min(max(self.h_inf, 0.5 * top), 1.5 * top)]
        lower = [self._mu_bounds[0], math.log(0.3), 0.0]
        upper = [self._mu_bounds[1], math.log(2.5), 2 * top]
        start = list(np.clip(start, np.array(lower) + 1e-9, np.array(upper) - 1e-9))
        mu, log_beta, self.h_inf = (float(v) for v in least_squares(residual, start, bounds=(lower, upper)).x)
        return GumbelSchedule(last.gamma_min, last.gamma_max, mu, math.exp(log_beta))

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, JSON-able and exact."""
        return super().state_dict() | {"h_inf": self.h_inf, "mu_bounds": list(self._mu_bounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.h_inf = float(state["h_inf"])
        self._mu_bounds = (float(state["mu_bounds"][0]), float(state["mu_bounds"][1]))


class TableFit(ScheduleFit):
    """Any rising curve: the bin means made monotone, and a table of their quantiles.

    spread: the share of levels that stays even in gamma, so that no level is ever left out.
    """

    knots = 33
    spread = 0.02

    def _fitted(self, gamma: Array, mean: Array, weight: Array) -> TableSchedule:
        from scipy.optimize import isotonic_regression

        rising = np.asarray(isotonic_regression(mean, weights=weight).x)
        lo, hi = float(self.edges[0]), float(self.edges[-1])
        gamma = np.concatenate([[lo], gamma, [hi]])
        share = np.concatenate([[0.0], rising / max(float(rising[-1]), 1e-9), [1.0]]).clip(0.0, 1.0)
        times = (1 - self.spread) * share + self.spread * (gamma - lo) / (hi - lo)
        return TableSchedule(gammas=tuple(np.interp(np.linspace(0.0, 1.0, self.knots), times, gamma).tolist()))


FITS: dict[str, type[ScheduleFit]] = {"gumbel": GumbelFit, "table": TableFit}
