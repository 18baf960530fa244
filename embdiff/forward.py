"""The parts of a step that are products of matrices, as a CPU likes them: native, or compiled with packed weights; in 8
bits.

R positions   V vocabulary   H features   D embedding dim
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff import native, ops
from embdiff.compilation import can_compile, compiled, once, versions
from embdiff.denoiser import Denoiser

# Multiplications and additions after which compiling pays: it takes half a minute and then saves a third or more.
PAYS_AFTER = {"cpu": 4e12, "cuda": 1e16}
ROWS, WORDS = 512, 4096  # of logits that are held at a time where they are compiled


class Forward:
    """A denoiser's passes for sampling, and what its features become.

    They are native where `native.suits` says so. Elsewhere they are as they are at first, and compiled once they have
    done so much that this pays. Both change results by rounding only, and take weights as constants, in another order.

    Args:
        denoiser: in whatever precision, on whatever device; both may change between runs, see `renew`.
        wanted: True = compiled at once, False = neither compiled nor native.
        int8: whether the products of layers and head are taken in 8 bits, see `Int8Linear`.
    """

    def __init__(self, denoiser: nn.Module, wanted: bool | None = None, int8: bool = False) -> None:
        self.denoiser, self.wanted, self.int8 = denoiser, wanted, int8
        self.weights = sum(p.numel() for p in cast(nn.Module, denoiser.blocks).parameters())
        self.done, self.refused, self.unbuilt = 0.0, False, False
        self._begin()

    def _begin(self) -> None:
        self.versions = versions(self.denoiser)
        self.native = self._native_pass()
        self.native_head: native.Head | None = None
        self.call: Callable[..., Tensor] = self.native or (in_int8(self.denoiser) if self.int8 else self.denoiser)
        self.compile: Callable[[nn.Module], Callable[..., Any]] | None = None
        self.heads = dict[tuple[int, ...], Callable[..., Any]]()

    def _native_pass(self) -> native.Pass | None:
        """The denoiser's pass as `native.cpp` has it, where there is one for it."""
        if self.wanted is False or self.unbuilt or not native.suits(self.denoiser):
            return None
        try:
            return native.Pass(cast(Denoiser, self.denoiser), self.int8)
        except native.UnavailableError as error:
            warnings.warn(f"no native step ({error}): going on without it, 1.2 to 4 times slower", stacklevel=4)
            self.unbuilt = True
            self.refused = native.compiler() is None  # then torch.compile can't work either
            return None

    def renew(self) -> None:
        """Begins anew where weights that were packed or rounded have changed."""
        if self.versions == versions(self.denoiser):
            return
        if self.compile:
            torch._dynamo.reset()  # else the same code with the old constants is found again
            self.done = 0.0
        self._begin()

    def __call__(self, z: Tensor, *args: Any, rows: Tensor | None = None) -> Tensor:
        """The denoiser's features, see `Denoiser.forward`."""
        self.count(z.shape[0] * z.shape[1] if rows is None else len(rows), z.device.type)
        return self.call(z, *args) if rows is None else self.call(z, *args, rows=rows)

    def count(self, positions: int, device_type: str) -> None:
        """Takes note of work done here or elsewhere, and compiles if it is time."""
        self.done += 2.0 * self.weights * positions
        if self.native:
            return
        due = self.done > PAYS_AFTER.get(device_type, torch.inf) if self.wanted is None else self.wanted
        if due and not self.compile and not self.refused:
            self._compile(device_type)

    def _compile(self, device_type: str) -> None:
        say = once(lambda text: warnings.warn(text, stacklevel=5))
        self.refused = not can_compile(device_type, say)
        if self.refused:
            return
        self.compile = lambda module: compiled(module, say, dynamic=None, pack=device_type == "cpu")
        self.call = self.compile(cast(nn.Module, self.call))
        self.heads.clear()

    def posterior(
        self, h: Tensor, weight: Tensor, table: Tensor, temperature: float, keep: tuple[int, ...]
    ) -> ops.Posterior | None:
        """`ops.expectation` of features h [.., H], by the denoiser's weight [V, H] and table [V, D] in the precision of
        h; None where that one is as fast."""
        if h.device.type != "cpu" or torch.is_grad_enabled():
            return None
        if (made := self._native_head(h, weight, table)) is not None:
            mean, kept, _ = made.posterior(h.flatten(0, -2), temperature, keep)
            return ops.Posterior(mean.view(*h.shape[:-1], -1), kept.view(*h.shape[:-1], -1))
        if not (self.compile or self.int8):
            return None
        head, cold = self._head(weight, table, keep, temperature)
        parts = [head(some, cold) for some in torch.split(h.flatten(0, -2), ROWS)]
        mean, kept = (torch.cat(column).view(*h.shape[:-1], -1) for column in zip(*parts, strict=True))
        return ops.Posterior(mean, kept)

    def most_probable(self, h: Tensor, weight: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`ops.most_probable` of features h [R, H]; natively in no order."""
        head = self._native_head(h, weight, table) if native.takes_candidates(count) else None
        return ops.most_probable(h, weight, count) if head is None else head.most_probable(h, count)

    def _native_head(self, h: Tensor, weight: Tensor, table: Tensor) -> native.Head | None:
        """The vocabulary's part of a step, where it is native."""
        if self.native is None or h.dtype is not torch.bfloat16:
            return None
        self.native_head = self.native_head or native.Head(weight, table, self.int8)
        return self.native_head

    def masses(
        self,
        h: Tensor,
        text: Tensor,
        texts: int,
        weight: Tensor,
        table: Tensor,
        temperature: float,
        keep: tuple[int, ...],
    ) -> tuple[ops.Posterior, Tensor]:
        """The posterior, and the mass of words [B, V] in each text: the sum of their probabilities over its rows.

        text: [R], that of each row of h. texts: B.
        """
        if (made := self._native_head(h, weight, table)) is not None:
            flat = made.posterior(h.flatten(0, -2), temperature, keep, text, texts)
            posterior = ops.Posterior(*(part.view(*h.shape[:-1], -1) for part in flat[:2]))
            return posterior, cast(Tensor, flat[2])
        head, cold = self._head(weight, table, keep, temperature)
        of_text = (text == torch.arange(texts, device=h.device)[:, None]).to(h.dtype)
        pieces = zip(torch.split(h.flatten(0, -2), ROWS), torch.split(of_text, ROWS, 1), strict=True)
        means, kept, masses = zip(*[head(rows, cold, of) for rows, of in pieces], strict=True)
        posterior = ops.Posterior(*(torch.cat(parts).view(*h.shape[:-1], -1) for parts in (means, kept)))
        return posterior, torch.stack(masses).sum(0)

    def _head(
        self, weight: Tensor, table: Tensor, keep: tuple[int, ...], temperature: float
    ) -> tuple[Callable[..., Any], Tensor]:
        """A `Head`, compiled where the denoiser is, and its temperature: a tensor, for each number would be compiled
        anew."""
        if keep not in self.heads:
            head = Head(weight, table, keep, self.int8)
            self.heads[keep] = self.compile(head) if self.compile else head
        return self.heads[keep], torch.tensor(temperature, device=weight.device)


class Head(nn.Module):
    """The token posterior as a module, of which torch.compile makes packed products and one pass between them.

    Args:
        weight: [V, H]. table: [V, D]. keep: ids of tokens that are kept apart. int8: as in `Forward`; what is kept
            apart, and the mean, have the precision of the weights.

    Words go by in blocks, with a running maximum, as in `ops.expectation`.
    """

    def __init__(self, weight: Tensor, table: Tensor, keep: tuple[int, ...], int8: bool) -> None:
        super().__init__()
        self.int8 = int8
        blocks, tables = torch.split(weight, WORDS), torch.split(table, WORDS)
        self.blocks = nn.ModuleList([Int8Linear(block) if int8 else linear(block) for block in blocks])
        self.tables = nn.ModuleList([linear(block.T) for block in tables])
        self.ends = nn.Parameter(weight[list(keep)], requires_grad=False)
        apart = torch.zeros(len(weight)).index_fill(0, torch.tensor(keep, dtype=torch.long), -torch.inf)
        self.apart = nn.ParameterList([nn.Parameter(block, requires_grad=False) for block in torch.split(apart, WORDS)])

    def forward(self, rows: Tensor, temperature: Tensor, texts: Tensor | None = None) -> tuple[Tensor, ...]:
        """The mean [R, D] of words and the probabilities [R, K] of tokens that are kept apart, of features [R, H]; with
        texts [B, R] also the mass of words [B, V], see `Forward.masses`."""
        given = rows.float() if self.int8 else rows
        seen = list[tuple[Tensor, Tensor]]()  # of each block, probabilities of words, and the maximum that they go by
        best = rows.new_full((len(rows), 1), -torch.inf, dtype=torch.float32)
        plain = cold = mean = torch.zeros_like(best)
        for block, table, apart in zip(self.blocks, self.tables, self.apart, strict=True):
            logits = block(given).float() + apart
            higher = torch.maximum(best, logits.amax(1, keepdim=True))
            x, fade = (logits - higher) * ops.LOG2_E, (best - higher) * ops.LOG2_E
            p, less = (x / temperature).exp2(), (fade / temperature).exp2()
            plain = plain * fade.exp2() + x.exp2().sum(1, keepdim=True)
            cold = cold * less + p.sum(1, keepdim=True)
            p = p.to(rows.dtype)
            mean = mean * less + table(p).float()
            best = higher
            if texts is not None:
                seen.append((p, best))
        ends = F.linear(rows, self.ends).float()
        top = torch.cat([best, ends], 1).amax(1, keepdim=True)
        ends, words = (ends - top).exp(), plain * (best - top).exp()
        found = mean / cold, ends / (words + ends.sum(1, keepdim=True))
        if texts is None:
            return found
        shares = [((by - best) * (ops.LOG2_E / temperature)).exp2() / cold for _, by in seen]
        mass = [(texts * share[:, 0]).to(p.dtype) @ p for (p, _), share in zip(seen, shares, strict=True)]
        return *found, torch.cat(mass, 1).float()


class Int8Linear(nn.Module):
    """x -> x W^T without a bias, each row of x and of W rounded as by `ops.eight_bits`; sums are exact.

    Args:
        weight: W [out, in], in whatever precision.
    """

    weight: Tensor
    step: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rounded, step = ops.eight_bits(weight.detach().float())
        self.register_buffer("weight", rounded)
        self.register_buffer("step", step[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """[.., out] of x [.., in], in the precision of x."""
        rounded, step = ops.eight_bits(x.flatten(0, -2).float())
        y = torch._int_mm(rounded, self.weight.T).float() * (step * self.step)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def linear(weight: Tensor) -> nn.Linear:
    """A layer with this weight [out, in], without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def in_int8(denoiser: nn.Module) -> nn.Module:
    """The denoiser with the large products of its blocks in 8 bits; all else is shared."""
    shared = {id(tensor): tensor for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    made = copy.deepcopy(denoiser, shared)
    for block in cast(nn.ModuleList, made.blocks):
        for name in ("qkv", "attention_out", "mlp_in", "mlp_out"):
            setattr(block, name, Int8Linear(cast(nn.Linear, getattr(block, name)).weight))
    return made
