"""embdiff sample"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from embdiff.cli.common import (
    COMPILE_HELP,
    DTYPE_HELP,
    GUIDANCE_HELP,
    SOLVERS,
    check_counts,
    check_encoding,
    check_output,
    check_seed,
    check_temperature,
    json_line,
    load_pipeline,
    noted,
    parsed,
    quiet,
    read_prompts,
    set_scheduler,
)
from embdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from embdiff.guidance import Guidance
    from embdiff.pipeline import TextDiffusionPipeline


@dataclass(frozen=True)
class Job:
    """One sample to draw."""

    prompt: str | None
    negative: str | None
    seed: int


@dataclass(frozen=True)
class Record:
    """One sample, as `--json` prints it. tokens: the ids that `text` is decoded from; cfg_scale: 1 where none acted."""

    prompt: str | None
    text: str
    tokens: list[int]
    seed: int
    steps: int
    scheduler: str
    cfg_scale: float


def sample(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    prompt: str | None = typer.Option(None, help="What the text is to be conditioned on."),
    prompts: str | None = typer.Option(None, help="File with a prompt on each line; - reads stdin."),
    negative_prompt: str | None = typer.Option(None, help="What guidance steers away from."),
    num_samples: int = typer.Option(1, "--num-samples", "-n", help="Samples for each prompt."),
    cfg_scale: float = typer.Option(1.0, help="Classifier-free guidance; 1 = off."),
    cfg_space: str = typer.Option("x0", help="Where guidance combines predictions: x0 or logits."),
    guidance: list[str] = typer.Option([], help=GUIDANCE_HELP),
    steps: int = typer.Option(32, help="Denoising steps."),
    scheduler: str | None = typer.Option(None, help=f"{SOLVERS}; by default the model's own."),
    noise_schedule: str | None = typer.Option(
        None, help="Noise levels even in another schedule's time: linear, cosine, sqrt, sigmoid, log-linear or karras."
    ),
    max_length: int | None = typer.Option(None, help="Tokens at most; by default what the model was trained for."),
    temperature: float | None = typer.Option(
        None, help="Of the words in the token posterior; 1 = as the model is; by default the model's own, mostly 0.76."
    ),
    draw_length: bool = typer.Option(True, help="Draw each text's length from the model while noise is high."),
    length_bias: float = typer.Option(1.0, help="Nats against padding, which outweighs words; 0 = as the model is."),
    noise_scale: float = typer.Option(
        1.0, help="Of all noise; less = more typical, as one faithful answer to a prompt."
    ),
    skip_padding: bool | None = typer.Option(
        None, help="Compute positions behind a text no more once they are surely padding; by default on a CPU."
    ),
    shortlist: int | None = typer.Option(
        None, help="Words of each text that most steps look at, such as 512; faster with a large vocabulary, on a CPU."
    ),
    seed: int = typer.Option(0, help="Seed of the first sample; sample i has seed + i."),
    batch_size: int = typer.Option(32, help="Samples drawn at a time; texts do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    compile: bool | None = typer.Option(None, help=COMPILE_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON object a line."),
    show_steps: bool = typer.Option(False, help="Show the text forming, step by step."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Write to this file, one sample a line."),
    resume: bool = typer.Option(False, help="Go on where --output ends, with the same options."),
    overwrite: bool = typer.Option(False, help="Replace --output."),
) -> None:
    """Draw samples from MODEL.

    [bold]embdiff sample runs/docstrings --prompt "def mean(values)" --cfg-scale 2 -n 5[/bold]
    """
    check(num_samples, steps, cfg_scale, batch_size, temperature, seed)
    check_output(output, overwrite, resume)
    modules = parsed(guidance)
    check_encoding("--prompt", prompt)
    check_encoding("--negative-prompt", negative_prompt)
    if prompt is not None and prompts is not None:
        raise UserError("both --prompt and --prompts are given: choose one")
    sources: list[str | None] = [prompt] if prompts is None else list(read_prompts(prompts))
    total = len(sources) * num_samples
    for module in modules:
        module.for_samples(0, total, total)  # refuses what is not there for each sample, before all is loaded
    prompted = any(sources) or bool(negative_prompt)
    scale = whole_scale(cfg_scale, modules) if prompted else 1.0
    if not prompted:
        say_idle(cfg_scale, modules)
    elif scale == 1 and negative_prompt is not None:
        noted("--negative-prompt has no effect at --cfg-scale 1: give a scale such as 2")
    as_json = as_json or (output is not None and output.suffix == ".jsonl")

    quiet()
    pipe = load_pipeline(model, device, dtype, compile)
    from embdiff.guidance import ClassifierFreeGuidance

    set_scheduler(pipe, scheduler, noise_schedule)
    if varied := [module for module in modules if module.for_samples(0, 1, total) != module]:
        pipe.check(varied, total, max_length)
    warn_of_long_prompts(pipe, [p for p in sources if p])
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "temperature": temperature,
        "draw_length": draw_length,
        "length_bias": length_bias,
        "noise_scale": noise_scale,
        "max_length": max_length,
        "skip_padding": skip_padding,
        "shortlist": shortlist,
    }
    own = ClassifierFreeGuidance(cfg_scale, cfg_space)
    name = type(pipe.scheduler).__name__

    def records(first: int, last: int) -> Iterator[Record]:
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            options["guidance"] = [own, *(module.for_samples(start, stop, total) for module in modules)]
            jobs = [Job(sources[i // num_samples], negative_prompt, seed + i) for i in range(start, stop)]
            for job, text, tokens in draw(pipe, jobs, options):
                yield Record(job.prompt, text, tokens, job.seed, steps, name, scale)

    def drawn(first: int, last: int) -> list[str]:
        return [line(record, as_json) for record in records(first, last)]

    done = already_written(output, total, drawn, batch_size) if output is not None and resume else 0
    if show_steps:
        options["callback_on_step_end"] = StepsView(pipe, steps)
    if output is None:
        for record in records(0, total):
            print(json_line(asdict(record)) if as_json else line(record, as_json), flush=True)
    else:
        write(records(done, total), total, done, output, as_json)


def say_idle(cfg_scale: float, modules: Sequence[Guidance]) -> None:
    """Says which classifier-free guidance does nothing where there is no prompt."""
    from embdiff.guidance import ClassifierFreeGuidance

    given = [f"--cfg-scale {cfg_scale:g}"] if cfg_scale != 1 else []
    given += [f"--guidance {m.name}" for m in modules if isinstance(m, ClassifierFreeGuidance) and m.scale != 1]
    for what in given:
        noted(f"{what} has no effect without a prompt: nothing to steer by")


def whole_scale(cfg_scale: float, modules: Sequence[Guidance]) -> float:
    """The scale of all classifier-free guidance together, whose changes add up; 1 = off."""
    from embdiff.guidance import ClassifierFreeGuidance

    scales = [cfg_scale, *(module.scale for module in modules if isinstance(module, ClassifierFreeGuidance))]
    acting = [scale for scale in scales if scale != 1]
    return sum(acting) - (len(acting) - 1)


def check(
    num_samples: int, steps: int, cfg_scale: float, batch_size: int, temperature: float | None, seed: int
) -> None:
    """Refuses numbers out of range before anything is loaded."""
    check_counts(num_samples=num_samples, steps=steps, batch_size=batch_size)
    check_seed(seed)
    if not math.isfinite(cfg_scale):
        raise UserError(f"--cfg-scale {cfg_scale} is not a finite number: 1 is off, 1.5 to 3 are usual")
    if temperature is not None:
        check_temperature(temperature)


def warn_of_long_prompts(pipe: TextDiffusionPipeline, prompts: list[str]) -> None:
    """Says how many prompts are longer than the model's, of which only the end is used."""
    limit = int(pipe.denoiser.config.max_prompt_length)
    lengths = [len(ids) for ids in pipe.tokenizer(prompts, add_special_tokens=False)["input_ids"]] if prompts else []
    long = sum(n > limit for n in lengths)
    if long and limit:
        noted(f"{long} of {len(prompts)} prompts are longer than {limit} tokens: only their end is used")


