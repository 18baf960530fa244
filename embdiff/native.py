"""`native.cpp` in Python: a step of sampling on a CPU with AVX512-VNNI and AVX512-BF16, built where a compiler is.

    R positions   V vocabulary   W width   H = W + D features   D embedding dim   K candidates

torch's operators reach such a CPU's matrix rate for many rows and large layers only. For one text most of the time goes
by between them; here all threads stay in one loop, and what follows a product is done while it is in registers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff import ops
from embdiff.compilation import compiler as compiler
from embdiff.denoiser import Context, Denoiser
from embdiff.errors import reason
from embdiff.noise import alpha_sigma
from embdiff.paths import cache_dir

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w"]
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "fma")
PANEL, BLOCK = 64, 256  # outputs of a panel, and words held at a time, as in the source
LEVELS = 256  # of which modulations are kept


class UnavailableError(Exception):
    """There is no compiler, or it fails."""


def suits(denoiser: nn.Module) -> bool:
    """Whether a denoiser's steps can be taken so: on this CPU, in bf16, with shapes of which vectors come out even.

    CPUs with AMX multiply bf16 several times faster than the instructions that are used here: torch's operators are.
    """
    if not isinstance(denoiser, Denoiser) or denoiser.device.type != "cpu" or denoiser.dtype is not torch.bfloat16:
        return False
    head_width = denoiser.rotary.head_width
    shaped = denoiser.dim % 16 == 0 and head_width % 32 == 0 and head_width <= 1024
    # Weights that can't tell that they were changed are not copied.
    return has_instructions() and shaped and not any(p.is_inference() for p in denoiser.parameters())


@functools.cache
def has_instructions() -> bool:
    """Whether this is such a CPU, under Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    return platform.machine() == "x86_64" and flags.issuperset(NEEDED) and "amx_tile" not in flags


def takes_candidates(count: int) -> bool:
    """Whether so many candidates of a position fill vectors."""
    return count % 16 == 0


def is_loaded() -> bool:
    """Whether anything here has been used."""
    return library.cache_info().currsize > 0


@functools.cache
def library() -> ctypes.CDLL:
    """The built source, kept from process to process in `cache_dir`; raises UnavailableError."""
    options = [*FLAGS, *("-m" + name.replace("_", "") for name in NEEDED)]
    program = compiler()
    key = hashlib.sha256("\n".join([SOURCE.read_text(), str(program), *options]).encode()).hexdigest()[:16]
    built = cache_dir() / f"native-{key}.so"
    try:
        if built.exists():
            return ctypes.CDLL(str(built))
        if program is None:
            raise UnavailableError("no C++ compiler")
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / built.name
            run = subprocess.run([program, *options, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
            if run.returncode:
                raise UnavailableError(f"{program} says: {reason(Exception(run.stderr))}")
            _keep(made, built)
            return ctypes.CDLL(str(made))
    except OSError as error:
        raise UnavailableError(reason(error)) from error


def _keep(made: Path, built: Path) -> None:
    """Whole or not at all, whoever else does; nowhere if that can't be."""
    beside = built.with_name(f".{built.name}-{os.getpid()}")
    with suppress(OSError):
        built.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, beside)
        beside.replace(built)


def call(function: Callable[..., int], *args: Any) -> None:
    """A function of the library; raises MemoryError where it says so."""
    if function(*args):
        raise MemoryError("can't allocate memory")


Index, Pointer = ctypes.c_int64, ctypes.c_void_p


class _Weight(ctypes.Structure):
    _fields_ = (("panels", Pointer), ("scale", Pointer), ("steps", Index), ("outputs", Index))


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, Index) for name in ("width", "heads", "depth", "dim", "bytes", "threads")),
        ("weights", ctypes.POINTER(_Weight)),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, Index) for name in ("texts", "levels", "context")),
        *((name, Pointer) for name in ("starts", "places", "z", "last", "cos", "sin", "modulation", "filter")),
        *((name, Pointer) for name in ("keys", "values", "seen", "out")),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, Index) for name in ("words", "padded", "features", "dim", "bytes", "threads")),
        ("weight", _Weight),
        ("table", Pointer),
        ("rows", Pointer),
    )


