"""Checkpoints: safetensors and JSON, written whole or not at all.

A checkpoint is a folder `step-00001234`. It is written under another name, flushed to the disk and renamed, so a run
that is killed, or a disk that is full, leaves the last good one as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embdiff.errors import UserError

Tensors = dict[str, Tensor]


def save_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, then puts it at `target` in one rename; raises UserError if it can't."""
    from safetensors import SafetensorError

    fresh = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        for path in [*fresh.rglob("*"), fresh]:
            flush(path)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot save {target}: {reason}; what was saved before is intact, make room and resume"
        ) from error


def flush(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; a full disk raises OSError."""
    from safetensors.torch import save

    path.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def read_tensors(path: Path) -> Tensors:
    """Reads a safetensors file; a missing or damaged one raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): delete its folder to resume from an earlier one"
        ) from error


def write_state(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes one checkpoint: a safetensors file for each group of tensors, and state.json."""
    for name, group in tensors.items():
        write_tensors(folder / f"{name}.safetensors", group)
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no embdiff checkpoint ({error}): delete it to resume from an earlier one"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for folder in checkpoints(run)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> Tensors:
    """The optimiser's state as `parameter/key` tensors."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for p, name in names.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Tensors) -> None:
    """Puts back what `optimizer_tensors` gave."""
    by_name = {name: p for p, name in names.items()}
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for label, tensor in tensors.items():
        name, key = label.rsplit("/", 1)
        parameter = by_name[name]
        # AdamW counts its steps on the host, unless it is fused.
        on_host = key == "step" and parameter not in fused
        optimizer.state[parameter][key] = tensor if on_host else tensor.to(parameter.device)
