"""What speed is compared with: other people's loops around the same network, and autoregressive models of its size.

Each peer is written as its kind is commonly written, without anything that slows it down on purpose:

    naive            a diffusers loop: fp32, eager, whole logits, the scheduler's own step, guidance by a second pass
    diffusion_lm     Diffusion-LM's: the same over 200 steps, each prediction moved to its nearest embedding
    generate         transformers' `generate` with a GPT-2
    tight            a KV-cache loop by hand: one buffer of keys and values, nothing else kept or copied
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff.batches import Prompts
from embdiff.denoiser import Denoiser


@dataclass(frozen=True)
class Naive:
    """Samples by a diffusers scheduler that is given x0.

    prompts: seen at every step anew, since nothing keeps their keys and values. scale: of guidance, 1 = one pass.
    """

    denoiser: Denoiser
    prompts: Prompts | None = None
    scale: float = 1.0

    @torch.no_grad()
    def __call__(self, batch: int, length: int, steps: int, to_nearest: bool = False) -> Tensor:
        """Token ids [B, L]."""
        device = self.denoiser.device
        scheduler = diffusers.DDPMScheduler(
            1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
        )
        scheduler.set_timesteps(steps, device=device)
        table = self.denoiser.space.table()
        z = torch.randn(batch, length, self.denoiser.dim, device=device)
        x0 = torch.zeros_like(z)
        for t in scheduler.timesteps:
            kept = scheduler.alphas_cumprod[t]
            gamma = torch.log((1 - kept) / kept).to(device).expand(batch).float()
            found = self.predict(z, gamma, x0, table, True)
            if self.scale != 1.0:
                other = self.predict(z, gamma, x0, table, False)
                found = other + self.scale * (found - other)
            x0 = table[nearest(found, table)] if to_nearest else found
            z = scheduler.step(x0, t, z).prev_sample
        return nearest(z, table)

    def predict(self, z: Tensor, gamma: Tensor, x0: Tensor, table: Tensor, prompted: bool) -> Tensor:
        """softmax(logits) E, with the prompt in front of the text in one joint pass."""
        if self.prompts is None:
            return self.denoiser.logits(self.denoiser(z, gamma, None, x0)).softmax(-1) @ table
        words = self.denoiser.space.embed(self.prompts.ids)
        C, L = words.shape[1], z.shape[1]
        known = F.pad(torch.ones_like(self.prompts.present), (0, L))
        present = F.pad(self.prompts.present & prompted, (0, L), value=True)
        text = torch.arange(L, device=z.device).expand(len(z), L)
        h = self.denoiser(
            torch.cat([words, z], 1), gamma, None, F.pad(x0, (0, 0, C, 0)),
            known=known, present=present, positions=torch.cat([self.prompts.positions, text], 1),
        )  # fmt: skip
        return self.denoiser.logits(h[:, C:]).softmax(-1) @ table


class Apart:
    """A call in a process of its own, where nothing is set that ours sets for itself, such as to keep freed memory.

    make: gives what is called there; both it and the arguments are sent there, and of results only that there are any.
    """

    def __init__(self, make: Callable[[], Callable[..., object]]) -> None:
        start = multiprocessing.get_context("spawn")
        self.end, other = start.Pipe()
        self.process = start.Process(target=served, args=(other, make), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, *args: Any) -> None:
        self.end.send(args)
        if failed := self.end.recv():
            raise RuntimeError(failed)

    def __del__(self) -> None:
        self.process.kill()


def served(end: Connection, make: Callable[[], Callable[..., object]]) -> None:
    """What the process does: a call for each message, until there is nobody any more."""
    call = make()
    while True:
        try:
            args = end.recv()
        except EOFError:
            return
        try:
            call(*args)
        except Exception as error:
            end.send(f"{type(error).__name__}: {error}")
        else:
            end.send("")


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The ids [B, L] of the embeddings that are nearest to points x [B, L, D], as Diffusion-LM finds them."""
    ids: Tensor = torch.cdist(x.flatten(0, 1), table).argmin(-1).view(x.shape[:-1])
    return ids


