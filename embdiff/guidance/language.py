"""Languages: sets of texts that can be told apart by reading a text once, token by token.

Every exact control is one: texts of twelve words, texts that hold a phrase, texts that end with a sentence. A language
says what of a token's text matters to it (`symbol`), how that changes what it remembers (`step`), and whether the text
may end there (`accepts`). `embdiff.guidance.automaton` does the rest, for any number of languages at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from string import whitespace
from typing import Any, NamedTuple, Protocol

CLOSING = "\"')]}\u201d\u2019"
OTHER_LETTER, OTHER_MARK = "\0", "\1"  # for characters that no phrase has
PART = "\ufffd"  # what a token adds that is a part of a character

State = Any  # hashable, and so is a symbol
Symbol = Any


class Language(Protocol):
    """A set of texts; for each sample its own, as far as `accepts` tells samples apart."""

    @property
    def start(self) -> State:
        """What is remembered of the empty text."""

    def symbol(self, text: str, token: int = -1) -> Symbol:
        """All that matters of a token, given what it adds to the text, and which it is."""

    def step(self, state: State, symbol: Symbol) -> State | None:
        """What is remembered after a token; None where no text of the language begins so."""

    def accepts(self, state: State, sample: int) -> bool:
        """Whether the text of this sample may end here."""


class Span(NamedTuple):
    """A range of counts, both ends included."""

    low: int
    high: int

    def __contains__(self, count: object) -> bool:
        return isinstance(count, int) and self.low <= count <= self.high


@dataclass(frozen=True)
class TokenCount:
    """Texts of so many tokens, the end of text not counted. spans: one for each sample, or one for all."""

    spans: Sequence[Span]
    start: State = 0

    @cached_property
    def most(self) -> int:
        """What no sample's count may exceed."""
        return max(span.high for span in self.spans)

    def symbol(self, text: str, token: int = -1) -> Symbol:
        return 1

    def step(self, state: State, symbol: Symbol) -> State | None:
        return state + symbol if symbol is not None and state + symbol <= self.most else None

    def accepts(self, state: State, sample: int) -> bool:
        return self.count(state) in self.spans[sample % len(self.spans)]

    def count(self, state: State) -> int:
        """How many there were."""
        return int(state)


@dataclass(frozen=True)
class CharacterCount(TokenCount):
    """Texts of so many characters. Tokens that are a part of a character are left out: only several would count one.

    sets_blanks: whether a text's first token is written without the blank that it begins with elsewhere.
    """

    start: State = -1  # no token yet
    sets_blanks: bool = False

    def symbol(self, text: str, token: int = -1) -> Symbol:
        """The characters that it adds to a text, and to an empty one."""
        return None if PART in text else (len(text), len(text.removeprefix(" ") if self.sets_blanks else text))

    def step(self, state: State, symbol: Symbol) -> State | None:
        if symbol is None:
            return None
        characters, first = symbol
        count = first if state == self.start else state + characters
        return count if count <= self.most else None

    def count(self, state: State) -> int:
        return max(0, int(state))


@dataclass(frozen=True)
class WordCount(TokenCount):
    """Texts of so many words, as `str.split` finds them. Tokens that are a part of a character are left out: several
    may spell a blank."""

    start: State = (0, False)  # words so far, whether the last character is one of a word

    def symbol(self, text: str, token: int = -1) -> Symbol:
        """Whether it begins within a word, the words that begin after a blank, and whether it ends within a word."""
        if PART in text:
            return None
        inside = [not c.isspace() for c in text]
        starts = sum(now and not before for before, now in pairwise(inside))
        return (inside[0], starts, inside[-1]) if inside else ()

    def step(self, state: State, symbol: Symbol) -> State | None:
        if not symbol:
            return None if symbol is None else state
        (words, within), (first, starts, last) = state, symbol
        words += starts + (first and not within)
        return (words, last) if words <= self.most else None

    def count(self, state: State) -> int:
        return int(state[0])


@dataclass(frozen=True)
class Sentences:
    """Texts that end with the end of a sentence: one of `.!?`, perhaps in quotes or brackets."""

    start: State = True  # of the empty text

    def symbol(self, text: str, token: int = -1) -> Symbol:
        closed = text.rstrip(CLOSING + whitespace)
        if not text.strip():
            return None
        # Closing marks alone leave it open: they end a sentence only after its end.
        return closed[-1] in ".!?\u2026" if closed else "closing"

    def step(self, state: State, symbol: Symbol) -> State | None:
        return state if symbol is None or symbol == "closing" else symbol

    def accepts(self, state: State, sample: int) -> bool:
        return bool(state)


