"""What only a GPU can show, each figure beside what it is compared with; all of it with random weights and tokens.

    python benchmarks/gpu.py                                    all parts, one after the other
    python benchmarks/gpu.py --part vocabulary --results runs/gpu_vocabulary.json      one; a process for each part is
                                                                                       safest, as a fault of the device
                                                                                       spoils all that follows it

    vocabulary   the posterior mean over 50,257 words: ours, its reference, and whole logits with nothing around them
    loop         a run of 8 steps: the whole call, its graph alone, and what of that are network and vocabulary; and
                 whether anything in it waits for the device
    training     tokens/s and the share of the matrix rate in a step of 32 x 1,024 positions, with the run's optimisers
    tiles        the vocabulary by other tiles than `kernels.tile` takes
    shapes       the compiled network, for one shape and for all shapes

Times are medians between CUDA events. What is launched from Python in use is launched so here; what is part of a graph
in use is measured as a graph.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from common import failure, keep, write
from peers import Machine, flops, training_flops
from speed import VOCABULARY, filled, graphs, pipeline, recorded, seconds_of
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from embdiff import losses, ops
from embdiff.batches import Batch, Mixture
from embdiff.cli.common import quiet
from embdiff.compilation import compiled
from embdiff.config import TrainConfig
from embdiff.denoiser import SIZES, Denoiser
from embdiff.optim import Muon

WORDS, STEPS = 50_257, 8
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16

Figures = dict[str, Any]


def main(
    part: list[str] = typer.Option([], help="vocabulary, loop, training, tiles or shapes; by default all."),
    budget: float = typer.Option(float("inf"), help="Seconds after which nothing more is begun."),
    results: Path = typer.Option(Path("benchmarks/results/gpu.json"), help="Where the figures go."),
) -> None:
    """Writes the figures as they come and prints them in the end."""
    if not torch.cuda.is_available():
        typer.echo("gpu.py: no CUDA device here", err=True)
        raise typer.Exit(2)
    if unknown := sorted(set(part) - set(PARTS)):
        typer.echo(f"gpu.py: part {unknown[0]!r} is unknown: choose {', '.join(PARTS)}", err=True)
        raise typer.Exit(2)
    quiet()
    deadline = time.monotonic() + budget
    limits = Machine.measured(BF16, DEVICE)
    figures: Figures = {"matrix_rate": limits.rate, "bandwidth": limits.bandwidth, "launch": limits.launch}
    for name in part or list(PARTS):
        figures[name] = []
        for found in begun(PARTS[name](limits), deadline):
            figures[name].append(found)
            keep(results, figures)
    write(results, figures)


def begun(part: Iterator[Figures], deadline: float) -> Iterator[Figures]:
    """The figures of a part while there is time, each with its seconds; and what stopped it, if anything did."""
    while (start := time.monotonic()) < deadline:
        try:
            found = next(part)
        except StopIteration:
            return
        except Exception as error:  # the other parts have figures of their own
            yield {"failed": failure(error)}
            return
        torch.cuda.empty_cache()
        yield found | {"took": round(time.monotonic() - start, 1)}
    yield {"failed": "no time left"}


# ------------------------------------------------------------------------------------------------------ the parts


@torch.no_grad()
def vocabulary(limits: Machine) -> Iterator[Figures]:
    """Seconds and memory of the posterior mean, for 64 to 65,536 rows of the largest network's features."""
    for rows in (64, 1024, 65_536):
        yield posterior(rows, limits)


@torch.no_grad()
def posterior(rows: int, limits: Machine) -> Figures:
    """For so many rows."""
    h, weight, table = problem(rows)
    apart = torch.tensor([0, 2], device=DEVICE)
    chunks = h.split(16_384)  # whole logits of more rows would not fit

    def ours() -> object:
        return ops.expectation(h, weight, table, 0.76, apart)

    def reference() -> object:
        return [ops.expectation_reference(chunk, weight, table, 0.76, (0, 2)) for chunk in chunks]

    def bare() -> object:
        return [(chunk @ weight.T).softmax(-1) @ table for chunk in chunks]

    seconds = {
        "ours": events(recorded(ours, DEVICE)), "ours_launched": events(ours),
        "reference": events(reference), "whole_logits": events(recorded(bare, DEVICE)),
    }  # fmt: skip
    work, read = 2 * rows * len(weight) * (weight.shape[1] + table.shape[1]), weight.nbytes + table.nbytes
    return {
        "rows": rows, "seconds": seconds, "mib": {"ours": peak(ours), "reference": peak(reference)},
        "reference_over_ours": seconds["reference"] / seconds["ours_launched"],  # both launched from Python
        "whole_logits_over_ours": seconds["whole_logits"] / seconds["ours"],  # both as graphs
        "of_matrix_rate": work / seconds["ours"] / limits.rate,
        "of_bandwidth": read / seconds["ours"] / limits.bandwidth,
    }  # fmt: skip


