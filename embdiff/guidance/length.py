"""Length: so many tokens, words or characters, and texts that end where a sentence does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any, ClassVar

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.guidance.base import Constraint, Guidance, Part, Run, check_demand
from embdiff.guidance.language import CharacterCount, Language, Sentences, Span, TokenCount, WordCount

Count = int | str | tuple[int, int] | Sequence["int | str | tuple[int, int]"]


@dataclass(frozen=True)
class Length(Guidance):
    """Texts of exactly so many tokens, words and characters; what is not given is free.

    The posterior is taken given the length, exactly under the independence of positions that it has anyway, so
    sentences are planned to end in time; the last step picks the nearest, or most probable, text of that length.

    tokens: the end of text not counted. words: as `str.split` finds them. characters: with blanks. Each is a number, a
    range ("8-12", "8-" at least, "-12" at most, or a tuple), or a list of these, one for each sample. complete: texts
    end with `.`, `!` or `?`. strength: 0 to 1, how much the length guides on the way. gradient: as `Lexical` has it.
    """

    name: ClassVar[str] = "length"

    tokens: Count | None = None
    words: Count | None = None
    characters: Count | None = None
    complete: bool = True
    strength: float = 1.0
    gradient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_demand("the length", self.strength, self.gradient)
        if self.tokens is None and self.words is None and self.characters is None:
            raise UserError("length without a number: give tokens, words or characters, as in length:words=12")
        for name in ("tokens", "words", "characters"):
            if getattr(self, name) is not None:
                spans(name, getattr(self, name))

    def for_samples(self, first: int, last: int, total: int) -> Length:
        given = {name: each(getattr(self, name)) for name in ("tokens", "words", "characters")}
        lists: dict[str, Any] = {name: count for name, count in given.items() if len(count) > 1}
        for name, count in lists.items():
            if len(count) != total:
                raise UserError(f"{len(count)} lengths in {name} for {total} samples: give one, or one for each")
        return replace(self, **{name: count[first:last] for name, count in lists.items()})

    def parts(self, run: Run) -> Iterable[Part]:
        kinds: dict[str, Callable[[list[Span]], Language]] = {
            "tokens": TokenCount,
            "words": WordCount,
            "characters": partial(CharacterCount, sets_blanks=vocabulary.sets_blanks(run.tokenizer)),
        }
        for name, kind in kinds.items():
            asked = getattr(self, name)
            if asked is None:
                continue
            wanted = spans(name, asked)
            if len(wanted) not in (1, run.samples):
                raise UserError(f"{len(wanted)} lengths in {name} for {run.samples} samples: give one, or one for each")
            language = kind([within(span, name, run) for span in wanted])
            yield Constraint(language, f"{name} {asked}", self.strength, self.gradient)
        if self.complete:
            yield Constraint(Sentences(), "complete sentences", self.strength, self.gradient)


def within(span: Span, name: str, run: Run) -> Span:
    """The span as far as a text of L tokens can reach."""
    most = run.length
    if name == "characters":
        most *= max(len(text) for text in run.pieces if text is not None)
    elif name == "words":
        most *= max(len(text.split()) for text in run.pieces if text is not None)
    return Span(span.low, min(span.high, max(most, span.low)))


def spans(name: str, count: Count) -> list[Span]:
    """The ranges that a number, a range, or a list of them names."""
    return [span_of(name, one) for one in each(count)]


def each(count: Count | None) -> list[Any]:
    """The numbers and ranges of a list, or the only one; in text, a list is separated by |."""
    if isinstance(count, str):
        return count.split("|")
    return count if isinstance(count, list) else [count]


def span_of(name: str, count: object) -> Span:
    """One range."""
    if not isinstance(count, str) and str(count).startswith("-"):
        raise UserError(f"{name} {count} is negative: give a number from 0 on, or '{count}' for at most so many")
    try:
        if isinstance(count, tuple):
            low, high = map(index, count)
        else:
            text = str(count).strip()
            start, dash, end = text.partition("-")
            low = int(start) if start else 0
            high = (int(end) if end else 10**9) if dash else low
            if not (start or end):
                raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{name} {count!r} is no length: give a number as 12, or a range as 8-12, 8- or -12") from None
    if low < 0:
        raise UserError(f"{name} {count!r} is negative: give numbers from 0 on")
    if low > high:
        raise UserError(f"{name} {count!r} is an empty range: the first number must not be above the second")
    return Span(low, high)
