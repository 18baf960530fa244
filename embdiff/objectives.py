"""What a run trains: the model of an objective, its loss, and all that no other objective needs.

The loop around it, `embdiff.training`, is the same for all: data, batches, optimisers, average, checkpoints, reports.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embdiff import checkpoint, losses
from embdiff.baselines import FOLDER, AutoregressiveModel, Baseline, MaskedModel
from embdiff.batches import Batch, Mixture, Prompts, sent
from embdiff.denoiser import Denoiser
from embdiff.noise import FITS, GumbelSchedule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from embdiff.config import TrainConfig


class Objective:
    """Abstract. The run moves the model to its device and may compile the network's passes.

    Args:
        config: of the run.
        tokenizer: it has the V tokens of the model.
        max_prompt_length: positions of the widest prompt, 0 = no prompts.
        accelerator: which device, and the way to the other processes.
    """

    part: ClassVar[str]  # what the model is called in a run's folder
    whole: ClassVar[bool] = False  # texts are looked at once and whole: no windows, no several draws of one

    model: Denoiser | Baseline

    def __init__(self, config: TrainConfig, tokenizer: Any, max_prompt_length: int, accelerator: Accelerator) -> None:
        self.config, self.tokenizer, self.accelerator = config, tokenizer, accelerator
        self.model = self.new_model(
            {"vocab_size": len(tokenizer), "max_length": config.max_length, "max_prompt_length": max_prompt_length}
        )
        self.network = losses.Network(self.model, self.model.encode_context)

    def new_model(self, shape: Mapping[str, int]) -> Denoiser | Baseline:
        """A model with its initial weights. shape: of its inputs, as keyword arguments."""
        raise NotImplementedError

    def loss(self, batch: Batch, mine: slice, step: int, generator: np.random.Generator) -> tuple[Tensor, float]:
        """The mean loss over this process's target positions, and its share of all target positions of the batch.

        Random numbers are drawn for the whole batch and then shared out, so that the number of processes changes
        nothing but the order of sums. mine: the rows of this process.
        """
        raise NotImplementedError

    def nats(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """[B]: -log p(text | prompt), or an upper bound on it, in nats, for validation."""
        raise NotImplementedError

    def texts(self, prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
        """One sample for each prompt, or `count` without."""
        raise NotImplementedError

    def write(self, output: Path) -> None:
        """Writes the finished model."""
        raise NotImplementedError

    def enter(self, step: int) -> None:
        """Sets what depends on the number of steps done alone."""

    def learn(self, step: int) -> None:
        """Fits what isn't learnt by gradients; after each step, by all processes."""

    def collect(self) -> None:
        """Takes what was measured into the state; before each checkpoint, by all processes."""

    def figures(self) -> dict[str, float]:
        """What is logged beside the loss."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, JSON-able and exact."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, or raises what it will where the state is damaged."""


