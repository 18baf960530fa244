"""How a step's numbers get to the device."""

import pytest
import torch
from torch import Tensor

from embdiff.batches import Batch, Prompts
from embdiff.objectives import sent


@pytest.fixture
def batch():
    ids = torch.arange(12).view(4, 3)
    prompts = Prompts.aligned(ids[:2], torch.tensor([1, 3]))
    return Batch(ids, known=ids > 5, prompts=prompts, prompted=None)


def tensors(batch):
    return [batch.ids, batch.known, batch.prompts.ids, batch.prompts.present, batch.prompts.positions]


def test_a_batch_moves_whole_and_unchanged(batch):
    same = sent(batch, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(batch), strict=True))
    moved = sent(batch, torch.device("meta"))
    assert moved.prompted is None
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(batch)]


def test_a_gpu_copies_from_pinned_memory_while_the_host_goes_on(batch, monkeypatch):
    copies, pinned = [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: copies.append((device.type, non_blocking)))
    sent(batch, torch.device("cuda"))
    assert len(pinned) == len(tensors(batch))
    assert copies == [("cuda", True)] * len(pinned)
