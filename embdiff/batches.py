"""From text to batches: token arrays, context masks and a sampler whose order depends only on seed and step.

An example is laid out as [prompt | text]: P prompt positions (left-aligned, padding absent) and L text positions
(end-of-text, then padding: both are content that the model predicts). A prompt of n tokens has positions -n .. -1, so
the text always starts at position 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """ids, positions: [B, S] int64; known, present: [B, S] bool or None (see `Denoiser.forward`); S = P + L.

    prompt: P, the number of leading positions that are context in every example.
    """

    ids: Tensor
    positions: Tensor
    known: Tensor | None = None
    present: Tensor | None = None
    prompt: int = 0

    def target(self) -> Tensor:
        """[B, L] bool: the text positions that are generated, and so carry the loss."""
        text = self.ids[:, self.prompt :]
        return torch.ones_like(text, dtype=torch.bool) if self.known is None else ~self.known[:, self.prompt :]

    def take(self, rows: slice) -> Batch:
        """Some of the examples."""
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        known = None if self.known is None else change(self.known)
        present = None if self.present is None else change(self.present)
        return Batch(change(self.ids), change(self.positions), known, present, self.prompt)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a set of examples. text: [N, L]; text_length: [N], with the end of text;
    prompt: [N, P]; prompt_length: [N]."""

    text: Ints
    text_length: Ints
    prompt: Ints
    prompt_length: Ints
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.text)

    @property
    def tokens(self) -> int:
        """Text tokens, the end of text included, padding not."""
        return int(self.text_length.sum())

    def batch(self, index: Sequence[int] | NDArray[Any], length: int | None = None) -> Batch:
        """The examples at `index` with the first `length` (default L) text positions as target."""
        index = np.asarray(index)
        text = torch.from_numpy(self.text[index, :length]).long()
        L, P = text.shape[1], self.prompt.shape[1]
        positions = torch.arange(L).expand(len(index), L)
        if P == 0:
            return Batch(text, positions)
        n = torch.from_numpy(self.prompt_length[index])[:, None]
        column = torch.arange(P)[None]
        return Batch(
            ids=torch.cat([torch.from_numpy(self.prompt[index]).long(), text], 1),
            positions=torch.cat([column - n, positions], 1),
            known=torch.cat([torch.ones(len(index), P, dtype=torch.bool), torch.zeros_like(text, dtype=torch.bool)], 1),
            present=torch.cat([column < n, torch.ones_like(text, dtype=torch.bool)], 1),
            prompt=P,
        )


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int = 0,
    on_long: str = "truncate",
) -> Encoded:
    """Tokenises examples. A text longer than max_length - 1 tokens is truncated or, with on_long = "drop", left out.

    A truncated text has no end-of-text token. Prompts keep their last `max_prompt_length` tokens.
    """
    if on_long not in ("truncate", "drop"):
        raise UserError(f"on_long {on_long!r} is unknown: choose truncate or drop")
    if max_length < 2:
        raise UserError(f"max_length {max_length} is too short: give at least 2 positions")
    texts = _tokenize(tokenizer, [e.text for e in examples])
    prompts = _tokenize(tokenizer, [e.prompt or "" for e in examples]) if max_prompt_length else [[]] * len(examples)
    long = [len(t) >= max_length for t in texts]
    kept = [i for i in range(len(texts)) if on_long == "truncate" or not long[i]]
    text = np.full((len(kept), max_length), tokenizer.pad_token_id, dtype=np.int32)
    prompt = np.full((len(kept), max_prompt_length), tokenizer.pad_token_id, dtype=np.int32)
    text_length, prompt_length = np.zeros(len(kept), dtype=np.int32), np.zeros(len(kept), dtype=np.int32)
    for row, i in enumerate(kept):
        ids = [*texts[i], tokenizer.eos_token_id][:max_length]
        text[row, : len(ids)], text_length[row] = ids, len(ids)
        ids = prompts[i][-max_prompt_length:] if max_prompt_length else []
        prompt[row, : len(ids)], prompt_length[row] = ids, len(ids)
    if not kept:
        raise UserError(f"every text is longer than {max_length} tokens: raise --max-length or truncate")
    truncated = sum(long) if on_long == "truncate" else 0
    return Encoded(text, text_length, prompt, prompt_length, truncated, len(examples) - len(kept))


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


