"""The vocabulary and the solver's step on a GPU, as Triton kernels: two launches from features to the next latents.

    R rows, the positions of a batch   V vocabulary   H features   D embedding dim   S parts of the vocabulary

A posterior mean needs one pass over the vocabulary with a running maximum (online softmax, Milakov & Gimelshein 2018,
arXiv:1805.02867, algorithm 3), since sum_v p_v E_v can be rescaled as the maximum grows. A row of tiles alone would
leave most of a GPU idle at small batches, so the vocabulary is split as well and the parts are merged by their maxima:

    parts   grid (rows, parts): the largest logit, sum exp(logit - largest), sum exp(..) E       of each part
    step    grid (rows): merges them, combines the branches, decides lengths, applies equation (3) of the solver's row

The first is bound by memory where rows are few and by arithmetic where they are many, so its tiles grow with R; the
second moves numbers about and multiplies nothing, so its tiles are thin, and even 64 rows keep 16 programs busy.

Logits are never written anywhere. Noise is Philox's (Salmon et al. 2011), of a sample's seed, the step, and the place
in the sample: `normal` gives the same numbers to whoever steps otherwise. Each kernel equals a reference in torch
(`ops.expectation_reference`, `Predictor`, `schedulers.table.advance`); the tests compare them under Triton's
interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from embdiff.ops import Posterior

P = ParamSpec("P")
T = TypeVar("T")
MERGED = 16  # parts whose sums are loaded at a time, at most


class Tile(NamedTuple):
    """How products are cut up.

    rows, words: of a tile of logits; features: multiplied at a time; warps, stages: of Triton's launch; programs: that
    a multiprocessor holds at a time.
    """

    rows: int
    words: int
    features: int
    warps: int
    stages: int
    programs: int


def tile(rows: int, dtype: torch.dtype) -> Tile:
    """For so many rows. In fp32 numbers take twice the memory and a product takes three: small tiles for all."""
    if dtype is torch.float32:
        return Tile(32 if rows <= 32 else 64, 32, 32, 4, 3, 2)
    if rows <= 32:
        return Tile(32, 64, 64, 4, 4, 2)
    if rows < 512:
        return Tile(64, 64, 64, 4, 4, 2)
    return Tile(128, 128, 64, 8, 3, 1)


def thin(device: torch.device) -> int:
    """Rows of a tile without products. Interpreted, each program costs as much as its arithmetic."""
    return 4 if device.type == "cuda" else 32


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, where Triton launches and torch records."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Launches on the first tensor's device."""

    @wraps(launch)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        with on(next(arg for arg in args if isinstance(arg, Tensor)).device):
            return launch(*args, **kwargs)

    return there


class Parts(NamedTuple):
    """What is known of the posterior of each row from each part of the vocabulary, fp32.

    top: [S, R] the largest logit of its words; sums: [S, R, D] sum of exp((logit - top) / T) E; tempered, plain: [S, R]
    sum of exp((logit - top) / T), and of exp(logit - top). kept: [R, K] logits of the tokens that are kept apart.
    """

    top: Tensor
    tempered: Tensor
    plain: Tensor
    sums: Tensor
    kept: Tensor
    coldness: float  # 1 / T


class Lengths(NamedTuple):
    """How padding and the end of text enter x0, see `pipeline.TextDiffusionPipeline`.

    quantile: [B] in (0, 1); embeddings: [2, D] of both tokens.
    """

    quantile: Tensor
    embeddings: Tensor


@on_its_device
def expectation(h: Tensor, weight: Tensor, table: Tensor, temperature: float, keep: Tensor) -> Posterior:
    """`ops.expectation` without classes and tilts. keep: [K] int64 with K of 0 to 2, on the device."""
    rows = h.reshape(-1, h.shape[-1])
    found = parts(rows, weight, table, temperature, keep)
    mean = torch.empty((len(rows), table.shape[1]), device=h.device)
    kept = torch.empty((len(rows), len(keep)), device=h.device)
    S, R, D = found.sums.shape
    ROWS = thin(h.device)
    _merge[(triton.cdiv(R, ROWS),)](
        *found, mean, kept, R, S, D=D, K=len(keep), ROWS=ROWS, WIDTH=_width(D), **_merging(S)
    )  # fmt: skip
    return Posterior(mean.view(*h.shape[:-1], D), kept.view(*h.shape[:-1], len(keep)))


