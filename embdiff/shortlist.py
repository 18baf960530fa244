"""The token posterior over a few words of each text, in place of the vocabulary.

    B texts   L positions   V vocabulary   H features   D embedding dim   K words

The sum over all words is the dearest part of a step beside the network, and most words add next to nothing to it. But
without them texts would be made of frequent words. So each text's words are drawn, without replacement and as likely as
its positions have them ("Gumbel-top-k", Kool, van Hoof and Welling 2019, arXiv:1903.06059): the K largest of

    log m_v + g_v        m_v = sum_l p_l(v)        g_v ~ Gumbel(0)

Given the next largest, kappa, a word is drawn with probability

    pi_v = 1 - exp(-exp(log m_v - kappa))                                                                       (6)

and counts 1 / pi_v times, with which sums over the vocabulary are right on average (Horvitz and Thompson 1952). Words
that are likely somewhere are drawn for sure, and count once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embdiff import ops
from embdiff.forward import Forward

TINY = 1e-38  # m of a word at least: whatever is drawn, it is a word


class Shortlist(NamedTuple):
    """Words of each text, and how often each counts.

    words: [B, K], ids. lift: [B, K], -log pi, at least 0. weight: [B, H, K]. table: [B, K, D].
    """

    words: Tensor
    lift: Tensor
    weight: Tensor
    table: Tensor

    @classmethod
    def draw(cls, mass: Tensor, noise: Tensor, count: int, weight: Tensor, table: Tensor) -> Shortlist:
        """Draws K = count words.

        Args:
            mass: m [B, V]; 0 = never drawn, and more than K of each row are above. noise: [B, V], uniform in [0, 1).
            weight: [V, H]. table: [V, D].
        """
        log_mass, gumbel = mass.log(), -(-noise.clamp(min=TINY).log()).log()
        top = (log_mass + gumbel).topk(count + 1, -1)
        words, kappa = top.indices[:, :-1], top.values[:, -1:]
        share = -(-(log_mass.gather(-1, words) - kappa).exp()).expm1()
        return cls(words, -share.clamp(min=TINY).log(), weight[words].mT.contiguous(), table[words])

    def posterior(self, h: Tensor, ends: Tensor, temperature: float = 1.0) -> ops.Posterior:
        """`ops.expectation` of features h [B, L, H], as far as the drawn words tell.

        ends: [k, H], weights of the tokens that are kept apart.
        """
        lift = self.lift[:, None]
        logits = (h @ self.weight).float()
        kept = torch.cat([logits + lift, F.linear(h, ends).float()], -1).softmax(-1)[..., logits.shape[-1] :]
        p = (logits / temperature + lift).softmax(-1)
        return ops.Posterior((p.to(h.dtype) @ self.table).float(), kept)

    def most_probable(self, h: Tensor, ends: Tensor, keep: Sequence[int], count: int) -> Tensor:
        """The tokens [B, L, count] with the highest logits, of words and of those that are kept apart [k]."""
        top = torch.cat([h @ self.weight, F.linear(h, ends)], -1).topk(count, -1).indices
        apart = torch.tensor(keep, device=h.device, dtype=torch.long).expand(len(h), -1)
        tokens = torch.cat([self.words, apart], -1)
        return tokens.gather(-1, top.flatten(1)).view_as(top)


class Shortlists:
    """The shortlists of a run.

    Args:
        count: K. turns: the predictions, from 1 on, in which words are drawn. uniform: gives [B, V] numbers to draw by.
        shape: (B, L). network: whose head takes in the whole vocabulary. weight, table, temperature, keep: as in
            `ops.expectation`.
    """

    def __init__(
        self,
        count: int,
        turns: Collection[int],
        uniform: Callable[[int], Tensor],
        shape: tuple[int, int],
        network: Forward,
        weight: Tensor,
        table: Tensor,
        temperature: float,
        keep: tuple[int, ...],
    ) -> None:
        self.count, self.turns, self.uniform, self.shape, self.network = count, turns, uniform, shape, network
        self.weight, self.table, self.temperature, self.keep = weight, table, temperature, keep
        self.ends = weight[list(keep)]
        self.drawn: tuple[int, Shortlist] | None = None  # when it was, and what

    def forget(self) -> None:
        """Words are drawn anew."""
        self.drawn = None

    def posterior(self, h: Tensor, rows: Tensor | None, turn: int) -> ops.Posterior | None:
        """Over few words, of features h [B, L, H], or [R, H] of the positions `rows`; None = look at all words.

        In a turn in which words are drawn, by its first prediction, others are compared with what was exact.
        """
        B, L = self.shape
        if self.drawn is None or (turn in self.turns and self.drawn[0] != turn):
            places = torch.arange(B * L, device=h.device) if rows is None else rows
            found, mass = self.network.masses(h, places // L, B, self.weight, self.table, self.temperature, self.keep)
            mass = mass.clamp(min=TINY)
            mass[:, list(self.keep)] = 0.0
            noise = self.uniform(len(self.weight))
            self.drawn = turn, Shortlist.draw(mass, noise, self.count, self.weight, self.table)
            return found
        if self.drawn[0] == turn:
            return None
        found = self.drawn[1].posterior(self._by_text(h, rows), self.ends, self.temperature)
        return found if rows is None else ops.Posterior(*(x.flatten(0, 1)[rows] for x in (found.mean, found.kept)))

    def most_probable(self, h: Tensor, rows: Tensor | None, count: int) -> tuple[Tensor, Tensor] | None:
        """`ops.most_probable` of features h [R, H] among the words that were drawn and what is kept apart; None where
        these are too few."""
        if self.drawn is None or self.count + len(self.keep) < count:
            return None
        words = self.drawn[1]
        found = words.most_probable(self._by_text(h, rows), self.ends, self.keep, count).flatten(0, 1)
        tokens = found if rows is None else found[rows]
        return ops.logits_of(h, self.weight, tokens), tokens

    def _by_text(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """Features of all positions, [B, L, H]; of those that are not looked at, 0."""
        B, L = self.shape
        if rows is not None:
            h = h.new_zeros(B * L, h.shape[-1]).index_copy(0, rows, h)
        return h.view(B, L, -1)
