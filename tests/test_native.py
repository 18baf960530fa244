"""The native step is the reference: by rounding of bf16, for every shape, and the same for a text in every batch."""

import ctypes
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from embdiff import native, ops
from embdiff.denoiser import Context, Denoiser
from embdiff.forward import Forward, Int8Linear, in_int8
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.schedulers import RenoiseScheduler
from tests.conftest import lively
from tests.test_pipeline import seeds

needs = pytest.mark.skipif(
    not native.has_instructions() or native.compiler() is None,
    reason="a CPU with AVX512-VNNI and AVX512-BF16 and without AMX is needed, and a C++ compiler",
)


def model(dim=32, width=64, heads=2, depth=2, words=300, **options):
    return lively(Denoiser(words, dim, width, depth, heads, condition_width=16, **options)).to(torch.bfloat16)


def in_double(denoiser):
    """The same weights without any rounding of what is computed by them."""
    exact = Denoiser(**{name: value for name, value in denoiser.config.items() if name[0] != "_"})
    exact.load_state_dict(denoiser.state_dict())
    return exact.double().eval()


def error(found, exact):
    """The standard deviation of what differs, in that of what should be."""
    return float((found.double() - exact).std() / exact.std())


@needs
@torch.no_grad()
@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 7, 13, 64, 70])),
    size=st.sampled_from([(16, 64, 2), (32, 64, 1), (48, 96, 3), (80, 192, 2)]),
    context=st.integers(0, 5),
    conditioned=st.booleans(),
    alike=st.booleans(),
    some=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_pass_is_the_denoisers(shape, size, context, conditioned, alike, some, seed):
    (B, L), (dim, width, heads) = shape, size
    denoiser = model(dim, width, heads, max_prompt_length=8)
    torch.manual_seed(seed)
    z, last = torch.randn(2, B, L, dim)
    gamma = torch.randn(1).expand(B) if alike else torch.randn(B)
    seen = None
    if context:
        keys, values = torch.randn(2, 2, B, heads, context, width // heads).bfloat16()
        seen = Context(keys, values, torch.rand(B, context) < 0.6)
    last = last if conditioned else None
    rows = None
    if some and alike:
        chosen = (torch.rand(B, L) < 0.5).index_fill(1, torch.tensor(0), True)
        rows, gamma = chosen.flatten().nonzero()[:, 0], gamma[:1]
    exact_context = None if seen is None else Context(seen.keys.double(), seen.values.double(), seen.mask)
    arguments = (z.double(), gamma.double(), exact_context, None if last is None else last.double())
    exact = in_double(denoiser)(*arguments, rows=rows)
    usual = denoiser(z, gamma, seen, last, rows=rows)
    found = native.Pass(denoiser, int8=False)(z, gamma, seen, last, rows=rows)
    assert found.shape == usual.shape
    assert error(found, exact) < max(1.2 * error(usual, exact), 5e-3)
    usual, found = (f(z, gamma, seen, last, rows=rows) for f in (in_int8(denoiser), native.Pass(denoiser, int8=True)))
    assert error(found, exact) < max(1.5 * error(usual, exact), 0.03)


@needs
@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_text_does_not_depend_on_others(int8, threads, monkeypatch):
    whole = native.Pass(denoiser := model(), int8)
    z, last = torch.randn(2, 5, 9, 32)
    gamma, before = torch.randn(5), torch.get_num_threads()
    keys, values = torch.randn(2, 2, 5, 2, 3, 32).bfloat16()
    context = Context(keys, values, torch.rand(5, 3) < 0.5)
    try:
        torch.set_num_threads(threads)
        together = whole(z, gamma, context, last)
        for b in range(5):
            one = slice(b, b + 1)
            assert torch.equal(whole(z[one], gamma[one], context.take(one), last[one]), together[one])
    finally:
        torch.set_num_threads(before)
    assert denoiser.dtype is torch.bfloat16


@needs
@torch.no_grad()
def test_many_texts_go_by_in_parts():
    """More rows than go through the layers at once."""
    whole = native.Pass(model(depth=1), False)
    z, gamma = torch.randn(70, 33, 32), torch.randn(70)
    together = whole(z, gamma)
    assert torch.equal(whole(z[61:69], gamma[61:69]), together[61:69])


@needs
@torch.no_grad()
@given(
    words=st.sampled_from([5, 64, 255, 256, 300, 1000]),
    dim=st.sampled_from([16, 32, 64, 80]),
    rows=st.integers(1, 20),
    temperature=st.sampled_from([1.0, 0.3, 0.76, 2.0]),
    kept=st.sampled_from([(), (0, 2), (4,)]),
    sharp=st.sampled_from([0.1, 1.0, 30.0]),
    int8=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_head_is_the_posterior_mean(words, dim, rows, temperature, kept, sharp, int8, seed):
    torch.manual_seed(seed)
    weight, table, h = torch.randn(words, 48).bfloat16(), torch.randn(words, dim).bfloat16(), torch.randn(rows, 48)
    h = (sharp * h).bfloat16()
    assume(not int8 or sharp < 30)  # there a number that is rounded up in place of down moves logits by a nat
    text = torch.randint(3, (rows,))
    mean, found, mass = native.Head(weight, table, int8).posterior(h, temperature, kept, text, 3)
    exact = h.double() @ weight.double().T
    logits = Int8Linear(weight)(h.float()).double() if int8 else exact.clone()
    logits[:, list(kept)] = -torch.inf
    probabilities = (logits / temperature).softmax(-1)
    expected = probabilities @ table.double()
    sums = torch.zeros(3, words, dtype=torch.double).index_add(0, text, probabilities)
    assert torch.allclose(mass.double(), sums, atol=0.05 if int8 else 1e-3)
    assert torch.allclose(
        mean.double(), expected, atol=0.05 if int8 else 0.02, rtol=0.01
    )  # probabilities are rounded to bf16
    logits[:, list(kept)] = exact[:, list(kept)]
    assert torch.allclose(found.double(), logits.softmax(-1)[:, list(kept)], atol=0.01 if int8 else 1e-4)


@needs
@torch.no_grad()
@given(
    words=st.sampled_from([32, 300, 2000]),
    rows=st.integers(1, 14),
    order=st.sampled_from(["any", "rising", "falling", "equal"]),
    int8=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_candidates_have_the_largest_logits(words, rows, order, int8, seed):
    torch.manual_seed(seed)
    weight = torch.randn(words, 16)
    if order != "any":  # the first feature alone decides
        weight = torch.zeros(words, 16)
        weight[:, 0] = {"rising": torch.arange(words), "falling": -torch.arange(words), "equal": torch.ones(words)}[
            order
        ]
    weight, h = weight.bfloat16(), torch.rand(rows, 16).bfloat16()
    scores, tokens = native.Head(weight, weight, int8).most_probable(h, 32)
    exact = h.double() @ weight.double().T
    assert torch.allclose(scores.double(), exact.gather(1, tokens), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 32 for row in tokens.tolist())
    off = 0.02 * float(exact.abs().max()) if int8 else 1e-4
    best = exact.topk(32).values
    assert (scores.sort(descending=True).values.double() >= best - 2 * off).all()


@needs
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.sampled_from([16, 32, 48])),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_best_path_is_the_references(shape, ties, seed):
    torch.manual_seed(seed)
    B, L, K = shape
    scores, pairs = torch.randn(B, L, K), torch.randn(B, L - 1, K, K)
    if ties:
        scores, pairs = scores.round(), pairs.round()
    found, expected = native.best_path(scores, pairs), ops.best_path_reference(scores, pairs)
    if not ties:
        assert torch.equal(found, expected)

    def value(path):
        own = scores.gather(2, path[..., None]).sum((1, 2))
        steps = zip(pairs.unbind(1), path[:, :-1].unbind(1), path[:, 1:].unbind(1), strict=True)
        return own + sum(pair[torch.arange(B), a, b] for pair, a, b in steps)

    assert torch.allclose(value(found), value(expected), atol=1e-4)


@pytest.fixture
def rounded(tokenizer):
    """A pipeline in bf16 whose shapes suit, with transitions."""
    denoiser = model(words=len(tokenizer), max_length=12, max_prompt_length=8, transition_rank=4)
    denoiser.transitions.candidates = 16
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@needs
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"skip_padding": False, "temperature": 1.0}])
def test_a_pipeline_writes_the_same_texts_natively(rounded, int8, options):
    prompts = ["the cat .", "a dog", "a red house", "the tree", "small dog ."]

    def drawn(count=5):
        return rounded(prompts[:count], num_inference_steps=4, generator=seeds(*range(count)), **options).sequences

    rounded.int8, rounded.compile = int8, False
    expected = drawn()
    assert rounded._forward.native is None
    rounded.compile = None
    found = drawn()
    assert rounded._forward.native is not None
    assert (found == expected).float().mean() > 0.8
    assert torch.equal(drawn(2), found[:2])


