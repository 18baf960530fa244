"""Losses: cross-entropy with score interpolation, and the variational bound.

    B batch   L positions   D embedding dim   gamma = log(sigma^2 / alpha^2)

Both look at a batch through the same passes: a first one without self-conditioning, whose x0 the next is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embdiff import ops
from embdiff.batches import Batch
from embdiff.denoiser import Context, Denoiser
from embdiff.noise import Array, NoiseSchedule, corrupt


class Loss(NamedTuple):
    """total: the scalar to minimise; cross_entropy: [B], detached, nats per target position; features: [B, L, W + D],
    that the prediction was made of."""

    total: Tensor
    cross_entropy: Tensor
    features: Tensor


class Network(NamedTuple):
    """A model's two passes, compiled or as they are."""

    forward: Callable[..., Tensor]
    encode_context: Callable[..., Context]


def cross_entropy(
    denoiser: Denoiser,
    batch: Batch,
    gamma: Tensor,
    noise: Tensor,
    self_condition: bool,
    network: Network | None = None,
) -> Loss:
    """-log p(token | z_gamma) averaged over target positions (CDCD, arXiv:2211.15089, equation 4).

    gamma: [B]; noise: [B, L, D]; network: the passes to call instead of the denoiser's own.
    """
    h = features(denoiser, batch, denoiser.space.embed(batch.ids), gamma, noise, 1 + self_condition, network)
    nats = ops.cross_entropy(h, denoiser.output_weight(), batch.ids)
    return Loss(mean_over_target(nats, batch), cross_entropies(nats, batch), h)


def variational_loss(
    denoiser: Denoiser,
    batch: Batch,
    gamma: Tensor,
    noise: Tensor,
    self_condition: bool,
    density: Tensor,
    network: Network | None = None,
) -> Loss:
    """One-sample estimate of the diffusion term of `variational_bound` per target position, for training.

    density: [B], the probability density with which each gamma was drawn. The embeddings are taken as constants:
    this term alone would shrink their differences.
    """
    x = denoiser.space.embed(batch.ids).detach()
    h = features(denoiser, batch, x, gamma, noise, 1 + self_condition, network)
    diffusion = diffusion_terms(denoiser, h, x, gamma, density)
    with torch.no_grad():
        nats = ops.cross_entropy(h, denoiser.output_weight(), batch.ids)
    return Loss(mean_over_target(diffusion, batch), cross_entropies(nats, batch), h)


def mixed_loss(
    denoiser: Denoiser,
    batch: Batch,
    gamma: Tensor,
    noise: Tensor,
    self_condition: bool,
    density: Tensor,
    network: Network | None = None,
) -> Loss:
    """The sum of `cross_entropy` and `variational_loss`, of one prediction; the former alone moves the embeddings that
    are to be predicted."""
    x = denoiser.space.embed(batch.ids)
    h = features(denoiser, batch, x, gamma, noise, 1 + self_condition, network)
    nats = ops.cross_entropy(h, denoiser.output_weight(), batch.ids)
    diffusion = diffusion_terms(denoiser, h, x.detach(), gamma, density)
    return Loss(mean_over_target(nats + diffusion, batch), cross_entropies(nats, batch), h)


def transition_loss(denoiser: Denoiser, features: Tensor, batch: Batch, rows: Tensor) -> Tensor:
    """[R]: -log p(text | z) per position under the chain of `Transitions`, for some rows [R] of a batch.

    features: [B, L, W + D], taken as constants: the chain learns what the denoiser's posteriors leave to it. What is
    given as context is certain.
    """
    assert denoiser.transitions is not None
    ids = batch.ids[rows]
    with torch.autocast(features.device.type, enabled=False):  # sums over texts are of numbers far apart
        with torch.no_grad():
            h = features[rows]
            weight = denoiser.output_weight().to(h.dtype)
            scores, tokens = ops.most_probable(h, weight, denoiser.transitions.candidates)
            own = (h.float() * weight[ids].float()).sum(-1)
        if batch.known is not None:
            known = batch.known[rows]
            scores = scores.masked_fill(known[..., None], ops.FAINTEST)
            own = own.masked_fill(known, 0.0)
        return denoiser.transitions.nats(scores, tokens, own, ids)


def diffusion_terms(denoiser: Denoiser, h: Tensor, x: Tensor, gamma: Tensor, density: Tensor) -> Tensor:
    """[B, L]: estimates of the bound's diffusion term at each position, from features h where x [B, L, D] is true."""
    x0 = ops.expectation(h, denoiser.output_weight(), denoiser.space.table().detach()).mean
    return (0.5 * torch.exp(-gamma) / density)[:, None] * (x0 - x).square().sum(-1)


def mean_over_target(values: Tensor, batch: Batch) -> Tensor:
    """The mean of [B, L] over all target positions."""
    target = batch.target().float()
    return (values * target).sum() / target.sum().clamp(min=1)


