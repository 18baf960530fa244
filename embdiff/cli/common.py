"""What the commands share: durations, devices, loading a model."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from embdiff.data import read_lines
from embdiff.errors import UserError, reason

if TYPE_CHECKING:
    import torch

    from embdiff.config import TrainConfig
    from embdiff.data import Corpus, Example
    from embdiff.guidance import Guidance
    from embdiff.pipeline import TextDiffusionPipeline

DTYPE_HELP = "fp32, bf16, auto: the faster one on this device; or int8: large products in 8 bits, on a CPU."
COMPILE_HELP = (
    "The fast step of a CPU, and elsewhere torch.compile; by default that one once it has worked for about a minute."
)
SOLVERS = "ddim, ddpm, renoise, euler, euler-a, heun, churn, dpm++, dpm++3m, dpm++sde, dpm++3m-sde or unipc"
GUIDANCE_HELP = "A module with its options, as length:words=12 or lexical:include=cheap pub|riverside; several times."
SEPARATOR_HELP = "Between prompt and text in lines of .txt; by default the run's own."
TEXT_COLUMN_HELP = "Of a table; by default the run's own, or text."
PROMPT_COLUMN_HELP = "Of a table; by default the run's own, or prompt."
UNITS = {"s": 1, "m": 60, "h": 3600}

Advance = Callable[[str, int, int], None]  # told of what, how much is done, and of how much


def noted(text: str) -> None:
    """A remark on stderr."""
    print(text, file=sys.stderr)


def seconds(text: str) -> float:
    """90, 90s, 15m or 1h30m in seconds."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UserError(f"time {text!r} is not understood: write 90s, 15m or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def check_seed(seed: int) -> None:
    """Refuses a seed that a generator, or the seed of a later sample, has no room for."""
    if not 0 <= seed < 2**62:
        raise UserError(f"--seed {seed} is out of range: give 0 to {2**62 - 1}")


MOST = 10**9


def check_counts(**counts: int) -> None:
    """Refuses numbers of things below 1, or beyond all reason; each is named like its option."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least 1")
        if value > MOST:
            raise UserError(f"--{name.replace('_', '-')} {value} is too large: give at most {MOST:,}")


def check_temperature(value: float) -> None:
    """Refuses what is no temperature."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--temperature {value} is out of range: give a number above 0")


def check_output(output: Path | None, overwrite: bool, resume: bool | None = None) -> None:
    """Refuses to replace a file unasked, or to write where nothing can be, before anything is loaded.

    resume: whether the file is to be gone on with; None = this command can't.
    """
    if resume and overwrite:
        raise UserError("both --resume and --overwrite are given: choose one")
    if output is None:
        if resume or overwrite:
            raise UserError(f"{'--resume' if resume else '--overwrite'} is for a file: name it with --output")
        return
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file")
    if output.exists() and not (overwrite or resume):
        finish = "" if resume is None else "--resume to finish it, "
        raise UserError(f"{output} exists: use {finish}--overwrite to replace it, or another name")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent} for {output.name}: make it first")
    target = output.resolve()  # a link stays
    there = target.exists()
    with target.open("a"):  # an OSError is told in one line
        pass
    if not there:
        target.unlink()


def duration(value: float) -> str:
    """Seconds as 1h05m, 3m20s or 45s."""
    whole = round(value)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def quiet() -> None:
    """Keeps the libraries' own remarks and progress bars out of the output, and says warnings in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = lambda message, *place, **more: f"{message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def reuse_memory() -> None:
    """Keeps freed memory for the next tensor. glibc gives large pieces back and maps them anew, and to fill in their
    pages costs more than the arithmetic on them: a third of a step on a CPU."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries have no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing apart
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back what exceeds 2 GiB


def device(name: str) -> torch.device:
    """The device of this name; `auto` takes the best there is. Where a device isn't there, that one is taken too."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(best if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: choose cpu, cuda or auto") from error
    try:
        torch.zeros(1, device=chosen).tolist()  # back again too: meta tensors hold nothing
    except (RuntimeError, AssertionError) as error:
        instead = "cpu" if chosen == torch.device(best) else best
        loss = ": slower, and a seed gives another text than on a GPU" if instead == "cpu" else ""
        noted(f"device {name!r} can't be used here ({reason(error)}), going on on {instead}{loss}")
        return device(instead)
    return chosen


def dtype(name: str, chosen: torch.device) -> torch.dtype:
    """fp32, bf16, or `auto`: whichever is faster on the device, as it is beside the products of `int8`. Other
    precisions of torch give way: the finer ones to fp32, the coarser ones to the faster one."""
    import torch

    from embdiff import ops

    if name == "int8" and chosen.type != "cpu":
        noted(f"int8 is for a CPU: going on in {str(ops.fast_dtype(chosen.type)).removeprefix('torch.')}")
    if name in ("auto", "int8"):
        return ops.fast_dtype(chosen.type)
    named = getattr(torch, re.sub(r"^(?:fp|(b)f)(?=\d)", r"\1float", name), None)
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise UserError(f"dtype {name!r} is unknown: choose auto, fp32, bf16 or int8")
    if named not in (torch.float32, torch.bfloat16):
        instead = torch.float32 if named.itemsize > 4 else ops.fast_dtype(chosen.type)
        noted(f"dtype {name!r} is not supported: going on in {str(instead).removeprefix('torch.')}")
        return instead
    if named is torch.bfloat16 and ops.fast_dtype(chosen.type) is torch.float32:
        noted(f"this {chosen.type} has no bf16 units: bf16 is emulated, and slower than --dtype fp32")
    return named


def load_pipeline(
    model: str, device_name: str = "cpu", dtype_name: str = "fp32", compile: bool | None = None
) -> TextDiffusionPipeline:
    """The pipeline in a local folder or on the hub, on a device; compile: None = once it pays."""
    from embdiff.pipeline import load

    reuse_memory()
    chosen = device(device_name)
    pipe = load(model)
    pipe.to(chosen, dtype(dtype_name, chosen))
    pipe.set_progress_bar_config(disable=True)
    pipe.compile, pipe.int8 = compile, dtype_name == "int8"
    return pipe


def check_local(model: Path) -> None:
    """Refuses what is no folder of a model, where something is to be stored with it."""
    if not (model / "model_index.json").exists():
        raise UserError(f"{model} is no model's folder on this machine: name the one that embdiff train wrote")


def set_scheduler(pipe: TextDiffusionPipeline, solver: str | None, noise_schedule: str | None = None) -> None:
    """Another solver, and levels even in another schedule's time, over the noise schedule that the model has; the
    model's own solver stays as it was tuned."""
    from embdiff.schedulers import EmbeddingScheduler, scheduler_class, with_solver

    if solver is not None and type(pipe.scheduler) is not scheduler_class(solver):
        pipe.scheduler = with_solver(pipe.scheduler, solver)
    if noise_schedule is None:
        return
    cls = type(pipe.scheduler)
    if not issubclass(cls, EmbeddingScheduler):
        raise UserError(f"--noise-schedule is for embdiff's schedulers, the model has {cls.__name__}: --scheduler too")
    pipe.scheduler = cls.from_config(pipe.scheduler.config, nodes=noise_schedule)


