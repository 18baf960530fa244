"""The denoiser: a bidirectional Transformer that predicts clean tokens from noisy embeddings.

    B batch   L positions   C context positions   D embedding dim   W width   H heads   V vocabulary

The context rule: context positions attend only to context, target positions attend to everything. So the keys and
values of the context do not depend on the noise: `encode_context` computes them once, and the result is exactly what
a joint pass over context and target would compute (`known` marks the context in a joint pass, used for training).

Conditioning is on gamma (see `embdiff.noise`), never on a scheduler's timestep, so one model runs under every
noise schedule and solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from embdiff import ops
from embdiff.errors import UserError
from embdiff.noise import alpha_sigma, expand_gamma
from embdiff.space import EmbeddingSpace
from embdiff.transitions import Transitions

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 32, "width": 128, "depth": 4, "heads": 4},
    "mini": {"dim": 32, "width": 192, "depth": 6, "heads": 3},
    "small": {"dim": 64, "width": 256, "depth": 6, "heads": 4},
    "medium": {"dim": 64, "width": 512, "depth": 8, "heads": 8},
    "base": {"dim": 128, "width": 768, "depth": 12, "heads": 12},
}
KEPT = 1024  # positions of which rotations are kept


class Context(NamedTuple):
    """Encoded context. keys, values: [depth, B, H, C, W / H]; mask: [B, C], False = not there for this example."""

    keys: Tensor
    values: Tensor
    mask: Tensor

    def hidden_from(self, seen: Tensor) -> Context:
        """Out of sight for the examples where `seen` [B] bool is False."""
        return self._replace(mask=self.mask & seen[:, None])

    def hidden(self) -> Context:
        """Out of sight for all examples."""
        return self._replace(mask=torch.zeros_like(self.mask))

    def repeat(self, n: int) -> Context:
        """Every example n times in a row."""
        return Context(
            self.keys.repeat_interleave(n, 1), self.values.repeat_interleave(n, 1), self.mask.repeat_interleave(n, 0)
        )

    def take(self, rows: slice) -> Context:
        """Some of the examples."""
        return Context(self.keys[:, rows], self.values[:, rows], self.mask[rows])

    def followed_by(self, other: Context) -> Context:
        """These positions and then another context's, of the same examples."""
        return Context(
            torch.cat([self.keys, other.keys], 3),
            torch.cat([self.values, other.values], 3),
            torch.cat([self.mask, other.mask], 1),
        )

    @staticmethod
    def stack(contexts: list[Context]) -> Context:
        """Contexts side by side in the batch, each as wide as the widest."""
        widest = max(c.mask.shape[1] for c in contexts)
        wide = [c.widened(widest) for c in contexts]
        return Context(
            torch.cat([c.keys for c in wide], 1),
            torch.cat([c.values for c in wide], 1),
            torch.cat([c.mask for c in wide], 0),
        )

    def widened(self, width: int) -> Context:
        """With positions at the end that nobody sees."""
        more = width - self.mask.shape[1]
        if not more:
            return self
        return Context(
            F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more)), F.pad(self.mask, (0, more))
        )


class Places(NamedTuple):
    """Some positions in a row, as [1, R, ..], where a layer looks at each alone. rows: [R] int64, b L + l."""

    rows: Tensor
    B: int
    L: int

    def gather(self, x: Tensor) -> Tensor:
        """[1, R, ..] of [B, L, ..]."""
        return x.flatten(0, 1)[None, self.rows]

    def spread(self, x: Tensor) -> Tensor:
        """[B, L, ..] of [1, R, ..], 0 elsewhere."""
        whole = x.new_zeros(self.B * self.L, *x.shape[2:])
        return whole.index_copy(0, self.rows, x[0]).view(self.B, self.L, *x.shape[2:])

    def mask(self, context: Context | None) -> Tensor:
        """[B, 1, 1, C + L] bool: the context and these positions are attended to."""
        here = self.spread(torch.ones_like(self.rows, dtype=torch.bool)[None])
        return (here if context is None else torch.cat([context.mask, here], 1))[:, None, None]


class Denoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the token at each position of a noisy latent.

    Args:
        vocab_size: V.
        dim: D, of the embedding space.
        width, depth, heads: of the Transformer; width / heads must be even.
        max_length: target positions that the model is trained for.
        max_prompt_length: prompt positions that it is trained for, 0 = none.
        condition_width: of the vector that carries gamma to every layer.
        transition_rank: of the scores of neighbouring tokens with which texts are rounded (`Transitions`); 0 = none.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int,
        dim: int = 64,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        max_length: int = 64,
        max_prompt_length: int = 0,
        condition_width: int = 128,
        transition_rank: int = 0,
    ) -> None:
        super().__init__()
        self.space = EmbeddingSpace(vocab_size, dim)
        self.embed_z = nn.Linear(dim, width, bias=False)
        self.embed_self_cond = nn.Linear(dim, width, bias=False)
        self.condition = GammaCondition(condition_width)
        self.context_condition = nn.Parameter(torch.zeros(condition_width))
        self.blocks = nn.ModuleList([Block(width, heads, condition_width) for _ in range(depth)])
        self.rotary = Rotary(width // heads)
        self.final = nn.Linear(condition_width, 2 * width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        # The share of the matched filter in the logits; training ramps it up from 0 to 1.
        self.register_buffer("filter_ramp", torch.ones(()))
        nn.init.zeros_(self.embed_self_cond.weight)
        nn.init.zeros_(self.final.weight)
        nn.init.normal_(self.head.weight, std=0.02)
        self.transitions = Transitions(vocab_size, transition_rank) if transition_rank else None

    @property
    def dim(self) -> int:
        """D, of the embedding space."""
        return self.space.dim

    @property
    def self_conditions(self) -> bool:
        """Whether the last x0 says anything to the model: not where it was trained without it."""
        return bool(self.embed_self_cond.weight.any())

    def forward(
        self,
        z: Tensor,
        gamma: Tensor,
        context: Context | None = None,
        self_cond: Tensor | None = None,
        *,
        known: Tensor | None = None,
        present: Tensor | None = None,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Features h [B, L, W + D]; logits are `h @ output_weight().T`.

        Logits are the head on the last hidden state plus the matched filter (alpha / sigma^2) z E^T, the exact
        log-likelihood of z under each token up to a constant. Both are linear, so both are in h.

        Args:
            z: noisy latents [B, L, D]; clean embeddings where `known`.
            gamma: [B] or [B, L].
            context: what `encode_context` gave; None = no context.
            self_cond: the previous x0 [B, L, D]; None = zeros.
            known: [B, L] bool, context positions of a joint pass; None = none.
            present: [B, L] bool, False = padding that nobody attends to; None = all present.
            positions: [B, L] or [1, L] int; None = 0 .. L - 1. A prompt of n tokens sits at -n .. -1.
            rows: [R] int64, b L + l: the only positions that are computed and attended to, at least one of each
                example, beside the context. gamma is [1] then, and h is [R, W + D]. None = all.
        """
        places = None if rows is None else Places(rows, len(z), z.shape[1])
        if places is not None:
            z, self_cond = places.gather(z), None if self_cond is None else places.gather(self_cond)
        h, _, _ = self._encode(z, gamma, context, self_cond, known, present, positions, places)
        gamma = expand_gamma(gamma, z)
        alpha, sigma = alpha_sigma(gamma)
        h = torch.cat([h, (self.filter_ramp * alpha / sigma**2 * z).to(h.dtype)], -1)
        return h if places is None else h[0]

    def encode_context(self, ids: Tensor, present: Tensor, positions: Tensor) -> Context:
        """Encodes context tokens once. ids, positions: [B, C]; present: [B, C] bool, False = padding."""
        x = self.space.embed(ids)
        known = torch.ones_like(present)
        _, keys, values = self._encode(x, x.new_zeros(len(x)), None, None, known, present, positions)
        return Context(torch.stack(keys), torch.stack(values), present)

    def output_weight(self) -> Tensor:
        """[V, W + D]: the head's weight beside the embedding table, see `forward`."""
        return torch.cat([self.head.weight.float(), self.space.table()], -1)

    def logits(self, h: Tensor) -> Tensor:
        """All logits [B, L, V] of features h; for inspection, since samplers and losses never hold them whole."""
        return F.linear(h, self.output_weight().to(h.dtype))

    def x0(self, h: Tensor) -> Tensor:
        """softmax(logits) E [B, L, D], fp32: the posterior mean of the clean embedding."""
        return ops.expectation(h, self.output_weight(), self.space.table()).mean

    def _encode(
        self,
        z: Tensor,
        gamma: Tensor,
        context: Context | None,
        self_cond: Tensor | None,
        known: Tensor | None,
        present: Tensor | None,
        positions: Tensor | None,
        places: Places | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Last hidden state [B, L, W] or [1, R, W], and the keys and values [B, H, L, W / H] of every layer."""
        L = z.shape[1] if places is None else places.L
        dtype = self.embed_z.weight.dtype
        x = self.embed_z(z.to(dtype))
        if self_cond is not None:
            if known is not None:
                self_cond = self_cond.masked_fill(known[..., None], 0.0)
            x = x + self.embed_self_cond(self_cond.to(dtype))
        condition = Condition(self.condition(gamma.reshape(len(gamma), -1).float()), self.context_condition, known)
        mask = attention_mask(L, context, known, present) if places is None else places.mask(context)
        rotation = self.rotary(L, positions)
        return through_blocks(self.blocks, self.final, x, condition, rotation, mask, context, places)


class GammaCondition(nn.Module):
    """gamma [B, 1 or L] -> the conditioning vector [B, 1 or L, condition_width]."""

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, gamma: Tensor) -> Tensor:
        # gamma spans about 12 nats: wavelengths from 0.5 to 100.
        rate = torch.logspace(math.log10(0.06), math.log10(12.0), self.frequencies, device=gamma.device)
        angle = gamma[..., None] * rate
        features = torch.cat([angle.sin(), angle.cos()], -1)
        return cast(Tensor, self.mlp(features.to(next(self.mlp.parameters()).dtype)))


class Condition(NamedTuple):
    """What modulates each position: gamma's vector [B, 1 or L, c], or the learned context vector [c] where `known`."""

    gamma: Tensor
    context: Tensor
    known: Tensor | None

    def through(self, layer: nn.Module) -> Tensor:
        """The layer's output for each position. Two products and a choice cost less than a product per position."""
        out: Tensor = layer(self.gamma)
        return out if self.known is None else torch.where(self.known[..., None], layer(self.context), out)


class Block(nn.Module):
    """Attention and MLP, each pre-normalised and modulated by gamma (adaLN, arXiv:2212.09748), without biases."""

    def __init__(self, width: int, heads: int, condition_width: int) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise UserError(f"width {width} with {heads} heads: each head needs the same even number of dimensions")
        self.heads, self.head_width = heads, width // heads
        self.gradient_checkpointing = False  # set by diffusers' `enable_gradient_checkpointing`
        self.dropout = 0.0  # of what attention and MLP add; set by training, and acts where gradients are taken
        self.modulation = nn.Linear(condition_width, 6 * width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        # At the start a block passes x on unchanged and gamma changes nothing.
        for layer in (self.modulation, self.attention_out, self.mlp_out):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        x: Tensor,
        condition: Condition,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        places: Places | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = condition.through(self.modulation).chunk(6, -1)

        qkv = self.qkv(modulate(x, shift_a, scale_a))
        qkv = qkv if places is None else places.spread(qkv)
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k = rotate(rms_norm(q), rotation), rotate(rms_norm(k), rotation)
        all_k, all_v = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        a = ops.attention(q, all_k, all_v, mask).transpose(1, 2).flatten(2)
        a = a if places is None else places.gather(a)
        x = x + self._dropped((1 + gate_a) * self.attention_out(a))

        m = F.relu(self.mlp_in(modulate(x, shift_m, scale_m)))
        # A product, for autocast takes powers in fp32 on a GPU.
        return x + self._dropped((1 + gate_m) * self.mlp_out(m * m)), k, v

    def _dropped(self, x: Tensor) -> Tensor:
        active = self.training and torch.is_grad_enabled() and self.dropout > 0
        return F.dropout(x, self.dropout) if active else x


def through_blocks(
    blocks: nn.ModuleList,
    final: nn.Module,
    x: Tensor,
    condition: Condition,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    context: Context | None,
    places: Places | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x [B, L, W], or [1, R, W] at some places, through the blocks and the last modulation, and the keys and values
    [B, H, L, W / H] of every block.

    rotation: see `Rotary`; mask: [B or 1, 1, L or 1, C + L], see `attention_mask`.
    """
    keys, values = [], []
    for i, block in enumerate(blocks):
        past = None if context is None else (context.keys[i], context.values[i])
        call: Callable[..., Any] = block
        if cast(Block, block).gradient_checkpointing and torch.is_grad_enabled():
            call = partial(cast(Any, block)._gradient_checkpointing_func, block)
        x, k, v = call(x, condition, rotation, mask, past, places)
        keys.append(k)
        values.append(v)
    shift, scale = condition.through(final).chunk(2, -1)
    return modulate(x, shift, scale), keys, values


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis, in the type of x also where autocast takes norms in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises x, then scales and shifts it."""
    return rms_norm(x) * (1 + scale) + shift


class Rotary(nn.Module):
    """L, positions [B or 1, L] (None = 0 .. L - 1) -> cos and sin [B or 1, 1, L, head_width / 2] of rotary position
    embedding (arXiv:2104.09864).

    Those of the first positions are kept, for a compiled pass would make them anew in every layer, head and text; in
    fp32 whatever the model's precision.
    """

    table: Tensor  # [2, 1, 1, KEPT, head_width / 2]

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.register_buffer("table", self._made(torch.arange(KEPT)[None]), persistent=False)

    def forward(self, length: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if positions is None and length > KEPT:
            positions = torch.arange(length, device=self.table.device)[None]
        cos, sin = self.table[..., :length, :] if positions is None else self._made(positions)
        return cos, sin

    def _made(self, positions: Tensor) -> Tensor:
        """[2, B or 1, 1, L, head_width / 2]"""
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=torch.float32)
        angle = positions[:, None, :, None].float() * 10000.0 ** -(pairs / self.head_width)
        return torch.stack([angle.cos(), angle.sin()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.table.dtype is not torch.float32:  # else it stays in its place, which recorded graphs know it by
            self.table = self._made(torch.arange(KEPT, device=self.table.device)[None])
        return self


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of halves of x [B, H, L, head_width] by its position's angle."""
    cos, sin = (r.to(x.dtype) for r in rotation)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention_mask(L: int, context: Context | None, known: Tensor | None, present: Tensor | None) -> Tensor | None:
    """[B, 1, L or 1, C + L] bool, True = attend; None where everything is attended to."""
    if known is None and present is None:
        if context is None:
            return None
        seen = context.mask.new_ones(len(context.mask), L)
        return torch.cat([context.mask, seen], 1)[:, None, None]
    key = present if present is not None else torch.ones_like(cast(Tensor, known))
    if known is None:
        allowed = key[:, None, :].expand(-1, L, -1)
    else:
        allowed = key[:, None, :] & (known[:, None, :] | ~known[:, :, None])
    # A position always sees itself, so that padding has something to attend to.
    allowed = allowed | torch.eye(L, dtype=torch.bool, device=key.device)
    if context is not None:
        allowed = torch.cat([context.mask[:, None, :].expand(-1, L, -1), allowed], 2)
    return allowed[:, None]