class Diffusion(Objective):
    """Denoising embeddings, by cross-entropy ("ce"), the variational bound ("vlb") or the sum of both ("mixed")."""

    part = "denoiser"
    model: Denoiser

    def __init__(self, config: TrainConfig, tokenizer: Any, max_prompt_length: int, accelerator: Accelerator) -> None:
        super().__init__(config, tokenizer, max_prompt_length, accelerator)
        self.mixture = Mixture(config.drop_prompt, config.infill)
        self.fit = FITS[config.schedule](GumbelSchedule.initial(self.model.dim, len(tokenizer)))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def new_model(self, shape: Mapping[str, int]) -> Denoiser:
        """A denoiser with its initial weights."""
        return cast(Denoiser, Denoiser(**shape, **self.config.shape, transition_rank=self.config.transitions))

    def loss(self, batch: Batch, mine: slice, step: int, generator: np.random.Generator) -> tuple[Tensor, float]:
        """At noise levels in strata of the fitted schedule."""
        config, device = self.config, self.accelerator.device
        t = strata(batch, generator)
        self_condition = bool(step >= config.filter_ramp and generator.random() < config.self_condition)
        batch = self.mixture.apply(batch, generator)
        noise = generator.standard_normal((*batch.ids.shape, self.model.dim), dtype=np.float32)
        weight = share(batch.target(), mine)
        batch = batch.take(mine).to(device)
        gamma = sent(torch.from_numpy(self.fit.schedule.gamma(t[mine])).float(), device)
        eps = sent(torch.from_numpy(noise[mine]), device)
        if config.objective == "ce":
            loss = losses.cross_entropy(self.model, batch, gamma, eps, self_condition, self.network)
        else:
            density = sent(torch.from_numpy(1 / self.fit.schedule.derivative(t[mine])).float(), device)
            bounded = losses.variational_loss if config.objective == "vlb" else losses.mixed_loss
            loss = bounded(self.model, batch, gamma, eps, self_condition, density, self.network)
        if batch.ids.shape[1] == config.max_length:
            # The schedule is fitted to what sampling sees: whole texts.
            self.pending.append((gamma, loss.cross_entropy))
        if self.model.transitions is None or step % EVERY:
            return loss.total, weight
        rows = rows_for_transitions(t)
        own = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
        nats = losses.transition_loss(self.model, loss.features, batch, sent(torch.from_numpy(own), device))
        return loss.total + nats.sum() / max(1, len(rows)) / weight, weight  # their mean over all processes

    def nats(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The variational bound."""
        return losses.variational_bound(self.model, batch, self.fit.schedule, generator, samples=2).total

    def texts(self, prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
        """Samples in 16 steps."""
        pipe = self._pipeline()
        pipe.set_progress_bar_config(disable=True)
        count = 1 if prompts else count
        texts = pipe(prompts or None, num_inference_steps=16, num_samples=count, generator=generator).texts
        return cast(list[str], texts)

    def write(self, output: Path) -> None:
        """The pipeline, each part in its folder; the index comes last: beside parts that differ there is none."""
        index = "model_index.json"
        checkpoint.save_folder(output / "pipeline.new", self._pipeline().save_pretrained)
        (output / index).unlink(missing_ok=True)
        for path in sorted((output / "pipeline.new").iterdir(), key=lambda path: path.name == index):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        (output / "pipeline.new").rmdir()

    def enter(self, step: int) -> None:
        """Sets how much of the matched filter is in."""
        ramp = self.config.filter_ramp
        self.model.filter_ramp.fill_(min(1.0, step / ramp) if ramp else 1.0)

    def learn(self, step: int) -> None:
        """Refits the noise schedule now and then."""
        if step % 25 == 0:
            self.collect()
            # Before it has learnt anything the model's cross-entropy says nothing about the noise.
            if step >= 2 * self.config.warmup:
                self.fit.fit()

    def collect(self) -> None:
        """Takes what was measured since the last fit into the statistics, without refitting."""
        for gamma, ce in self._gathered():
            self.fit.update(gamma.cpu().numpy(), ce.float().cpu().numpy())

    def figures(self) -> dict[str, float]:
        """Where half of the uncertainty is gone."""
        return {"schedule_median": float(self.fit.schedule.gamma(0.5))}

    def state_dict(self) -> dict[str, Any]:
        """The fit of the noise schedule."""
        return {"schedule": self.fit.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the fit."""
        bins = self.fit.weight.shape
        self.fit.load_state_dict(state["schedule"])
        measured = np.stack([self.fit.weight, self.fit.total])
        if measured.shape[1:] != bins or not np.isfinite([*measured.flat, self.fit.schedule.gamma(0.5)]).all():
            raise ValueError("the schedule has other bins, or numbers that are not finite")

    def _gathered(self) -> Iterator[tuple[Tensor, Tensor]]:
        pending, self.pending = self.pending, []
        if self.accelerator.num_processes == 1:
            yield from pending
        else:
            for pair in pending:
                yield cast(Any, self.accelerator.gather(pair))

    def _pipeline(self) -> Any:
        from embdiff.pipeline import TextDiffusionPipeline
        from embdiff.schedulers import RenoiseScheduler, UniPCScheduler

        # Fresh noise lets a text be corrected towards its prompt; without one, UniPC writes as well in half the steps.
        solver = RenoiseScheduler if int(self.model.config.max_prompt_length) else UniPCScheduler
        return TextDiffusionPipeline(self.model, self.tokenizer, solver(noise_schedule=self.fit.schedule.config()))


class BaselineObjective(Objective):
    """What both baselines share. Abstract."""

    part = FOLDER
    model: Baseline

    def texts(self, prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
        """Samples at temperature 1."""
        from embdiff import vocabulary
        from embdiff.randomness import sample_generators

        limit = int(self.model.config.max_prompt_length)
        encoded = Prompts.tokenized(self.tokenizer, prompts, limit) if prompts else None
        ids = self.model.sample(sample_generators(generator, len(prompts) or count), encoded)
        return [vocabulary.decode(self.tokenizer, row) for row in ids.tolist()]

    def write(self, output: Path) -> None:
        """The model, beside its tokenizer."""
        checkpoint.save_folder(output / self.part, self.model.save_pretrained)

    def _backbone(self) -> dict[str, int]:
        return {name: value for name, value in self.config.shape.items() if name != "dim"}


class Autoregressive(BaselineObjective):
    """Each token from those before it, by the exact likelihood."""

    whole = True
    model: AutoregressiveModel

    def new_model(self, shape: Mapping[str, int]) -> AutoregressiveModel:
        """A model with its initial weights."""
        ends = {"end_id": self.tokenizer.eos_token_id, "pad_id": self.tokenizer.pad_token_id}
        return cast(AutoregressiveModel, AutoregressiveModel(**shape, **ends, **self._backbone()))

    def loss(self, batch: Batch, mine: slice, step: int, generator: np.random.Generator) -> tuple[Tensor, float]:
        """Nothing about it is random."""
        charged = self.model.charged(batch.ids)
        weight = share(charged, mine)
        batch = batch.take(mine)
        # Up to the longest text, in quarters of the full length, since each width is compiled apart.
        quarter = -(-batch.ids.shape[1] // 4)
        width = quarter * -(-int(charged[mine].sum(1).max()) // quarter)
        batch = replace(batch, ids=batch.ids[:, :width]).to(self.accelerator.device)
        return -self.model.log_probs(batch, self.network).sum() / charged[mine].sum(), weight

    @torch.no_grad()
    def nats(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The exact likelihood."""
        return -self.model.log_probs(batch).sum(1)


class Masked(BaselineObjective):
    """Masked tokens from the others, by the variational bound."""

    model: MaskedModel

    def __init__(self, config: TrainConfig, tokenizer: Any, max_prompt_length: int, accelerator: Accelerator) -> None:
        super().__init__(config, tokenizer, max_prompt_length, accelerator)
        self.mixture = Mixture(0.0, config.infill)  # prompts are dropped for guidance, which it has none of

    def new_model(self, shape: Mapping[str, int]) -> MaskedModel:
        """A model with its initial weights."""
        return cast(MaskedModel, MaskedModel(**shape, **self._backbone()))

    def loss(self, batch: Batch, mine: slice, step: int, generator: np.random.Generator) -> tuple[Tensor, float]:
        """At times in strata over the batch, from 0.001 on, so that no weight 1 / t is huge; so did the authors."""
        device = self.accelerator.device
        t = 1e-3 + (1 - 1e-3) * strata(batch, generator)
        batch = self.mixture.apply(batch, generator)
        quantiles = generator.random(batch.ids.shape, dtype=np.float32)
        weight = share(batch.target(), mine)
        batch = batch.take(mine).to(device)
        times, numbers = (sent(torch.from_numpy(x[mine]).float(), device) for x in (t, quantiles))
        return self.model.loss(batch, times, numbers, self.network), weight

    def nats(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The variational bound."""
        return self.model.bound(batch, generator, samples=4)


OBJECTIVES: dict[str, type[Objective]] = {
    "ce": Diffusion, "vlb": Diffusion, "mixed": Diffusion, "autoregressive": Autoregressive, "masked": Masked,
}  # fmt: skip


def strata(batch: Batch, generator: np.random.Generator) -> NDArray[np.float64]:
    """A number in [0, 1) for each row, evenly spread; those of one text's draws lie far apart."""
    rows = len(batch.ids)
    t = (np.arange(rows) + generator.random(rows)) / rows
    return t.reshape(batch.draws, -1).T.reshape(-1)


# Transitions are learned in one of so many steps, which is enough, and cheap; at times up to 0.3, where texts are
# rounded in 4 steps or more; from so many rows.
EVERY, ROUNDED_BELOW, ROWS = 8, 0.3, 8


def rows_for_transitions(t: NDArray[np.float64]) -> NDArray[np.int64]:
    """Some of the rows at low noise, spread over it."""
    low = np.flatnonzero(t < ROUNDED_BELOW)
    return low[:: -(-len(low) // ROWS) or 1]


def share(target: Tensor, mine: slice) -> float:
    """Of the target positions [B, L] bool, those in my rows."""
    return int(target[mine].sum()) / int(target.sum())