class _Posterior(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float),
        ("kept", Index),
        ("keep", ctypes.POINTER(Index)),
        *((name, Pointer) for name in ("mean", "probability", "text", "mass")),
    )


class Packed:
    """A weight [N, K] in the order in which it is read. rows: N up to a multiple of this."""

    def __init__(self, weight: Tensor, int8: bool, rows: int = PANEL) -> None:
        outputs, inputs = weight.shape
        padded = F.pad(weight.detach().float(), (0, 0, 0, -outputs % rows))
        self.scale: Tensor | None = None
        if int8:
            rounded, step = ops.eight_bits(padded)
            self.scale = step[:, 0].contiguous()
            numbers = (rounded.int() + 128).to(torch.uint8)
        else:
            numbers = padded.to(torch.bfloat16)
        in_word = 4 if int8 else 2
        self.panels = numbers.view(-1, PANEL, inputs // in_word, in_word).transpose(1, 2).contiguous()
        scale = None if self.scale is None else self.scale.data_ptr()
        self.struct = _Weight(self.panels.data_ptr(), scale, inputs // in_word, outputs)


class Pass:
    """A denoiser's passes, without gradients.

    Args:
        denoiser: one that `suits`; its weights are copied. int8: whether the products of the blocks are taken in 8
            bits, as by `embdiff.forward.Int8Linear`.

    Raises:
        UnavailableError: where it can't be built.
    """

    def __init__(self, denoiser: Denoiser, int8: bool) -> None:
        self.library = library()
        self.denoiser = denoiser
        embed = torch.cat([denoiser.embed_z.weight, denoiser.embed_self_cond.weight], 1)
        blocks = list(cast(Any, denoiser.blocks))
        layers = [(b.qkv, b.attention_out, b.mlp_in, b.mlp_out) for b in blocks]
        self.packed = [Packed(embed, False), *(Packed(layer.weight, int8) for layer in chain(*layers))]
        self.modulation = torch.cat([*(b.modulation.weight for b in blocks), denoiser.final.weight]).detach()
        self.placed: tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self.modulations = dict[float, tuple[Tensor, Tensor]]()
        self.weights = (_Weight * len(self.packed))(*(packed.struct for packed in self.packed))
        self.shape = (denoiser.embed_z.out_features, blocks[0].heads, len(blocks), denoiser.dim, int(int8))

    def __call__(
        self,
        z: Tensor,
        gamma: Tensor,
        context: Context | None = None,
        self_cond: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """As `Denoiser.forward`."""
        B, L, D = z.shape
        W = self.shape[0]
        modulation, filter = self._modulated(gamma)
        starts, places, cos, sin = self._placed(B, L)
        if rows is not None:
            starts, places = torch.searchsorted(rows, starts), rows % L
        latents, last = (None if x is None else self._rows(x, rows) for x in (z, self_cond))
        C = 0 if context is None else context.mask.shape[1]
        seen = () if context is None else (context.keys, context.values, context.mask)
        keys, values, mask = (part.contiguous() for part in seen) if seen else (None, None, None)
        out = torch.empty(len(places), W + D, dtype=torch.bfloat16)
        tensors = (starts, places, latents, last, cos, sin, modulation, filter, keys, values, mask, out)
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        network = _Network(*self.shape, torch.get_num_threads(), self.weights)
        call(self.library.forward, ctypes.byref(network), ctypes.byref(_Arguments(B, len(filter), C, *addresses)))
        return out.view(B, L, -1) if rows is None else out

    def _placed(self, B: int, L: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of B whole texts: where each begins [B + 1], the places of their rows [R], and rotations [L, W / heads / 2];
        those of the last shape are kept."""
        if self.placed is None or self.placed[0] != (B, L):
            cos, sin = (part.contiguous() for part in self.denoiser.rotary(L))
            self.placed = (B, L), (L * torch.arange(B + 1), torch.arange(L).repeat(B), cos, sin)
        return self.placed[1]

    @staticmethod
    def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
        """[R, D], fp32, of [B, L, D]."""
        flat = x.float().flatten(0, 1)
        return (flat if rows is None else flat[rows]).contiguous()

    def _modulated(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Modulations [G, depth 6 W + 2 W] and shares of the matched filter [G] at noise levels gamma [B]; G = 1 where
        they are the same, and those of single ones are kept."""
        if len(gamma) > 1 and not bool((gamma == gamma[0]).all()):
            return self._new(gamma)
        level = float(gamma[0])
        if level not in self.modulations:
            if len(self.modulations) >= LEVELS:
                self.modulations.clear()
            self.modulations[level] = self._new(gamma[:1])
        return self.modulations[level]

    def _new(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.denoiser.condition(gamma[:, None].float())[:, 0]
        alpha, sigma = alpha_sigma(gamma)
        modulation = F.linear(condition, self.modulation).float().contiguous()
        return modulation, (self.denoiser.filter_ramp * alpha / sigma**2).float().contiguous()


class Head:
    """The vocabulary's part of a step.

    Args:
        weight: [V, H]. table: [V, D]. Both in bf16, and not changed afterwards. int8: whether logits are rounded so.

    Raises:
        UnavailableError: where it can't be built.
    """

    def __init__(self, weight: Tensor, table: Tensor, int8: bool) -> None:
        self.library = library()
        (V, H), D = weight.shape, table.shape[1]
        self.rows, self.packed = weight.detach().contiguous(), Packed(weight, int8, BLOCK)
        padded = V + -V % BLOCK
        self.dim = D
        wide = F.pad(table.detach().to(torch.bfloat16), (0, -D % PANEL, 0, padded - V))
        pairs = wide.view(padded // 2, 2, -1, PANEL)  # [words / 2, 2, D / 64, 64]
        self.table = pairs.permute(2, 0, 3, 1).contiguous()
        self.shape = (V, padded, H, D, int(int8))

    def _struct(self) -> Any:
        pointers = (self.table.data_ptr(), self.rows.data_ptr())
        return ctypes.byref(_Head(*self.shape, torch.get_num_threads(), self.packed.struct, *pointers))

    def posterior(
        self, h: Tensor, temperature: float, keep: Sequence[int], text: Tensor | None = None, texts: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean [R, D] and kept [R, k] of features h [R, H], as `embdiff.ops.expectation` has them.

        text: of each row [R], of so many `texts`; then also the sums of words' probabilities [texts, V] over their
        rows.
        """
        h, R = h.contiguous(), len(h)
        mean, kept = torch.empty(R, self.dim), torch.empty(R, len(keep))
        mass = None if text is None else torch.zeros(texts, self.shape[1])
        addresses = [None if t is None else t.data_ptr() for t in (mean, kept, text, mass)]
        asked = _Posterior(temperature, len(keep), (Index * len(keep))(*keep), *addresses)
        call(self.library.token_posterior, self._struct(), Index(R), Pointer(h.data_ptr()), ctypes.byref(asked))
        return mean, kept, None if mass is None else mass[:, : self.shape[0]]

    def most_probable(self, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `embdiff.ops.most_probable`, in no order, of features h [R, H]; count: K <= V."""
        h, R = h.contiguous(), len(h)
        scores, tokens = torch.empty(R, count), torch.empty(R, count, dtype=torch.long)
        pointers = [Pointer(t.data_ptr()) for t in (h, scores, tokens)]
        call(self.library.largest_logits, self._struct(), Index(R), pointers[0], Index(count), *pointers[1:])
        return scores, tokens


def best_path(scores: Tensor, pairs: Tensor) -> Tensor:
    """`embdiff.ops.best_path_reference` for K a multiple of 16; raises UnavailableError."""
    B, L, K = scores.shape
    path = torch.empty(B, L, dtype=torch.long)
    scores, pairs = scores.contiguous(), pairs.contiguous()
    pointers = [Pointer(t.data_ptr()) for t in (scores, pairs, path)]
    call(library().best_path, Index(B), Index(L), Index(K), *pointers, Index(torch.get_num_threads()))
    return path
