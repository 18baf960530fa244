"""Folders of the user."""

from __future__ import annotations

import os
from pathlib import Path

from embdiff.errors import UserError


def local_path(name: str) -> Path:
    """The path of a name, with the home folder for "~"."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"no home folder is known for {name!r}; write the path without '~'") from None


def cache_dir() -> Path:
    """Where embdiff keeps what it can build again: $EMBDIFF_CACHE, else $XDG_CACHE_HOME/embdiff, else
    ~/.cache/embdiff. The folder need not exist yet."""
    if own := os.environ.get("EMBDIFF_CACHE"):
        return local_path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return local_path(base) / "embdiff"
