"""Importing stays light, and the version is said."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_embdiff_loads_nothing_heavy():
    loaded = python("import sys, embdiff; print(*sys.modules)").split()
    assert not {"torch", "numpy", "diffusers", "transformers", "scipy", "matplotlib", "accelerate"} & set(loaded)


def test_the_command_line_loads_torch_only_to_work():
    loaded = python("import sys, embdiff.cli; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "scipy", "matplotlib"} & set(loaded)


def test_every_public_name_is_there():
    import embdiff

    for name in embdiff.__all__:
        assert getattr(embdiff, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = embdiff.nothing_such
