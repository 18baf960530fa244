"""Automata over tokens: what languages ask of a text, as marginals of its tokens and as the nearest text that has it.

    B samples   L positions   C classes of tokens   S states   V vocabulary

Tokens that no language tells apart form a class. States are what the languages remember together. A text is read token
by token, ends in a state that all languages accept, and is padding from then on. Given independent probabilities of the
classes at each position, the probability of each class *given that the text is in all languages* follows from one sum
forwards and one backwards over the positions (Rabiner 1989, equations 19 to 27), and the best such text from a maximum
backwards (Viterbi). Both are exact; their cost is L S C, without the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embdiff.errors import UserError
from embdiff.guidance.language import Language
from embdiff.ops import Classes

MOST_STATES = 20_000
FLOOR = 1e-6  # of a class's probability: what the model holds for impossible must stay possible
SCALED = 8  # positions after which hopes are made numbers around 1 again: a product of so many floors is one still
MOST = 2**24  # numbers held at a time in a sum over positions


class Shares(NamedTuple):
    """Probabilities at each position. classes: [B, L, C]; end, padding: [B, L]. They sum to 1."""

    classes: Tensor
    end: Tensor
    padding: Tensor


class Ways(NamedTuple):
    """The ways of an automaton with two more states, the last one of texts that are over and that of lost texts.

    states: S + 1, without the lost. targets: [(C + 2) (S + 1)], where each class leads from each state. order, starts:
    the ways by where they lead, and where those to each state begin. ending: [S + 1, B], which states may end; None
    where that is so for all samples alike, and `targets` say it.
    """

    states: int
    targets: Tensor
    order: Tensor
    starts: Tensor
    ending: Tensor | None


@dataclass(frozen=True)
class Automaton:
    """order: [V - specials] token ids, class after class; sizes: of the classes, C numbers.
    next: [S, C] int64, S where a text is lost; accepts: [B, S] bool. State 0 is that of the empty text.
    """

    order: Tensor
    sizes: tuple[int, ...]
    next: Tensor
    accepts: Tensor

    @staticmethod
    def of(
        languages: Sequence[Language], texts: Sequence[str | None], samples: int, length: int, cause: str
    ) -> Automaton:
        """The automaton of the texts that are in all languages.

        Args:
            texts: what each token of the vocabulary adds to a text; None for tokens that no text may have.
            samples, length: B, L.
            cause: what was asked for, for the error where no text of L tokens has it.
        """
        members: dict[tuple[Any, ...], list[int]] = {}
        for token, text in enumerate(texts):
            if text is not None:
                members.setdefault(tuple(language.symbol(text, token) for language in languages), []).append(token)
        symbols = list(members)
        start = tuple(language.start for language in languages)
        number, rows, waiting = {start: 0}, list[list[int]](), [start]
        while len(rows) < len(waiting):
            state = waiting[len(rows)]
            row = []
            for symbol in symbols:
                after = tuple(of.step(s, c) for of, s, c in zip(languages, state, symbol, strict=True))
                if None in after:
                    row.append(-1)
                    continue
                if after not in number:
                    number[after] = len(number)
                    waiting.append(after)
                row.append(number[after])
            rows.append(row)
            if len(number) > MOST_STATES:
                raise UserError(f"{cause}: too much to keep track of at once; ask for fewer or shorter things")
        lost = len(rows)
        accepts = torch.tensor(
            [[all(of.accepts(s, b) for of, s in zip(languages, state, strict=True)) for state in waiting]
             for b in range(samples)]
        )  # fmt: skip
        # Symbols that lead everywhere alike are one.
        alike: dict[tuple[int, ...], list[int]] = {}
        for symbol, column in zip(symbols, zip(*rows, strict=True), strict=True):
            alike.setdefault(column, []).extend(members[symbol])
        following = torch.tensor(list(alike)).T.reshape(len(rows), len(alike))
        automaton = Automaton(
            torch.tensor([token for group in alike.values() for token in group]),
            tuple(map(len, alike.values())), torch.where(following < 0, lost, following), accepts,
        )  # fmt: skip
        possible = automaton._possible(length)
        if not bool(possible.all()):
            which = "" if possible.shape[0] == 1 else f" (sample {int((~possible).nonzero()[0, 0])})"
            raise UserError(f"{cause}: no text of at most {length} tokens has all of it{which}")
        return automaton

    def to(self, device: torch.device) -> Automaton:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("order", "next", "accepts")}
        return replace(self, **moved)

    def _possible(self, length: int) -> Tensor:
        """[B] bool: whether a text of at most `length` tokens is accepted."""
        reached = torch.zeros(len(self.next) + 1, dtype=torch.bool)
        reached[0] = True
        found = self.accepts[:, 0]
        for _ in range(length):
            after = torch.zeros_like(reached)
            after[self.next[reached[:-1]].flatten()] = True
            after[-1] = False
            if torch.equal(after, reached):
                break
            reached = after
            found = found | (self.accepts & reached[:-1]).any(1)
        return found

    @torch.no_grad()
    def marginals(self, shares: Shares) -> Shares:
        """The probabilities given that the text is in all languages, from those of independent positions."""
        B, L, C = shares.classes.shape
        size = max(1, MOST // (L * (C + 2) * (len(self.next) + 1)))
        if size >= B:
            return self._marginals(shares)
        parts = list[Shares]()
        for index in torch.split(torch.arange(B, device=self.next.device), size):
            own = self if len(self.accepts) == 1 else self.rows(index)
            parts.append(own._marginals(Shares(*(share[index] for share in shares))))
        return Shares(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _marginals(self, shares: Shares) -> Shares:
        """`marginals`, by products and sums of probabilities.

        The end of text and padding are two more classes here: the one leads from states that are accepted to a last
        state, the other stays there.
        """
        p = torch.cat([shares.classes, shares.end[..., None], shares.padding[..., None]], -1)
        p = p.double().clamp(min=FLOOR).permute(1, 2, 0)[:, :, None].contiguous()  # [L, C + 2, 1, B]
        L, C, _, B = p.shape
        ways = self._ways
        S = ways.states
        # Backwards: how probable it is to be accepted from each state, and by each way on, but for a factor.
        hopes = p.new_zeros(L + 1, S + 1, B)
        hopes[L, : S - 1], hopes[L, S - 1] = self.accepts.T, 1.0
        going = p.new_empty(L, C, S, B)
        # In pieces beforehand, for there is so little to do at each position that to take them there would tell.
        own, each, flat, later = hopes[:, :S].unbind(), going.unbind(), going.view(L, C * S, B).unbind(), hopes.unbind()
        for i, share in reversed(list(enumerate(p.unbind()))):
            torch.index_select(later[i + 1], 0, ways.targets, out=flat[i])
            each[i].mul_(share)
            if ways.ending is not None:
                each[i][-2].mul_(ways.ending)
            torch.sum(each[i], 0, out=own[i])
            if i % SCALED == 0:
                top = own[i].amax(0).clamp(min=FLOOR**SCALED)
                own[i].div_(top)
                each[i].div_(top)
        if bool((hopes[::SCALED] > 0).ne(self._hopeful(L)[::SCALED]).any()):  # less than any number
            return self._marginals_by_logs(shares)
        # Forwards: how probable each state is, given that the text is accepted.
        hopes.clamp_(min=torch.finfo(p.dtype).tiny)
        here = p.new_zeros(S, B)
        here[0] = 1.0
        for i in range(L):
            each[i].mul_(here.div_(own[i]))
            here = F.embedding_bag(ways.order, flat[i], ways.starts, mode="sum", include_last_offset=True)
        marginal = going.sum(2).permute(2, 0, 1).to(shares.classes.dtype)
        return Shares(marginal[..., :-2], marginal[..., -2], marginal[..., -1])

    @cached_property
    def _ways(self) -> Ways:
        """Where each way leads, as `_marginals` needs it."""
        lost, C = len(self.next) + 1, len(self.sizes)  # the state before is the last one
        following = torch.where(self.next == lost - 1, lost, self.next).T
        end = torch.where(self.accepts.any(0), lost - 1, lost)
        targets = torch.full((C + 2, lost), lost, device=self.next.device)
        targets[:C, :-1], targets[C, :-1], targets[C + 1, -1] = following, end, lost - 1
        targets = targets.flatten()
        ordered = targets.sort(stable=True)
        starts = torch.searchsorted(ordered.values, torch.arange(lost + 1, device=targets.device))
        alike = bool((self.accepts == self.accepts[:1]).all())
        ending = None if alike else F.pad(self.accepts, (0, 1)).T.double()
        return Ways(lost, targets, ordered.indices, starts, ending)

    @cached_property
    def _known_hopes(self) -> dict[int, Tensor]:
        """What `_hopeful` found, by length."""
        return {}

    def _hopeful(self, length: int) -> Tensor:
        """[L + 1, S + 2, B or 1] bool: whether a text may still be accepted from each state, at each position."""
        if length not in self._known_hopes:
            ways = self._ways
            accepts = self.accepts if ways.ending is not None else self.accepts[:1]
            found = accepts.new_zeros(length + 1, ways.states + 1, len(accepts))
            found[length, : ways.states - 1], found[length, ways.states - 1] = accepts.T, True
            for i in reversed(range(length)):
                going = found[i + 1, ways.targets].view(-1, ways.states, len(accepts))
                if ways.ending is not None:
                    going[-2] &= ways.ending > 0
                found[i, : ways.states] = going.any(0)
            self._known_hopes[length] = found
        return self._known_hopes[length]

    def _marginals_by_logs(self, shares: Shares) -> Shares:
        """`marginals` where what a text must still become may be less probable than any number."""
        # Samples last and logs to the base 2, for on a CPU both are several times as fast.
        classes, end, padding = (share.double().clamp(min=FLOOR).log2() for share in shares)
        m = classes.permute(1, 2, 0)[:, :, None]  # [L, C, 1, B]
        L, C, _, B = m.shape
        S, lowest = len(self.next), torch.finfo(m.dtype).min  # -inf less it is -inf, and no NaN
        targets = self.next.T.flatten()
        stop, lost, tail = (ends.T for ends in self._ends(padding))
        ending = stop + (end.T + tail[1:])[:, None]  # [L, S, B]

        def going(i: int) -> Tensor:
            """[C, S, B]: how probable each way on is, and is accepted in the end."""
            return hopes[i + 1][targets].view(C, S, B) + m[i]

        hopes = [torch.cat([stop, lost])] * (L + 1)  # [S + 1, B]: of being accepted from each state, at each position
        for i in reversed(range(L)):
            ways = going(i)
            top = torch.maximum(ways.amax(0), ending[i]).clamp(min=lowest)
            total = (ways - top).exp2_().sum(0) + (ending[i] - top).exp2_()
            hopes[i] = torch.cat([top + total.log2_(), lost])

        # Forwards: how probable each state is, given that the text is accepted.
        here, done = m.new_zeros(S, B), m.new_zeros(B)
        here[0] = 1.0
        found: list[Tensor] = []
        for i in range(L):
            hope = hopes[i][:-1].clamp(min=lowest)
            flow = (going(i) - hope).exp2_() * here
            ends = ((ending[i] - hope).exp2_() * here).sum(0)
            found.append(torch.cat([flow.sum(1), ends[None], done[None]]))
            here = m.new_zeros(S + 1, B).index_add_(0, targets, flow.flatten(0, 1))[:-1]
            done = done + ends
        marginal = torch.stack(found, 1).permute(2, 1, 0).to(shares.classes.dtype)
        return Shares(marginal[..., :C], marginal[..., C], marginal[..., C + 1])

    def _ends(self, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, given those of padding [B, L]: of ending in each state [B, S], 0 or -inf; of the state of lost texts
        [B, 1]; of nothing but padding from each position on [B, L + 1]."""
        B = len(padding)
        stop = torch.where(self.accepts, 0.0, -torch.inf).double().expand(B, len(self.next))
        tail = torch.cat([padding.flip(1).cumsum(1).flip(1), padding.new_zeros(B, 1)], 1)
        return stop, padding.new_full((B, 1), -torch.inf), tail

    @property
    def classes(self) -> Classes:
        """Which tokens are alike."""
        return Classes(self.order, self.sizes)

    def _class_of_each(self) -> Tensor:
        """The class of each token, in the order of their ids."""
        return self._class_in_order()[self.order.argsort()]

    def _class_in_order(self) -> Tensor:
        """The class of each token of `order`."""
        device = self.order.device
        classes = torch.arange(len(self.sizes), device=device)
        return classes.repeat_interleave(torch.tensor(self.sizes, device=device))

    def class_of_tokens(self, vocabulary: int, ends: Tensor) -> Tensor:
        """[V]: the class of each token, as in `best`: C for the first of `ends`, the end of text, C + 1 for the other,
        padding; -1 for what no text may have."""
        found = torch.full((vocabulary,), -1, device=self.order.device)
        found[self.order] = self._class_in_order()
        found[ends] = len(self.sizes) + torch.arange(len(ends), device=ends.device)
        return found

    def rows(self, index: Tensor) -> Automaton:
        """For some of the samples."""
        return replace(self, accepts=self.accepts[index])

    def best(self, scores: Shares) -> tuple[Tensor, Tensor]:
        """The text with the highest sum of scores (any numbers) that is in all languages.

        Returns the class at each position [B, L], where C is the end of text and C + 1 padding; and the sum [B], -inf
        where no text is possible.
        """
        m = scores.classes.double()
        B, L, C = m.shape
        S = len(self.next)
        targets = self.next.flatten()
        stop, lost, tail = self._ends(scores.padding.double())
        later = torch.cat([stop, lost], 1)
        choices: list[Tensor] = []
        for i in reversed(range(L)):
            going = (later[:, targets].view(B, S, C) + m[:, i, None]).max(-1)
            ending = stop + (scores.end.double()[:, i] + tail[:, i + 1])[:, None]
            choices.append(torch.where(ending > going.values, C, going.indices))
            later = torch.cat([torch.maximum(ending, going.values), lost], 1)
        choices.reverse()
        state = torch.zeros(B, dtype=torch.long, device=m.device)
        over = torch.zeros(B, dtype=torch.bool, device=m.device)
        picked: list[Tensor] = []
        for choice in choices:
            now = choice.gather(1, state[:, None])[:, 0]
            picked.append(torch.where(over, C + 1, now))
            over = over | (now == C)
            state = torch.where(over, state, self.next[state, now.clamp(max=C - 1)])
        return torch.stack(picked, 1), later[:, 0]


def aligned(automata: Sequence[Automaton]) -> list[Automaton]:
    """The same automata over common classes: tokens are alike where no automaton tells them apart."""
    if len(automata) < 2:
        return list(automata)
    tokens = automata[0].order.sort().values
    classes = torch.stack([automaton._class_of_each() for automaton in automata])
    columns, which = torch.unique(classes, dim=1, return_inverse=True)
    order, sizes = tokens[which.argsort(stable=True)], tuple(which.bincount().tolist())
    return [
        replace(automaton, order=order, sizes=sizes, next=automaton.next[:, column])
        for automaton, column in zip(automata, columns, strict=True)
    ]