@torch.no_grad()
def loop(limits: Machine) -> Iterator[Figures]:
    """Where the time of a run of the largest network goes."""
    for batch, length in ((1, 64), (1, 1024), (16, 64), (64, 256)):
        try:
            yield whole_run(batch, length, limits)
        except Exception as error:  # the other shapes have figures of their own
            yield {"batch": batch, "length": length, "failed": failure(error)}


@torch.no_grad()
def whole_run(batch: int, length: int, limits: Machine) -> Figures:
    """For one shape. `rest` is the sampler outside of network and vocabulary; `host` what a call does beside its
    graph."""
    pipe = pipeline("base", WORDS, length, DEVICE, BF16, True)

    def run() -> object:
        return pipe(
            num_samples=batch, num_inference_steps=STEPS, draw_length=False, skip_padding=False, output_type="seq"
        )

    run()
    run()
    whole = statistics.median(seconds_of(run) for _ in range(15))
    work = flops(SIZES["base"], WORDS, length) * batch * length * STEPS
    figures = {
        "batch": batch, "length": length, "seconds": whole, "tokens_per_second": batch * length / whole,
        "of_matrix_rate": work / whole / limits.rate, "waits_in_a_call": waits(run), **graphs(pipe),
    }  # fmt: skip
    for own in pipe._loops.kept.values():
        if own.graph is not None:
            figures |= shares(pipe, own, batch, length, whole) | {"waits_in_the_loop": forbidden(own)}
    return figures


def shares(pipe: Any, own: Any, batch: int, length: int, whole: float) -> dict[str, float]:
    """Of a recorded run."""
    from embdiff import kernels

    z, last = torch.randn(2, batch, length, pipe.denoiser.dim, device=DEVICE)
    gamma, network = torch.zeros(batch, device=DEVICE), pipe._network(pipe.device)
    h = network(z, gamma, None, last).flatten(0, 1)
    weight, table = own.inputs.weight, own.inputs.table
    replay = events(own.graph.replay)
    forward = STEPS * each_of_many(lambda: network(z, gamma, None, last))
    words = STEPS * each_of_many(lambda: kernels.parts(h, weight, table, 0.76, own.ends))
    return {
        "graph": replay, "network": forward / replay, "vocabulary": words / replay,
        "rest": 1 - (forward + words) / replay, "host": 1 - replay / whole,
    }  # fmt: skip


def forbidden(own: Any) -> str:
    """What happens where waiting for the device is an error: first launch by launch, then as the graph."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        own._steps()
        own.graph.replay()
    except RuntimeError as error:
        return failure(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def waits(run: Callable[[], object]) -> int:
    """How often a call waits for the device, as far as torch notices."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def training(limits: Machine) -> Iterator[Figures]:
    """Steps of 32 x 1,024 positions in bf16: forward, backward, gradients cut, optimisers, average of weights.

    infill: whether parts of texts are given, as by default, for which attention needs a mask.
    """
    ways = (("muon", 1, False), ("adamw", 1, False), ("muon", 2, False), ("muon", 2, True))
    for size, (optimizer, passes, infill) in product(("base", "medium"), ways):
        place = {"size": size, "optimizer": optimizer, "self_conditioned": passes == 2, "infill": infill}
        notes = list[str]()
        try:
            seconds = training_seconds(size, optimizer, passes, infill, notes.append)
        except torch.OutOfMemoryError as error:
            yield place | {"failed": failure(error)}
            continue
        positions = 32 * 1024
        rate = positions * training_flops(SIZES[size], VOCABULARY.get(size, 8192), 1024, passes == 2) / seconds
        figures = {"seconds": seconds, "tokens_per_second": positions / seconds, "flops": rate}
        yield place | figures | {"of_matrix_rate": rate / limits.rate, "notes": notes}


def training_seconds(
    size: str, optimizer: str, passes: int, infill: bool, note: Callable[[str], None], rounds: int = 10
) -> float:
    """Median seconds of a step; a compiler that fails is noted."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    words, config = VOCABULARY.get(size, 8192), TrainConfig()
    model = filled(Denoiser(words, max_length=1024, **SIZES[size])).to(DEVICE)
    network = losses.Network(compiled(model, note), model.encode_context)
    optimizers = optimizers_of(model, optimizer, config)
    average = [p.detach().clone() for p in model.parameters()]
    batch = Batch(torch.randint(words, (32, 1024)))
    if infill:
        batch = Mixture(0.0, config.infill).apply(batch, np.random.default_rng(0))
    batch = batch.to(DEVICE)

    def step() -> None:
        gamma, eps = torch.randn(32, device=DEVICE), torch.randn(32, 1024, model.dim, device=DEVICE)
        with torch.autocast("cuda", BF16):
            loss = losses.cross_entropy(model, batch, gamma, eps, passes == 2, network).total
        loss.backward()
        clip_grad_norm_(model.parameters(), config.clip)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-3)

    return events(step, rounds)


def optimizers_of(model: Denoiser, name: str, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Those of a run: Muon for the Transformer's matrices and AdamW for the rest, or AdamW for all."""
    matrices = [p for name, p in model.blocks.named_parameters() if "modulation" not in name]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), config.lr, fused=True)]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [Muon(matrices, config.matrix_lr, dtype=BF16), torch.optim.AdamW(others, config.lr, fused=True)]


