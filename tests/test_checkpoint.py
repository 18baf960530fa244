"""Checkpoints: whole or not at all, readable, and no other tensors than expected."""

import os
from pathlib import Path

import pytest
import torch

from embdiff import checkpoint
from embdiff.errors import UserError


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device")])
def test_a_folder_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, error):
    def fail(folder):
        (folder / "half").write_text("x")
        raise error

    checkpoint.save_folder(tmp_path / "kept", lambda folder: (folder / "a").write_text("x"))
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_folder(tmp_path / "kept", fail)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["kept", "kept/a"]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def interrupt(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_folder(tmp_path / "run", interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch, when):
    """Whether it comes before or after the old folder has made room."""
    target, calls = tmp_path / "kept", []
    checkpoint.save_folder(target, lambda folder: (folder / "a").write_text("old"))
    rename = Path.rename

    def interrupted(path, other):
        calls.append(path)
        if len(calls) == (1 if when == "before" else 2):
            raise KeyboardInterrupt
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_folder(target, lambda folder: (folder / "a").write_text("new"))
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["kept", "kept/a"]
    assert (target / "a").read_text() == "old"


def test_a_stray_folder_beside_checkpoints_is_none(tmp_path):
    for name in ("step-00000001", "step-old", "step-00000002 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]


def test_saved_files_have_the_mode_that_the_umask_gives(tmp_path):
    def private(folder):
        (folder / "below").mkdir()
        (folder / "below" / "weights").touch(mode=0o600)

    before = os.umask(0o027)
    try:
        checkpoint.save_folder(tmp_path / "run", private)
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "below" / "weights").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "run" / "below").stat().st_mode & 0o777 == 0o750


def test_pruning_takes_old_checkpoints_and_unfinished_ones(tmp_path):
    for name in ("step-00000001", "step-00000002", "step-00000003", ".step-00000004.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_tensors_must_have_the_names_shapes_and_types_expected(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(())}
    checkpoint.write_tensors(path, tensors)
    assert checkpoint.read_tensors(path, tensors).keys() == tensors.keys()
    for expected in (
        {"a": torch.ones(2, 3)},
        tensors | {"c": torch.ones(1)},
        tensors | {"a": torch.ones(3, 2)},
        tensors | {"b": torch.zeros((), dtype=torch.int64)},
    ):
        with pytest.raises(UserError, match=r"x\.safetensors is damaged or of another run \(1 tensors"):
            checkpoint.read_tensors(path, expected)