class Phrases:
    """Texts in which all phrases occur, as whole words, in any case of letters: anywhere, or one after the other.

    What is remembered: which phrases were found, and how far the last characters spell others. A phrase is found only
    when the next character, or the end, shows that its last word is whole.
    """

    def __init__(self, phrases: Sequence[str], ordered: bool = False) -> None:
        self.phrases = [" ".join(one_case(phrase).split()) for phrase in phrases]
        self.ordered = ordered
        self.known = {c for phrase in self.phrases for c in phrase}
        self.words = {word for phrase in self.phrases for word in re.findall(r"\w+", phrase)}
        # Found phrases, the ones that the text so far ends with, and the starts of phrases that it ends with.
        self.start: State = (frozenset(), frozenset(), frozenset((i, 0) for i in range(len(self.phrases))))

    def symbol(self, text: str, token: int = -1) -> Symbol:
        """The text, with all as one that no phrase has: letters that are no part of a phrase's words, other marks, and
        blanks in a row."""
        plain, text = [], one_case(text)
        for run in re.finditer(r"\w+|\s+|.", text, re.DOTALL):
            found, inside = run[0], (run.start() > 0, run.end() < len(text))
            if found[0].isspace():
                plain.append(" ")
            elif found == PART:
                plain.append(OTHER_LETTER)  # with the next token's it may become one
            elif is_word(found[0]):
                plain.append(found if self._matters(found, *inside) else OTHER_LETTER)
            else:
                plain.append(found if found in self.known else OTHER_MARK)
        single = (OTHER_LETTER, OTHER_MARK)
        return "".join(c for i, c in enumerate(plain) if i == 0 or c != plain[i - 1] or c not in single)

    def _matters(self, letters: str, begins: bool, ends: bool) -> bool:
        """Whether letters can be a part of a phrase's word; begins, ends: whether its first and last are known."""
        test: Callable[[str], bool] = {
            (True, True): letters.__eq__, (True, False): lambda word: word.startswith(letters),
            (False, True): lambda word: word.endswith(letters), (False, False): lambda word: letters in word,
        }[begins, ends]  # fmt: skip
        return any(map(test, self.words))

    def step(self, state: State, symbol: Symbol) -> State | None:
        for c in symbol:
            state = self._read(state, c)
        return state

    def _read(self, state: State, c: str) -> State:
        found, ended, begun = state
        other = not is_word(c) and c != OTHER_LETTER
        found = self._find(found, ended) if other else found
        nexts, ends = set(), set()
        for i, n in begun:
            phrase = self.phrases[i]
            if c == phrase[n]:
                nexts.add((i, n + 1)) if n + 1 < len(phrase) else ends.add(i)
            elif c == " " and n and phrase[n - 1] == " ":
                nexts.add((i, n))  # blanks in a row are one
        whole = frozenset(i for i in ends if not is_word(self.phrases[i][-1]))
        found = self._find(found, whole)
        wanted = [i for i in range(len(self.phrases)) if (i == len(found) if self.ordered else i not in found)]
        nexts |= {(i, 0) for i in wanted if other or not is_word(self.phrases[i][0])}
        return found, frozenset(ends) - whole - found, frozenset((i, n) for i, n in nexts if i in wanted)

    def _find(self, found: frozenset[int], ended: frozenset[int]) -> frozenset[int]:
        if not self.ordered:
            return found | ended
        return found | {len(found)} if len(found) in ended else found

    def accepts(self, state: State, sample: int) -> bool:
        found, ended, _ = state
        return len(self._find(found, ended)) == len(self.phrases)


@dataclass(frozen=True)
class Kept:
    """Texts with given tokens at given positions: {position: token}. Tokens, for all parts of characters read alike."""

    tokens: Mapping[int, int]
    start: State = 0

    def symbol(self, text: str, token: int = -1) -> Symbol:
        return token if token in self.tokens.values() else None

    def step(self, state: State, symbol: Symbol) -> State | None:
        fits = state not in self.tokens or self.tokens[state] == symbol
        # Behind the last kept position nothing needs to be counted.
        return min(state + 1, max(self.tokens) + 1) if fits else None

    def accepts(self, state: State, sample: int) -> bool:
        return bool(state > max(self.tokens))


def one_case(text: str) -> str:
    """The text in one case of letters, as `re.IGNORECASE` compares them: each stays one character, so `ß` is no ss."""
    return "".join(next(form for form in (c.casefold(), c.lower(), c) if len(form) == 1) for c in text)


def is_word(c: str) -> bool:
    """Whether a character is one that words are made of."""
    return c.isalnum() or c == "_"
