"""Training: from a corpus to a folder with a model. What is special to an objective is in `embdiff.objectives`.

Everything random at step k is drawn from generators seeded with (seed, k), so a resumed run needs no random state and
ends with the same weights as one that was never stopped.

    DIR/run.yaml               the configuration
    DIR/log.jsonl              loss, speed and schedule over the steps, and the validation bound now and then
    DIR/tokenizer/             the vocabulary, there from the start
    DIR/checkpoints/step-*/    training state, see `embdiff.checkpoint`
    DIR/model_index.json, denoiser/, scheduler/    the pipeline, there at the end
    DIR/model/                 instead of it, if the run trains a baseline
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from embdiff import checkpoint, ops, vocabulary
from embdiff.batches import Encoded, Window, batch_index, encode, spread
from embdiff.compilation import can_compile, compiled, once
from embdiff.config import DECISIVE, TrainConfig
from embdiff.data import Corpus, Example
from embdiff.errors import UserError
from embdiff.losses import Network
from embdiff.objectives import OBJECTIVES, Objective
from embdiff.optim import Muon
from embdiff.randomness import mixed_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKER = "embdiff"  # the name that trackers know a run by, and the folder of those that write files
# What a run writes into its folder, and so what a new one deletes; run.yaml last, for it tells that the rest is a run.
WRITTEN = (
    "log.jsonl", ".log.jsonl.tmp", "tokenizer", ".tokenizer.tmp", "checkpoints", "model_index.json", "denoiser",
    "scheduler", checkpoint.CLASSIFIERS, "pipeline.new", ".pipeline.new.tmp", "model", ".model.tmp", TRACKER,
    ".run.yaml.tmp", "run.yaml",
)  # fmt: skip

Result = TypeVar("Result")

# ------------------------------------------------------------------------------------------------ reporting


class Reporter(Protocol):
    """Where a run says how it goes."""

    def note(self, text: str) -> None:
        """One line of information."""

    def progress(self, metrics: dict[str, float]) -> None:
        """loss, tokens_per_second, step, share (done, 0 to 1), seconds_left; every `log_every` steps."""

    def validation(self, metrics: dict[str, float], previews: list[tuple[str | None, str]]) -> None:
        """Metrics on validation data, and (prompt, sample) pairs."""


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, metrics: dict[str, float]) -> None:
        """Nothing."""

    def validation(self, metrics: dict[str, float], previews: list[tuple[str | None, str]]) -> None:
        """Nothing."""


class Stopped(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, has saved its state and can be resumed."""


# --------------------------------------------------------------------------------------------------- a run


@dataclass
class Progress:
    """What the loop counts; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def train(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    corpus: Corpus | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Trains a model and writes it to `output`, which it returns.

    Args:
        resume: continue the newest checkpoint in `output`.
        overwrite: delete another run in `output` first.
        corpus: the data, if it is already loaded; else `config.data` is.
        should_stop: asked after every step.

    Raises:
        UserError: bad input. Stopped: `should_stop` said so; the state is saved.
    """
    from accelerate import Accelerator

    check_tracker(config.tracker)
    accelerator = Accelerator(mixed_precision="no", log_with=config.tracker, project_dir=str(output))
    if accelerator.num_processes > 1:
        atexit.register(leave_group)
    reporter = reporter if reporter is not None and accelerator.is_main_process else Silent()
    config = config.located()
    inputs = [source for source in (config.data, config.validation) if source is not None]
    by_main(accelerator, lambda: check_output(output, resume, overwrite, inputs))
    corpus = corpus or main_first(  # the others then find it in the cache
        accelerator,
        lambda: config.corpus(progress=accelerator.is_main_process),
    )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        reporter.note(f"accelerate's mixed_precision {precision} has no effect with embdiff: use --dtype")
    for text in [*config.idle(), *corpus.notes]:
        reporter.note(text)
    Trainer(config, output, corpus, accelerator, reporter, resume).run(should_stop)
    return output