def generate(
    size: dict[str, int], vocabulary: int, length: int, dtype: torch.dtype, device: torch.device, static: bool
) -> Callable[[int], Tensor]:
    """transformers' `generate` of exactly `length` tokens with a GPT-2. static: with its static cache, compiled."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length + 1, n_embd=size["width"], n_layer=size["depth"],
        n_head=size["heads"], bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device, dtype).eval()
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def run(batch: int) -> Tensor:
        start = torch.ones(batch, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            ids: Tensor = model.generate(
                start, attention_mask=start, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length,
                **options,
            )  # fmt: skip
        return ids

    return run


class Tight(nn.Module):
    """A Llama-like decoder with one buffer of keys and values for all layers."""

    def __init__(self, size: dict[str, int], vocabulary: int, length: int, batch: int) -> None:
        super().__init__()
        W, self.depth, self.heads = size["width"], size["depth"], size["heads"]
        head = W // self.heads

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

        self.embeddings = weight(vocabulary, W)
        self.qkv = nn.ParameterList([weight(3 * W, W) for _ in range(self.depth)])
        self.out = nn.ParameterList([weight(W, W) for _ in range(self.depth)])
        self.up = nn.ParameterList([weight(4 * W, W) for _ in range(self.depth)])
        self.down = nn.ParameterList([weight(W, 4 * W) for _ in range(self.depth)])
        rate = 10000.0 ** -(torch.arange(0, head, 2) / head)
        angle = torch.arange(length)[:, None] * rate
        self.register_buffer("places", torch.arange(length))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("past", torch.zeros(self.depth, 2, batch, self.heads, length, head))

    def step(self, ids: Tensor, position: Tensor) -> Tensor:
        """The tokens [B] that follow ids [B], the ones at a position [1]; one shape for all, so compiled once."""
        x = F.embedding(ids, self.embeddings)
        B, W = x.shape
        cos, sin = self.cos[position], self.sin[position]
        seen = (self.places <= position)[None]
        for i in range(self.depth):
            q, k, v = F.linear(F.rms_norm(x, (W,)), self.qkv[i]).view(B, 3, self.heads, -1).unbind(1)
            self.past[i, 0].index_copy_(2, position, turned(k, cos, sin)[:, :, None])
            self.past[i, 1].index_copy_(2, position, v[:, :, None])
            keys, values = self.past[i]
            a = F.scaled_dot_product_attention(turned(q, cos, sin)[:, :, None], keys, values, attn_mask=seen)
            x = x + F.linear(a.reshape(B, W), self.out[i])
            x = x + F.linear(F.relu(F.linear(F.rms_norm(x, (W,)), self.up[i])).square(), self.down[i])
        logits = F.linear(F.rms_norm(x, (W,)), self.embeddings).float()
        # The largest of logits with Gumbel noise is a draw from their softmax.
        drawn: Tensor = (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)
        return drawn

    @torch.no_grad()
    def forward(self, batch: int) -> Tensor:
        """Token ids [B, L]."""
        ids = torch.ones(batch, dtype=torch.long, device=self.embeddings.device)
        found = []
        for position in self.places[:, None]:
            ids = self.step(ids, position).clone()  # a recorded step writes to one place
            found.append(ids)
        return torch.stack(found, 1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, d] by rotary angles [d / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def network_flops(size: dict[str, int], length: int) -> float:
    """Multiplications and additions of one pass of the denoiser, for each position."""
    W, D = size["width"], size["dim"]
    return size["depth"] * (2 * 12 * W * W + 4 * length * W) + 4 * W * D


def flops(size: dict[str, int], vocabulary: int, length: int) -> float:
    """The same of one evaluation of the denoiser with its posterior mean."""
    W, D = size["width"], size["dim"]
    return network_flops(size, length) + 2 * vocabulary * (W + D) + 2 * vocabulary * D


def training_flops(size: dict[str, int], vocabulary: int, length: int, self_conditioned: bool = False) -> float:
    """The same of a step of training: 6 for each weight of a product, which is used forward and twice backward, and
    attention; before it, with self-conditioning, an evaluation. What is computed again backward doesn't count."""
    once = network_flops(size, length) + 2 * vocabulary * (size["width"] + size["dim"])
    return 3 * once + (flops(size, vocabulary, length) if self_conditioned else 0)


def waiting(size: dict[str, int], vocabulary: int, length: int, launches: int, machine: Machine) -> float:
    """Seconds that an autoregressive model takes at least for `length` tokens, whatever the batch: for each it reads
    its weights, and starts so many things in each layer, one after the other."""
    weights = size["depth"] * 12 * size["width"] ** 2 + vocabulary * size["width"]
    return length * (2 * weights / machine.bandwidth + size["depth"] * launches * machine.launch)


@dataclass(frozen=True)
class Machine:
    """What limits everyone. rate, plain_rate: multiplications and additions a second, in the precision that is measured
    and in fp32; bandwidth: bytes a second; launch: seconds from one small operation to the next."""

    rate: float
    plain_rate: float
    bandwidth: float
    launch: float

    @staticmethod
    def measured(dtype: torch.dtype, device: torch.device) -> Machine:
        """This one."""
        large, small = torch.zeros(2**26, device=device), torch.zeros(1, device=device)
        return Machine(
            matrix_rate(dtype, device),
            matrix_rate(torch.float32, device),
            20 * large.nbytes / best_seconds(lambda: [large.add_(1) for _ in range(10)], device),
            best_seconds(lambda: [small.add_(1) for _ in range(100)], device) / 100,
        )


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions a second of a large matrix product: the best of some."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of seven runs."""
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