def draw(pipe: TextDiffusionPipeline, jobs: list[Job], options: dict[str, Any]) -> Iterator[tuple[Job, str, list[int]]]:
    """Draws one batch; each sample has its own generator."""
    import torch

    from embdiff.vocabulary import before_end

    prompts = None if jobs[0].prompt is None else [j.prompt or "" for j in jobs]
    negative = jobs[0].negative
    generators = [torch.Generator().manual_seed(j.seed) for j in jobs]
    count = len(jobs) if prompts is None else 1
    result: Any = pipe(prompts, negative_prompt=negative, num_samples=count, generator=generators, **options)
    for job, text, ids in zip(jobs, result.texts, result.sequences.tolist(), strict=True):
        yield job, text, before_end(pipe.tokenizer, ids)


def already_written(output: Path, total: int, drawn: Callable[[int, int], list[str]], batch_size: int) -> int:
    """How many of `total` samples `output` holds, told from its last lines, which are drawn again.

    Half of them must be the same, for in bf16 a text may depend on its batch. A line cut off in the middle is dropped.
    """
    if not output.exists():
        return 0
    *whole, partial = output.read_bytes().decode("utf-8", errors="replace").split("\n")
    done = len(whole)
    if done > total:
        raise UserError(f"{output} holds {done} samples, more than the {total} asked for: choose another file")
    first = max(0, done - batch_size)
    same = sum(old == new for old, new in zip(whole[first:], drawn(first, done), strict=True))
    if 2 * same < done - first or (partial and not done and not drawn(0, 1)[0].startswith(partial.rstrip("\ufffd"))):
        raise UserError(f"{output} was not begun with this model, prompts and options: give the same, or --overwrite")
    if partial:
        os.truncate(output, sum(len(text.encode()) + 1 for text in whole))
    return done


