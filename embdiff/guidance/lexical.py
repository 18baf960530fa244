"""Lexical control: words and phrases that must appear, that must not, and places that are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.guidance.base import Constraint, Guidance, Part, Run, Tilt, Veto
from embdiff.guidance.language import Kept, Phrases, is_word


@dataclass(frozen=True)
class Lexical(Guidance):
    """Texts with all phrases of `include` and none of `exclude`, as whole words, in any case of letters.

    Included phrases may come anywhere; with `ordered`, one after the other. keep: text at given positions, {first
    token's position: text}. strength: 0 to 1, how much `include` and `keep` guide on the way.
    """

    name: ClassVar[str] = "lexical"

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    ordered: bool = False
    keep: Mapping[int, str] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("include", "exclude"):
            given = getattr(self, name)
            phrases = [given] if isinstance(given, str) else list(given)
            if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
                raise UserError(f"{name} {given!r}: a phrase is empty, or is no text")
            object.__setattr__(self, name, tuple(phrases))
        if not (self.include or self.exclude or self.keep):
            raise UserError("lexical without words: give include, exclude or keep, as in lexical:include=cheap pub")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength} of lexical control is out of range: give 0 to 1")
        banned = matcher(self.exclude)
        for phrase in (*self.include, *self.keep.values()):
            if banned is not None and (found := banned.search(phrase)):
                raise UserError(f"{phrase!r} is asked for while {found[0]!r} is excluded: drop one of them")

    def parts(self, run: Run) -> Iterable[Part]:
        for phrase in (*self.include, *self.keep.values()):
            check_spelling(run.tokenizer, phrase)
        if self.include:
            order = " in this order" if self.ordered else ""
            cause = f"words {', '.join(map(repr, self.include))}{order}"
            yield Constraint(Phrases(self.include, self.ordered), cause, self.strength)
        if self.keep:
            yield Constraint(Kept(kept_pieces(self.keep, run)), f"kept positions {dict(self.keep)}", self.strength)
        if self.exclude:
            yield from without(self.exclude, run)


def without(phrases: Sequence[str], run: Run, called: str | None = None) -> Iterable[Part]:
    """The parts that keep phrases out of texts. called: what errors call them; by default they are shown."""
    banned = matcher(phrases)
    assert banned is not None
    # Tokens that are such a phrase by themselves, whatever stands beside them.
    end = " " if vocabulary.sets_blanks(run.tokenizer) else ""
    alone = [i for i, text in enumerate(run.pieces) if text and (m := banned.search(" " + text + end)) and m.end() > 1]
    if not end:
        alone = [i for i in alone if whole_inside(banned, run.pieces[i] or "")]
    if alone:
        bias = torch.zeros(len(run.pieces), device=run.device)
        bias[alone] = -torch.inf
        yield Tilt(lambda words: words.logits + bias)
    yield Veto(finder(banned, run), f"without {called or ', '.join(map(repr, phrases))}")


def matcher(phrases: Sequence[str]) -> re.Pattern[str] | None:
    """Finds whole phrases in any case of letters; None without phrases."""
    if not phrases:
        return None
    longest_first = sorted({" ".join(phrase.split()) for phrase in phrases}, key=len, reverse=True)
    return re.compile("|".join(map(whole, longest_first)), re.IGNORECASE)


def whole(phrase: str) -> str:
    """The pattern of a phrase with nothing beside it that would make its first or last word another."""
    before, after = (r"(?<!\w)" if is_word(phrase[0]) else "", r"(?!\w)" if is_word(phrase[-1]) else "")
    return before + r"\s+".join(map(re.escape, phrase.split())) + after


def whole_inside(banned: re.Pattern[str], text: str) -> bool:
    """Whether a match lies in the text with characters beside it that end words, so that no neighbour changes it."""
    return any(m.start() > 0 and m.end() < len(text) for m in banned.finditer(text))


def finder(banned: re.Pattern[str], run: Run) -> Callable[[Tensor], Tensor]:
    """A function of tokens [B, L] that marks a position [B, L] in each match: the one where it begins."""

    def find(ids: Tensor) -> Tensor:
        marked = torch.zeros(ids.shape, dtype=torch.bool)
        for b, row in enumerate(ids.tolist()):
            pieces = [run.pieces[token] or "" for token in vocabulary.before_end(run.tokenizer, row)]
            owner = [i for i, text in enumerate(pieces) for _ in text]
            for match in banned.finditer("".join(pieces)):
                marked[b, owner[match.start()]] = True
        return marked.to(ids.device)

    return find


def check_spelling(tokenizer: Any, phrase: str) -> None:
    """Raises UserError where the tokenizer can't spell a word of the phrase in any case of letters."""

    def known(word: str) -> bool:
        forms = (word, word.lower(), word.capitalize(), word.upper())
        return any(tokenizer.unk_token_id not in vocabulary.tokens(tokenizer, form) for form in forms)

    if unknown := [word for word in phrase.split() if not known(word)]:
        raise UserError(f"the model's vocabulary has no {' '.join(unknown)!r}: ask for words it has seen")


def kept_pieces(keep: Mapping[int, str], run: Run) -> dict[int, str]:
    """What the token at each kept position adds to a text."""
    found: dict[int, str] = {}
    for start, text in keep.items():
        for i, token in enumerate(vocabulary.tokens(run.tokenizer, text), int(start)):
            if i in found or not 0 <= i < run.length:
                why = "is kept twice" if i in found else f"is not among the {run.length} of a text"
                raise UserError(f"keep {start}={text!r}: position {i} {why}")
            found[i] = run.pieces[token] or ""
    return found
