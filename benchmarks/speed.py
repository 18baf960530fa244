"""Sampling speed: ours, the same network in other loops, and autoregressive models of its size, in one run.

    python benchmarks/speed.py                                          what fits the machine: minutes to hours
    python benchmarks/speed.py --size mini --batch 1 --length 64 --steps 8 --results runs/speed_mini.json
    python benchmarks/speed.py --size base --only ours --only "generate*" --budget 450 --results runs/speed_base.json

Weights are random: speed doesn't depend on them. Every peer makes B texts of exactly L tokens, all of which count, as
ids; ours may make shorter texts too, so its lengths are not drawn and all of its positions count. Sizes are about 5M,
30M and 125M parameters (small, medium, base); vocabularies are 8,192 words, or 50,257 for base.

On a CPU a plain diffusers loop, and Diffusion-LM's, run in a process of their own, as their users run them: how memory
is reused, which ours sets for the process it is in, would make them faster too; `naive, freed memory kept` says by how
much.

Protocol: each cell is warmed up, then all cells of one size, batch and length take turns, and medians are
compared, since machines are shared. Cells that would take longer than --longest by arithmetic, memory and launches
alone are left out, and so is what fails and what --budget has no time for; `left_out` says why. `parts` says where a
step's time goes; its matrix rate is the best of a large product in the same precision.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from common import failure, generators, keep, write
from peers import Apart, Machine, Naive, Tight, flops, generate, waiting

from embdiff import native, ops, vocabulary
from embdiff.baselines import MaskedModel
from embdiff.batches import Prompts
from embdiff.cli.common import dtype as precision
from embdiff.cli.common import quiet, reuse_memory
from embdiff.config import TrainConfig
from embdiff.denoiser import SIZES, Denoiser
from embdiff.guidance import ClassifierFreeGuidance
from embdiff.noise import GumbelSchedule
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.prediction import Predictor
from embdiff.schedulers import RenoiseScheduler

VOCABULARY = {"base": 50_257}
PROMPT = " ".join(f"w{i}" for i in range(16))
LM_STEPS = 200
SHORTLIST = 512
WAYS = ("ours", "ours, int8", "ours, shortlist", "ours, int8, shortlist")
# What transformers starts from Python in a layer for one token, roughly: enough to tell seconds from minutes.
EAGER, COMPILED = 30, 8


class Cell(NamedTuple):
    """One measured thing. steps: 0 where there are none; least: seconds that a run takes at least, as far as can be
    told; make: gives what is run."""

    name: str
    steps: int
    least: float
    make: Callable[[], Callable[[], object]]


class Times(NamedTuple):
    """Of some cells. medians: seconds of each that ran; rounds: of which they are taken; left_out: the others, with the
    reason."""

    medians: list[tuple[Cell, float]]
    rounds: int
    left_out: list[tuple[Cell, str]]


def main(
    size: list[str] = typer.Option(["small", "medium", "base"], help="Of the networks."),
    batch: list[int] = typer.Option([1, 16, 64], help="Texts at a time."),
    length: list[int] = typer.Option([64, 256, 1024], help="Tokens of a text."),
    steps: list[int] = typer.Option([2, 4, 8, 16, 32], help="Evaluations of ours and of masked diffusion."),
    only: list[str] = typer.Option([], help="Names of cells; * stands for anything, as in generate*. By default all."),
    rounds: int = typer.Option(5, help="Of which medians are taken."),
    longest: float = typer.Option(20.0, help="Seconds that a cell may take at least, as estimated."),
    budget: float = typer.Option(math.inf, help="Seconds after which nothing more is begun."),
    compile: bool = typer.Option(True, help="Compile ours, masked diffusion, the tight loop, and the static cache."),
    dtype: str = typer.Option("auto", help="auto, fp32 or bf16; of ours and of the autoregressive models."),
    results: Path = typer.Option(Path("benchmarks/results/speed.json"), help="Where the figures go."),
) -> None:
    """Writes one table after every size, batch and length, draws it, and prints it in the end."""
    deadline = time.monotonic() + budget
    quiet()
    reuse_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = precision(dtype, device)
    limits = Machine.measured(kind, device)
    figures: dict[str, Any] = {
        "dtype": str(kind), "compile": compile, "matrix_rate": limits.rate, "matrix_rate_fp32": limits.plain_rate,
        "bandwidth": limits.bandwidth, "launch": limits.launch, "cells": [], "ratios": [], "parts": [],
        "graphs": [], "left_out": [],
    }  # fmt: skip
    for name, texts, tokens in product(size, batch, length):
        place: dict[str, Any] = {"size": name, "batch": texts, "length": tokens}
        if time.monotonic() > deadline:
            figures["left_out"].append(place | {"reason": "no time left"})
            continue
        words = VOCABULARY.get(name, 8192)
        pipe = pipeline(name, words, tokens, device, kind, compile)
        cells = contestants(pipe, name, words, texts, tokens, steps, kind, compile, limits)
        times = race([cell for cell in cells if chosen(cell.name, only)], rounds, longest, deadline)
        for cell, seconds in times.medians:
            what = {"name": cell.name, "steps": cell.steps, "seconds": seconds, "rounds": times.rounds}
            figures["cells"].append(place | what | {"tokens_per_second": texts * tokens / seconds})
        for cell, reason in times.left_out:
            figures["left_out"].append(place | {"name": cell.name, "steps": cell.steps, "reason": reason})
        figures["ratios"] = ratios(figures["cells"])
        figures["graphs"].append(place | graphs(pipe))
        keep(results, figures)
        if time.monotonic() < deadline and any(cell.name.startswith("ours") for cell, _ in times.medians):
            ways = {"ours": pipe}
            if device.type == "cpu":
                ways |= {"ours, int8": twin(pipe, int8=True), "ours, torch's operators": twin(pipe, native_step=False)}
            for way, own in ways.items():
                found = parts(own, name, words, texts, tokens, limits.rate, rounds)
                figures["parts"].append(place | {"name": way} | found)
            keep(results, figures)
    if time.monotonic() < deadline:
        figures["memory"] = memory()
    write(results, figures)
    if figures["cells"]:
        draw(figures["cells"], results.with_suffix(".svg"))


def chosen(name: str, only: list[str]) -> bool:
    """Whether a cell is among those asked for."""
    return not only or any(fnmatchcase(name, pattern) for pattern in only)


def pipeline(
    size: str, words: int, length: int, device: torch.device, dtype: torch.dtype, compile: bool
) -> TextDiffusionPipeline:
    """Ours, with random weights."""
    torch.manual_seed(0)
    tokenizer = vocabulary.train_word([" ".join(f"w{i}" for i in range(words - 4))], min_count=1)
    shape = SIZES[size] | {"transition_rank": TrainConfig().transitions}
    denoiser = filled(Denoiser(len(tokenizer), max_length=length, max_prompt_length=16, **shape))
    schedule = GumbelSchedule.initial(denoiser.dim, len(tokenizer)).config()
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler(noise_schedule=schedule))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    pipe.compile = compile
    torch._dynamo.reset()  # shapes of other pipelines count as recompilations of this one
    if device.type == "cuda":
        from embdiff.loop import Loops

        pipe._loops = Loops(most=64)  # all cells take turns
    return pipe


def twin(pipe: TextDiffusionPipeline, int8: bool = False, native_step: bool = True) -> TextDiffusionPipeline:
    """A pipeline with the same denoiser. native_step: whether its steps are native where they can be."""
    other = TextDiffusionPipeline(pipe.denoiser, pipe.tokenizer, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    other.compile, other.int8 = pipe.compile, int8
    if not native_step:
        with patch.object(native, "suits", lambda denoiser: False):
            other._network(pipe.device)
    return other


def plain_loop(shape: dict[str, int], words: int, length: int, device: torch.device, prompts: Prompts | None) -> Naive:
    """A diffusers loop around the same network, guided where there are prompts."""
    torch.manual_seed(0)
    denoiser = filled(Denoiser(words, max_length=length, max_prompt_length=16, **shape)).to(device).eval()
    return Naive(denoiser, None if prompts is None else prompts.to(device), 1.0 if prompts is None else 2.0)


def filled(denoiser: Denoiser) -> Denoiser:
    """With random weights in place of those that begin as zeros, which take less power to multiply by."""
    for p in denoiser.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return denoiser


def contestants(
    pipe: TextDiffusionPipeline,
    size: str,
    words: int,
    batch: int,
    length: int,
    steps: list[int],
    dtype: torch.dtype,
    compile: bool,
    limits: Machine,
) -> Iterator[Cell]:
    """Everything that makes `batch` texts of `length` tokens."""
    device, shape = pipe.device, SIZES[size]
    work = flops(shape, words, length) * batch * length
    least, plain_least = work / limits.rate, work / limits.plain_rate
    middle = float(pipe.scheduler.noise_schedule.gamma(0.5))
    ways: dict[str, dict[str, Any]] = {"": {}, ", half of the steps": {"max_gamma": middle}, ", every 2": {"every": 2}}
    guidance = {
        f"CFG in {space}{way}": ClassifierFreeGuidance(2.0, space, **options)
        for space in ("x0", "logits")
        for way, options in ways.items()
    }

    @cache
    def masked() -> MaskedModel:
        model = MaskedModel(words, shape["width"], shape["depth"], shape["heads"], length).to(device, dtype).eval()
        if compile:
            model.forward = torch.compile(model.forward)
        return model

    @cache
    def peer(guided: bool, apart: bool) -> Callable[..., object]:
        prompts = Prompts.tokenized(pipe.tokenizer, [PROMPT] * batch, 16) if guided else None
        make = partial(plain_loop, shape, words, length, device, prompts)
        return Apart(make) if apart else make()

    def naive(n: int, guided: bool = False, to_nearest: bool = False, kept: bool = False) -> Callable[[], object]:
        run = peer(guided, device.type == "cpu" and not kept)
        return lambda: run(batch, length, n, to_nearest)

    def unmasking(n: int) -> Callable[[], object]:
        model = masked()
        return lambda: model.sample(generators(0, batch), steps=n)

    def gpt(static: bool) -> Callable[[], object]:
        run = generate(shape, words, length, dtype, device, static)
        return lambda: run(batch)

    def tight() -> Callable[[], object]:
        model = Tight(shape, words, length, batch).to(device, dtype).eval()
        if compile:
            model.step = torch.compile(model.step, mode="reduce-overhead" if device.type == "cuda" else None)
        return lambda: model(batch)

    def in_turn(launches: int) -> float:
        return max(least, waiting(shape, words, length, launches, limits))

    def ours(
        n: int, prompt: str | None = None, of: Callable[[], TextDiffusionPipeline] = lambda: pipe, **options: Any
    ) -> Callable[[], object]:
        generator, own = torch.Generator().manual_seed(0), of()
        texts = {"num_samples": batch} if prompt is None else {"prompt": [prompt] * batch}
        return lambda: own(
            **texts, num_inference_steps=n, draw_length=False, skip_padding=False, output_type="seq",
            generator=generator, **options,
        )  # fmt: skip

    rounded, by_torch = cache(partial(twin, pipe, int8=True)), cache(partial(twin, pipe, native_step=False))

    for n in steps:
        yield Cell("ours", n, n * least, partial(ours, n))
        if device.type == "cpu":
            yield Cell("ours, int8", n, n * least, partial(ours, n, of=rounded))
            yield Cell("ours, shortlist", n, n * least, partial(ours, n, shortlist=SHORTLIST))
            yield Cell("ours, int8, shortlist", n, n * least, partial(ours, n, of=rounded, shortlist=SHORTLIST))
            yield Cell("ours, torch's operators", n, n * least, partial(ours, n, of=by_torch))
        yield Cell("naive", n, n * plain_least, partial(naive, n))
        if device.type == "cpu":
            yield Cell("naive, freed memory kept", n, n * plain_least, partial(naive, n, kept=True))
        yield Cell("masked", n, n * least, partial(unmasking, n))
        yield Cell("ours, prompt", n, n * least, partial(ours, n, PROMPT))
        for name, module in guidance.items():
            passes = 1.5 if "," in name else 2
            yield Cell(f"ours, {name}", n, passes * n * least, partial(ours, n, PROMPT, guidance=[module]))
        if device.type == "cpu":
            plain = [guidance["CFG in x0"]]
            yield Cell("ours, int8, CFG in x0", n, 2 * n * least, partial(ours, n, PROMPT, of=rounded, guidance=plain))
        yield Cell("naive, CFG", n, 2 * n * plain_least, partial(naive, n, True))
    yield Cell("diffusion-lm", LM_STEPS, LM_STEPS * plain_least, partial(naive, LM_STEPS, False, True))
    yield Cell("generate, dynamic cache", 0, in_turn(EAGER), partial(gpt, False))
    if compile:
        yield Cell("generate, static cache", 0, in_turn(COMPILED), partial(gpt, True))
    yield Cell("tight", 0, in_turn(1 if compile else EAGER), tight)


def race(cells: list[Cell], rounds: int, longest: float, deadline: float) -> Times:
    """Times those that may run and can: each twice to warm up, for at the second time a graph is recorded; then in
    turns."""
    ready, left_out = list[tuple[Cell, Callable[[], object]]](), list[tuple[Cell, str]]()
    for cell in cells:
        if cell.least > longest:
            left_out.append((cell, f"would take {cell.least:.0f} s at least"))
        elif time.monotonic() > deadline:
            left_out.append((cell, "no time left"))
        else:
            try:
                run = cell.make()
                run()
                run()
            except Exception as error:  # it costs its own figures alone
                left_out.append((cell, failure(error)))
            else:
                ready.append((cell, run))
    turns = list[list[float]]()
    while len(turns) < rounds and ready and not (turns and time.monotonic() > deadline):
        turns.append([seconds_of(run) for _, run in ready])
    medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    return Times([(cell, median) for (cell, _), median in zip(ready, medians, strict=True)], len(turns), left_out)


def timed(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each; they take turns, after two runs each to warm up."""
    for run in runs:
        run()
        run()
    turns = [[seconds_of(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run, until the device is done too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def parts(
    pipe: TextDiffusionPipeline,
    size: str,
    words: int,
    batch: int,
    length: int,
    rate: float,
    rounds: int,
    steps: int = 8,
) -> dict[str, float]:
    """Shares of a run of ours: the network, the posterior means, the last step's head, which gives the likeliest words
    of each position in place of a mean, and the rest, which is the sampler; and of the rate."""
    D, device = pipe.denoiser.dim, pipe.device
    z, last = (torch.randn(batch, length, D, device=device) for _ in range(2))
    network = pipe._network(pipe.device)
    h = network(z, torch.zeros(batch, device=device), None, last)
    predictor = Predictor(pipe._run([None], None, batch, length), network=network)
    weight, _, table = predictor.outputs[pipe.denoiser]
    candidates = pipe.denoiser.transitions.candidates
    keep, gamma = torch.tensor([0, 2], device=device), torch.zeros(batch, device=device)

    def posterior() -> object:
        return network.posterior(h, weight, table, 0.76, (0, 2)) or ops.expectation(h, weight, table, 0.76, keep)

    whole, forward, mean, last_head = timed(
        [
            lambda: pipe(
                num_samples=batch, num_inference_steps=steps, draw_length=False, skip_padding=False, output_type="seq"
            ),
            recorded(lambda: network(z, gamma, None, last), device),
            recorded(posterior, device),
            lambda: network.most_probable(h.flatten(0, 1), weight, table, candidates),
        ],
        2 * rounds,
    )
    work = flops(SIZES[size], words, length) * batch * length
    means = steps if device.type == "cuda" else steps - 1  # a recorded loop has one in its last step too
    return {
        "step": whole / steps, "network": forward * steps / whole, "posterior": mean * means / whole,
        "last_head": last_head / whole, "sampler": 1 - (forward * steps + mean * means + last_head) / whole,
        "of_matrix_rate_in_the_denoiser": work / (forward + mean) / rate, "of_matrix_rate": work * steps / whole / rate,
    }  # fmt: skip


def graphs(pipe: TextDiffusionPipeline) -> dict[str, int]:
    """How many loops there are, and how many of them as graphs: the others run launch by launch. {} without a GPU."""
    if pipe._loops is None:
        return {}
    loops = pipe._loops.kept.values()
    return {"loops": len(loops), "recorded": sum(loop.graph is not None for loop in loops)}


def recorded(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the run as a graph, as it is part of one in the loop: launched singly, it would wait for Python."""
    if device.type != "cuda":
        return run
    from embdiff.loop import forget_workspaces

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at a first run, and compiled, is made before
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    forget_workspaces()
    with torch.cuda.graph(graph, stream=side):
        run()
    forget_workspaces()
    return graph.replay


def ratios(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times of others over ours, with as many steps where both have steps; and of guidance over none."""

    def compared(ours: dict[str, Any], other: dict[str, Any]) -> bool:
        if any(ours[key] != other[key] for key in ("size", "batch", "length")):
            return False
        if other["name"].startswith("ours"):
            guided = ours["name"] == "ours, prompt" and other["name"].startswith("ours, CFG")
            same = ours["name"] == "ours" and other["name"] in (*WAYS[1:], "ours, torch's operators")
            return (guided or same) and ours["steps"] == other["steps"]
        alike = ", CFG in x0" if "CFG" in other["name"] else ""
        return ours["name"] in [way + alike for way in WAYS] and other["steps"] in (0, LM_STEPS, ours["steps"])

    return [
        {key: ours[key] for key in ("size", "batch", "length", "steps")}
        | {"what": f"{other['name']} / {ours['name']}", "ratio": round(other["seconds"] / ours["seconds"], 2)}
        for ours, other in product(cells, cells)
        if compared(ours, other)
    ]


MEMORY = """
import sys, torch
from pathlib import Path
from embdiff import ops
device = "cuda" if torch.cuda.is_available() else "cpu"
h, w, e = (torch.randn(shape, device=device) for shape in ((64, 64, 256), (32768, 256), (32768, 64)))
def status(name):
    return 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x).split()[1])
if device == "cpu":
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")
with torch.no_grad():
    (ops.expectation if sys.argv[1] == "ours" else ops.expectation_reference)(h, w, e, 0.76, (0, 2))
print((torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")) - before)
"""


def memory() -> dict[str, float]:
    """Peak MiB of a posterior mean at [64, 64] positions and 32,768 words, by ours and with whole logits."""
    ours, whole = (
        int(subprocess.run([sys.executable, "-c", MEMORY, who], capture_output=True, text=True, check=True).stdout)
        for who in ("ours", "whole")
    )
    return {"ours": round(ours / 2**20), "whole": round(whole / 2**20), "ratio": round(ours / whole, 3)}


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second against steps and against length, for the largest network, one text at a time."""
    import matplotlib.pyplot as plt

    size = cells[-1]["size"]
    batch = min(cell["batch"] for cell in cells if cell["size"] == size)
    mine = [cell for cell in cells if cell["size"] == size and cell["batch"] == batch]
    mine = [cell for cell in mine if "CFG" not in cell["name"]] or mine
    shortest = min(cell["length"] for cell in mine)
    steps = min((cell["steps"] for cell in mine if cell["steps"]), key=lambda n: abs(n - 8), default=8)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name in dict.fromkeys(cell["name"] for cell in mine):
        own = [cell for cell in mine if cell["name"] == name]
        at = [cell for cell in own if cell["length"] == shortest]
        if at and at[0]["steps"] in (0, LM_STEPS):
            left.axhline(at[0]["tokens_per_second"], linestyle=":", color="grey")
            left.text(2, at[0]["tokens_per_second"], name, fontsize=7, va="bottom")
        else:
            left.plot([c["steps"] for c in at], [c["tokens_per_second"] for c in at], marker="o", label=name)
        long = [cell for cell in own if cell["steps"] in (0, steps, LM_STEPS)]
        right.plot([c["length"] for c in long], [c["tokens_per_second"] for c in long], marker="o", label=name)
    lengths = sorted({cell["length"] for cell in mine})
    counts = sorted({cell["steps"] for cell in mine} - {0, LM_STEPS})
    labels = (left, f"steps, {shortest} tokens", counts), (right, f"tokens, {steps} steps", lengths)
    for axis, label, ticks in labels:
        axis.set(xscale="log", yscale="log", xlabel=label, title=f"{size}, {batch} at a time")
        axis.set_xticks(ticks, map(str, ticks))
        axis.xaxis.minorticks_off()
    left.set_ylabel("tokens a second")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