@torch.no_grad()
def tiles(limits: Machine) -> Iterator[Figures]:
    """Seconds of the first kernel by each tile; `taken` marks the one that is used."""
    from embdiff import kernels

    for rows in (64, 1024, 16_384):
        own, rest = kernels.tile(rows, BF16), problem(rows)
        for of in dict.fromkeys([own, *candidates(rows)]):
            yield {"rows": rows, "tile": of._asdict(), "taken": of == own} | by_tile(of, *rest)


def by_tile(of: Any, h: Tensor, weight: Tensor, table: Tensor) -> Figures:
    """With one tile."""
    from embdiff import kernels

    apart, taken = torch.tensor([0, 2], device=DEVICE), kernels.tile
    kernels.tile = lambda *_: of
    try:
        return {"seconds": events(recorded(lambda: kernels.parts(h, weight, table, 0.76, apart), DEVICE))}
    except Exception as error:  # one that is too large for the GPU
        return {"failed": failure(error)}
    finally:
        kernels.tile = taken


def candidates(rows: int) -> list[Any]:
    """Tiles that are not taller than the rows ask for."""
    from embdiff.kernels import Tile

    every = [
        Tile(16, 128, 64, 4, 4, 2), Tile(32, 64, 64, 4, 4, 2), Tile(32, 128, 64, 4, 4, 1), Tile(64, 64, 64, 4, 4, 2),
        Tile(64, 128, 64, 4, 3, 1), Tile(64, 128, 64, 8, 4, 1), Tile(128, 64, 64, 4, 3, 1), Tile(128, 128, 64, 8, 3, 1),
        Tile(128, 128, 64, 8, 4, 1), Tile(128, 256, 64, 8, 3, 1), Tile(256, 128, 64, 8, 3, 1),
    ]  # fmt: skip
    return [of for of in every if min(rows, 1024) / 16 <= of.rows <= max(32, rows)]


@torch.no_grad()
def shapes(limits: Machine) -> Iterator[Figures]:
    """Seconds of the network's graph, compiled for one shape and for all, and of compiling it."""
    model = filled(Denoiser(WORDS, max_length=64, **SIZES["base"])).to(DEVICE, BF16).eval()
    for batch, dynamic in product((2, 32), (False, True)):
        torch._dynamo.reset()
        z, last = torch.randn(2, batch, 64, model.dim, device=DEVICE)
        yield {"batch": batch, "length": 64, "dynamic": dynamic} | of_network(compiled(model, print, dynamic), z, last)


@torch.no_grad()
def of_network(call: Callable[..., Tensor], z: Tensor, last: Tensor) -> Figures:
    """A compiled one, at z and last [B, L, D]."""
    gamma, begin = torch.zeros(len(z), device=DEVICE), time.monotonic()
    call(z, gamma, None, last)
    compiling = time.monotonic() - begin
    return {"seconds": events(recorded(lambda: call(z, gamma, None, last), DEVICE)), "compiling": compiling}


PARTS: dict[str, Callable[[Machine], Iterator[Figures]]] = {
    "vocabulary": vocabulary, "loop": loop, "training": training, "tiles": tiles, "shapes": shapes
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what they share


def problem(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """h [R, W + D], weight [V, W + D] and table [V, D] of the largest network, bf16."""
    W, D = SIZES["base"]["width"], SIZES["base"]["dim"]
    h, weight, table = (torch.randn(shape, device=DEVICE) for shape in ((rows, W + D), (WORDS, W + D), (WORDS, D)))
    return h.to(BF16), (0.05 * weight).to(BF16), table.to(BF16)


def events(run: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds of a run between two events, after three runs to warm up."""
    for _ in range(3):
        run()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def each_of_many(run: Callable[[], object], times: int = 20) -> float:
    """Seconds of a run that follows others in one graph, as it does in use: a graph alone has its own start to wait
    for."""
    return events(recorded(lambda: [run() for _ in range(times)], DEVICE)) / times


def peak(run: Callable[[], object]) -> float:
    """MiB that a run takes at most beyond what is there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


if __name__ == "__main__":
    typer.run(main)
