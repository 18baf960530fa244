"""A text classifier that knows nothing of embeddings or noise: the independent scorer of controls.

Logistic regression on hashed n-grams of words and of characters. It reads finished texts, and must be trained on other
data than what guides: a guide that is its own judge finds what it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embdiff.errors import UserError

BUCKETS = 2**18
EPOCHS, BATCH, RATE = 3, 64, 0.3


class Scorer:
    """p(label) of texts, as if all labels were equally frequent: the data's own shares say nothing of what is scored.

    Args:
        texts, labels: what it learns from, at least two labels.
        seed: of the order of texts.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str], seed: int = 0) -> None:
        self.labels = sorted(set(labels))
        if len(texts) != len(labels) or len(self.labels) < 2:
            raise UserError(f"{len(texts)} texts with {len(self.labels)} different labels: a scorer needs two or more")
        if len(self.labels) > max(2, len(texts) // 2):
            raise UserError(
                f"the scorer's data has {len(self.labels)} labels for {len(texts)} texts: "
                "is the label column the right one?"
            )
        targets = torch.tensor([self.number(label) for label in labels])
        balance = len(texts) / (len(self.labels) * targets.bincount())
        features = [grams(text) for text in texts]
        self.weight = torch.nn.EmbeddingBag(BUCKETS, len(self.labels), mode="sum")
        torch.nn.init.zeros_(self.weight.weight)
        optimizer = torch.optim.Adagrad(self.weight.parameters(), lr=RATE)
        for epoch in range(EPOCHS):
            order = np.random.default_rng((seed, epoch)).permutation(len(texts))
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                logits = self._logits([features[i] for i in rows])
                loss = F.cross_entropy(logits, targets[rows], weight=balance, reduction="none").mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()

    def __call__(self, texts: Sequence[str], label: str) -> NDArray[np.float64]:
        """p(label) of each text, [N]."""
        number = self.number(label)
        with torch.no_grad():
            p = self._logits([grams(text) for text in texts]).softmax(-1)
        return p[:, number].double().numpy()

    def number(self, label: str) -> int:
        """Where the label stands among all. Raises UserError for an unknown one."""
        if label not in self.labels:
            some = ", ".join(self.labels[:20]) + (" .." if len(self.labels) > 20 else "")
            raise UserError(f"the scorer has no label {label!r}: choose one of {some}")
        return self.labels.index(label)

    def _logits(self, features: Sequence[list[int]]) -> Tensor:
        sizes = [0, *(len(f) for f in features[:-1])]
        # By the root of their number, as noise grows: long texts are surer than short ones, but not in proportion.
        scale = torch.tensor([[len(f) ** -0.5] for f in features])
        together = torch.tensor([i for f in features for i in f])
        logits: Tensor = self.weight(together, torch.tensor(sizes).cumsum(0)) * scale
        return logits


def grams(text: str) -> list[int]:
    """The buckets of a text's words, pairs of words, and runs of 2 to 4 characters within words; never none."""
    words = text.casefold().split()
    found = [f"w {word}" for word in words] + [f"p {a} {b}" for a, b in pairwise(words)]
    for word in words:
        marked = f"<{word}>"
        found += [f"c {marked[i : i + n]}" for n in (2, 3, 4) for i in range(len(marked) - n + 1)]
    return [crc32(gram.encode()) % BUCKETS for gram in found] or [0]
