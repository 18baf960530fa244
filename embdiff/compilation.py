"""torch.compile where it works, and one remark where it doesn't."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Says the first thing that it is told, and nothing after."""
    said: list[str] = []

    def note(text: str) -> None:
        if not said:
            said.append(text)
            say(text)

    return note


def can_compile(device_type: str, note: Callable[[str], None]) -> bool:
    """Whether torch.compile has what it needs; says so once where it hasn't."""
    if device_type == "cpu" and not _has_compiler():
        note("no C++ compiler for torch.compile: going on without it, 1.2 to 1.7 times slower")
        return False
    return True


def compiled(
    call: Callable[..., Any], note: Callable[[str], None], dynamic: bool | None = False, pack: bool = False
) -> Callable[..., Any]:
    """A pass of the denoiser under torch.compile; where that fails, one warning and the pass as it is.

    dynamic: as torch.compile has it; False = each shape is compiled apart. pack: whether weights are taken as constants
    and packed for the CPU's matrix units.
    """
    state: dict[str, Callable[..., Any]] = {"call": torch.compile(call, dynamic=dynamic)}

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings(), many_shapes(), packing() if pack else nullcontext():
                warnings.simplefilter("ignore")
                return state["call"](*args, **kwargs)
        except Exception as error:
            if state["call"] is call or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            note(f"torch.compile failed ({type(error).__name__}): going on without it")
            state["call"] = call
            return call(*args, **kwargs)

    return attempt


def versions(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Tells whether weights were changed, or moved, or replaced. Those made in inference mode can't be told about."""
    tensors = chain(module.parameters(), module.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


MOST_SHAPES = 64


def many_shapes() -> Any:
    """Where a pass may be compiled for so many shapes: beyond torch's own 8 it would go on uncompiled, in silence."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch({name: MOST_SHAPES})


def packing() -> Any:
    """Where weights are constants; no option of torch.compile, for tracing looks at it before there are options."""
    from torch._inductor import config

    return config.patch(freezing=True)


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _has_compiler() -> bool:
    return compiler() is not None