def leave_group() -> None:
    """Ends the threads of torch.distributed, if they run: left to the end of the process, they may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def by_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Lets the main process work while the others wait. If it fails, all fail in its words, and none waits forever."""
    from accelerate.utils import broadcast_object_list

    failure: Exception | None = None
    try:
        if accelerator.is_main_process:
            work()
    except Exception as error:
        failure = error
    words = [None if failure is None else str(failure)]
    if accelerator.num_processes > 1:
        broadcast_object_list(words)
    if failure is not None:
        raise failure
    if words[0] is not None:
        raise UserError(words[0])


def main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What the work gives, done by the main process first, then by the others."""
    results: list[Result] = []
    by_main(accelerator, lambda: results.append(work()))
    return results[0] if results else work()


def check_tracker(name: str | None) -> None:
    """Refuses a tracker that accelerate doesn't know or that isn't installed; it would only be ignored."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"tracker {name!r} is unknown: choose one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        raise UserError(f"tracker {name!r} is not installed: pip install {name}, or leave --tracker out")


def check_output(output: Path, resume: bool, overwrite: bool, inputs: Sequence[str] = ()) -> None:
    """Refuses a folder that holds something else, or the data where a new run would delete them, before anything is
    loaded or deleted."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    if resume:
        if not (output / "run.yaml").exists():
            raise UserError(f"nothing to resume in {output}: start a run there without --resume")
    elif output.exists() and any(output.iterdir()):
        if not (output / "run.yaml").exists():
            raise UserError(f"output folder {output} holds files that are no embdiff run: use another folder")
        if not overwrite:
            raise UserError(
                f"output folder {output} already holds a run: go on with embdiff train --resume, or use --overwrite or "
                "another folder"
            )
        for source, name in itertools.product(inputs, WRITTEN):
            if Path(source).resolve().is_relative_to((output / name).resolve()):
                raise UserError(
                    f"data {source} is in {output / name}, which --overwrite deletes: move it elsewhere first"
                )


def clear_output(output: Path) -> None:
    """A folder without what an earlier run wrote there. It may be a link or a mount, so it stays, and so do files of
    other origin."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in (output / name for name in WRITTEN):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot make output folder {output}: {error.strerror or error}") from error


