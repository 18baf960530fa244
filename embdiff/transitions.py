"""Which tokens follow each other: a linear chain over the token posteriors of all positions.

    B batch   L positions   V vocabulary   R rank   K candidates a position

The denoiser's posteriors of two positions are independent of each other given the latents, so that in few steps a text
may be rounded to half of one phrase and half of another (the multimodality of parallel decoders, Gu et al. 2018,
arXiv:1711.02281). A chain weighs neighbours as well (Sun et al. 2019, arXiv:1910.11555, equation (6)):

    log p(x | z) = sum_l e_l(x_l) + sum_l <a(x_l), b(x_{l+1})> - log Z                                    (5)

e: the denoiser's logits, taken as they are; a, b: vectors of tokens, learned at low noise, where texts are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TINY = 1e-30


class Transitions(nn.Module):
    """The chain's pair scores.

    Args:
        vocab_size: V. rank: R, of the matrix of scores.
        candidates: K, the most probable tokens of each position, which alone are looked at.
    """

    def __init__(self, vocab_size: int, rank: int, candidates: int = 32) -> None:
        super().__init__()
        self.candidates = min(candidates, vocab_size)
        self.left = nn.Parameter(0.1 * torch.randn(vocab_size, rank))
        self.right = nn.Parameter(torch.zeros(vocab_size, rank))  # no pair is preferred at the start

    def pairs(self, tokens: Tensor) -> Tensor:
        """Scores [B, L - 1, K, K] of all pairs of neighbouring candidates [B, L, K]."""
        return self.left[tokens[:, :-1]] @ self.right[tokens[:, 1:]].mT

    def nats(self, logits: Tensor, ids: Tensor) -> Tensor:
        """-log p of tokens ids [B, L] among the candidates of logits [B, L, V], per position, [B]."""
        tokens = logits.topk(self.candidates, -1).indices
        there = (tokens == ids[..., None]).any(-1, keepdim=True)
        tokens = torch.cat([tokens[..., :-1], torch.where(there, tokens[..., -1:], ids[..., None])], -1)
        scores = logits.gather(-1, tokens)
        normaliser = chain_logsumexp(scores, self.pairs(tokens))
        chosen = logits.gather(-1, ids[..., None])[..., 0].sum(1)
        follows = (self.left[ids[:, :-1]] * self.right[ids[:, 1:]]).sum((-2, -1))
        return (normaliser - chosen - follows) / ids.shape[1]

    def best(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """The most probable text [B, L], by Viterbi's algorithm, of candidates [B, L, K] with logits `scores`."""
        pairs = self.pairs(tokens)
        total, back = scores[:, 0], list[Tensor]()
        for pair, here in zip(pairs.unbind(1), scores[:, 1:].unbind(1), strict=True):
            reached = (total[..., None] + pair).max(1)
            total = reached.values + here
            back.append(reached.indices)
        choice = [total.argmax(-1, keepdim=True)]
        for from_ in reversed(back):
            choice.append(from_.gather(-1, choice[-1]))
        return tokens.gather(-1, torch.stack(choice[::-1], 1))[..., 0]


def chain_logsumexp(scores: Tensor, pairs: Tensor) -> Tensor:
    """log Z [B] of a chain with scores [B, L, K] and pair scores [B, L - 1, K, K].

    Neighbouring steps are multiplied as matrices, in log2(L) rounds, so that short loops don't rule the time.
    """
    steps = pairs + scores[:, 1:, None]
    while steps.shape[1] > 1:
        even = steps.shape[1] // 2 * 2
        joined = log_matmul(steps[:, 0:even:2], steps[:, 1:even:2])
        steps = torch.cat([joined, steps[:, even:]], 1)
    whole = scores[:, 0, :, None] + steps[:, 0] if steps.shape[1] else scores[:, 0, :, None]
    return whole.flatten(1).logsumexp(-1)


def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) @ exp(b)) for a, b [.., K, K]."""
    top_a, top_b = a.amax(-1, keepdim=True).detach(), b.amax(-2, keepdim=True).detach()
    return ((a - top_a).exp() @ (b - top_b).exp()).clamp(min=TINY).log() + top_a + top_b
