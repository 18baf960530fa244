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
from embdiff.optim import Muon

Tensors = dict[str, Tensor]
CLASSIFIERS = "classifiers"  # in a model's folder: of what guides it, a folder each


def classifier_folder(model: Path, name: str) -> Path:
    """Where a model keeps its classifier of this name."""
    return model / CLASSIFIERS / name


def save_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, then puts it in place of `target`; raises UserError if it can't."""
    fresh, old = (target.with_name(f".{target.name}.{state}") for state in ("tmp", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        readable = fresh.stat().st_mode & 0o666  # what the umask allows; some libraries write for the owner alone
        for path in [*fresh.rglob("*"), fresh]:
            if path.is_file():
                path.chmod(readable)
            flush(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        fresh.rename(target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        # OSError, or whatever the library that writes makes of a full disk; tokenizers raises a bare Exception.
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


def read_tensors(path: Path, expected: Mapping[str, Tensor] | None = None) -> Tensors:
    """Reads a safetensors file. One that is missing or damaged, or whose tensors have not the names, shapes and types
    of the expected ones, raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: Tensors = dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): delete its folder to resume from an earlier one"
        ) from error
    if expected is not None:
        kinds, wanted = ({name: (t.shape, t.dtype) for name, t in x.items()} for x in (tensors, expected))
        odd = sorted(name for name in kinds.keys() | wanted.keys() if kinds.get(name) != wanted.get(name))
        if odd:
            raise UserError(
                f"{path} is damaged or of another run ({len(odd)} tensors are missing, unknown or of another shape, "
                f"{odd[0]!r} for one): delete its folder to resume from an earlier one"
            )
    return tensors


def write_state(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes one checkpoint: a safetensors file for each group of tensors, and state.json."""
    for name, group in tensors.items():
        write_tensors(folder / f"{name}.safetensors", group)
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError(f"its state.json holds {type(state).__name__}")
        return state
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no embdiff checkpoint ({error}): delete it to resume from an earlier one"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal())


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what was left unfinished when a run was killed."""
    for folder in [*checkpoints(run)[:-keep], *(run / "checkpoints").glob(".step-*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> Tensors:
    """The optimiser's state as `parameter/key` tensors."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for p, name in names.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def expected_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], idle: list[str]) -> Tensors:
    """Tensors like those that `optimizer_tensors` gives; none for the idle parameters, which no step has used yet."""
    keys = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if names[p] not in idle]
    return {f"{names[p]}/{key}": torch.zeros(()) if key == "step" else p for p in parameters for key in keys}


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
