"""Likelihood of texts under a diffusion model: the variational bound, and the bound that the probability flow gives.

    B batch   L target positions   D embedding dim   g0 < g1 the ends of the noise schedule

Both are upper bounds on -log p(text | prompt) in nats, of all L positions: the end of text and padding are charged like
words, and the sum is shared out among words and ends. So padding that is predicted badly is paid for by the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embdiff import ops
from embdiff.batches import Batch, Encoded
from embdiff.errors import UserError
from embdiff.losses import prompt_context, variational_bound
from embdiff.noise import NoiseSchedule, alpha_sigma

if TYPE_CHECKING:
    from embdiff.denoiser import Context, Denoiser


class Likelihood(NamedTuple):
    """An estimate over a set of texts.

    nats_per_token: an upper bound, over words and ends of text.
    standard_error: of that mean, from the differences between texts; NaN for one text.
    noise_error: the part of it that other random numbers on the same texts would change.
    parts: what nats_per_token is made of. texts, tokens: counted.
    """

    nats_per_token: float
    standard_error: float
    noise_error: float
    parts: dict[str, float]
    texts: int
    tokens: int


def bound(
    denoiser: Denoiser,
    encoded: Encoded,
    schedule: NoiseSchedule,
    *,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """The variational bound (see `losses.variational_bound`) of all texts.

    samples: noise levels for each text, at least 2 and even: two independent halves of `samples` / 2 strata, whose
    difference gives `noise_error`. advance: told how many texts were done.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"{samples} noise levels for each text: give an even number, at least 2")
    generator = torch.Generator().manual_seed(seed)

    def halves(batch: Batch) -> Tensor:
        estimates = [variational_bound(denoiser, batch, schedule, generator, samples // 2) for _ in range(2)]
        return torch.stack([torch.stack(tuple(e)) for e in estimates])  # [2, parts, B]

    return _over(encoded, halves, ("diffusion", "reconstruction", "prior"), batch_size, advance, denoiser.device)


def flow_bound(
    denoiser: Denoiser,
    encoded: Encoded,
    schedule: NoiseSchedule,
    *,
    steps: int = 32,
    self_condition: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """The bound of all texts by the probability flow, see `flow_nats`; each text is dequantised twice."""
    generator = torch.Generator().manual_seed(seed)

    def twice(batch: Batch) -> Tensor:
        nats = [flow_nats(denoiser, batch, schedule, generator, steps, self_condition) for _ in range(2)]
        return torch.stack(nats)[:, None]

    return _over(encoded, twice, ("flow",), batch_size, advance, denoiser.device)


def flow_nats(
    denoiser: Denoiser,
    batch: Batch,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    steps: int = 32,
    self_condition: bool = True,
) -> Tensor:
    """An unbiased estimate of an upper bound on -log p(target | context) of each example, [B], in nats.

    The flow dz/dgamma = alpha (alpha z - x0(z, gamma)) / 2 (Song et al. 2021, arXiv:2011.13456, equation 13, in gamma)
    carries the data's density to N(0, I), so the model's density p(z_g0) follows from the divergence along the way
    (their equation 39), which Rademacher probes estimate (equation 40). Texts are points, so

        -log p(x) <= E_q(z_g0 | x) [ log q(z_g0 | x) - log p(z_g0) - log p(x | z_g0) ].

    This needs the divergence of the field that is followed: with `self_condition` x0 is the second of two passes, both
    functions of z, and both are differentiated. An x0 that came from elsewhere, taken as a constant, would give a
    number that bounds nothing. The integral is by Runge and Kutta's fourth order over `steps` even steps in gamma.
    """
    if batch.known is not None:
        raise UserError("the flow bound is for whole texts: leave known positions out")
    x = denoiser.space.embed(batch.ids)
    g0 = float(schedule.gamma(0.0))
    alpha0, sigma0 = (float(v) for v in alpha_sigma(torch.tensor(g0)))
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    probe = (torch.randint(2, x.shape, generator=generator) * 2.0 - 1.0).to(x.device)
    z0 = alpha0 * x + sigma0 * eps
    z1, divergence = integrate(denoiser, batch, schedule, z0, probe, steps, self_condition)

    size = x[0].numel()
    log_q = -0.5 * eps.square().sum((1, 2)) - size * (math.log(sigma0) + 0.5 * math.log(2 * math.pi))
    log_p = -0.5 * z1.square().sum((1, 2)) - 0.5 * size * math.log(2 * math.pi) + divergence
    decoded = ops.cross_entropy(z0 * alpha0 / sigma0**2, denoiser.space.table(), batch.ids).sum(1)
    return (log_q - log_p + decoded).detach()


def integrate(
    denoiser: Denoiser,
    batch: Batch,
    schedule: NoiseSchedule,
    z: Tensor,
    probe: Tensor,
    steps: int,
    self_condition: bool = True,
) -> tuple[Tensor, Tensor]:
    """Follows the flow from g0 to g1. Returns z there [B, L, D], and the integral of its divergence [B]."""

    def slope(z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        return flow(denoiser, context, z, gamma, probe, self_condition)

    if steps < 1:
        raise UserError(f"{steps} steps for the flow: give at least 1")
    frozen = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.requires_grad_(False)  # only z is differentiated: autograd then keeps half as much
    try:
        context = prompt_context(batch, denoiser.encode_context)
        total = z.new_zeros(len(z))
        # Even in gamma: a fitted schedule's quantiles run off at its ends, and so would dz/dt.
        levels = np.linspace(float(schedule.gamma(0.0)), float(schedule.gamma(1.0)), steps + 1)
        for gamma, end in pairwise(levels.tolist()):
            h, middle = end - gamma, 0.5 * (gamma + end)
            v1, d1 = slope(z, gamma)
            v2, d2 = slope(z + 0.5 * h * v1, middle)
            v3, d3 = slope(z + 0.5 * h * v2, middle)
            v4, d4 = slope(z + h * v3, end)
            z = z + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return z, total


def flow(
    denoiser: Denoiser,
    context: Context | None,
    z: Tensor,
    gamma: float,
    probe: Tensor,
    self_condition: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz/dgamma [B, L, D] of the probability flow, and its divergence along the probes [B]."""
    alpha = math.sqrt(1 / (1 + math.exp(gamma)))
    level = torch.full((len(z),), gamma, device=z.device)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x0 = denoiser.x0(denoiser(z, level, context, torch.zeros_like(z)))
        if self_condition:
            x0 = denoiser.x0(denoiser(z, level, context, x0))
        velocity = 0.5 * alpha * (alpha * z - x0)
        (along,) = torch.autograd.grad((velocity * probe).sum(), z)
    return velocity.detach(), (along * probe).sum((1, 2))


def _over(
    encoded: Encoded,
    estimate: Callable[[Batch], Tensor],
    names: tuple[str, ...],
    batch_size: int,
    advance: Callable[[int], None],
    device: Any,
) -> Likelihood:
    """`estimate` gives [2, parts, B] nats: each text twice, with independent random numbers."""
    if not len(encoded):
        raise UserError("no texts: a likelihood needs at least one")

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(encoded), batch_size):
            rows = range(start, min(start + batch_size, len(encoded)))
            yield estimate(encoded.batch(rows).to(device)).double().cpu()
            advance(len(rows))

    parts = list(batches())
    pairs = torch.cat(parts, 2).numpy()
    per_text = pairs.mean(0).sum(0)
    lengths = encoded.text_length.astype(np.float64)
    tokens, texts = float(lengths.sum()), len(lengths)
    mean = float(per_text.sum() / tokens)
    # Of a ratio of sums: its error is that of the residuals (the delta method).
    residual = per_text - mean * lengths
    spread = float(np.sqrt((residual**2).sum() * texts / (texts - 1)) / tokens) if texts > 1 else math.nan
    # By batch, since the texts of one share the offset of their noise levels.
    differences = np.array([float((first - second).sum()) for first, second in parts])
    noise = float(np.sqrt((differences**2).sum()) / 2 / tokens)
    shares = {name: float(value) for name, value in zip(names, pairs.mean(0).sum(1) / tokens, strict=True)}
    return Likelihood(mean, spread, noise, shares, texts, int(tokens))
