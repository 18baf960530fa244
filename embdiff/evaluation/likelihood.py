"""Likelihood of texts under a diffusion model: the variational bound, and the bound that the probability flow gives.

    B batch   L target positions   D embedding dim   g0 < g1 the ends of the noise schedule

Both are upper bounds on -log p(text | prompt) in nats, of all L positions: the end of text and padding are charged like
tokens, and the sum is shared out among tokens and ends. So padding that is predicted badly is paid for by the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embdiff import ops
from embdiff.batches import Batch, Encoded
from embdiff.errors import UserError
from embdiff.losses import prompt_context, variational_bound
from embdiff.noise import NoiseSchedule, alpha_sigma

if TYPE_CHECKING:
    from embdiff.denoiser import Context, Denoiser

TOLERANCE = 1e-3
PASSES = 3  # of self-conditioning: the third is worth 0.02 nats, a fourth next to nothing


class Likelihood(NamedTuple):
    """An estimate over a set of texts.

    nats_per_token: an upper bound, over tokens and ends of text.
    standard_error: of that mean, from the differences between texts, or where there are prompts between prompts, each
        with all its texts; NaN for one. Texts without prompts are taken to be independent.
    noise_error: of other random numbers on the same texts, at most: that strata span texts makes the bound's smaller.
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
    passes: int = PASSES,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """The variational bound (see `losses.variational_bound`) of all texts.

    samples: noise levels for each text, at least 2 and even: two independent halves of `samples` / 2 strata, whose
    difference gives `noise_error`. passes: of self-conditioning, 1 = none. advance: told how many texts were done.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"{samples} noise levels for each text: give an even number, at least 2")
    if passes < 1:
        raise UserError(f"{passes} passes of the denoiser: give 1 (no self-conditioning) or more")
    generator = torch.Generator().manual_seed(seed)

    def halves(batch: Batch) -> Tensor:
        estimates = [variational_bound(denoiser, batch, schedule, generator, samples // 2, passes) for _ in range(2)]
        return torch.stack([torch.stack(tuple(e)) for e in estimates])  # [2, parts, B]

    return _over(encoded, halves, ("diffusion", "reconstruction", "prior"), batch_size, advance, denoiser.device)


def flow_bound(
    denoiser: Denoiser,
    encoded: Encoded,
    schedule: NoiseSchedule,
    *,
    tolerance: float = TOLERANCE,
    passes: int = 2,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """The bound of all texts by the probability flow, see `flow_nats`; each text is dequantised twice.

    passes: of the denoiser, 2 = with self-conditioning, 1 = without.
    """
    if passes not in (1, 2):
        raise UserError(f"{passes} passes of the flow: give 1 (no self-conditioning) or 2")
    generator = torch.Generator().manual_seed(seed)

    def twice(batch: Batch) -> Tensor:
        nats = [flow_nats(denoiser, batch, schedule, generator, tolerance, passes > 1) for _ in range(2)]
        return torch.stack(nats)[:, None]

    return _over(encoded, twice, ("flow",), batch_size, advance, denoiser.device)


def flow_nats(
    denoiser: Denoiser,
    batch: Batch,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    tolerance: float = TOLERANCE,
    self_condition: bool = True,
) -> Tensor:
    """An unbiased estimate of an upper bound on -log p(target | context) of each example, [B], in nats.

    The flow dz/dgamma = alpha (alpha z - x0(z, gamma)) / 2 (Song et al. 2021, arXiv:2011.13456, equation 13, in gamma)
    carries the data's density to N(0, I), so the model's density p(z_g0) follows from the divergence along the way
    (their equation 39), which Rademacher probes estimate (equation 40). Texts are points, so

        -log p(x) <= E_q(z_g0 | x) [ log q(z_g0 | x) - log p(z_g0) - log p(x | z_g0) ].

    This needs the divergence of the field that is followed: with `self_condition` x0 is the second of two passes, both
    functions of z, and both are differentiated. An x0 that came from elsewhere, taken as a constant, would give a
    number that bounds nothing. Nor would few steps of an even size: where z decides between two tokens, the field is
    stiff and its divergence large for a short while, and to miss that is to find texts too likely by whole nats.
    """
    if batch.known is not None:
        raise UserError("the flow bound is for whole texts: leave known positions out")
    x = denoiser.space.embed(batch.ids).detach()
    g0 = float(schedule.gamma(0.0))
    alpha0, sigma0 = (float(v) for v in alpha_sigma(torch.tensor(g0)))
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    probe = (torch.randint(2, x.shape, generator=generator) * 2.0 - 1.0).to(x.device)
    z0 = alpha0 * x + sigma0 * eps
    z1, divergence = integrate(denoiser, batch, schedule, z0, probe, tolerance, self_condition)

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
    tolerance: float = TOLERANCE,
    self_condition: bool = True,
) -> tuple[Tensor, Tensor]:
    """Follows the flow from g0 to g1. Returns z there [B, L, D], and the integral of its divergence [B].

    Dormand and Prince's fifth order with adaptive steps (scipy), the same for the whole batch. tolerance: of each step,
    relative and absolute for z, in nats for each text's integral.
    """
    from scipy.integrate import solve_ivp

    if not 0 < tolerance < 1:
        raise UserError(
            f"tolerance {tolerance} of the flow is out of range: give a number between 0 and 1, such as 0.001"
        )
    size, shape = z.numel(), z.shape

    def slope(gamma: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        at = torch.from_numpy(state[:size]).to(probe).reshape(shape)
        velocity, divergence = flow(denoiser, context, at, gamma, probe, self_condition)
        return np.concatenate([velocity.reshape(-1).cpu().numpy(), divergence.cpu().numpy()])

    # The error is a mean square over all numbers, of which the integrals are few: together they weigh as much as z.
    absolute, relative = np.full((2, size + len(z)), tolerance)
    absolute[size:], relative[size:] = tolerance * math.sqrt(len(z) / size), 1e-12
    frozen = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.requires_grad_(False)  # only z is differentiated: autograd then keeps half as much
    try:
        context = prompt_context(batch, denoiser.encode_context)
        start = np.concatenate([z.reshape(-1).double().cpu().numpy(), np.zeros(len(z))])
        ends = tuple(float(g) for g in schedule.gamma([0.0, 1.0]))
        found = solve_ivp(slope, ends, start, method="RK45", t_eval=ends[1:], rtol=relative, atol=absolute)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    if not found.success:
        raise UserError(f"the flow could not be followed ({found.message}): give a larger tolerance")
    end = torch.from_numpy(found.y[:, -1])
    return end[:size].to(probe).reshape(shape), end[size:]


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

    pairs = torch.cat(list(batches()), 2).numpy()
    per_text = pairs.mean(0).sum(0)
    lengths = encoded.text_length.astype(np.float64)
    tokens, texts = float(lengths.sum()), len(lengths)
    mean = float(per_text.sum() / tokens)
    # Of a ratio of sums: its error is that of the residuals (the delta method).
    residual = per_text - mean * lengths
    if encoded.prompt_length.any():  # texts of one prompt are no independent ones
        alone = np.arange(texts)[:, None] * (encoded.prompt_length == 0)[:, None]
        _, group = np.unique(np.hstack([encoded.prompt, alone]), axis=0, return_inverse=True)
        residual = np.bincount(group.ravel(), residual)
    drawn = len(residual)
    spread = float(np.sqrt((residual**2).sum() * drawn / (drawn - 1)) / tokens) if drawn > 1 else math.nan
    noise = float(np.sqrt(((pairs[0] - pairs[1]).sum(0) ** 2).sum()) / 2 / tokens)
    shares = {name: float(value) for name, value in zip(names, pairs.mean(0).sum(1) / tokens, strict=True)}
    return Likelihood(mean, spread, noise, shares, texts, int(tokens))