@on_its_device
def parts(rows: Tensor, weight: Tensor, table: Tensor, temperature: float, keep: Tensor) -> Parts:
    """The first kernel. rows: [R, H]; weight: [V, H], table: [V, D], best in the rows' precision; keep: [K]."""
    (R, H), (V, D) = rows.shape, table.shape
    of = tile(R, rows.dtype)
    S = splits(R, V, of, rows.device)
    top, tempered, plain = (torch.empty((S, R), device=rows.device) for _ in range(3))
    sums, kept = torch.empty((S, R, D), device=rows.device), torch.empty((R, len(keep)), device=rows.device)
    found = Parts(top, tempered, plain, sums, kept, 1 / temperature)
    _parts[(triton.cdiv(R, of.rows), S)](
        rows.contiguous(), weight.to(rows.dtype).contiguous(), table.to(rows.dtype).contiguous(), keep, *found,
        R, V, triton.cdiv(triton.cdiv(V, of.words), S) * of.words,
        H=H, D=D, K=len(keep), TEMPERED=temperature != 1.0,
        ROWS=of.rows, WORDS=of.words, FEATURES=of.features, WIDTH=_width(D), PRECISION=precision(rows.device),
        num_warps=of.warps, num_stages=of.stages,
    )  # fmt: skip
    return found


@on_its_device
def step(
    found: Parts,
    z: Tensor,
    history: Sequence[Tensor],
    row: Tensor,
    lengths: Lengths,
    seeds: Tensor,
    draw: int,
    scale: float | None,
    z_next: Tensor,
    x0: Tensor,
) -> None:
    """The second kernel: from the parts to x0 and the next latents, written to `x0` and `z_next` [B, L, D].

    Args:
        found: of B L rows, or of 2 B L where scale is given: those of the main prediction, then those of the other.
        z: [B, L, D]. history: x0_prev and x0_prev2, likewise.
        row: [8] a, b, c, d, s of equation (3), whether lengths are drawn (0 or 1), e^length_bias, and nothing.
        seeds, draw: [B] int64, and which of `normal`'s draws is added; -1 = no noise.
        scale: of guidance in x0 space, other + scale (main - other); None = one branch.
    """
    B, L, D = z.shape
    S, R = found.top.shape
    ROWS = thin(z.device)
    _step[(triton.cdiv(B * L, ROWS),)](
        *found, z, *history, row, *lengths, seeds, z_next, x0, B * L, R, S, L, max(draw, 0),
        1.0 if scale is None else scale,
        D=D, GUIDED=scale is not None, NOISY=draw >= 0, ROWS=ROWS, WIDTH=_width(D), **_merging(S),
    )  # fmt: skip


@on_its_device
def normal(seeds: Tensor, draw: int, length: int, dim: int) -> Tensor:
    """eps [B, L, D] ~ N(0, I) of seeds [B] int64, 0 to 2^63 - 1: the draw of this number, 0 to 2^31 / (L D) - 1."""
    B = len(seeds)
    eps = torch.empty((B, length, dim), device=seeds.device)
    ROWS = thin(seeds.device)
    _normal[(triton.cdiv(B * length, ROWS),)](
        seeds, eps, B * length, length, draw, D=dim, ROWS=ROWS, WIDTH=_width(dim)
    )  # fmt: skip
    return eps


@on_its_device
def argmax(h: Tensor, weight: Tensor) -> Tensor:
    """`ops.argmax`."""
    rows = h.reshape(-1, h.shape[-1])
    (R, H), V = rows.shape, len(weight)
    of = tile(R, h.dtype)
    S = splits(R, V, of, h.device)
    top = torch.empty((S, R), device=h.device)
    index = torch.empty((S, R), device=h.device, dtype=torch.int64)
    _argmax[(triton.cdiv(R, of.rows), S)](
        rows.contiguous(), weight.to(h.dtype).contiguous(), top, index,
        R, V, triton.cdiv(triton.cdiv(V, of.words), S) * of.words,
        H=H, ROWS=of.rows, WORDS=of.words, FEATURES=of.features, PRECISION=precision(h.device),
        num_warps=of.warps, num_stages=of.stages,
    )  # fmt: skip
    return index.gather(0, top.argmax(0, keepdim=True))[0].view(h.shape[:-1])


