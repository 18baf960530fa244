"""All steps of a run on a GPU as one CUDA graph: nothing is launched from Python, and nothing read back, until the end.

    B samples   L positions   D embedding dim   N steps

Each step is the denoiser and the two kernels of `embdiff.kernels`. A graph is recorded once for a shape, a solver and a
way of guiding, and replayed for every further batch: seeds, lengths, contexts and the weights of the vocabulary are
copied to the places that it reads; other weights are read where they are. What it can't hold (constraints, vetoes,
tilts, gradients, callbacks, other packages' schedulers) is left to `Predictor` and the scheduler, one launch at a time,
with the same noise.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embdiff import kernels
from embdiff.denoiser import Context
from embdiff.errors import reason
from embdiff.guidance.base import Branch
from embdiff.prediction import Plan, Predictor
from embdiff.schedulers.table import Row

MOST_GRAPHS = 8  # that are kept: each holds the activations of its steps


class Inputs(NamedTuple):
    """What differs from batch to batch, or is made of weights.

    weight: of the output, [V, W + D]; table: E [V, D], both in the denoiser's precision, made anew when weights change;
    ends: [2, D] fp32, embeddings of padding and the end of text; seeds: [B] int64; quantile: [B] in (0, 1);
    contexts: of each plan.
    """

    weight: Tensor
    table: Tensor
    ends: Tensor
    seeds: Tensor
    quantile: Tensor
    contexts: list[Context | None]

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order; the first two are made of weights alone."""
        return [*self[:-1], *(t for context in self.contexts for t in context or ())]

    def own(self) -> Inputs:
        """Copies of all but the tables, which are large and seldom change."""
        contexts = [c and Context(*(t.clone() for t in c)) for c in self.contexts]
        return Inputs(self.weight, self.table, self.ends.clone(), self.seeds.clone(), self.quantile.clone(), contexts)

    def padded(self, count: int) -> Inputs:
        """With further samples, whose texts nobody reads."""
        B = len(self.seeds)
        if count == B:
            return self

        def wide(tensor: Tensor, dim: int) -> Tensor:
            by_branch = tensor.view(*tensor.shape[:dim], -1, B, *tensor.shape[dim + 1 :])
            return F.pad(by_branch, (*(0, 0) * (tensor.ndim - dim - 1), 0, count - B)).flatten(dim, dim + 1)

        contexts = [c and Context(wide(c.keys, 1), wide(c.values, 1), wide(c.mask, 0)) for c in self.contexts]
        return self._replace(seeds=wide(self.seeds, 0), quantile=wide(self.quantile, 0), contexts=contexts)


