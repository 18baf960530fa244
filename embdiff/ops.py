"""The operations that touch the vocabulary, and attention: a reference for each and the fast path for a CPU.

    h       hidden states          [.., H]
    weight  output weight          [V, H]     logits = h weight^T
    table   embedding table E      [V, D]

The [B, L, V] logits are never held whole: rows are taken in chunks that stay in the cache.
The functions named `*_reference` say what the others must give; tests compare them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TRITON = find_spec("triton") is not None
CHUNK = 256  # rows of logits held at a time, or more
CACHED, MOST = 2**19, 2**26  # numbers of each kind held at a time, on a CPU and on a GPU
BLOCK = 1024  # rows and words of logits held at a time, where a running maximum will do; of few rows, more words
SMALL = 16  # words of a class, which is then computed together with other such
LOG2_E = 1 / math.log(2)
FAINT = 1e-3  # how much of its share a class keeps, for constraints alone, where tilts leave it no word
FAINTEST = -1e4  # a logit that outweighs no other


class Posterior(NamedTuple):
    """The token posterior of each position, as far as a sampler needs it.

    mean: [.., D], the mean embedding of the words, the tokens that are not kept apart;
    kept: [.., K], the probability of each token that is kept apart (K may be 0).
    share: [.., C], how probable each class of words is, among words that are in a class; None without classes.
    each: [.., C, D], the mean embedding of each class; None without classes.
    What tilts leave no word of a class, a constraint may ask for all the same. So such a class has a faint share, which
    mean does without, and in `each` its mean without tilts. One that bans leave no word is 0 in both.
    """

    mean: Tensor
    kept: Tensor
    share: Tensor | None = None
    each: Tensor | None = None


class Classes(NamedTuple):
    """Classes of words, the tokens that are not kept apart. order: their ids, class after class; sizes: of classes."""

    order: Tensor
    sizes: Sequence[int]


# (logits [R, V] of words, number of the first row) -> logits: tempered and with -inf for tokens that are kept apart.
# A ban takes words out, the same whatever the logits are; it comes before tilts, which leave a word where bans do.
Tilting = Callable[[Tensor, int], Tensor]


def chunk_rows(device_type: str, columns: int) -> int:
    """Rows held at a time, of so many numbers each: few on a CPU, for its cache, as many as fit on a GPU."""
    return max(CHUNK, (CACHED if device_type == "cpu" else MOST) // columns)


def has_kernels(device_type: str) -> bool:
    """Whether `embdiff.kernels` serves such a device."""
    return device_type == "cuda" and TRITON


def expectation_reference(
    h: Tensor,
    weight: Tensor,
    table: Tensor,
    temperature: float = 1.0,
    keep: tuple[int, ...] = (),
    classes: Classes | None = None,
    tilts: Sequence[Tilting] = (),
    bans: Sequence[Tilting] = (),
) -> Posterior:
    """The posterior with materialised logits, in the precision of its inputs.

    p = softmax(h weight^T). The tokens in `keep` stay as probable as p says; the others share the rest according to
    p^(1/temperature), changed by the bans and the tilts. Where there are classes, words are those of a class. Where
    bans leave no word, `keep` has all. With an empty `keep`, temperature 1, `mean` is softmax(logits) E ("score
    interpolation", CDCD, arXiv:2211.15089, equation 3).
    """
    logits = h @ weight.T
    ids = list(keep)
    kept = logits.softmax(-1)[..., ids]
    words = logits / temperature
    words[..., ids] = -torch.inf
    allowed, tilted_words = (x.reshape(words.shape) for x in tilted(words.flatten(0, -2), 0, bans, tilts))
    kept = all_where_no(has_word(allowed if classes is None else allowed[..., classes.order]), kept)
    if classes is None:
        return Posterior(tilted_words.softmax(-1).nan_to_num() @ table, kept)
    groups, share, asked = by_class(tilted_words, allowed, classes)
    tables = torch.split(table[classes.order], list(classes.sizes))
    each = torch.stack([g.softmax(-1).nan_to_num() @ t for g, t in zip(groups, tables, strict=True)], -2)
    return Posterior((share[..., None] * each).sum(-2), kept, asked, each)


def tilted(words: Tensor, start: int, bans: Sequence[Tilting], tilts: Sequence[Tilting]) -> tuple[Tensor, Tensor]:
    """Logits [R, V] of words after the bans alone, and after the tilts too. Where tilts leave a row no word, the row is
    as it was before them."""
    for ban in bans:
        words = ban(words, start)
    allowed = words
    for tilt in tilts:
        words = tilt(words, start)
    return allowed, torch.where(has_word(words), words, allowed) if tilts else allowed


def has_word(words: Tensor) -> Tensor:
    """[.., 1] bool: whether any of the logits [.., V] is above -inf, and none is NaN."""
    if not words.shape[-1]:
        return words.new_zeros((*words.shape[:-1], 1), dtype=torch.bool)
    return words.amax(-1, keepdim=True) > -torch.inf


def all_where_no(word: Tensor, kept: Tensor) -> Tensor:
    """Probabilities [.., K] of tokens that are kept apart; where there is no word [.., 1], they share what there is."""
    return torch.where(word, kept, kept / kept.sum(-1, keepdim=True).clamp(min=1e-30))


def by_class(words: Tensor, allowed: Tensor, classes: Classes) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Logits of each class's words [.., n] and shares of the classes [.., C]: as they are, and as constraints see them.

    words: logits [.., V]; allowed: without the tilts, from which a class is taken that tilts left no word.
    """
    groups = torch.split(words[..., classes.order], list(classes.sizes), -1)
    size = torch.stack([group.logsumexp(-1) for group in groups], -1)
    share = size.softmax(-1).nan_to_num()
    if allowed is words:
        return groups, share, share
    before = torch.split(allowed[..., classes.order], list(classes.sizes), -1)
    emptied = size == -torch.inf
    faint = FAINT * torch.stack([group.logsumexp(-1) for group in before], -1).softmax(-1).nan_to_num()
    asked = torch.where(emptied, faint, share)
    parts = zip(emptied.unbind(-1), before, groups, strict=True)
    groups = tuple(torch.where(none[..., None], whole, cut) for none, whole, cut in parts)
    return groups, share, asked / asked.sum(-1, keepdim=True).clamp(min=1e-30)


def expectation(
    h: Tensor,
    weight: Tensor,
    table: Tensor,
    temperature: float = 1.0,
    keep: Sequence[int] | Tensor = (),
    classes: Classes | None = None,
    tilts: Sequence[Tilting] = (),
    bans: Sequence[Tilting] = (),
) -> Posterior:
    """`expectation_reference` in chunks: softmax in fp32, matrix products in the precision of `h`.

    keep may be a tensor on the device of `h`, so that nothing is copied there. Where there are neither classes, tilts,
    bans nor gradients: by a kernel on a GPU, and by blocks of words of a large vocabulary elsewhere. Classes alone are
    taken in their order, with each a slice of the logits.
    """
    plain = classes is None and not tilts and not bans and not torch.is_grad_enabled()
    if plain and has_kernels(h.device.type) and len(keep) <= 2:
        from embdiff import kernels

        return kernels.expectation(h, weight, table, temperature, torch.as_tensor(keep, device=h.device).long())
    rows = h.reshape(-1, h.shape[-1])
    weight, table = weight.to(h.dtype), table.to(h.dtype)
    ids = keep if isinstance(keep, Tensor) else list(keep)
    if plain and len(weight) > 2 * BLOCK and h.device.type == "cpu":
        tokens = [int(token) for token in ids]
        parts = [_by_blocks(part, weight, table, temperature, tokens) for part in torch.split(rows, BLOCK)]
        mean, kept = (torch.cat(column) for column in zip(*parts, strict=True))
        return Posterior(mean.view(*h.shape[:-1], -1), kept.view(*h.shape[:-1], len(ids)))
    if classes is not None and not tilts and not bans:
        known = torch.as_tensor(ids, device=h.device, dtype=torch.long)
        flat = _by_sorted_words(rows, weight, table, temperature, known, classes)
        return Posterior(*(part.reshape(*h.shape[:-1], *part.shape[1:]) for part in flat if part is not None))
    sorted_table = None if classes is None else torch.split(table[classes.order], list(classes.sizes))
    found: list[tuple[Tensor, ...]] = []
    size = chunk_rows(h.device.type, len(weight))
    for start, chunk in zip(range(0, len(rows), size), torch.split(rows, size), strict=True):
        logits = F.linear(chunk, weight).float()
        kept = logits.new_zeros((len(chunk), 0))
        if len(ids):
            kept = logits.softmax(-1)[:, ids]
            logits[:, ids] = -torch.inf
        logits = logits if temperature == 1.0 else logits / temperature
        allowed, logits = tilted(logits, start, bans, tilts)
        if classes is None or sorted_table is None:
            p = logits.softmax(-1)
            if bans:
                kept, p = all_where_no(has_word(allowed), kept), p.nan_to_num()
            found.append(((p.to(h.dtype) @ table).float(), kept))
            continue
        # Class by class, so that the mean of an improbable one is as exact as that of a probable one.
        groups, share, asked = by_class(logits, allowed, classes)
        means = (
            group.softmax(1).nan_to_num().to(h.dtype) @ rows_of
            for group, rows_of in zip(groups, sorted_table, strict=True)
        )
        each = torch.stack([mean.float() for mean in means], 1)
        kept = all_where_no(asked.sum(-1, keepdim=True) > 0, kept)
        found.append(((share[..., None] * each).sum(1), kept, asked, each))
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return Posterior(*(column.reshape(*h.shape[:-1], *column.shape[1:]) for column in columns))


def _by_blocks(
    rows: Tensor, weight: Tensor, table: Tensor, temperature: float, keep: list[int]
) -> tuple[Tensor, Tensor]:
    """Mean [R, D] and kept [R, K] of rows [R, H], by a softmax with a running maximum over blocks of words.

    What is held stays in the cache, and in the same place: fresh memory of this size costs as much as the arithmetic.
    Powers are of 2: torch leaves exp to MKL, which takes four times as long for it on some CPUs.
    """
    ends = F.linear(rows, weight[keep]).float()
    most = max(BLOCK, BLOCK**2 // max(1, len(rows)))
    space = torch.empty(2, len(rows) * min(most, len(weight)))
    best = torch.full((len(rows), 1), -torch.inf)
    plain, cold, mean = torch.zeros_like(best), torch.zeros_like(best), torch.zeros(len(rows), table.shape[1])
    for start in range(0, len(weight), most):
        words = slice(start, start + most)
        block = weight[words]
        x, p = space[:, : len(rows) * len(block)].view(2, len(rows), len(block))
        if rows.dtype is torch.float32:
            torch.mm(rows, block.T, out=x)
        else:
            x.copy_(rows @ block.T)
        x[:, [token - start for token in keep if start <= token < start + len(block)]] = -torch.inf
        higher = torch.maximum(best, x.amax(1, keepdim=True))
        # A block may have no word before the first one; then nothing was summed up either.
        fade = (best - higher).nan_to_num(0.0, neginf=-torch.inf)
        torch.mul(x.sub_(higher), LOG2_E / temperature, out=p).exp2_()
        plain = plain * fade.exp() + x.mul_(LOG2_E).exp2_().sum(1, keepdim=True)
        fade = (fade / temperature).exp_()
        cold = cold * fade + p.sum(1, keepdim=True)
        mean = mean * fade + (p.to(rows.dtype) @ table[words]).float()
        best = higher
    top = torch.cat([best, ends], 1).amax(1, keepdim=True)
    ends = (ends - top).exp_()
    return mean / cold, ends / (plain * (best - top).exp_() + ends.sum(1, keepdim=True))


def _by_sorted_words(
    rows: Tensor, weight: Tensor, table: Tensor, temperature: float, keep: Tensor, classes: Classes
) -> Posterior:
    """The posterior of rows [R, H] with classes of words that nothing changes.

    Words are taken in the order of their classes, small ones first: a large class is a slice of the logits then, and
    the small ones, of which constraints have many, are another.
    """
    words, device, (R, D) = len(classes.order), rows.device, (len(rows), table.shape[1])
    small = [c for c, size in enumerate(classes.sizes) if size <= SMALL]
    large = [c for c, size in enumerate(classes.sizes) if size > SMALL]
    groups = torch.split(classes.order, list(classes.sizes))
    order = torch.cat([groups[c] for c in small + large])
    others = torch.ones(len(weight), dtype=torch.bool, device=device).index_fill(0, order, False)
    others = others.index_fill(0, keep, False).nonzero()[:, 0]
    weight, table = weight[torch.cat([order, keep, others])], table[order]
    sizes = [classes.sizes[c] for c in small]
    parts = [sum(sizes), *(classes.sizes[c] for c in large)]
    tables = torch.split(table, parts)
    made = partial(torch.empty, dtype=torch.float32, device=device)
    kept, first, mass, each = made(R, len(keep)), made(R, parts[0]), made(R, len(groups)), made(R, len(groups), D)
    size = chunk_rows(device.type, len(weight))
    for start, chunk in zip(range(0, R, size), torch.split(rows, size), strict=True):
        here = slice(start, start + size)
        logits = F.linear(chunk, weight).float()
        if len(keep):
            kept[here] = logits.softmax(-1)[:, words : words + len(keep)]
        first[here], *others_of = torch.split(logits[:, :words] / temperature, parts, -1)
        for c, group, own in zip(large, others_of, tables[1:], strict=True):
            top = group.amax(-1, keepdim=True)
            p = (group - top).mul_(LOG2_E).exp2_()
            total = p.sum(-1, keepdim=True)
            mass[here, c] = (top + total.log())[:, 0]
            each[here, c] = (p.to(own.dtype) @ own).float() / total
    if small:
        mass[:, small], each[:, small] = _side_by_side(first, tables[0].float(), sizes)
    share = mass.softmax(-1).nan_to_num()
    kept = kept if words else all_where_no(torch.zeros_like(kept[:, :1], dtype=torch.bool), kept)
    return Posterior((share[..., None] * each).sum(1), kept, share, each)


def _side_by_side(logits: Tensor, table: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The log of the mass [R, C] and the mean embedding [R, C, D] of each of some small classes, whose words have the
    logits [R, N] and the table [N, D]."""
    words = torch.arange(len(table), device=logits.device)
    places = pad_sequence(list(torch.split(words, list(sizes))), padding_value=-1)  # [n, C]
    group = logits.T[places].masked_fill_((places < 0)[..., None], -torch.inf)  # [n, C, R]
    top = group.amax(0) if len(places) else group.new_full(group.shape[1:], -torch.inf)
    p = (group - top.clamp(min=torch.finfo(top.dtype).min)).mul_(LOG2_E).exp2_()
    total = p.sum(0)
    means = torch.einsum("ncr,ncd->rcd", p, table[places]) / total.T[..., None].clamp(min=1e-30)
    return (top + total.log()).T, means


def most_probable(
    h: Tensor,
    weight: Tensor,
    count: int,
    keep: Sequence[int] | Tensor = (),
    tilts: Sequence[Tilting] = (),
    bans: Sequence[Tilting] = (),
    among: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The highest logits [.., K] of features h [.., H], and their tokens [.., K], in row chunks.

    count: K. keep, tilts, bans, temperature: as in `changed`. among: classes of the tokens [V], and of each row [R]: a
    row's tokens outside of its class have -inf, those in it at least FAINTEST, whatever is banned; where tilts leave
    its class no word, the row is as it was before them.
    """
    found = list[tuple[Tensor, Tensor]]()
    rows, weight, ids = h.reshape(-1, h.shape[-1]), weight.to(h.dtype), torch.as_tensor(keep, device=h.device).long()
    size = chunk_rows(h.device.type, max(len(weight), count * weight.shape[1]))
    for start, chunk in zip(range(0, max(1, len(rows)), size), torch.split(rows, size), strict=True):
        logits = F.linear(chunk, weight).float()
        allowed, tilted_logits = changed(logits, start, ids, tilts, bans, temperature)
        if among is not None:
            of_tokens, of_rows = among
            outside = of_tokens != of_rows[start : start + len(chunk), None]
            there = has_word(tilted_logits.masked_fill(outside, -torch.inf))
            tilted_logits = torch.where(there, tilted_logits, allowed).clamp(min=FAINTEST)
            tilted_logits = tilted_logits.masked_fill(outside, -torch.inf)
        top = tilted_logits.topk(count, -1)
        exact = logits_of(chunk, weight, top.indices)
        found.append((top.values + exact - logits.gather(-1, top.indices), top.indices))
    scores, tokens = (torch.cat(column).reshape(*h.shape[:-1], count) for column in zip(*found, strict=True))
    return scores, tokens


def logits_of(h: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Logits [R, K] of some tokens [R, K] of each row of h [R, H], in fp32: in bf16 one may be nats away from itself,
    where noise is low and logits are in the hundreds."""
    return (F.embedding(tokens, weight).float() * h[:, None].float()).sum(-1)


def changed(
    logits: Tensor,
    start: int,
    keep: Tensor,
    tilts: Sequence[Tilting] = (),
    bans: Sequence[Tilting] = (),
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Logits [R, V] of rows from number `start` on, after the bans alone, and after the tilts too.

    As in `expectation`, tokens that are kept apart [K] stay as probable, and words share the rest; tilts are told
    logits at the temperature.
    """
    if not (tilts or bans):
        return logits, logits
    words = logits.index_fill(1, keep, -torch.inf)

    def together(after: Tensor) -> Tensor:
        after = temperature * after
        lost = words.logsumexp(-1, keepdim=True) - after.logsumexp(-1, keepdim=True)
        return (after + torch.where(lost.isfinite(), lost, 0.0)).index_copy(1, keep, logits[:, keep])

    banned, after = tilted(words / temperature, start, bans, tilts)
    allowed = together(banned)
    return allowed, allowed if after is banned else together(after)


def best_path_reference(scores: Tensor, pairs: Tensor) -> Tensor:
    """Which of K candidates to take at each position, [B, L], so that their scores [B, L, K], and those of neighbours
    [B, L - 1, K, K], have the largest sum (Viterbi 1967)."""
    total, back = scores[:, 0], list[Tensor]()
    for pair, here in zip(pairs.unbind(1), scores[:, 1:].unbind(1), strict=True):
        reached = (total[..., None] + pair).max(1)
        total = reached.values + here
        back.append(reached.indices)
    path = [total.argmax(-1, keepdim=True)]
    for before in reversed(back):
        path.append(before.gather(-1, path[-1]))
    return torch.cat(path[::-1], -1)


def best_path(scores: Tensor, pairs: Tensor) -> Tensor:
    """`best_path_reference`: by one kernel on a GPU, and natively on a CPU where a step is."""
    from embdiff import native

    if has_kernels(scores.device.type):
        from embdiff import kernels

        return kernels.best_path(scores, pairs)
    if native.is_loaded() and scores.device.type == "cpu" and native.takes_candidates(scores.shape[-1]):
        return native.best_path(scores, pairs)
    return best_path_reference(scores, pairs)


def highest(logits: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """The highest of the logits [.., V] in each class [.., C], and the token that has it [.., C]."""
    groups = torch.split(classes.order, list(classes.sizes))
    found = [logits[..., group].max(-1) for group in groups]
    tokens = [group[best.indices] for group, best in zip(groups, found, strict=True)]
    return torch.stack([best.values for best in found], -1), torch.stack(tokens, -1)


def class_max(h: Tensor, weight: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """`highest` of the logits h weight^T, in row chunks."""
    rows = h.reshape(-1, h.shape[-1])
    size = chunk_rows(h.device.type, len(weight))
    found = [highest(chunk @ weight.T, classes) for chunk in torch.split(rows, size)]
    values, tokens = (torch.cat(column).reshape(*h.shape[:-1], -1) for column in zip(*found, strict=True))
    return values, tokens


def argmax_reference(h: Tensor, weight: Tensor) -> Tensor:
    """The most probable token of each position, [..]."""
    return (h @ weight.T).argmax(-1)


def argmax(h: Tensor, weight: Tensor) -> Tensor:
    """`argmax_reference`: by a kernel on a GPU, else in row chunks, by `max`, for `argmax` is slow in bf16 on a CPU."""
    if has_kernels(h.device.type):
        from embdiff import kernels

        return kernels.argmax(h, weight)
    rows = h.reshape(-1, h.shape[-1])
    weight = weight.to(h.dtype)
    chunks = torch.split(rows, chunk_rows(h.device.type, len(weight)))
    return torch.cat([F.linear(chunk, weight).max(-1).indices for chunk in chunks]).reshape(h.shape[:-1])


def cross_entropy_reference(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """-log softmax(h weight^T)[target] per position, [..], nats."""
    logits = (h @ weight.T).float()
    return logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]


def cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """`cross_entropy_reference` in row chunks.

    Where the logits would be many, each chunk's are recomputed in the backward pass instead of being kept.
    """
    from torch.utils.checkpoint import checkpoint

    weight = weight.to(h.dtype)

    def chunk_loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, weight).float(), labels, reduction="none")

    recompute = target.numel() * weight.shape[0] > 2**23 and torch.is_grad_enabled()
    size = 4 * chunk_rows(h.device.type, len(weight))
    chunks = zip(torch.split(h.reshape(-1, h.shape[-1]), size), torch.split(target.reshape(-1), size), strict=True)
    again = partial(checkpoint, chunk_loss, use_reentrant=False, preserve_rng_state=False)  # nothing is random
    losses = [again(*chunk) if recompute else chunk_loss(*chunk) for chunk in chunks]
    return torch.cat(losses).reshape(target.shape)


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [R, N], fp32, as whole numbers and the step [R, 1] that they count, 1/127 of the row's largest number
    ("vector-wise", Dettmers et al. 2022, arXiv:2208.07339, equation 4)."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x / step).round().to(torch.int8), step


def limited(vectors: Tensor, longest: float) -> Tensor:
    """Vectors [.., D], none longer than that."""
    shrink: Tensor = longest / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return vectors * shrink.clamp(max=1.0)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, H, L, d], k and v [B, H, S, d].

    mask: [B or 1, 1, L or 1, S] bool, True = attend.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_reference`; written out on a CPU, where torch's fused kernel runs bf16 at fp32 speed."""
    if q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > 2**20:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    out: Tensor = scores.softmax(-1) @ v
    return out


@lru_cache(maxsize=4)
def fast_dtype(device_type: str) -> torch.dtype:
    """bf16 where this device multiplies bf16 matrices faster than fp32 ones, else fp32.

    GPUs with compute capability 8 do. Among CPUs it depends on AVX512-BF16 or AMX: without them torch emulates bf16
    several times slower than fp32. No flag tells for every architecture, so a measurement of 20 ms does: the fastest of
    products that take turns, for on a busy machine many are slow.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device_type != "cpu":
        return torch.float32
    types = (torch.bfloat16, torch.float32)
    turns = [[_matmul_time(kind) for kind in types] for _ in range(12)]
    fast, exact = (min(times) for times in zip(*turns, strict=True))
    return torch.bfloat16 if fast < 0.8 * exact else torch.float32


def _matmul_time(dtype: torch.dtype) -> float:
    """Seconds for one [512, 256] x [256, 512] product."""
    a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start