def write(records: Iterator[Record], total: int, done: int, output: Path, as_json: bool) -> None:
    """Streams samples to a file with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    first = list(islice(records, 1))  # what can't be drawn at all must not cost the file that is there
    try:
        with output.open("a" if done else "w", encoding="utf-8") as file:
            console = Console(stderr=True)
            for record in track(chain(first, records), "sampling", total=total, completed=done, console=console):
                file.write(line(record, as_json) + "\n")
                file.flush()
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; continue later with --resume") from error
    noted(f"{total} samples in {output}")


def line(record: Record, as_json: bool) -> str:
    """A record as a JSON object, or its text on one line."""
    return json.dumps(asdict(record), ensure_ascii=False) if as_json else " ".join(record.text.split())


class StepsView:
    """A pipeline callback that shows the first sample's text as each step predicts it."""

    def __init__(self, pipe: TextDiffusionPipeline, steps: int, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True, highlight=False)
        self.steps = steps
        self.table = pipe.denoiser.space.table()

    def __call__(self, pipe: TextDiffusionPipeline, step: int, timestep: Tensor, state: dict[str, Tensor]) -> None:
        """Prints one line: tokens brighter the closer x0 is to them."""
        from rich.text import Text

        x0 = state["x0"][0]
        ids = pipe.denoiser.space.round(x0)
        # Cosine between the predicted embedding and the token's own: 1 = certain.
        certainty = (x0 * self.table[ids]).sum(-1) / (x0.norm(dim=-1) * self.table[ids].norm(dim=-1)).clamp(min=1e-6)
        shown = Text(f"{step + 1:3d}/{self.steps} ", style="cyan")
        end, pad = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
        for token, c in zip(ids.tolist(), certainty.tolist(), strict=True):
            if token == end:
                break
            word = "·" if token == pad else pipe.tokenizer.decode([token])
            grey = 60 + round(195 * max(0.0, min(1.0, c)) ** 2)
            shown.append(
                word,
                style=f"rgb({grey},{grey},{grey})",
            )
            if is_word_level(pipe):
                shown.append(" ")
        self.console.print(shown, soft_wrap=False)


def is_word_level(pipe: TextDiffusionPipeline) -> bool:
    """Whether the tokenizer's tokens are whole words, to be joined by blanks."""
    ids = pipe.tokenizer("a b", add_special_tokens=False)["input_ids"]
    return bool(pipe.tokenizer.decode(ids).replace("<unk>", "u") in ("a b", "u u", "a u", "u b")) and not any(
        pipe.tokenizer.decode([i]).startswith(" ") for i in ids
    )
