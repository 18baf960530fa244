"""Lexical control: words and phrases that must appear, that must not, and places that are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from string import whitespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from embdiff import vocabulary
from embdiff.errors import UserError
from embdiff.guidance.base import Ban, Constraint, Guidance, Part, Run, Veto, check_demand
from embdiff.guidance.language import PART, Kept, Phrases, is_word, one_case


@dataclass(frozen=True)
class Lexical(Guidance):
    """Texts with all phrases of `include` and none of `exclude`, as whole words, in any case of letters.

    Included phrases may come anywhere; with `ordered`, one after the other. keep: text at given positions, {first
    token's position: text}, exactly as it is written; a word behind the first position begins a new word, with or
    without a blank before it. strength: 0 to 1, how much `include` and `keep` guide on the way. gradient: how much the
    words around them are made to fit, by the gradient of log p(the demand | z) through the denoiser: 0 = they follow by
    themselves; 1 = as Bayes' rule has it, for some three times the time of a step.
    """

    name: ClassVar[str] = "lexical"

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    ordered: bool = False
    keep: Mapping[int, str] = field(default_factory=dict)
    strength: float = 1.0
    gradient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_demand("lexical control", self.strength, self.gradient)
        for name in ("include", "exclude"):
            given = getattr(self, name)
            phrases = [given] if isinstance(given, str) else list(given)
            if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
                raise UserError(f"{name} {given!r}: a phrase is empty, or is no text")
            object.__setattr__(self, name, tuple(phrases))
        if not (self.include or self.exclude or self.keep):
            raise UserError("lexical without words: give include, exclude or keep, as in lexical:include=cheap pub")
        if self.gradient and not (self.include or self.keep):
            raise UserError(f"gradient {self.gradient} is of what must appear: give include or keep, or leave it out")
        banned = matcher(self.exclude)
        for phrase in (*self.include, *self.keep.values()):
            if banned is not None and (found := banned.search(phrase)):
                raise UserError(f"{phrase!r} is asked for while {found[0]!r} is excluded: drop one of them")

    def parts(self, run: Run) -> Iterable[Part]:
        for phrase in self.include:
            check_spelling(run.tokenizer, phrase)
        for text in self.keep.values():
            check_spelling(run.tokenizer, text, exactly=True)
        if self.include:
            order = " in this order" if self.ordered else ""
            cause = f"words {', '.join(map(repr, self.include))}{order}"
            yield Constraint(Phrases(self.include, self.ordered), cause, self.strength, self.gradient)
        if self.keep:
            cause = f"kept positions {dict(self.keep)}"
            yield Constraint(Kept(kept_tokens(self.keep, run)), cause, self.strength, self.gradient)
        if self.exclude:
            yield from without(self.exclude, run)


def without(phrases: Sequence[str], run: Run, called: str | None = None) -> Iterable[Part]:
    """The parts that keep phrases out of texts. called: what errors call them; by default they are shown."""
    banned = matcher(phrases)
    assert banned is not None
    if alone := always(run.tokenizer, tuple(phrases)):
        yield Ban(alone)
    yield Veto(
        finder(banned, run),
        f"without {called or ', '.join(map(repr, phrases))}",
        finder(banned, run, whole=True),
        drafts=any(in_several(run.tokenizer, phrase) for phrase in phrases),
    )


@lru_cache(maxsize=16)
def always(tokenizer: Any, phrases: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens that are such a phrase by themselves, whatever stands beside them."""
    banned = matcher(phrases)
    assert banned is not None
    texts = [text and text.replace(PART, "_") for text in vocabulary.pieces(tokenizer)]  # it may become a letter
    if set_apart(tokenizer):
        found = (i for i, text in enumerate(texts) if text and (m := banned.search(f" {text} ")) and m.end() > 1)
    else:
        found = (i for i, text in enumerate(texts) if text and whole_inside(banned, text))
    return tuple(found)


@lru_cache(maxsize=16)
def set_apart(tokenizer: Any) -> bool:
    """Whether no token goes on with another's word."""
    return all(text is None or text.startswith(" ") for text in vocabulary.pieces(tokenizer))


def in_several(tokenizer: Any, phrase: str) -> bool:
    """Whether a text may have the phrase without a token that is it by itself: where no token goes on with another's
    word, if it is several words, all of which tokens have."""
    if not set_apart(tokenizer):
        return True
    words = one_case(phrase).split()
    return len(words) > 1 and all(word in spelled(tokenizer) for word in words)


@lru_cache(maxsize=16)
def spelled(tokenizer: Any) -> str:
    """The texts of all tokens, in one case of letters."""
    return " ".join(one_case(text) for text in vocabulary.pieces(tokenizer) if text)


def matcher(phrases: Sequence[str]) -> re.Pattern[str] | None:
    """Finds whole phrases in any case of letters; None without phrases."""
    if not phrases:
        return None
    longest_first = sorted({" ".join(phrase.split()) for phrase in phrases}, key=len, reverse=True)
    # What must stand beside a phrase is said once for all alike, so that it is looked for once at each character.
    alike: dict[tuple[str, str], list[str]] = {}
    for phrase in longest_first:
        alike.setdefault(beside(phrase), []).append(r"\s+".join(map(re.escape, phrase.split())))
    patterns = (f"{before}(?:{'|'.join(group)}){after}" for (before, after), group in alike.items())
    return re.compile("|".join(patterns), re.IGNORECASE)


def beside(phrase: str) -> tuple[str, str]:
    """Patterns that keep out what, before and after a phrase, would make its first or last word another."""
    return r"(?<!\w)" if is_word(phrase[0]) else "", r"(?!\w)" if is_word(phrase[-1]) else ""


def whole_inside(banned: re.Pattern[str], text: str) -> bool:
    """Whether a match lies in the text with characters beside it that end words, so that no neighbour changes it."""
    return any(m.start() > 0 and m.end() < len(text) for m in banned.finditer(text))


def finder(banned: re.Pattern[str], run: Run, whole: bool = False) -> Callable[[Tensor], Tensor]:
    """A function of tokens [B, L] that marks a position [B, L] in each match: the one where it begins; whole: all."""

    def find(ids: Tensor) -> Tensor:
        marked = torch.zeros(ids.shape, dtype=torch.bool)
        for b, row in enumerate(ids.tolist()):
            for first, last in matches(banned, vocabulary.before_end(run.tokenizer, row), run):
                marked[b, first : last + 1 if whole else first + 1] = True
        return marked.to(ids.device)

    return find


def matches(banned: re.Pattern[str], tokens: Sequence[int], run: Run) -> Iterator[tuple[int, int]]:
    """The positions of the first and the last token of each match in a text."""
    texts = read(tokens, run)
    owner = [i for i, text in enumerate(texts) for _ in text]
    for match in banned.finditer("".join(texts)):
        yield owner[match.start()], owner[match.end() - 1]


def read(tokens: Sequence[int], run: Run) -> list[str]:
    """What each token adds to a text. A character that several spell is added by the last of them."""
    texts = [run.pieces[token] or "" for token in tokens]
    for partial, group in groupby(range(len(tokens)), lambda i: PART in texts[i]):
        if partial:
            places = list(group)
            first, end = places[0], places[-1] + 1
            begin = max(0, first - 1)  # the token before shows whether there is a blank
            known = run.tokenizer.batch_decode([tokens[begin:i] for i in range(first, end + 1)])
            # What may still become a character is left to the next token.
            known[1:-1] = [text.rstrip(PART) for text in known[1:-1]]
            texts[first:end] = [after[len(before) :] for before, after in pairwise(known)]
    return texts


def check_spelling(tokenizer: Any, phrase: str, exactly: bool = False) -> None:
    """Raises UserError where the tokenizer can't spell a word of the phrase in any case of letters, or as it is."""

    def known(word: str) -> bool:
        forms = (word,) if exactly else (word, word.lower(), word.capitalize(), word.upper())
        return any(tokenizer.unk_token_id not in vocabulary.tokens(tokenizer, form) for form in forms)

    if unknown := [word for word in phrase.split() if not known(word)]:
        raise UserError(f"the model's vocabulary has no {' '.join(unknown)!r}: ask for words it has seen")
    if not exactly and (apart := sorted(set(one_case(phrase)) - characters(tokenizer) - set(whitespace))):
        raise UserError(
            f"{phrase!r}: this tokenizer spells {apart[0]!r} by parts of a character, which can't be asked for "
            "anywhere; ask for other words, or keep it at a position"
        )


@lru_cache(maxsize=16)
def characters(tokenizer: Any) -> frozenset[str]:
    """All that tokens have, in one case of letters."""
    return frozenset(one_case("".join(text or "" for text in vocabulary.pieces(tokenizer))))


def kept_tokens(keep: Mapping[int, str], run: Run) -> dict[int, int]:
    """The token at each kept position."""
    found: dict[int, int] = {}
    for start, text in keep.items():
        tokens = tokens_at(int(start), text, run)
        if not tokens:
            raise UserError(f"keep {start}={text!r}: there is no word to keep")
        for i, token in enumerate(tokens, int(start)):
            if i in found or not 0 <= i < run.length:
                why = "is kept twice" if i in found else f"is not among the {run.length} of a text"
                raise UserError(f"keep {start}={text!r}: position {i} {why}")
            found[i] = token
    return found


def tokens_at(start: int, text: str, run: Run) -> list[int]:
    """The tokens of a text at a position. A word behind the first one is set apart from the word before it."""
    tokens = vocabulary.tokens(run.tokenizer, text)
    glued = start > 0 and bool(tokens) and is_word((run.pieces[tokens[0]] or " ")[0]) and is_word(text[0])
    return vocabulary.tokens(run.tokenizer, " " + text) if glued else tokens
