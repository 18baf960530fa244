"""torch.compile where it works, and one remark where it doesn't."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch


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
        note("no C++ compiler for torch.compile: training without it, about 1.2 times slower")
        return False
    return True


def compiled(call: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
    """A pass of the denoiser under torch.compile; where that fails, one warning and the pass as it is."""
    state: dict[str, Callable[..., Any]] = {"call": torch.compile(call, dynamic=False)}

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return state["call"](*args, **kwargs)
        except Exception as error:
            if state["call"] is call or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            note(f"torch.compile failed ({type(error).__name__}): training without it")
            state["call"] = call
            return call(*args, **kwargs)

    return attempt


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name)
