"""What runs in a step: compiled, by blocks of words, in 8 bits."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embdiff import compilation, forward, ops
from embdiff.denoiser import Denoiser
from embdiff.forward import Forward, Head, Int8Linear, in_int8
from tests.conftest import lively


@pytest.fixture
def counted(monkeypatch):
    """Compiling is counted, and what is compiled adds 0."""
    calls = []

    def compile_(call, note, **options):
        calls.append(options)
        return lambda *args: call(*args) + 0

    monkeypatch.setattr(forward, "compiled", compile_)
    monkeypatch.setattr(forward, "can_compile", lambda device_type, note: True)
    return calls


def small(dtype=torch.float32):
    return lively(Denoiser(20, dim=8, width=16, depth=1, heads=2, condition_width=8)).to(dtype)


def test_a_forward_pass_is_compiled_once_it_has_worked_enough(counted, monkeypatch):
    whole = Forward(small())
    work = 2 * sum(p.numel() for p in whole.denoiser.blocks.parameters()) * 2 * 5
    monkeypatch.setitem(forward.PAYS_AFTER, "cpu", 2.5 * work)
    for expected in (0, 0, 1, 1):
        whole(torch.randn(2, 5, 8), torch.randn(2))
        assert len(counted) == expected


@pytest.mark.parametrize(("wanted", "times"), [(True, 1), (False, 0), (None, 0)])
def test_a_forward_pass_is_compiled_where_wanted(counted, wanted, times):
    whole = Forward(small(), wanted)
    whole(torch.randn(2, 5, 8), torch.randn(2))
    assert len(counted) == times


def test_packed_weights_that_change_are_packed_anew():
    if not compilation._has_compiler():
        pytest.skip("no C++ compiler")
    whole, z, gamma = Forward(small(), True), torch.randn(2, 5, 8), torch.randn(2)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(whole(z, gamma), whole.denoiser(z, gamma), atol=1e-4)
            assert whole.call is not whole.denoiser
            whole.denoiser.final.weight.mul_(2)
            whole.renew()
            assert whole.call is whole.denoiser


def test_without_a_compiler_a_forward_pass_warns_once(monkeypatch):
    monkeypatch.setattr(compilation, "_has_compiler", lambda: False)
    whole = Forward(small(), True)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        whole(torch.randn(2, 5, 8), torch.randn(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(torch.randn(2, 5, 8), torch.randn(2))


def test_a_pipeline_that_compiles_writes_the_same_texts(pipe):
    if not compilation._has_compiler():
        pytest.skip("no C++ compiler")

    def drawn(count):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return pipe(num_samples=count, num_inference_steps=2, generator=generators).texts

    expected = drawn(3)
    pipe.compile = True
    assert drawn(3) == expected
    assert drawn(2) == expected[:2]
    assert pipe._forward.call is not pipe.denoiser


@torch.no_grad()
@given(
    words=st.integers(5, 40),
    block=st.integers(3, 50),
    temperature=st.floats(0.2, 3.0),
    kept=st.sampled_from([(), (0, 2)]),
    seed=st.integers(0, 2**16),
)
def test_the_head_is_the_posterior_mean(words, block, temperature, kept, seed):
    torch.manual_seed(seed)
    h, weight, table = 3 * torch.randn(6, 5), torch.randn(words, 5), torch.randn(words, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "WORDS", block)
        mean, probability = Head(weight, table, kept, int8=False)(h, torch.tensor(temperature))
    expected = ops.expectation_reference(h.double(), weight.double(), table.double(), temperature, kept)
    assert torch.allclose(mean, expected.mean.float(), atol=1e-4)
    assert torch.allclose(probability, expected.kept.float(), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_a_compiled_head_is_the_head(monkeypatch, int8):
    """By rounding, in rows of whatever number."""
    if not compilation._has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(forward, "ROWS", 4)
    monkeypatch.setattr(forward, "WORDS", 12)
    weight, table = torch.randn(2, 30, 8)
    denoiser = small()
    fast, slow = Forward(denoiser, True, int8), Forward(denoiser, False, True)
    fast.count(1, "cpu")
    for shape in ((2, 5), (1, 4), (7, 1)):
        h = torch.randn(*shape, 8)
        found = fast.posterior(h, weight, table, 0.7, (0, 2))
        plain = (
            slow.posterior(h, weight, table, 0.7, (0, 2)) if int8 else ops.expectation(h, weight, table, 0.7, (0, 2))
        )
        assert torch.allclose(found.mean, plain.mean, atol=1e-4)
        assert torch.allclose(found.kept, plain.kept, atol=1e-5)


def test_only_a_head_that_gains_is_taken():
    h, weight, table = torch.randn(2, 8), *torch.randn(2, 30, 8)
    with torch.no_grad():
        assert Forward(small(), False).posterior(h, weight, table, 1.0, ()) is None
        assert Forward(small(), False, int8=True).posterior(h, weight, table, 1.0, ()) is not None
    assert Forward(small(), False, int8=True).posterior(h, weight, table, 1.0, ()) is None  # it has no gradients


@torch.no_grad()
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.floats(-12, 12), st.integers(0, 2**16))
def test_8_bits_are_off_by_half_a_step_of_each_factor_at_most(rows, inner, outer, log_size, seed):
    torch.manual_seed(seed)
    x, weight = (torch.randn(n, inner, dtype=torch.double) * 2.0**log_size for n in (rows, outer))
    half_x, half_w = (t.abs().amax(1, keepdim=True) / 254 * 1.0001 for t in (x, weight))
    bound = x.abs().sum(1, keepdim=True) * half_w.T + half_x * weight.abs().sum(1) + inner * half_x * half_w.T
    found = Int8Linear(weight)(x.float()[:, None])[:, 0].double()
    assert ((found - x @ weight.T).abs() <= bound).all()


@torch.no_grad()
def test_whole_numbers_of_8_bits_are_multiplied_exactly():
    x, weight = torch.randint(-127, 128, (2, 20, 300)).float()
    x[:, 0] = weight[:, 0] = 127.0
    assert torch.equal(Int8Linear(weight / 128)(x) * 128, x @ weight.T)


@torch.no_grad()
def test_a_denoiser_in_8_bits_shares_all_else():
    model = small()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    z, gamma = torch.randn(4, 5, 8), torch.randn(4)
    exact, rounded = model(z, gamma), in_int8(model)(z, gamma)
    assert 0 < (rounded - exact).std() < 0.03 * exact.std()
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in in_int8(model).parameters())


def test_texts_in_8_bits_do_not_depend_on_their_batch_and_follow_the_weights(pipe):
    def drawn(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(num_samples=len(seeds), num_inference_steps=3, generator=generators, output_type="seq").sequences

    exact = drawn(*range(8))
    pipe.int8 = True
    together = drawn(*range(8))
    assert (together == exact).float().mean() > 0.9
    for seed in range(3):
        assert torch.equal(drawn(seed)[0], together[seed])
    with torch.no_grad():
        pipe.denoiser.head.weight.neg_()
        pipe.denoiser.blocks[0].mlp_in.weight.neg_()
    assert not torch.equal(drawn(*range(8)), together)
    assert pipe._forward.versions == compilation.versions(pipe.denoiser)
