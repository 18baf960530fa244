"""Baselines: an autoregressive and a masked model with the denoiser's blocks, trained like it.

    B batch   L positions   C context positions   W width   V vocabulary   N steps

Both follow the denoiser's layout and context rule: a text starts at position 0, a prompt of n tokens sits at -n .. -1,
attends only to itself and is seen by the whole text. Where the denoiser is modulated by gamma they are modulated by the
constant 1, so a block's modulation is six learned vectors. `forward` gives features h; logits are the head's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from embdiff import ops, vocabulary
from embdiff.batches import Batch, Prompts
from embdiff.denoiser import Block, Condition, Context, Rotary, attention_mask, rms_norm, through_blocks
from embdiff.errors import UserError, reason
from embdiff.losses import Network, prompt_context
from embdiff.space import EmbeddingSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "model"  # where a run keeps its baseline


class Baseline(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Token embeddings of width W, the blocks, and prompts as context. Abstract."""

    _supports_gradient_checkpointing = True

    def __init__(self, vocab_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.space = EmbeddingSpace(vocab_size, width)
        self.blocks = nn.ModuleList([Block(width, heads, condition_width=1) for _ in range(depth)])
        self.rotary = Rotary(width // heads)
        self.final = nn.Linear(1, 2 * width, bias=False)
        nn.init.zeros_(self.final.weight)

    def encode_context(self, ids: Tensor, present: Tensor, positions: Tensor) -> Context:
        """Encodes prompt tokens once. ids, positions: [B, C]; present: [B, C] bool, False = padding."""
        mask = attention_mask(ids.shape[1], None, None, present)
        _, keys, values = self._encode(self.space.embed(ids), positions, mask, None)
        return Context(torch.stack(keys), torch.stack(values), present)

    def sample(
        self, generators: Sequence[torch.Generator], prompts: Prompts | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Token ids [B, L] of one text for each generator, and for each prompt where there are prompts."""
        raise NotImplementedError

    def _encode(
        self, x: Tensor, positions: Tensor | None, mask: Tensor | None, context: Context | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Last hidden state [B, L, W] of inputs x [B, L, W], and the keys and values of every block."""
        x = x.to(self.final.weight.dtype)
        condition = Condition(x.new_ones(1, 1, 1), x.new_ones(1), None)
        rotation = self.rotary(x.shape[1], positions)
        return through_blocks(self.blocks, self.final, x, condition, rotation, mask, context)

    def _prompt_context(self, prompts: Prompts | None, count: int) -> Context | None:
        """The encoded prompts of `count` samples."""
        if prompts is None:
            return None
        if self.config.max_prompt_length == 0:
            raise UserError("this model was trained without prompts: leave the prompt out, or train on pairs")
        if len(prompts.ids) != count:
            raise UserError(f"{count} generators for {len(prompts.ids)} prompts: give one for each")
        prompts = prompts.to(self.device)
        return self.encode_context(prompts.ids, prompts.present, prompts.positions)


class AutoregressiveModel(Baseline):
    """Predicts each token from the prompt and the tokens before it.

    A text is words and its end, or as many words as there are positions; it never holds padding, for which the head has
    no row. So the probabilities of all texts sum to one.

    Args:
        vocab_size: V.
        width, depth, heads: of the Transformer; width / heads must be even.
        max_length: text positions that the model is trained for.
        max_prompt_length: prompt positions that it is trained for, 0 = none.
        end_id, pad_id: the tokenizer's end of text and padding.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        max_length: int = 64,
        max_prompt_length: int = 0,
        end_id: int = 2,
        pad_id: int = 0,
    ) -> None:
        super().__init__(vocab_size, width, depth, heads)
        self.start = nn.Parameter(torch.randn(width))  # what the first token is predicted from
        self.head = nn.Linear(width, vocab_size - 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, context: Context | None = None) -> Tensor:
        """Features h [B, L, W] of texts ids [B, L]; h[:, j] is for token j and depends on the tokens before it only."""
        B, L = ids.shape
        x = torch.cat([self._start(B), self.space.embed(ids[:, :-1])], 1)
        return self._encode(x, None, causal_mask(L, context, ids.device), context)[0]

    def log_probs(self, batch: Batch, network: Network | None = None) -> Tensor:
        """log p(token | prompt, tokens before it) [B, L] in nats, at most 0; 0 where nothing is predicted.

        What follows the end of a text is neither predicted nor charged, and a text without an end has none. So the sum
        over positions is the exact log-likelihood of the text; `batch.known` is not looked at. network: the passes to
        call instead of the model's own.
        """
        forward, encode_context = network or Network(self, self.encode_context)
        charged = self.charged(batch.ids)
        h = forward(batch.ids, prompt_context(batch, encode_context))
        rows = torch.where(charged, batch.ids - (batch.ids > self.config.pad_id).long(), 0)
        return torch.where(charged, -ops.cross_entropy(h, self.head.weight, rows), 0.0)

    def charged(self, ids: Tensor) -> Tensor:
        """[B, L] bool: the words and the end of texts ids [B, L], not what follows an end, nor padding."""
        padding: Tensor = ids == self.config.pad_id
        stops = (padding | (ids == self.config.end_id)).long()
        first: Tensor = stops.cumsum(1) == stops  # no stop before it
        return first & ~padding

    def logits(self, h: Tensor) -> Tensor:
        """All logits [.., V] of features h [.., W]; minus infinity for padding."""
        words = self.head(h)
        never = torch.full_like(words[..., :1], -math.inf)
        return torch.cat([words[..., : self.config.pad_id], never, words[..., self.config.pad_id :]], -1)

    def step(self, ids: Tensor, seen: Context | None) -> tuple[Tensor, Context]:
        """Logits [B, V] of the token that follows ids [B, n], and `seen` grown by one position: the KV cache.

        seen: at n = 0 the prompt's context, or None; then what the step before gave.
        """
        x = self.space.embed(ids[:, -1:]) if ids.shape[1] else self._start(len(ids))
        positions = torch.full((1, 1), ids.shape[1], device=ids.device)
        h, keys, values = self._encode(x, positions, attention_mask(1, seen, None, None), seen)
        there = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
        last = Context(torch.stack(keys), torch.stack(values), there)
        return self.logits(h[:, 0]), last if seen is None else seen.followed_by(last)

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        prompts: Prompts | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Token ids [B, L] of one text for each generator: words, the end, padding.

        Args:
            generators: B of them; each gives its sample L numbers, so a text does not depend on its batch.
            prompts: one for each sample; None = no prompt.
            temperature: at least 0.001; 1 samples the model as it is.
            top_p: in (0, 1]; only the most probable tokens that together have this much are drawn (Holtzman et al.
                2020, arXiv:1904.09751). 1 = all.

        Raises:
            UserError: for arguments out of range, and prompts that the model wasn't trained for.
        """
        check_sampling(temperature, top_p)
        B, L = len(generators), int(self.config.max_length)
        seen = self._prompt_context(prompts, B)
        quantiles = uniform(generators, L).to(self.device, precision(self.device))
        ids = torch.empty(B, 0, dtype=torch.long, device=self.device)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        while ids.shape[1] < L and not ended.all():
            logits, seen = self.step(ids, seen)
            token = draw(logits, quantiles[:, ids.shape[1]], temperature, top_p)
            ids = torch.cat([ids, token.masked_fill(ended, self.config.pad_id)[:, None]], 1)
            ended = ended | (token == self.config.end_id)
        return F.pad(ids, (0, L - ids.shape[1]), value=self.config.pad_id)

    def _start(self, count: int) -> Tensor:
        return rms_norm(self.start).expand(count, 1, -1)


class MaskedModel(Baseline):
    """Masked diffusion: predicts the tokens at masked positions from all others (MDLM, Sahoo et al. 2024,
    arXiv:2406.07524).

    At time t in (0, 1] a position is masked with probability t (alpha_t = 1 - t). The network is not told t. The end of
    a text and padding are content, as they are for the denoiser. The mask is an input but no token: the head has no row
    for it, and tokens that aren't masked stay (the paper's zero masking probabilities and carry-over unmasking).

    Args:
        vocab_size: V, without the mask.
        width, depth, heads: of the Transformer; width / heads must be even.
        max_length: text positions that the model is trained for.
        max_prompt_length: prompt positions that it is trained for, 0 = none.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        max_length: int = 64,
        max_prompt_length: int = 0,
    ) -> None:
        super().__init__(vocab_size, width, depth, heads)
        self.mask = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, masked: Tensor, context: Context | None = None) -> Tensor:
        """Features h [B, L, W] of texts ids [B, L], of which `masked` [B, L] bool is not seen."""
        x = torch.where(masked[..., None], rms_norm(self.mask), self.space.embed(ids))
        L = ids.shape[1]
        return self._encode(x, None, attention_mask(L, context, None, None), context)[0]

    def logits(self, h: Tensor) -> Tensor:
        """All logits [.., V] of features h [.., W]."""
        logits: Tensor = self.head(h)
        return logits

    def cross_entropy(self, batch: Batch, masked: Tensor, network: Network | None = None) -> Tensor:
        """-log p(token | prompt, tokens that aren't masked) [B, L] in nats where masked, else 0.

        network: the passes to call instead of the model's own.
        """
        forward, encode_context = network or Network(self, self.encode_context)
        h = forward(batch.ids, masked, prompt_context(batch, encode_context))
        losses = ops.cross_entropy(h[masked], self.head.weight, batch.ids[masked])
        return losses.new_zeros(masked.shape).masked_scatter(masked, losses)

    def loss(self, batch: Batch, t: Tensor, quantiles: Tensor, network: Network | None = None) -> Tensor:
        """One-sample estimate of the bound on -log p(target | context) per target position, for training.

        The bound is int_0^1 E_{masked at t} sum_masked -log p(token | rest) dt / t, the paper's continuous-time one for
        alpha_t = 1 - t. A target position is masked where its number in `quantiles` [B, L], uniform in [0, 1), is below
        t [B], in (0, 1].
        """
        target = batch.target()
        losses = self.cross_entropy(batch, (quantiles < t[:, None]) & target, network)
        return (losses / t[:, None]).sum() / target.sum().clamp(min=1)

    @torch.no_grad()
    def bound(self, batch: Batch, generator: torch.Generator, samples: int = 4) -> Tensor:
        """An unbiased estimate of an upper bound on -log p(target | context) of each example, [B], in nats.

        The integral in `loss` over t is done exactly: given that n of T target positions are masked, it doesn't matter
        which t it was, and int_0^1 (T over n) t^n (1 - t)^(T - n) dt / t = 1 / n. So the bound is the mean over n
        uniform in 1 .. T of T / n times the cross-entropy of n random positions (Ou et al. 2024, arXiv:2406.03736,
        theorem 2). `samples` strata of n for each example, offset over the batch. Every target position counts: the
        end of text, padding and `<unk>` are charged like words.
        """
        target = batch.target()
        B, count = len(target), target.sum(1)
        offset = float(torch.rand(1, generator=generator, dtype=torch.float64))
        total = torch.zeros(B, device=target.device)
        for k in range(samples):
            share = torch.from_numpy((k + (offset + np.arange(B) / B) % 1.0) / samples)
            n = (share * count.cpu()).long().to(target.device) + 1
            order = torch.rand(target.shape, generator=generator).to(target.device).masked_fill(~target, 2.0)
            masked = (order.argsort(1).argsort(1) < n[:, None]) & target
            total += self.cross_entropy(batch, masked).sum(1) * count / n / samples
        return total

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        prompts: Prompts | None = None,
        *,
        temperature: float = 1.0,
        steps: int = 32,
        keep: Sequence[int] = (),
    ) -> Tensor:
        """Token ids [B, L] of one text for each generator, unmasked over N steps from t = 1 to t = 0.

        From t to s a masked position stays masked with probability (1 - alpha_s) / (1 - alpha_t) = s / t, else its
        token is drawn from the prediction (the paper's reverse posterior). With steps of 1 / N the step in which a
        position is unmasked is uniform, so it is drawn beforehand, and steps that unmask nothing are left out.

        Args:
            generators: B of them; each gives its sample 2 L numbers, so a text does not depend on its batch.
            prompts: one for each sample; None = no prompt.
            temperature: at least 0.001; 1 samples the model as it is.
            steps: N >= 1; there are at most min(N, L) evaluations.
            keep: tokens that the temperature leaves as probable as they are. A pipeline keeps the end of text and
                padding; tempered like words they make texts too short.

        Raises:
            UserError: for arguments out of range, and prompts that the model wasn't trained for.
        """
        check_sampling(temperature)
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps {steps}: ask for a whole number, at least 1")
        B, L = len(generators), int(self.config.max_length)
        context = self._prompt_context(prompts, B)
        turn = dense_rank((uniform(generators, L) * steps).long()).to(self.device)
        quantiles = uniform(generators, L).to(self.device, precision(self.device))
        ids = torch.zeros(B, L, dtype=torch.long, device=self.device)
        for k in range(int(turn.max()) + 1):
            now = turn == k
            h = self(ids, turn >= k, context)
            ids[now] = draw(self.logits(h[now]), quantiles[now], temperature, keep=keep)
        return ids


BASELINES: dict[str, type[Baseline]] = {"autoregressive": AutoregressiveModel, "masked": MaskedModel}


def causal_mask(L: int, context: Context | None, device: torch.device) -> Tensor:
    """[B or 1, 1, L, C + L] bool, True = attend: each position to all context, to itself and to those before it."""
    before = torch.ones(1, L, L, dtype=torch.bool, device=device).tril()
    if context is not None:
        seen = context.mask[:, None].expand(-1, L, -1)
        before = torch.cat([seen, before.expand(len(seen), -1, -1)], 2)
    return before[:, None]


def check_sampling(temperature: float, top_p: float = 1.0) -> None:
    """Refuses what is out of range."""
    if not 1e-3 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is out of range: give 0.001 or more, 1 is neutral")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} is out of range: give a probability above 0, 1 is neutral")


def uniform(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """`count` numbers in [0, 1) from each generator, [B, count] float64 on the host."""
    if not generators:
        raise UserError("there is no generator: give one for each sample")
    drawn = [torch.rand(count, generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators]
    return torch.stack(drawn)


def dense_rank(numbers: Tensor) -> Tensor:
    """How many different numbers of its row are below each of numbers [B, L]."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(numbers.numpy(), "dense", axis=1)).long() - 1


def precision(device: torch.device) -> torch.dtype:
    """Of sums of probabilities: fp32 ones would cut off the rare tokens of a large vocabulary (Zheng et al. 2024,
    arXiv:2409.02908), but Apple's GPUs have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(
    logits: Tensor, quantiles: Tensor, temperature: float = 1.0, top_p: float = 1.0, keep: Sequence[int] = ()
) -> Tensor:
    """Tokens [n]: the `quantiles` [n] in [0, 1) of the distributions softmax(logits [n, V] / temperature).

    The tokens in `keep` stay as probable as softmax(logits) says, the others share the rest.
    """
    logits, ids = logits.to(precision(logits.device)), sorted(set(keep))
    words = logits / temperature
    words[:, ids] = -torch.inf
    p = words.softmax(-1)
    if ids:
        kept = logits.softmax(-1)[:, ids]
        p *= (1 - kept.sum(-1, keepdim=True)).clamp(min=0)
        p[:, ids] = kept
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p
        p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    upper = p.cumsum(-1)
    wanted = quantiles.to(p)[:, None] * upper[:, -1:]
    return torch.searchsorted(upper, wanted, right=True)[:, 0].clamp(max=p.shape[-1] - 1)


def kind(folder: Path) -> str | None:
    """Which of the baselines is in a run's folder; None if there is none."""
    try:
        name = json.loads((folder / FOLDER / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((known for known, model in BASELINES.items() if model.__name__ == name), None)


def load(folder: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model (AutoregressiveModel or MaskedModel, see `kind`) and the tokenizer in the folder of a finished run.

    Raises:
        UserError: in one line, for folders that hold no baseline, or a damaged one.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"no model at {folder}: name the folder that embdiff train wrote")
    if (folder / "model_index.json").exists():
        raise UserError(
            f"{folder} holds a diffusion pipeline, no baseline: name a folder that embdiff train wrote with "
            f"--objective {' or '.join(BASELINES)}"
        )
    if not (folder / FOLDER).exists():
        if (folder / "run.yaml").exists():
            raise UserError(
                f"the run in {folder} is not finished: continue it with embdiff train --output {folder} --resume"
            )
        raise UserError(f"{folder} holds no baseline: name the folder that embdiff train wrote")
    name = kind(folder)
    if name is None:
        raise UserError(f"{folder / FOLDER} is damaged or of another kind: its config.json names no baseline")
    try:
        model = BASELINES[name].from_pretrained(folder / FOLDER, use_safetensors=True)
    except Exception as error:  # missing or broken files: the library has many errors
        raise UserError(f"cannot load the model in {folder}: {reason(error)}; the folder is damaged") from error
    tokenizer = vocabulary.load(str(folder / "tokenizer"))
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, its model {model.config.vocab_size}: no pair"
        )
    return model, tokenizer