def run_config(model: str | Path) -> TrainConfig | None:
    """The options that a run was started with; None for a model without them."""
    from embdiff.config import TrainConfig, read_config

    run = Path(model) / "run.yaml"
    if not run.exists():
        return None
    options = read_config(run)
    if "data" not in options:
        raise UserError(f"{run} does not name the data, so it is damaged: delete it, and name texts with --data")
    return TrainConfig(**options)


def run_corpus(model: str | Path, progress: bool = True) -> Corpus:
    """What a run was trained and validated with."""
    config = run_config(model)
    if config is None:
        raise UserError(f"{model} does not say what it was trained on: name texts with --data")
    return config.corpus(progress)


class Reading(NamedTuple):
    """How texts and prompts are told apart in data, see `data.read_examples`; None = as the run did."""

    separator: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None


def like_run(model: str | Path, data: str, reading: Reading = Reading()) -> list[Example]:
    """The examples of another source, read as the run read its own where `reading` names nothing else.

    Options for another kind of file are left out: the run's data may have been of that kind, or another source is.
    """
    from embdiff.data import read_examples

    config = run_config(model)
    own = Reading() if config is None else Reading(config.separator, config.text_column, config.prompt_column)
    chosen = Reading(*(mine or its for mine, its in zip(reading, own, strict=True)))
    lines, table = kinds(data)
    chosen = Reading(chosen.separator if lines else None, *(chosen[1:] if table else (None, None)))
    return read_examples(data, **chosen._asdict(), note=noted)


def json_line(value: Any) -> str:
    """JSON for stdout, in characters that it has."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not utf8, allow_nan=False)


def kinds(data: str) -> tuple[bool, bool]:
    """Whether a source may have lines of text, and tables."""
    from embdiff.data import files_in
    from embdiff.paths import local_path

    if data == "docstrings":
        return False, False
    path = local_path(data)
    suffixes = {file.suffix.lower() for file in (files_in(path) if path.is_dir() else [path])}
    return ".txt" in suffixes, bool(suffixes - {".txt"})


def check_reading(reading: Reading, *sources: str | Path | None) -> None:
    """Refuses options that none of the sources has a use for; None = the run's own, read as it was."""
    found = [kinds(str(source)) for source in sources if source is not None]
    lines, table = (any(kind) for kind in zip((False, False), *found, strict=True))
    for name, value in reading._asdict().items():
        if value is not None and not (lines if name == "separator" else table):
            kind = "a .txt file" if name == "separator" else "a table"
            raise UserError(f"--{name.replace('_', '-')} {value!r} is for {kind}, and none is named as data")


def note_prompts(
    pipe: TextDiffusionPipeline, examples: list[Example], fix: str = "name them with --separator or --prompt-column"
) -> None:
    """Says so where a model of prompts is given texts without any: they may stand unseparated in the texts."""
    if pipe.denoiser.config.max_prompt_length and not any(example.prompt for example in examples):
        noted(f"the model takes prompts and the data has none, so it writes without; if there are any, {fix}")


def read_prompts(path: str) -> list[str]:
    """The lines of a file, or of stdin for `-`, as in data; blank lines are skipped."""
    prompts = read_lines(path, "prompts file")
    if not prompts:
        raise UserError(f"prompts file {path} has no prompt: write one on each line")
    return prompts


def check_encoding(option: str, value: str | None) -> None:
    """Refuses half characters, which no tokenizer takes: bytes that are not UTF-8 come as such."""
    from embdiff.data import has_lone_surrogate

    if value is not None and has_lone_surrogate(value):
        raise UserError(f"{option} {value!r} is not UTF-8: check the terminal's encoding")


def parsed(guidance: list[str]) -> list[Guidance]:
    """The modules that --guidance names."""
    if not guidance:
        return []
    from embdiff.guidance import parse

    for spec in guidance:
        check_encoding("--guidance", spec)
    return [parse(spec) for spec in guidance]


@contextmanager
def shown() -> Iterator[Advance]:
    """Progress bars on stderr, one for each thing that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield advance