@dataclass(frozen=True)
class Mixture:
    """What is context in training. Shares of examples, each in [0, 1].

    drop_prompt: prompts dropped, for classifier-free guidance.
    infill: texts of which a part is given, in equal shares a prefix, the text around a span, or random positions.
    """

    drop_prompt: float = 0.1
    infill: float = 0.1

    def apply(self, batch: Batch, length: int, generator: np.random.Generator) -> Batch:
        """Draws which of the last `length` positions (the text) are given, and which prompts are dropped."""
        B, P = len(batch.ids), batch.prompt
        given = np.zeros((B, length), dtype=bool)
        for b in np.flatnonzero(generator.random(B) < self.infill):
            given[b] = _given(length, generator)
        dropped = torch.from_numpy(generator.random(B) < self.drop_prompt)
        if P == 0:
            # Always a mask when infilling is on: shapes and branches then are those of every other batch.
            return batch if self.infill == 0 else replace(batch, known=torch.from_numpy(given))
        assert batch.known is not None
        assert batch.present is not None
        known, present = batch.known.clone(), batch.present.clone()
        known[:, P:] = torch.from_numpy(given)
        present[dropped, :P] = False
        return replace(batch, known=known, present=present)


def _given(length: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """[length] bool: a prefix, all but a span, or random positions; at least one position is left to generate."""
    position = np.arange(length)
    kind = generator.integers(3)
    start, stop = sorted(generator.choice(length + 1, size=2, replace=False))
    if kind == 0:
        return np.asarray(position < start)
    if kind == 1:
        return np.asarray((position < start) | (position >= stop))
    given = generator.random(length) < generator.random()
    given[generator.integers(length)] = False
    return np.asarray(given)


@dataclass(frozen=True)
class Window:
    """Some steps look only at the first `length` text positions, with as many more examples.

    Short texts are mostly padding, and every position costs. What lies beyond the window is unseen, not known to be
    padding, so the model learns the exact distribution of the positions that it sees, and length is no less
    random. share: of the steps, in [0, 1].
    """

    length: int
    full: int
    share: float

    @staticmethod
    def fitting(encoded: Encoded, share: float) -> Window:
        """1.25 times the mean text length, rounded up to a multiple of 8; off if that leaves little out."""
        full = encoded.text.shape[1]
        length = int(np.ceil(1.25 * encoded.text_length.mean() / 8)) * 8
        return Window(length, full, share) if length <= 0.75 * full else Window(full, full, 0.0)

    def at(self, step: int) -> int:
        """How many positions this step looks at; short steps are spread evenly."""
        return self.length if self._short(step + 1) > self._short(step) else self.full

    def count(self, batch_size: int, step: int) -> int:
        """Examples in this step's batch: about as many positions as batch_size * full."""
        return batch_size * self.full // self.at(step)

    def start(self, batch_size: int, step: int) -> int:
        """Examples in all batches before this step's."""
        short = self._short(step)
        return (step - short) * batch_size + short * (batch_size * self.full // self.length)

    def _short(self, steps: int) -> int:
        return int(steps * self.share + 1e-9)


def batch_index(size: int, start: int, count: int, seed: int) -> NDArray[np.int64]:
    """Examples number start .. start + count - 1 of an endless sequence of epochs, each in an order that depends on
    (seed, epoch) alone, so that a resumed run needs no state."""
    wanted = np.arange(start, start + count)
    epochs, within = wanted // size, wanted % size
    orders = {e: np.random.default_rng((seed, int(e))).permutation(size) for e in np.unique(epochs)}
    return np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)])