@on_its_device
def best_path(scores: Tensor, pairs: Tensor) -> Tensor:
    """`ops.best_path`, a program for each text."""
    B, L, K = scores.shape
    back = torch.empty((B, L, K), device=scores.device, dtype=torch.int32)
    path = torch.empty((B, L), device=scores.device, dtype=torch.int64)
    _best_path[(B,)](
        scores.float().contiguous(), pairs.float().contiguous(), back, path, L,
        K=K, SIZE=max(16, int(triton.next_power_of_2(K))), num_warps=1,  # steps wait for each other, warps would too
    )  # fmt: skip
    return path


def splits(rows: int, vocabulary: int, of: Tile, device: torch.device) -> int:
    """Parts of the vocabulary, all alike and of two tiles at least: as many as are soonest through, in waves of all the
    programs that the GPU runs at once."""
    return _splits(-(-rows // of.rows), -(-vocabulary // of.words), of.programs, _processors(device))


@lru_cache(maxsize=256)
def _splits(row_tiles: int, tiles: int, programs: int, processors: int) -> int:
    def cost(parts: int) -> int:
        waves = -(-row_tiles * parts // (programs * processors))
        return waves * (-(-tiles // parts) + 1)  # and one tile's time for a program to begin and end

    parts = min(range(1, max(1, min(processors, tiles // 2)) + 1), key=cost)
    return -(-tiles // -(-tiles // parts))


@lru_cache(maxsize=4)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def precision(device: torch.device) -> str:
    """Of products of fp32 numbers; bf16 has only one.

    "ieee" goes without matrix units: three products in tf32 of a number's two halves are many times as fast and nearly
    as exact.
    """
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # where it exists, reading the older setting may raise
    if matmul.allow_tf32 if newer is None else newer == "tf32":
        return "tf32"
    return "tf32x3" if _has_tf32(device) else "ieee"


@lru_cache(maxsize=4)
def _has_tf32(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def _merging(parts: int) -> dict[str, int]:
    """The sizes, powers of two, of what is loaded at once: maxima of all parts, sums of some."""
    whole = int(triton.next_power_of_2(parts))
    return {"PARTS": whole, "MERGED": min(MERGED, whole)}


def _width(dim: int) -> int:
    """Columns of a tile of embeddings: a power of two that tensor cores take."""
    return max(16, int(triton.next_power_of_2(dim)))


# ------------------------------------------------------------------------------------------------ the kernels
# No types: what Triton compiles is no Python.


@triton.jit
def _logits(h, weight, rows, words, R, V, H: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
            FEATURES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile [ROWS, WORDS] of h weight^T; beyond R and V something that nobody may read."""
    x = tl.zeros((ROWS, WORDS), tl.float32)
    a_at = h + tl.where(rows < R, rows, 0)[:, None] * H
    b_at = weight + tl.where(words < V, words, 0)[None, :] * H
    for start in range(0, H, FEATURES):
        k = start + tl.arange(0, FEATURES)
        if H % FEATURES == 0:
            a = tl.load(a_at + k[None, :])
            b = tl.load(b_at + k[:, None])
        else:
            a = tl.load(a_at + k[None, :], mask=k[None, :] < H, other=0.0)
            b = tl.load(b_at + k[:, None], mask=k[:, None] < H, other=0.0)
        x = tl.dot(a, b, x, input_precision=PRECISION)
    return x


@triton.jit
def _parts(h, weight, table, keep, top, tempered, plain, sums, kept, coldness, R, V, split,
           H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, TEMPERED: tl.constexpr, ROWS: tl.constexpr,
           WORDS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    cold = tl.zeros((ROWS,), tl.float32)
    warm = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(part * split, tl.minimum((part + 1) * split, V), WORDS):
        words = first + tl.arange(0, WORDS)
        x = _logits(h, weight, rows, words, R, V, H, ROWS, WORDS, FEATURES, PRECISION)
        is_word = words < V
        for i in tl.static_range(K):
            token = tl.load(keep + i)
            if (token >= first) & (token < first + WORDS):
                logit = tl.sum(tl.where((words == token)[None, :], x, 0.0), 1)
                tl.store(kept + rows * K + i, logit, mask=rows < R)
            is_word = is_word & (words != token)
        x = tl.where(is_word[None, :], x, float("-inf"))
        higher = tl.maximum(best, tl.max(x, 1))
        # A part may have no word before this tile, or at all.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp((x - level[:, None]) * coldness)
        fade = tl.exp((best - level) * coldness)
        cold = cold * fade + tl.sum(p, 1)
        if TEMPERED:
            warm = warm * tl.exp(best - level) + tl.sum(tl.exp(x - level[:, None]), 1)
        e = tl.load(table + words[:, None] * D + d[None, :], mask=(words[:, None] < V) & (d[None, :] < D), other=0.0)
        total = tl.dot(p.to(e.dtype), e, total * fade[:, None], input_precision=PRECISION)
        best = higher
    at = part * R + rows
    tl.store(top + at, best, mask=rows < R)
    tl.store(tempered + at, cold, mask=rows < R)
    tl.store(plain + at, warm if TEMPERED else cold, mask=rows < R)
    tl.store(sums + at[:, None] * D + d[None, :], total, mask=(rows[:, None] < R) & (d[None, :] < D))


@triton.jit
def _merged(top, tempered, plain, sums, kept, coldness, rows, R, S, D: tl.constexpr, K: tl.constexpr,
            ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, MERGED: tl.constexpr):  # fmt: skip
    """Of some rows: the mean embedding of words [ROWS, WIDTH], and the probabilities of two kept tokens [ROWS]."""
    d = tl.arange(0, WIDTH)
    real = rows < R
    s = tl.arange(0, PARTS)
    at = s[:, None] * R + rows[None, :]
    inside = (s[:, None] < S) & real[None, :]
    tops = tl.load(top + at, mask=inside, other=float("-inf"))
    best = tl.where(real, tl.max(tops, 0), 0.0)
    below = tops - best[None, :]
    cold = tl.sum(tl.load(tempered + at, mask=inside, other=0.0) * tl.exp(below * coldness), 0)
    warm = tl.sum(tl.load(plain + at, mask=inside, other=0.0) * tl.exp(below), 0)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    # Several parts at a time, since one load after the other would take longer than all else.
    for begin in range(0, S, MERGED):
        part = begin + tl.arange(0, MERGED)
        here = part[:, None] * R + rows[None, :]
        there = (part[:, None] < S) & real[None, :]
        weight = tl.exp((tl.load(top + here, mask=there, other=float("-inf")) - best[None, :]) * coldness)
        e = tl.load(
            sums + here[:, :, None] * D + d[None, None, :], mask=there[:, :, None] & (d[None, None, :] < D), other=0.0
        )
        total += tl.sum(e * weight[:, :, None], 0)
    cold, warm = tl.where(real, cold, 1.0), tl.where(real, warm, 1.0)
    mean = total / cold[:, None]
    first = tl.full((ROWS,), float("-inf"), tl.float32)
    second = first
    if K > 0:
        first = tl.load(kept + rows * K, mask=real, other=0.0)
    if K > 1:
        second = tl.load(kept + rows * K + 1, mask=real, other=0.0)
    highest = tl.maximum(best, tl.maximum(first, second))
    first = tl.exp(first - highest)
    second = tl.exp(second - highest)
    everything = warm * tl.exp(best - highest) + first + second
    return mean, first / everything, second / everything


@triton.jit
def _merge(top, tempered, plain, sums, kept, coldness, mean, p, R, S, D: tl.constexpr, K: tl.constexpr,
           ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, MERGED: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    m, first, second = _merged(top, tempered, plain, sums, kept, coldness, rows, R, S, D, K, ROWS, WIDTH, PARTS, MERGED)
    tl.store(mean + rows[:, None] * D + d[None, :], m, mask=(rows[:, None] < R) & (d[None, :] < D))
    if K > 0:
        tl.store(p + rows * K, first, mask=rows < R)
    if K > 1:
        tl.store(p + rows * K + 1, second, mask=rows < R)


@triton.jit
def _eps(seeds, rows, d, real, L, draw, D: tl.constexpr):
    """Noise [ROWS, WIDTH] of some rows: of the sample's seed, and of the draw, position and dimension as one number."""
    seed = tl.load(seeds + rows // L, mask=real, other=0)
    place = (draw * L + rows % L)[:, None] * D + d[None, :]
    return tl.randn(seed[:, None], place)


@triton.jit(do_not_specialize=["draw"])
def _normal(seeds, eps, R, L, draw, D: tl.constexpr, ROWS: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (rows[:, None] < R) & (d[None, :] < D)
    tl.store(eps + rows[:, None] * D + d[None, :], _eps(seeds, rows, d, rows < R, L, draw, D), mask=inside)


@triton.jit(do_not_specialize=["draw"])
def _step(top, tempered, plain, sums, kept, coldness, z, before, before_that, row, quantile, embeddings, seeds, z_next,
          x0, rows_of_main, R, S, L, draw, scale, D: tl.constexpr, GUIDED: tl.constexpr, NOISY: tl.constexpr,
          ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, MERGED: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < rows_of_main
    d = tl.arange(0, WIDTH)
    # A tile that reaches beyond the main rows reads the other branch's there, and writes nothing of it.
    mean, pad, end = _merged(top, tempered, plain, sums, kept, coldness, rows, R, S, D, 2, ROWS, WIDTH, PARTS, MERGED)
    if GUIDED:
        other, other_pad, other_end = _merged(
            top, tempered, plain, sums, kept, coldness, rows_of_main + rows, R, S, D, 2, ROWS, WIDTH, PARTS, MERGED
        )
        mean = other + scale * (mean - other)
        pad = tl.minimum(tl.maximum(other_pad + scale * (pad - other_pad), 0.0), 1.0)
        end = tl.minimum(tl.maximum(other_end + scale * (end - other_end), 0.0), 1.0)
        both = tl.maximum(pad + end, 1.0)
        pad, end = pad / both, end / both
    draws = tl.load(row + 5) > 0.5
    odds = tl.load(row + 6)
    u = tl.load(quantile + rows // L, mask=real, other=0.5)
    together = pad + end
    share = 1.0 / tl.maximum(together + (1.0 - together) * odds, 1e-12)
    drawn_pad = tl.where((u > 0.0) & (u <= pad), 1.0, 0.0)
    drawn_end = tl.where((u > pad) & (u <= together), 1.0, 0.0)
    pad = tl.where(draws, drawn_pad, pad * share)
    end = tl.where(draws, drawn_end, end * share)

    inside = real[:, None] & (d[None, :] < D)
    at = rows[:, None] * D + d[None, :]
    padding = tl.load(embeddings + d, mask=d < D, other=0.0)
    ending = tl.load(embeddings + D + d, mask=d < D, other=0.0)
    clean = pad[:, None] * padding[None, :] + end[:, None] * ending[None, :] + (1.0 - pad - end)[:, None] * mean
    moved = tl.load(row) * tl.load(z + at, mask=inside, other=0.0) + tl.load(row + 1) * clean
    moved += tl.load(row + 2) * tl.load(before + at, mask=inside, other=0.0)
    moved += tl.load(row + 3) * tl.load(before_that + at, mask=inside, other=0.0)
    if NOISY:
        moved += tl.load(row + 4) * _eps(seeds, rows, d, real, L, draw, D)
    tl.store(x0 + at, clean, mask=inside)
    tl.store(z_next + at, moved, mask=inside)


@triton.jit
def _argmax(h, weight, top, index, R, V, split, H: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
            FEATURES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int64)
    for first in range(part * split, tl.minimum((part + 1) * split, V), WORDS):
        words = first + tl.arange(0, WORDS)
        x = _logits(h, weight, rows, words, R, V, H, ROWS, WORDS, FEATURES, PRECISION)
        x = tl.where((words < V)[None, :], x, float("-inf"))
        higher = tl.max(x, 1)
        found = first + tl.argmax(x, 1)
        where = tl.where(higher > best, found.to(tl.int64), where)
        best = tl.maximum(best, higher)
    tl.store(top + part * R + rows, best, mask=rows < R)
    tl.store(index + part * R + rows, where, mask=rows < R)


@triton.jit
def _best_path(scores, pairs, back, path, L, K: tl.constexpr, SIZE: tl.constexpr):
    k = tl.arange(0, SIZE)
    inside = k < K
    scores += tl.program_id(0).to(tl.int64) * L * K
    back += tl.program_id(0).to(tl.int64) * L * K
    pairs += tl.program_id(0).to(tl.int64) * (L - 1) * K * K
    path += tl.program_id(0).to(tl.int64) * L
    of_both = inside[:, None] & inside[None, :]
    total = tl.load(scores + k, mask=inside, other=float("-inf"))
    for here in range(1, L):
        reached = tl.load(pairs + (here - 1) * K * K + k[:, None] * K + k[None, :], mask=of_both, other=float("-inf"))
        reached += total[:, None]
        tl.store(back + here * K + k, tl.argmax(reached, 0).to(tl.int32), mask=inside)
        total = tl.max(reached, 0) + tl.load(scores + here * K + k, mask=inside, other=float("-inf"))
    tl.debug_barrier()  # what one thread stored others load
    choice = tl.argmax(total, 0).to(tl.int32)
    for left in range(1, L):
        tl.store(path + L - left, choice.to(tl.int64))
        choice = tl.load(back + (L - left) * K + choice)
    tl.store(path, choice.to(tl.int64))
