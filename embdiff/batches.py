"""From text to batches: token arrays, context masks, and an order of examples that depends on seed and step alone.

Texts are L positions from 0 on: words, the end of text, then padding. The end and the padding are content that the
model predicts. A prompt of n tokens sits at positions -n .. -1, so the text always starts at 0; padding of prompts is
absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example

Ints = NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True)
class Prompts:
    """ids, positions: [B, P] int64; present: [B, P] bool, False = padding."""

    ids: Tensor
    present: Tensor
    positions: Tensor

    @staticmethod
    def aligned(ids: Tensor, lengths: Tensor) -> Prompts:
        """Prompts of `lengths` [B] tokens, left-aligned in ids [B, P]."""
        column, n = torch.arange(ids.shape[1])[None], lengths[:, None]
        return Prompts(ids.long(), column < n, column - n)

    @staticmethod
    def tokenized(tokenizer: Any, texts: Sequence[str], limit: int) -> Prompts:
        """The last `limit` tokens of each text; one position at least, so that there is one where all are empty."""
        tokens = [ids[-limit:] for ids in _tokenize(tokenizer, list(texts))]
        ids = torch.full((len(tokens), max([1, *map(len, tokens)])), tokenizer.pad_token_id)
        for row, prompt in enumerate(tokens):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        return Prompts.aligned(ids, torch.tensor([len(prompt) for prompt in tokens]))

    def take(self, rows: slice) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.ids[rows], self.present[rows], self.positions[rows])

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on a device."""
        return sent(self, device)


@dataclass(frozen=True)
class Batch:
    """Texts, and the prompts that they answer.

    ids: [B, L] int64.
    known: [B, L] bool, text positions that are given as context; None = none.
    prompts: of B / draws examples, each of which has `draws` consecutive rows of text; None = no prompts.
    prompted: [B] bool, False = this row doesn't see its prompt; None = all do.
    """

    ids: Tensor
    known: Tensor | None = None
    prompts: Prompts | None = None
    prompted: Tensor | None = None

    def target(self) -> Tensor:
        """[B, L] bool: the positions that are generated, and so carry the loss."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.known is None else ~self.known

    @property
    def draws(self) -> int:
        """Rows of text for each prompt."""
        return 1 if self.prompts is None else len(self.ids) // len(self.prompts.ids)

    def take(self, rows: slice) -> Batch:
        """Some of the rows; whole examples of them."""
        examples = slice(rows.start // self.draws, rows.stop // self.draws)
        return Batch(
            self.ids[rows],
            None if self.known is None else self.known[rows],
            None if self.prompts is None else self.prompts.take(examples),
            None if self.prompted is None else self.prompted[rows],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return sent(self, device)


def sent(value: T, device: torch.device | str) -> T:
    """A tensor, or a dataclass with all its tensors, on a device; copied to a GPU without waiting for it."""
    device = torch.device(device)
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return cast(T, pinned.to(device, non_blocking=pinned is not value))
    if is_dataclass(value) and not isinstance(value, type):
        moved = {field.name: sent(getattr(value, field.name), device) for field in fields(value)}
        return cast(T, replace(cast(Any, value), **moved))
    return value


@dataclass(frozen=True)
class Encoded:
    """Token ids of a set of examples. text: [N, L]; text_length: [N], with the end of text;
    prompt: [N, P]; prompt_length: [N]. truncated, dropped: how many texts were; cut: how many prompts were."""

    text: Ints
    text_length: Ints
    prompt: Ints
    prompt_length: Ints
    truncated: int = 0
    dropped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.text)

    def fingerprint(self) -> str:
        """A hash of all tokens and lengths, to tell whether two sets are the same."""
        digest = blake2b(digest_size=16)
        for array in (self.text, self.text_length, self.prompt, self.prompt_length):
            digest.update(repr(array.shape).encode() + array.tobytes())
        return digest.hexdigest()

    def first(self, count: int) -> Encoded:
        """The first examples alone."""
        return Encoded(self.text[:count], self.text_length[:count], self.prompt[:count], self.prompt_length[:count])

    def batch(self, index: Sequence[int] | NDArray[Any], length: int | None = None, draws: int = 1) -> Batch:
        """The first `length` (default L) text positions of the examples at `index`, `draws` rows of each."""
        index = np.asarray(index)
        text = torch.from_numpy(self.text[index, :length]).long().repeat_interleave(draws, 0)
        if self.prompt.shape[1] == 0:
            return Batch(text)
        prompts = Prompts.aligned(torch.from_numpy(self.prompt[index]), torch.from_numpy(self.prompt_length[index]))
        return Batch(text, prompts=prompts)


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int = 0,
    on_long: str = "truncate",
    what: str = "text",
) -> Encoded:
    """Tokenises examples. A text longer than max_length - 1 tokens is truncated or, with on_long = "drop", left out.

    A truncated text has no end-of-text token. Prompts keep their last `max_prompt_length` tokens. `what` the texts are
    called where all of them are too long.
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
        raise UserError(f"every {what} is longer than {max_length} tokens: raise --max-length or truncate")
    truncated = sum(long) if on_long == "truncate" else 0
    cut = sum(len(prompts[i]) > max_prompt_length for i in kept)
    return Encoded(text, text_length, prompt, prompt_length, truncated, len(examples) - len(kept), cut)


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

    def apply(self, batch: Batch, generator: np.random.Generator) -> Batch:
        """Draws which text positions are given, and which rows don't see their prompts."""
        B, L = batch.ids.shape
        known = prompted = None
        if self.infill:
            given = np.zeros((B, L), dtype=bool)
            for b in np.flatnonzero(generator.random(B) < self.infill):
                given[b] = _given(L, generator)
            known = torch.from_numpy(given)
        if batch.prompts is not None:
            prompted = torch.from_numpy(generator.random(B) >= self.drop_prompt)
        return replace(batch, known=known, prompted=prompted)


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


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_index(size: int, start: int, count: int, seed: int) -> NDArray[np.int64]:
    """Examples number start .. start + count - 1 of an endless sequence of epochs, each in an order that depends on
    (seed, epoch) alone, so that a resumed run needs no state."""
    wanted = np.arange(start, start + count)
    epochs, within = wanted // size, wanted % size
    orders = {e: _order(size, seed, int(e)) for e in np.unique(epochs)}
    return np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)])


def spread(size: int, count: int) -> NDArray[np.int64]:
    """At most `count` numbers below `size`, evenly spread: files are often sorted, so their heads mislead."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64)) if size else np.zeros(0, np.int64)