@needs
def test_weights_that_change_are_packed_anew(rounded):
    z, gamma = torch.randn(2, 5, 32), torch.zeros(2)
    whole = Forward(rounded.denoiser)
    with torch.no_grad():
        for _ in range(2):
            assert error(whole(z, gamma), rounded.denoiser(z, gamma).double()) < 0.03
            rounded.denoiser.blocks[0].mlp_in.weight.mul_(-1)
            whole.renew()


@needs
def test_without_a_compiler_one_warning_and_torchs_own_operators(rounded, monkeypatch, tmp_path):
    monkeypatch.setenv("EMBDIFF_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.library.cache_clear()
    rounded.compile = True
    with pytest.warns(UserWarning, match="no native step .no C\\+\\+ compiler") as caught:
        rounded(num_inference_steps=2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded(num_inference_steps=2)
    assert not native.is_loaded()


@needs
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBDIFF_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(native, "FLAGS", ["-nonsense"])
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="no native step .*nonsense"):
        whole = Forward(model())
    assert whole.native is None
    with warnings.catch_warnings(), torch.no_grad():  # nor is it tried again where weights change
        warnings.simplefilter("error")
        whole.denoiser.final.weight.mul_(2)
        whole.renew()


@needs
def test_what_is_built_is_kept_whole_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBDIFF_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    native.library()
    (built,) = (tmp_path / "cache").iterdir()
    ctypes.CDLL(str(built))
    monkeypatch.setattr(native, "compiler", lambda: pytest.fail("built again"))
    (tmp_path / "file").touch()
    monkeypatch.undo()
    monkeypatch.setenv("EMBDIFF_CACHE", str(tmp_path / "file" / "cache"))  # can't be written
    native.library.cache_clear()
    native.library()


def test_what_does_not_suit_is_left_to_torch():
    assert not native.suits(model().float())
    assert not native.suits(model(dim=24))
    assert not native.suits(model(width=64, heads=4))
    assert not native.suits(torch.nn.Linear(2, 2))
    with torch.inference_mode():
        assert not native.suits(model())  # changed weights could not be told


@needs
def test_no_memory_is_said():
    with pytest.raises(MemoryError):
        native.call(lambda: 1)
    native.call(lambda: 0)
