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
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff import ops

TINY = 1e-30
TEXTS = 64  # whose pairs are scored at a time


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
        left, right = F.embedding(tokens[:, :-1], self.left), F.embedding(tokens[:, 1:], self.right)
        return left.float() @ right.float().mT

    def most(self) -> Tensor:
        """No pair's score is larger, nor smaller than minus this."""
        longest = [vectors.square().sum(-1).max().sqrt() for vectors in (self.left, self.right)]
        return longest[0] * longest[1]

    def nats(self, scores: Tensor, tokens: Tensor, own: Tensor, ids: Tensor) -> Tensor:
        """-log p, per position [B], of a text ids [B, L] with logits `own`, among candidates [B, L, K] with logits
        `scores`; where it is none of them, it takes the last one's place."""
        there = (tokens == ids[..., None]).any(-1, keepdim=True)
        tokens = torch.cat([tokens[..., :-1], torch.where(there, tokens[..., -1:], ids[..., None])], -1)
        scores = torch.where(tokens == ids[..., None], own[..., None], scores)
        follows = (self.left[ids[:, :-1]] * self.right[ids[:, 1:]]).sum((-2, -1))
        return (chain_logsumexp(scores, self.pairs(tokens)) - own.sum(1) - follows) / ids.shape[1]

    def best(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """The most probable text [B, L] of candidates [B, L, K] with logits `scores`."""
        found = []
        for some_scores, some_tokens in zip(torch.split(scores, TEXTS), torch.split(tokens, TEXTS), strict=True):
            some_scores = some_scores - some_scores.amax(-1, keepdim=True)  # small sums keep their digits
            path = ops.best_path(some_scores, self.pairs(some_tokens))
            found.append(some_tokens.gather(-1, path[..., None])[..., 0])
        return torch.cat(found)


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