class Trainer:
    """One run: data, objective, optimisers, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        corpus: Corpus,
        accelerator: Accelerator,
        reporter: Reporter,
        resume: bool,
    ) -> None:
        if config.batch_size % config.draws:
            raise UserError(
                f"draws {config.draws} does not divide batch_size {config.batch_size}: give a divisor of it"
            )
        self.config, self.output, self.corpus = config, output, corpus
        self.accelerator, self.reporter = accelerator, reporter
        self.device = self.accelerator.device
        saved = checkpoint.checkpoints(output) if resume else []
        self.start = saved[-1] if saved else None
        if resume and not saved:
            reporter.note("no checkpoint was written yet: starting from the beginning")
        self.tokenizer = self._tokenizer()
        self.train_set, self.valid_set = self._encode()
        self.data_hash = self.train_set.fingerprint()
        self.objective = self._new_objective()
        self.model = self.objective.model.to(self.device)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        for block in self.model.blocks:
            block.dropout = config.dropout
        self.window = Window.fitting(self.train_set, 0.0 if self.objective.whole else config.window)
        self.dtype = self._dtype()
        self.names = {p: name for name, p in self.model.named_parameters()}
        # Transitions apart, so that what they learn changes nothing else.
        self.clipped = {p: name for p, name in self.names.items() if not name.startswith("transitions.")}
        self.optimizers = self._new_optimizers()
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.progress = Progress()
        self.recent: list[Tensor] = []
        if self.start is not None:
            self._load(self.start)
        self.objective.enter(self.progress.step)
        by_main(self.accelerator, lambda: self._prepare_output(resume))
        if config.tracker:
            self.accelerator.init_trackers(TRACKER, {k: v for k, v in asdict(config).items() if v is not None})
        self._compile()

    # ---------------------------------------------------------------------------------------- construction

    def _dtype(self) -> torch.dtype:
        """Measured once in a run, by one process, for a second measurement might end the other way."""
        from accelerate.utils import broadcast_object_list

        choice = [self.config.dtype]
        if choice == ["auto"] and self.start is not None:
            choice = [checkpoint.read_state(self.start).get("dtype", "auto")]
        if choice == ["auto"]:
            choice = ["bf16" if ops.fast_dtype(self.device.type) is torch.bfloat16 else "fp32"]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(choice)
        return torch.bfloat16 if choice == ["bf16"] else torch.float32

    def _tokenizer(self) -> Any:
        saved = self.output / "tokenizer"
        if self.start is not None and saved.exists():
            return vocabulary.load(str(saved))
        texts = (part for e in self.corpus.train for part in (e.prompt, e.text) if part)
        return vocabulary.build(
            self.config.tokenizer, texts, vocab_size=self.config.vocab_size, min_count=self.config.min_count
        )

    def _encode(self) -> tuple[Encoded, Encoded]:
        config, corpus = self.config, self.corpus
        limit = config.max_prompt_length if any(e.prompt for e in corpus.train) else 0

        def encoded(examples: list[Example], what: str) -> Encoded:
            found = encode(examples, self.tokenizer, config.max_length, limit, config.on_long, what)
            for count, fate in ((found.truncated, "truncated"), (found.dropped, "dropped")):
                if count:
                    long = f"longer than {config.max_length} tokens"
                    self.reporter.note(f"{count:,} {fate} of {len(examples):,} {what}s: {long}")
            if found.cut:
                self.reporter.note(f"{found.cut:,} prompts of {len(found):,} {what}s cut to their last {limit} tokens")
            return found

        train_set = encoded(corpus.train, "text")
        valid_set = encoded(corpus.valid, "validation text") if corpus.valid else train_set.first(1)
        if not corpus.valid:
            self.reporter.note("validated on a training text, for want of others: the bound says nothing of new texts")
        if limit:
            # No wider than the longest prompt: every position costs.
            width = int(max(1, train_set.prompt_length.max(), valid_set.prompt_length.max()))
            train_set, valid_set = (replace(s, prompt=s.prompt[:, :width]) for s in (train_set, valid_set))
        return train_set, valid_set

    def _prepare_output(self, resume: bool) -> None:
        if resume:
            self._trim_log()
        else:
            clear_output(self.output)
        self.config.save(self.output)
        if self.start is None or not (self.output / "tokenizer").exists():
            checkpoint.save_folder(self.output / "tokenizer", self.tokenizer.save_pretrained)

    def _new_objective(self) -> Objective:
        torch.manual_seed(weight_seed(self.config.seed))
        kind = OBJECTIVES[self.config.objective]
        objective = kind(self.config, self.tokenizer, self.train_set.prompt.shape[1], self.accelerator)
        count = sum(p.numel() for p in objective.model.parameters())
        self.reporter.note(
            f"{count / 1e6:.1f}M parameters, {len(self.tokenizer):,} tokens in the vocabulary, "
            f"{len(self.train_set):,} training and {len(self.valid_set):,} validation texts on {self.device}"
        )
        return objective

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        embedding = [self.model.space.weight, *(p for p in self.names if p not in self.clipped)]
        matrices = [p for name, p in self.model.blocks.named_parameters() if "modulation" not in name]
        special = {id(p) for p in embedding + matrices}
        others = [p for p in self.model.parameters() if id(p) not in special]
        groups = [
            {"params": embedding, "lr": config.embedding_lr, "weight_decay": 0.0},
            {"params": others, "lr": config.lr},
        ]
        optimizers: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            optimizers.append(Muon(matrices, config.matrix_lr, weight_decay=config.weight_decay, dtype=self.dtype))
        else:
            groups.append({"params": matrices, "lr": config.lr})
        fused = self.device.type == "cuda"
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=fused))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
        return optimizers

    def _compile(self) -> None:
        """Lets the objective call compiled passes, where that is wanted and possible."""
        wanted = self.config.compile
        if wanted is None:
            # Compiling takes a minute or more on a CPU, so short runs are faster without.
            wanted = self.device.type == "cuda" or (
                (self.config.max_time or math.inf) >= 600 and (self.config.steps or math.inf) >= 1000
            )
        if wanted and can_compile(self.device.type, self.reporter.note):
            note = once(self.reporter.note)
            self.objective.network = Network(*(compiled(call, note) for call in self.objective.network))

    # ------------------------------------------------------------------------------------------- the loop

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Trains until the steps or the time are used up, then writes the model."""
        config = self.config
        written = self._finished() and (self.output / "model_index.json").exists()  # and perhaps tuned since
        begin = time.monotonic() - self.progress.seconds
        mark, tokens = time.monotonic(), self.progress.tokens
        while not self._finished():
            self._step()
            step = self.progress.step
            stop, self.progress.seconds = self._agreed(should_stop(), time.monotonic() - begin)
            if step % config.log_every == 0 or self._finished():
                now = time.monotonic()
                self._log((self.progress.tokens - tokens) / max(now - mark, 1e-9))
                mark, tokens = now, self.progress.tokens
            pause = time.monotonic()
            if step % config.validate_every == 0 and not self._finished():
                by_main(self.accelerator, self._validate)
            if step % config.save_every == 0 or stop or self._finished():
                self._save()
            mark += time.monotonic() - pause
            if stop and not self._finished():
                raise Stopped(str(self.output))
        by_main(self.accelerator, self._validate)
        if written:
            self.reporter.note("the run was finished: its model stays as it is")
        else:
            by_main(self.accelerator, self._write_model)
        if config.tracker:
            self.accelerator.end_training()

    def _agreed(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """What all processes make of one wanting to stop and of the time, so that all leave the loop together."""
        if self.accelerator.num_processes == 1:
            return stop, seconds
        views = torch.tensor([float(stop), seconds], dtype=torch.float64, device=self.device)
        wanted, total = cast(Tensor, self.accelerator.reduce(views)).tolist()
        return wanted > 0, total / self.accelerator.num_processes

    def _share(self) -> float:
        """How much of the run is done, 0 to 1."""
        by_step = self.progress.step / self.config.steps if self.config.steps else 0.0
        by_time = self.progress.seconds / self.config.max_time if self.config.max_time else 0.0
        return min(1.0, max(by_step, by_time))

    def _finished(self) -> bool:
        return self._share() >= 1.0

    def _step(self) -> None:
        step, config = self.progress.step, self.config
        self._set_learning_rates()
        for part in range(config.accumulate):
            with self._autocast():
                loss, weight = self._loss(step, part)
            torch.autograd.backward(loss * weight / config.accumulate)
            self.recent.append(loss.detach() * weight)
        self._share_gradients()
        clip_grad_norm_(list(self.clipped), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        self.progress.step += 1
        self.objective.enter(self.progress.step)
        self.objective.learn(self.progress.step)

    def _share_gradients(self) -> None:
        """Sums gradients over processes; not through DDP, since head and embeddings are used outside of forward."""
        if self.accelerator.num_processes > 1:
            for p in self.names:
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)

    def _loss(self, step: int, part: int) -> tuple[Tensor, float]:
        """This process's mean loss over target positions, and its share of all target positions of the step."""
        config = self.config
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        generator = np.random.default_rng((config.seed, step, part))
        if config.dropout:  # drawn from torch's own generator
            torch.manual_seed(mixed_seed(config.seed, step, part, rank))
        turn = step * config.accumulate + part
        length = self.window.at(turn)
        # Where there are prompts, each can be encoded once for several noise levels of its text.
        several = self.train_set.prompt.shape[1] and not self.objective.whole
        draws = config.draws if several else 1
        examples = world * (config.batch_size // draws)
        count = self.window.count(examples, turn)
        index = batch_index(len(self.train_set), self.window.start(examples, turn), count, config.seed)
        self.progress.tokens += draws * int(self.train_set.text_length[index].clip(max=length).sum())
        mine = slice(count * rank // world * draws, count * (rank + 1) // world * draws)
        return self.objective.loss(self.train_set.batch(index, length, draws), mine, step, generator)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _set_learning_rates(self) -> None:
        """Linear warm-up, then constant, then linear to zero over the last `decay` of the run."""
        warm = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup))
        cool = min(1.0, (1.0 - self._share()) / self.config.decay) if self.config.decay else 1.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * warm * cool

    @torch.no_grad()
    def _update_ema(self) -> None:
        # Early on the average is over as many steps as there have been.
        decay = min(self.config.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.names], 1 - decay)

    # ------------------------------------------------------------------------------------------ reporting

    def _log(self, tokens_per_second: float) -> None:
        step = self.progress.step
        values = self._over_processes(torch.stack(self.recent).float()).cpu().numpy()
        self.recent = []
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            first = step - (len(values) - int(bad[0]) - 1) // self.config.accumulate
            raise UserError(f"the loss is {values[bad[0]]} at step {first}: {self._last_good()}; try a lower --lr")
        loss, share = float(values.mean()), self._share()
        metrics = {
            "step": step,
            "loss": loss,
            "tokens_per_second": tokens_per_second,
            "share": share,
            "seconds_left": self.progress.seconds * (1 - share) / max(share, 1e-9),
            **self.objective.figures(),
        }
        if self.accelerator.is_main_process:
            self._append(metrics)
            self.reporter.progress(metrics)
        if self.config.tracker:
            shown = ("loss", "tokens_per_second", *self.objective.figures())
            self.accelerator.log({k: metrics[k] for k in shown}, step=step)

    def _append(self, metrics: dict[str, float]) -> None:
        with (self.output / "log.jsonl").open("a") as log:
            log.write(json.dumps(metrics) + "\n")

    def _over_processes(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values)) if self.accelerator.num_processes > 1 else values

    def _last_good(self) -> str:
        saved = checkpoint.checkpoints(self.output)
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Gives the model its averaged weights for a while."""
        trained = {name: p.detach().clone() for p, name in self.names.items()}
        try:
            self._put(self.ema)
            self.model.eval()
            yield
        finally:
            self._put(trained)
            self.model.train()

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for p, name in self.names.items():
            p.copy_(weights[name])

    def _validate(self) -> None:
        with self._averaged():
            index = spread(len(self.valid_set), 128)
            batch = self.valid_set.batch(index).to(self.device)
            generator = torch.Generator().manual_seed(self.config.seed)
            nats = float(self.objective.nats(batch, generator).sum() / self.valid_set.text_length[index].sum())
            previews = self._previews() if self.config.previews else []
        metrics = {"step": self.progress.step, "bound": nats}
        self._append(metrics)
        self.reporter.validation(metrics, previews)
        if self.config.tracker:
            self.accelerator.log({"validation_bound": nats}, step=self.progress.step)

    def _previews(self) -> list[tuple[str | None, str]]:
        prompted = self.train_set.prompt.shape[1] > 0
        chosen = spread(len(self.corpus.valid), self.config.previews if prompted else 0)
        prompts = [self.corpus.valid[i].prompt for i in chosen]
        generator = torch.Generator().manual_seed(self.config.seed)
        texts = self.objective.texts([p or "" for p in prompts], self.config.previews, generator)
        return list(zip(prompts or [None] * len(texts), texts, strict=False))

    # --------------------------------------------------------------------------------------------- saving

    def _write_model(self) -> None:
        with self._averaged():
            self.objective.write(self.output)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to continue."""
        return {
            "vocabulary": vocabulary.fingerprint(self.tokenizer),
            "examples": len(self.train_set),
            "data": self.data_hash,
            "processes": self.accelerator.num_processes,
            "model": {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")},
            "options": {name: getattr(self.config, name) for name in DECISIVE},
        }

    def _trim_log(self) -> None:
        """Drops what was logged after the checkpoint, for those steps come again, and what is no whole line."""
        log, fresh = self.output / "log.jsonl", self.output / ".log.jsonl.tmp"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(errors="replace").splitlines():
            step, metrics = logged(line)
            again = "bound" in metrics and self._finished()  # a finished run only validates
            if step < self.progress.step or (step == self.progress.step and not again):
                kept.append(line + "\n")
        fresh.write_text("".join(kept))
        fresh.replace(log)

    def _save(self) -> None:
        self._log_pending()
        if not all(bool(torch.isfinite(p).all()) for p in self.names):
            raise UserError(
                f"weights are not finite at step {self.progress.step}: {self._last_good()}; try a lower --lr"
            )
        self.objective.collect()
        by_main(self.accelerator, self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        state = {
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "tokens": self.progress.tokens,
            "dtype": "bf16" if self.dtype is torch.bfloat16 else "fp32",
            **self.objective.state_dict(),
            "idle": [name for p, name in self.names.items() if not any(p in o.state for o in self.optimizers)],
            "fingerprint": self._fingerprint(),
        }
        tensors = {self.objective.part: {name: p for p, name in self.names.items()}, "ema": self.ema}
        for i, optimizer in enumerate(self.optimizers):
            tensors[f"optimizer-{i}"] = checkpoint.optimizer_tensors(optimizer, self.names)
        target = self.output / "checkpoints" / f"step-{self.progress.step:08d}"
        checkpoint.save_folder(target, lambda folder: checkpoint.write_state(folder, tensors, state))
        checkpoint.prune(self.output, self.config.keep)

    def _log_pending(self) -> None:
        """Looks for a bad loss before its weights are saved."""
        if self.recent and not torch.isfinite(self._over_processes(torch.stack(self.recent))).all():
            self._log(0.0)

    def _load(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        self._check(folder, state)
        try:
            self._load_state(state)
            idle = list(state.get("idle", []))
        except Exception as error:  # it can be wrong in every way
            raise UserError(
                f"state.json in {folder} is damaged ({type(error).__name__}: {error}): "
                "delete the folder to resume from an earlier one"
            ) from error
        weights, ema = (
            checkpoint.read_tensors(folder / f"{name}.safetensors", self.ema) for name in (self.objective.part, "ema")
        )
        self._put(weights)
        for name, average in self.ema.items():
            average.copy_(ema[name])
        for i, optimizer in enumerate(self.optimizers):
            expected = checkpoint.expected_tensors(optimizer, self.names, idle)
            tensors = checkpoint.read_tensors(folder / f"optimizer-{i}.safetensors", expected)
            checkpoint.load_optimizer(optimizer, self.names, tensors)
        self.reporter.note(f"resuming at step {self.progress.step}")

    def _load_state(self, state: dict[str, Any]) -> None:
        step, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        if not (type(step) is type(tokens) is int and min(step, tokens, seconds) >= 0 and math.isfinite(seconds)):
            raise ValueError("step, seconds or tokens is no count")
        self.progress = Progress(step, float(seconds), tokens)
        self.objective.load_state_dict(state)

    def _check(self, folder: Path, state: dict[str, Any]) -> None:
        now, then = self._fingerprint(), state.get("fingerprint")
        if not isinstance(then, dict) or not isinstance(then.get("options"), dict):
            raise UserError(f"{folder} is no embdiff checkpoint: its state.json has no fingerprint")
        if now["vocabulary"] != then.get("vocabulary"):
            raise UserError(
                f"the vocabulary in {self.output / 'tokenizer'} is not the one of {folder}: put the old one back"
            )
        for name, value in now["options"].items():
            before = then["options"].get(name, value)
            if value != before:
                raise UserError(f"{name} is {value}, the run in {folder} had {before}: resume without changing it")
        if now["model"] != then.get("model"):
            raise UserError(
                f"the model's shape is not the one of {folder}: resume with the options and data it was started with"
            )
        if now["examples"] != then.get("examples"):
            raise UserError(
                f"the data has {now['examples']} examples, the run in {folder} had {then.get('examples')}: "
                "resume with the data that it was started with"
            )
        if now["data"] != then.get("data", now["data"]):
            raise UserError(
                f"{self.config.data} holds other texts than the run in {folder} had: "
                "resume with the data that it was started with"
            )
        if now["processes"] != then.get("processes", now["processes"]):
            raise UserError(
                f"there are {now['processes']} processes, the run in {folder} had {then['processes']}: "
                "resume with as many, for they share out its batches"
            )


def logged(line: str) -> tuple[float, dict[str, Any]]:
    """Step and metrics of a line of log.jsonl; at no step if it is damaged, as the last one of a killed run can be."""
    try:
        metrics = json.loads(line)
        return float(metrics["step"]), metrics
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf, {}


def weight_seed(seed: int) -> int:
    """The seed of the initial weights. Noise is drawn from torch generators seeded with small numbers too, often the
    same ones: from the same stream, the embeddings would be that noise, row by row."""
    return mixed_seed(seed, 0x656D62)