class Loop:
    """The steps of a run, from seeds to the last latents.

    Args:
        predictor: what is predicted at each step; see `fits`.
        rows: the solver's table, N rows. gammas: their noise levels.
        ends: ids of padding and the end of text.
        inputs: of the first batch, which tell the shapes; copies are kept, and overwritten by those of later ones.
        noise_scale: of all noise.
    """

    def __init__(
        self,
        predictor: Predictor,
        rows: Sequence[Row],
        gammas: Sequence[float],
        ends: tuple[int, int],
        inputs: Inputs,
        noise_scale: float = 1.0,
    ) -> None:
        self.noise_scale, self.gammas = noise_scale, list(gammas)
        self.call, self.temperature = predictor.network.call, predictor.temperature
        self.length, self.dim = predictor.run.length, predictor.denoiser.dim
        plans, self.plan_of_step = distinct(predictor, gammas)
        self.branches = [plan.branches for plan in plans]
        # Before the first step there are no predictions: its own stands in for them.
        first, *others = (row._replace(s=row.s * noise_scale) for row in rows)
        self.rows = [Row(first.a, first.b + first.c + first.d, s=first.s), *others]
        device, odds = inputs.seeds.device, math.exp(predictor.length_bias)
        drawn = [predictor.draws(gamma) for gamma in gammas]
        with torch.inference_mode(False), torch.no_grad():  # else only runs in inference mode could overwrite them
            self.inputs = inputs.own()
            self.numbers = torch.tensor(
                [[*row, float(draws), odds, 0.0] for row, draws in zip(self.rows, drawn, strict=True)], device=device
            )
            self.ends = torch.tensor(ends, device=device)
        self.shown = [weakref.ref(inputs.weight), weakref.ref(inputs.table)]
        self.graph: Any = None
        self.recordable = True

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """z [B, L, D] after the last step, and the features [B, L, H] it was made of; the next call overwrites both."""
        self._take(inputs)
        if self.graph is None:
            return self._steps()
        self.graph.replay()
        return self.found

    def _take(self, inputs: Inputs) -> None:
        """Copies them to the places that are read; the tables only where they aren't those of the last time."""
        places, values = self.inputs.tensors(), inputs.tensors()
        for i, (shown, table) in enumerate(zip(self.shown, values, strict=False)):
            if shown() is not table:
                places[i].copy_(table)
                self.shown[i] = weakref.ref(table)
        for place, value in zip(places[len(self.shown) :], values[len(self.shown) :], strict=True):
            place.copy_(value)

    def record(self, stream: Any, pool: Any) -> None:
        """Records the steps, after a run on that stream for libraries to choose their kernels."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._steps()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        forget_workspaces()
        # The outer one goes back to this stream also where the end of a recording fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            found = self._steps()
        forget_workspaces()
        self.graph, self.found = graph, found

    def _steps(self) -> tuple[Tensor, Tensor]:
        lengths = kernels.Lengths(self.inputs.quantile, self.inputs.ends)
        z = self.noise_scale * kernels.normal(self.inputs.seeds, 0, self.length, self.dim)
        before = before_that = nothing = torch.zeros_like(z)
        draw, held = 1, dict[int, tuple[int, Tensor]]()
        for i, row in enumerate(self.rows):
            found, scale, h = self._parts(z, i, before, nothing, held)
            z_next, x0 = torch.empty_like(z), torch.empty_like(z)
            kernels.step(
                found, z, (before, before_that), self.numbers[i], lengths, self.inputs.seeds, draw if row.s else -1,
                scale, z_next, x0,
            )  # fmt: skip
            draw += bool(row.s)
            z, before, before_that = z_next, x0, before if i else x0
        if scale is not None:
            h = self.branches[self.plan_of_step[-1]][0].combine(*h.chunk(2))
        return z, h

    def _parts(
        self, z: Tensor, i: int, last: Tensor, nothing: Tensor, held: dict[int, tuple[int, Tensor]]
    ) -> tuple[kernels.Parts, float | None, Tensor]:
        """The posterior of a step under all its branches, their scale where they are combined afterwards, and the
        features [B, L, H], of branches too [2 B, L, H], that it was made of.

        held: the step of each branch's last prediction, and main - other then, see `Predictor`.
        """
        plan = self.plan_of_step[i]
        branches, context = self.branches[plan], self.inputs.contexts[plan]
        due = [branch for branch in branches if branch.due(held.get(id(branch), (None,))[0], i)]
        given = [last, *(last if branch.self_conditioned else nothing for branch in due)]
        # Made here: to a compiled network a part of a tensor is another kind of argument than a whole one.
        level = torch.full((len(given) * len(z),), self.gammas[i], device=z.device)
        if len(due) < len(branches) and context is not None:
            context = Context(*(t.contiguous() for t in context.take(slice(len(z)))))
        h: Tensor = self.call(together([z] * len(given)), level, context, together(given))
        scale = None
        for branch in branches:
            if not due:
                h = torch.cat([h, h - held[id(branch)][1]])
            elif branch.held(first=i == 0):
                main, other = h.chunk(2)
                held[id(branch)] = i, main - other
            if branch.space == "logits":
                h = branch.combine(*h.chunk(2))
            else:
                scale = branch.scale
        weight, table = self.inputs.weight, self.inputs.table
        return kernels.parts(h.flatten(0, 1), weight, table, self.temperature, self.ends), scale, h


class Loops:
    """The loops of a pipeline. One is recorded when it is needed for the second time; the oldest make room.

    All share one pool of memory, since they run one after the other.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self.most, self.recording = most, True
        self.kept: OrderedDict[Hashable, Loop] = OrderedDict()
        self.stream: Any = None
        self.pool: Any = None

    def run(
        self,
        predictor: Predictor,
        rows: Sequence[Row],
        gammas: Sequence[float],
        ends: tuple[int, int],
        seeds: Tensor,
        noise_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """What a `Loop` finds for seeds [B]; the other arguments are its own."""
        B, device = len(seeds), seeds.device
        plans, of_step = distinct(predictor, gammas)
        positions = sum(1 + len(plans[k].branches) for k in of_step) * B * predictor.run.length
        predictor.network.count(positions, device.type)  # before anything is recorded: it may compile
        quantile = seeds.new_full((B,), 0.5, dtype=torch.float32)
        if predictor.quantile is not None:
            quantile = predictor.quantile.flatten().float()
        contexts = [plan.context and plan.context.widened(-(-plan.context.mask.shape[1] // 16) * 16) for plan in plans]
        denoiser = predictor.denoiser
        weight, table, rounded = predictor.outputs[denoiser]
        ending = torch.stack([table[token] for token in ends])  # by a list it would copy the numbers to the device
        inputs = Inputs(weight, rounded, ending, seeds, quantile, contexts).padded(bucket(B))
        key = (
            id(predictor.network.call), denoiser.dtype, kernels.precision(device), predictor.run.length,
            predictor.temperature, predictor.length_bias, predictor.quantile is None, predictor.draw_above,
            tuple(rows), tuple(gammas), ends, tuple(of_step), noise_scale,
            tuple(tuple(map(way, plan.branches)) for plan in plans),
            tuple(tuple(t.shape) for t in inputs.tensors()),
            tuple(t.data_ptr() for t in chain(denoiser.parameters(), denoiser.buffers())),
        )  # fmt: skip
        with kernels.on(device):
            if key not in self.kept:
                while len(self.kept) >= self.most:
                    self.kept.popitem(last=False)
                self.kept[key] = Loop(predictor, rows, gammas, ends, inputs, noise_scale)
            elif device.type == "cuda":
                self._record(self.kept[key])
            self.kept.move_to_end(key)
            z, features = self.kept[key](inputs)
            return z[:B].clone(), features[:B].clone()

    def _record(self, loop: Loop) -> None:
        """Records a loop that wasn't, if it can be: where one runs out of memory others may fit, but no other failure
        is tried for again."""
        if loop.graph is not None or not (self.recording and loop.recordable):
            return
        try:
            if self.pool is None:
                self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            loop.record(self.stream, self.pool)
        except RuntimeError as error:
            # The end of a recording may fail after its middle, with another error.
            full = any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))
            self.recording, loop.recordable = full and self.recording, False
            cause = "out of memory: a smaller batch or max_length would fit" if full else reason(error)
            warnings.warn(f"no CUDA graph ({cause}): going on launch by launch, which is slower", stacklevel=4)


def forget_workspaces() -> None:
    """Gives back the memory that cuBLAS took for its products, so that it takes other memory at the next.

    Around a recording it would else write where it did before, which others have got meanwhile; taken while recording,
    it is the graphs' own. `torch._inductor.cudagraph_trees` does the same.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:
        forget()


def together(tensors: list[Tensor]) -> Tensor:
    """One after the other along the batch; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def bucket(count: int) -> int:
    """How many samples a graph is recorded for: a power of two up to 64, then a multiple of 64."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


def fits(predictor: Predictor, gammas: Sequence[float]) -> bool:
    """Whether a loop can hold what is predicted at these levels: all positions, and at most one branch, of a scale
    alone."""

    def simple(plan: Plan) -> bool:
        others = plan.tilts or plan.vetoes or plan.gradients or plan.classes is not None
        return not others and len(plan.branches) <= 1 and all(map(linear, plan.branches))

    def linear(branch: Branch) -> bool:
        # The kernel combines probabilities and means of words; where no tokens are kept apart, the mean is of all.
        apart = branch.space == "logits" or bool(predictor.kept)
        return branch.denoiser is None and branch.scale is not None and apart

    return (
        not predictor.skip_padding and predictor.shortlists is None and all(map(simple, distinct(predictor, gammas)[0]))
    )


def way(branch: Branch) -> tuple[str, float | None, bool, int]:
    """How a branch is combined, for those that `fits` accepts."""
    return branch.space, branch.scale, branch.self_conditioned, branch.every


def distinct(predictor: Predictor, gammas: Sequence[float]) -> tuple[list[Plan], list[int]]:
    """The plans of a run, each once, and which of them each step follows."""
    of_steps = [predictor.plan(gamma) for gamma in gammas]
    plans = list({id(plan): plan for plan in of_steps}.values())
    return plans, [next(k for k, plan in enumerate(plans) if plan is own) for own in of_steps]
