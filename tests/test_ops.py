"""Every op equals its reference, and float64 is the judge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import ops
from embdiff.guidance.base import Words
from embdiff.guidance.sampling import TopP, cut
from embdiff.optim import orthogonalise
from embdiff.space import EmbeddingSpace


def problem(rows: int, vocab: int, seed: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 24, generator=generator).to(dtype),
        torch.randn(vocab, 24, generator=generator).to(dtype),
        torch.randn(vocab, 8, generator=generator).to(dtype),
    )


sizes = {
    "rows": st.sampled_from([1, 3, 256, 300]),
    "vocab": st.sampled_from([5, 64, 700]),
    "seed": st.integers(0, 99),
}


@given(**sizes, temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]), keep=st.sampled_from([(), (0,), (0, 2)]))
def test_expectation_equals_its_reference(rows, vocab, seed, temperature, keep):
    h, weight, table = problem(rows, vocab, seed)
    fast = ops.expectation(h, weight, table, temperature, keep)
    exact = ops.expectation_reference(h.double(), weight.double(), table.double(), temperature, keep)
    assert torch.allclose(fast.mean.double(), exact.mean, atol=1e-4)
    assert torch.allclose(fast.kept.double(), exact.kept, atol=1e-5)


@given(
    vocab=st.sampled_from([257, 300, 641]), rows=st.sampled_from([1, 5, 128, 200]), seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 1.5]), keep=st.sampled_from([(), (0, 2), (150, 256)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_blocks_of_a_large_vocabulary_add_up(vocab, rows, seed, temperature, keep, dtype):
    h, weight, table = problem(rows, vocab, seed, dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "BLOCK", 64)  # up to eleven blocks of words, and several of rows
        fast = ops.expectation(h, weight, table, temperature, keep)
    by_rows = ops.expectation(h, weight, table, temperature, keep)  # with gradients, row by row
    close = 1e-4 if dtype is torch.float32 else 0.05
    assert torch.allclose(fast.mean, by_rows.mean, atol=close)
    assert torch.allclose(fast.kept, by_rows.kept, atol=close)


@given(**sizes)
def test_keeping_tokens_apart_changes_nothing_at_temperature_one(rows, vocab, seed):
    h, weight, table = problem(rows, vocab, seed, torch.float64)
    plain = ops.expectation_reference(h, weight, table).mean
    mean, kept, *_ = ops.expectation_reference(h, weight, table, 1.0, (1, 3))
    assert torch.allclose(kept @ table[[1, 3]] + (1 - kept.sum(-1, keepdim=True)) * mean, plain, atol=1e-9)


@given(**sizes, temperature=st.sampled_from([0.5, 1.0]), seen=st.floats(0, 1), spread=st.sampled_from([1.0, 100.0]))
def test_classes_alone_equal_their_reference_also_where_some_have_no_words(
    rows, vocab, seed, temperature, seen, spread
):
    h, weight, table = problem(rows, vocab, seed)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(vocab - 2, generator=generator)[: int(seen * (vocab - 2))] + 2
    cuts = torch.randint(len(words) + 1, (3,), generator=generator).sort().values
    sizes = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([len(words)])).tolist()
    given_ = (temperature, (0, 1), ops.Classes(words, sizes))
    fast = ops.expectation(spread * h, weight, table, *given_)
    exact = ops.expectation_reference(spread * h.double(), weight.double(), table.double(), *given_)
    # A word in no class is as one that is banned.
    banned = torch.full((vocab,), -torch.inf).index_fill(0, words, 0.0)
    given_ = (temperature, (0, 1), None, (), [lambda logits, start: logits + banned])
    apart = ops.expectation_reference(spread * h.double(), weight.double(), table.double(), *given_)
    for one, other in zip((*fast, *fast[:2]), (*exact, *apart[:2]), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-3)


@given(**sizes, temperature=st.sampled_from([0.5, 1.0]))
def test_classes_and_tilts_equal_their_reference_and_classes_add_up(rows, vocab, seed, temperature):
    h, weight, table = problem(rows, vocab, seed)
    words = torch.randperm(vocab - 2, generator=torch.Generator().manual_seed(seed)) + 2
    classes = ops.Classes(words, (1, vocab // 3, vocab - 3 - vocab // 3))
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    tilts = [lambda logits, start: logits + bias.to(logits)]
    fast = ops.expectation(h, weight, table, temperature, (0, 1), classes, tilts)
    exact = ops.expectation_reference(h.double(), weight.double(), table.double(), temperature, (0, 1), classes, tilts)
    for one, other in zip(fast, exact, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4)
    apart = ops.expectation(h, weight, table, temperature, (0, 1), None, tilts)
    assert torch.allclose(fast.mean, apart.mean, atol=1e-4)
    assert torch.equal(fast.kept, apart.kept)
    highest, tokens = ops.class_max(h, weight, classes)
    logits = h @ weight.T
    assert torch.allclose(logits.gather(-1, tokens), highest, atol=1e-4)
    assert torch.allclose(highest.max(-1).values, logits[:, 2:].max(-1).values, atol=1e-4)


TILTS = {
    "top-k": lambda words, start: cut(words, words.topk(1).values),
    "top-p": lambda words, start: TopP(0.6)._cut(Words(words, torch.arange(len(words)), None)),
    "min-p": lambda words, start: cut(words, words.amax(-1, keepdim=True) + torch.tensor(0.5).log()),
    "all": lambda words, start: torch.full_like(words, -torch.inf),  # what is no ban may not take all words
}


@given(
    vocab=st.sampled_from([5, 64]), seed=st.integers(0, 99), banned=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    names=st.lists(st.sampled_from(sorted(TILTS)), max_size=2),
)  # fmt: skip
def test_bans_hold_whatever_is_cut_and_what_is_cut_may_be_asked_for(vocab, seed, banned, names):
    rows = 3
    h, weight, _ = problem(rows, vocab, seed)
    table = torch.eye(vocab)  # means are probabilities
    out = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed)) < banned
    bans = [lambda words, start: words.masked_fill(out[start : start + len(words)], -torch.inf)]
    tilts = [TILTS[name] for name in names]
    classes = ops.Classes(torch.arange(2, vocab), (1, 1, vocab - 4))
    flat, split, uncut = (
        ops.expectation(h, weight, table, 1.0, (0, 1), of, changes, bans)
        for of, changes in ((None, tilts), (classes, tilts), (classes, []))
    )
    for of, found in ((None, flat), (classes, split)):
        exact = ops.expectation_reference(h.double(), weight.double(), table.double(), 1.0, (0, 1), of, tilts, bans)
        for one, other in zip(found, exact, strict=True):
            assert (one is None) is (other is None)
            assert one is None or torch.allclose(one.double(), other, atol=1e-4)
    free = ~out[:, 2:].all(1)
    assert torch.allclose(flat.mean.sum(1), free.float(), atol=1e-4)
    assert (flat.mean[out] == 0).all()
    assert torch.allclose(split.mean, flat.mean, atol=1e-4)
    assert torch.allclose(flat.kept[~free].sum(1), torch.ones(len(flat.kept[~free])))
    assert torch.equal(flat.kept[free], uncut.kept[free])
    # A class without words of its own takes what it has without the cut; one that is banned has nothing.
    gone = torch.stack([group.all(1) for group in out[:, 2:].split(classes.sizes, 1)], 1)
    emptied = torch.stack([group.sum(1) == 0 for group in flat.mean[:, 2:].split(classes.sizes, 1)], 1)
    assert (split.share[gone] == 0).all()
    assert (split.each[gone] == 0).all()
    assert (split.share[emptied & ~gone] > 0).all()
    assert (split.share[emptied] <= ops.FAINT).all()
    assert torch.allclose(split.each[emptied], uncut.each[emptied], atol=1e-5)


@given(**sizes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_argmax_equals_its_reference_up_to_ties(rows, vocab, seed, dtype):
    h, weight, _ = problem(rows, vocab, seed, dtype)
    logits = (h @ weight.T).float()
    chosen = logits.gather(-1, ops.argmax(h, weight)[:, None])[:, 0]
    assert torch.all(chosen >= logits.max(-1).values - (0.0 if dtype == torch.float32 else 0.1) - 1e-4)


@pytest.mark.parametrize("vocab", [50, 3000])  # the direct way and the chunked one
def test_cross_entropy_and_its_gradients_equal_the_reference(vocab):
    rows = 3000
    h, weight, _ = problem(rows, vocab, 0)
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    results = []
    for function, dtype in ((ops.cross_entropy, torch.float32), (ops.cross_entropy_reference, torch.float64)):
        x, w = (v.detach().to(dtype).clone().requires_grad_() for v in (h, weight))
        loss = function(x, w, target)
        loss.mean().backward()
        results.append((loss.double(), x.grad.double(), w.grad.double()))
    for fast, exact in zip(*results, strict=True):
        assert torch.allclose(fast, exact, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
def test_attention_equals_its_reference(length, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, length, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, keys, 8, generator=generator)
    mask = torch.rand(2, 1, length, keys, generator=generator) < 0.7
    mask[..., 0] = True
    for m in (None, mask):
        assert torch.allclose(ops.attention(q, k, v, m), ops.attention_reference(q, k, v, m), atol=1e-5)


@pytest.mark.parametrize(("slow", "fast"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_fast_dtype_is_the_one_that_multiplies_faster(monkeypatch, slow, fast):
    monkeypatch.setattr(ops, "_matmul_time", {slow: 5.0, fast: 1.0}.get)
    ops.fast_dtype.cache_clear()
    assert ops.fast_dtype("cpu") is fast
    ops.fast_dtype.cache_clear()


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 99))
def test_embeddings_lie_on_the_sphere_and_round_to_themselves(vocab, dim, seed):
    torch.manual_seed(seed)
    space = EmbeddingSpace(vocab, dim)
    ids = torch.arange(vocab)
    assert torch.allclose(space.table().norm(dim=-1), torch.tensor(dim**0.5), rtol=1e-5)
    assert torch.equal(space.embed(ids), space.table())
    if dim > 8:
        assert torch.equal(space.round(space.embed(ids)), ids)


@given(st.integers(1, 4), st.integers(2, 40), st.integers(2, 40), st.integers(0, 99))
def test_orthogonalised_matrices_have_singular_values_near_one(count, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(count, rows, columns, generator=generator)).float())
    assert values.max() < 1.3
    assert values.median() > 0.6


@given(rows=st.integers(1, 12), columns=st.integers(1, 40), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_short_way_of_long_matrices_is_the_plain_iteration(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, n, rank, generator=generator) for n in (rows, columns))
    x = left @ right.mT  # of low rank too: then most of G's eigenvalues are 0 to rounding
    exact = orthogonalise(x.double(), torch.float64)
    assert torch.allclose(orthogonalise(x).double(), exact, atol=5e-3)