def cross_entropies(nats: Tensor, batch: Batch) -> Tensor:
    """[B]: the mean of [B, L] over each example's target positions, detached."""
    target = batch.target().float()
    return (nats.detach() * target).sum(1) / target.sum(1).clamp(min=1)


def features(
    denoiser: Denoiser,
    batch: Batch,
    x: Tensor,
    gamma: Tensor,
    noise: Tensor,
    passes: int,
    network: Network | None = None,
) -> Tensor:
    """The denoiser's features [B, L, W + D] at embeddings x made noisy, in the last of some passes.

    Prompts are encoded once for all. Gradients go through the last pass alone.
    """
    forward, encode_context = network or Network(denoiser, denoiser.encode_context)
    z = corrupt(x, gamma, noise)
    if batch.known is not None:
        z = torch.where(batch.known[..., None], x, z)
    context = prompt_context(batch, encode_context)
    self_cond = torch.zeros_like(z)
    with torch.no_grad():
        for _ in range(passes - 1):
            self_cond = denoiser.x0(forward(z, gamma, context, self_cond, known=batch.known))
    torch.clear_autocast_cache()  # older torch would take weights again that were cast without gradients
    return forward(z, gamma, context, self_cond, known=batch.known)


def prompt_context(batch: Batch, encode_context: Callable[..., Context]) -> Context | None:
    """The prompts of a batch, encoded once for all rows that share one; None without prompts."""
    if batch.prompts is None:
        return None
    prompts = batch.prompts
    context = encode_context(prompts.ids, prompts.present, prompts.positions).repeat(batch.draws)
    return context if batch.prompted is None else context.hidden_from(batch.prompted)


class Bound(NamedTuple):
    """Nats. total = diffusion + reconstruction + prior, each [B]."""

    diffusion: Tensor
    reconstruction: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """[B]"""
        return self.diffusion + self.reconstruction + self.prior


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    batch: Batch,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    samples: int = 4,
    passes: int = 2,
) -> Bound:
    """An unbiased estimate of an upper bound on -log p(target | context) of each example, [B], in nats.

    -log p(x) <= 1/2 int_{g0}^{g1} e^-gamma E|x - x0(z_gamma)|^2 dgamma   diffusion (arXiv:2107.00630, equation 15)
                 - E log p(x | z_g0)                                      reconstruction
                 + KL(q(z_g1 | x) || N(0, I))                             prior

    The integral is estimated by importance sampling (`levels`): `samples` strata for each example, offset over the
    batch. z_g0 is decoded by the matched filter alone. x0 is the prediction of the last of `passes`
    passes of self-conditioning: a function of z_gamma only, so the bound holds. Every target position counts: the
    end of text, padding and `<unk>` are charged like words. g0, g1: the ends of `schedule`.
    """
    B = len(batch.ids)
    x = denoiser.space.embed(batch.ids)
    target = batch.target().float()

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device)

    offset = float(torch.rand(1, generator=generator, dtype=torch.float64))  # one for all: strata over the batch too
    diffusion = torch.zeros(B, device=x.device)
    for k in range(samples):
        drawn, width = levels(schedule, (k + (offset + np.arange(B) / B) % 1.0) / samples)
        gamma, weight = (torch.from_numpy(v).float().to(x.device) for v in (drawn, width))
        h = features(denoiser, batch, x, gamma, draw(), passes)
        error = ((denoiser.x0(h) - x).square().sum(-1) * target).sum(1)
        diffusion += 0.5 * torch.exp(-gamma) * weight * error / samples

    g0, g1 = (float(g) for g in schedule.gamma([0.0, 1.0]))
    low = torch.full((B,), g0, device=x.device)
    z = corrupt(x, low, draw())
    h = z * math.exp(-g0) * math.sqrt(1 + math.exp(g0))  # alpha / sigma^2 = e^-g sqrt(1 + e^g)
    reconstruction = (ops.cross_entropy(h, denoiser.space.table(), batch.ids) * target).sum(1)
    # Per coordinate (alpha^2 x^2 + sigma^2 - 1 - log sigma^2) / 2, and x^2 averages to 1.
    prior = 0.5 * denoiser.dim * math.log1p(math.exp(-g1)) * target.sum(1)
    return Bound(diffusion, reconstruction, prior)


def levels(schedule: NoiseSchedule, u: Array) -> tuple[Array, Array]:
    """Noise levels for numbers u, uniform in [0, 1), and one over the density with which they are drawn.

    Half are the schedule's quantiles, half lie evenly between its ends: a schedule fitted to cross-entropy hardly ever
    visits low noise, where the rare token that the model is wrong about costs e^-gamma (defensive importance sampling,
    Hesterberg 1995). No weight is above twice the schedule's width in gamma.
    """
    g0, g1 = (float(g) for g in schedule.gamma([0.0, 1.0]))
    gamma = np.where(u < 0.5, schedule.gamma(2 * u), g0 + (g1 - g0) * (2 * u - 1))
    density = 0.5 / np.maximum(schedule.derivative(schedule.t(gamma)), 1e-12) + 0.5 / (g1 - g0)
    return gamma, 1 / density
