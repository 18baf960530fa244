"""Kernels equal their references: interpreted on a CPU, compiled where there is a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import ops
from embdiff.randomness import DeviceNoise

kernels = pytest.importorskip("embdiff.kernels", reason="no triton on this platform")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(rows, vocab, features, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, features), (vocab, features), (vocab, dim)]
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


sizes = {
    "rows": st.sampled_from([1, 33, 70]),
    "vocab": st.sampled_from([5, 64, 700]),
    "features": st.sampled_from([8, 100]),
    "dim": st.sampled_from([4, 32]),
    "seed": st.integers(0, 99),
}


@given(**sizes, temperature=st.sampled_from([0.3, 1.0, 1.5]), keep=st.sampled_from([(), (2,), (0, 4)]))
def test_the_expectation_equals_its_reference(rows, vocab, features, dim, seed, temperature, keep):
    h, weight, table = problem(rows, vocab, features, dim, seed)
    fast = kernels.expectation(h, weight, table, temperature, torch.tensor(keep, dtype=torch.long, device=DEVICE))
    exact = ops.expectation_reference(h.double(), weight.double(), table.double(), temperature, keep)
    assert torch.allclose(fast.mean.double(), exact.mean, atol=1e-4)
    assert torch.allclose(fast.kept.double(), exact.kept, atol=1e-5)


def test_parts_without_a_word_count_for_nothing(monkeypatch):
    h, _, table = problem(3, 128, 8, 4, 0)
    weight = torch.full((128, 8), -1e30, device=DEVICE)  # exp of these is 0, whatever the maximum
    weight[:2] = torch.randn(2, 8).to(DEVICE)
    h = h.abs()
    monkeypatch.setattr(kernels, "splits", lambda *_: 2)
    fast = kernels.expectation(h, weight, table, 0.7, torch.tensor([0, 100], device=DEVICE))
    exact = ops.expectation_reference(h.double(), weight.double(), table.double(), 0.7, (0, 100))
    assert torch.allclose(fast.mean.double(), exact.mean, atol=1e-5)
    assert torch.allclose(fast.kept.double(), exact.kept, atol=1e-6)


@given(**sizes, parts=st.integers(1, 5))
def test_how_the_vocabulary_is_split_changes_nothing(rows, vocab, features, dim, seed, parts):
    h, weight, table = problem(rows, vocab, features, dim, seed)
    keep = torch.tensor([1, 3], device=DEVICE)
    whole = kernels.expectation(h, weight, table, 0.8, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "splits", lambda *_: parts)
        split = kernels.expectation(h, weight, table, 0.8, keep)
        chosen = kernels.argmax(h, weight)
    assert torch.allclose(whole.mean, split.mean, atol=1e-4)
    assert torch.allclose(whole.kept, split.kept, atol=1e-6)
    logits = h.double() @ weight.double().T
    assert torch.allclose(logits.gather(-1, chosen[:, None])[:, 0], logits.max(-1).values, atol=1e-4)


# On a GPU tiles for bf16 have no room for the fp32 numbers of this test.
DTYPES = [torch.float32] if DEVICE.type == "cuda" else [torch.bfloat16, torch.float32]
TILES = sorted({kernels.tile(rows, dtype) for rows in (1, 64, 10_000) for dtype in DTYPES})


@pytest.mark.parametrize("of", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 130])
def test_every_tile_gives_the_same(monkeypatch, of, rows):
    h, weight, table = problem(rows, 300, 100, 20, 0)
    monkeypatch.setattr(kernels, "tile", lambda *_: of)
    monkeypatch.setattr(kernels, "thin", lambda device: 4)
    fast = kernels.expectation(h, weight, table, 0.8, torch.tensor([0, 2], device=DEVICE))
    exact = ops.expectation_reference(h.double(), weight.double(), table.double(), 0.8, (0, 2))
    assert torch.allclose(fast.mean.double(), exact.mean, atol=1e-4)
    assert torch.allclose(fast.kept.double(), exact.kept, atol=1e-5)
    logits = h.double() @ weight.double().T
    chosen = kernels.argmax(h, weight)
    assert torch.allclose(logits.gather(-1, chosen[:, None])[:, 0], logits.max(-1).values, atol=1e-4)


@given(st.integers(1, 100_000), st.integers(1, 300_000), st.sampled_from([torch.bfloat16, torch.float32]))
def test_the_parts_are_the_whole_vocabulary_and_none_is_empty(rows, vocab, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_processors", lambda device: 132)
        of = kernels.tile(rows, dtype)
        parts = kernels.splits(rows, vocab, of, DEVICE)
    tiles = -(-vocab // of.words)
    words = -(-tiles // parts) * of.words  # of a part, as the kernel is told
    assert 1 <= parts <= 132
    assert (parts - 1) * words < vocab <= parts * words
    assert parts == 1 or words >= 2 * of.words


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 5, 32]), st.integers(0, 99), st.booleans())
def test_the_best_path_equals_its_reference(samples, length, candidates, seed, impossible):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, length, candidates, generator=generator).to(DEVICE)
    pairs = torch.randn(samples, length - 1, candidates, candidates, generator=generator).to(DEVICE)
    if impossible:
        scores[..., 1::2] = -torch.inf
    assert torch.equal(kernels.best_path(scores, pairs), ops.best_path_reference(scores, pairs))


@given(st.integers(0, 2**62), st.integers(0, 40))
def test_noise_is_a_samples_own_and_normal(seed, draw):
    seeds = torch.tensor([seed, seed ^ 1, 7], device=DEVICE)
    noise = kernels.normal(seeds, draw, 24, 20)
    assert torch.equal(kernels.normal(seeds[1:2], draw, 24, 20)[0], noise[1])
    assert torch.equal(kernels.normal(seeds, draw, 11, 20), kernels.normal(seeds, draw, 11, 20))
    flat = torch.cat([noise.flatten(1), kernels.normal(seeds, draw + 1, 24, 20).flatten(1)])
    n = flat.shape[1]
    assert (flat.mean(1).abs() < 5 / n**0.5).all()
    assert ((flat.var(1) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    products = (flat @ flat.T / n).fill_diagonal_(0)
    assert (products.abs() < 5 / n**0.5).all()


def test_noise_of_generators_is_drawn_from_their_state():
    def draws(seeds):
        source = DeviceNoise([torch.Generator().manual_seed(s) for s in seeds], (5, 4), DEVICE)
        return torch.stack([source(), source()], 1)

    assert torch.equal(draws([1, 2, 3])[1:], draws([2, 3]))
    assert not torch.equal(draws([1])[0, 0], draws([1])[0, 1])
