"""torch.compile where it works."""

import pytest
import torch

from embdiff import compilation
from embdiff.denoiser import Denoiser
from tests.conftest import lively


def test_compiling_changes_a_forward_pass_by_rounding_only():
    if not compilation._has_compiler():
        pytest.skip("no C++ compiler")
    model = lively(Denoiser(20, dim=8, width=16, depth=1, heads=2, condition_width=8))
    z, gamma = torch.randn(2, 5, 8), torch.randn(2)
    with torch.no_grad():
        fast = compilation.compiled(model, pytest.fail)(z, gamma, None, torch.zeros_like(z))
        assert torch.allclose(fast, model(z, gamma, None, torch.zeros_like(z)), atol=1e-4)


def test_a_pass_that_cannot_be_compiled_runs_as_it_is_after_one_remark(monkeypatch):
    class BackendError(Exception):
        __module__ = "torch._dynamo.exc"

    def broken(call, **options):
        def fail(*args):
            raise BackendError

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    notes: list[str] = []
    call = compilation.compiled(lambda x: x + 1, notes.append)
    assert [call(1), call(2)] == [2, 3]
    assert len(notes) == 1


def test_more_shapes_are_compiled_than_torch_would(monkeypatch):
    """Each at its first call; what has been compiled for too many goes on uncompiled, in silence."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[0].shape))
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: whole(call, backend=backend, **options))
    torch._dynamo.reset()
    call = compilation.compiled(lambda x: x + 1, pytest.fail)
    shapes = [(n,) for n in range(2, 22)]
    for shape in shapes:
        assert torch.equal(call(torch.zeros(shape)), torch.ones(shape))
    assert compiled == shapes
    torch._dynamo.reset()


def test_without_a_compiler_there_is_one_remark_and_training_goes_on(monkeypatch):
    monkeypatch.setattr(compilation, "_has_compiler", lambda: False)
    notes: list[str] = []
    assert not compilation.can_compile("cpu", notes.append)
    assert compilation.can_compile("cuda", pytest.fail)
    assert len(notes) == 1
    assert "compiler" in notes[0]
