"""embdiff eval"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from embdiff.cli.common import (
    COMPILE_HELP,
    GUIDANCE_HELP,
    PROMPT_COLUMN_HELP,
    SEPARATOR_HELP,
    SOLVERS,
    TEXT_COLUMN_HELP,
    Reading,
    check_output,
    check_reading,
    check_seed,
    json_line,
    like_run,
    load_pipeline,
    note_prompts,
    noted,
    parsed,
    quiet,
    run_config,
    run_corpus,
    set_scheduler,
    shown,
)
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example
    from embdiff.evaluation.judges import Judge
    from embdiff.pipeline import TextDiffusionPipeline


def evaluate(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    data: str | None = typer.Option(
        None, help="Held-out texts, read like the training data; by default the run's own."
    ),
    separator: str | None = typer.Option(None, help=SEPARATOR_HELP),
    text_column: str | None = typer.Option(None, help=TEXT_COLUMN_HELP),
    prompt_column: str | None = typer.Option(None, help=PROMPT_COLUMN_HELP),
    judge: list[str] = typer.Option(
        ["5-gram"], help="N-gram, a run of train --objective autoregressive, or a transformers folder; several times."
    ),
    judge_data: str | None = typer.Option(
        None, help="Real texts for N-gram judges; by default the run's training data."
    ),
    references: Path | None = typer.Option(None, help="A jsonl or csv of prompt and text: the references of prompts."),
    mbr: int = typer.Option(0, help="Also choose the best of so many candidates a prompt, by minimum Bayes risk."),
    lowercase: bool = typer.Option(False, help="Compare with references in lower case."),
    samples: int = typer.Option(1000, "--samples", "-n", help="Texts to draw, at most one a prompt; 0 = none."),
    steps: int = typer.Option(32, help="Denoising steps."),
    scheduler: str | None = typer.Option(None, help=f"{SOLVERS}; by default the model's own."),
    temperature: float | None = typer.Option(None, help="As in embdiff sample; by default the model's own."),
    length_bias: float = typer.Option(1.0, help="As in embdiff sample."),
    noise_scale: float = typer.Option(1.0, help="As in embdiff sample."),
    shortlist: int | None = typer.Option(None, help="As in embdiff sample."),
    cfg_scale: float = typer.Option(1.0, help="Classifier-free guidance; 1 = off."),
    cfg_space: str = typer.Option("x0", help="Where guidance combines predictions: x0 or logits."),
    guidance: list[str] = typer.Option([], help=GUIDANCE_HELP),
    bound: int | None = typer.Option(None, help="Texts for the variational bound; 0 = none; by default all."),
    passes: int = typer.Option(
        3, help="Of self-conditioning in the bound: 1 = none; 3 is tighter than 2, and slower. The flow has 2 at most."
    ),
    flow: int = typer.Option(0, help="Texts for the probability flow's bound, which is slow; 0 = none."),
    seed: int = typer.Option(0, help="Of the first sample and of the noise in likelihoods."),
    batch_size: int = typer.Option(50, help="Texts at a time; samples do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("fp32", help="fp32, bf16, auto or int8; likelihoods deserve fp32."),
    compile: bool | None = typer.Option(None, help=COMPILE_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of tables."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Also write the JSON, with all samples, here."),
    overwrite: bool = typer.Option(False, help="Replace --output."),
) -> None:
    """Judge MODEL: likelihood of held-out texts, samples beside real texts, references where there are prompts.

    [bold]embdiff eval runs/mine --data test.txt --steps 16 --output eval.json[/bold]
    """
    check_seed(seed)
    check_output(output, overwrite)
    modules, reading = parsed(guidance), Reading(separator, text_column, prompt_column)
    check_reading(reading, data, judge_data, references)
    quiet()
    from embdiff.evaluation import report
    from embdiff.guidance import ClassifierFreeGuidance

    options: dict[str, Any] = {"temperature": temperature, "length_bias": length_bias, "noise_scale": noise_scale}
    options["shortlist"] = shortlist
    options["guidance"] = [ClassifierFreeGuidance(cfg_scale, cfg_space), *modules]
    protocol = report.Protocol(
        samples, steps, seed, batch_size, mbr, lowercase, bound, passes=passes, flow_texts=flow, options=options
    )
    pipe = load_pipeline(model, device, dtype, compile)
    set_scheduler(pipe, scheduler)
    valid, train, sources = real_texts(model, data, judge_data, needed=samples > 0, reading=reading, judges=judge)
    note_prompts(pipe, valid)
    answers = None if references is None else read_references(model, references, reading)
    judges = named_judges(judge, pipe, train, valid) if samples else []
    with shown() as advance:
        figures = report.evaluate(pipe, valid, judges, protocol, train=train, references=answers, advance=advance)
    figures = {
        "model": model, **sources, "judges": judge if samples else [],
        "references": None if references is None else str(references), **figures,
    }  # fmt: skip
    drawn = figures.pop("texts", [])
    if output is not None:  # first, for who reads the tables may close them
        content = json.dumps(figures | {"texts": drawn}, indent=1, ensure_ascii=False, allow_nan=False)
        output.write_text(content + "\n", encoding="utf-8")
    if as_json:
        print(json_line(figures), flush=True)
    else:
        show(figures)


def real_texts(
    model: str,
    data: str | None,
    judge_data: str | None,
    needed: bool = True,
    reading: Reading = Reading(),
    judges: Sequence[str] = ("5-gram",),
) -> tuple[list[Example], list[str], dict[str, Any]]:
    """Held-out examples, texts for judges, and where they are from, as JSON has it.

    Both are those of the run where no others are named; there are no texts for judges where there is no run, or no
    need. That the model was trained on held-out examples, or judges know them, is remarked on; where there is no run,
    nobody knows. What judges that are models were trained on, nobody knows either.
    """
    own, train = None, list[str]()
    if data is None or run_config(model) is not None:
        try:
            own = run_corpus(model, progress=False)
        except UserError as error:
            if data is None or (needed and judge_data is None):
                raise UserError(f"{error}; other texts than the run's are named by --data and --judge-data") from error
    valid = own.valid if data is None and own is not None else like_run(model, str(data), reading)
    if judge_data is not None:
        train = [example.text for example in like_run(model, judge_data, reading)]
    elif own is not None and needed:
        train = [example.text for example in own.train]
    seen = None if own is None else overlap(valid, [example.text for example in own.train])
    known = overlap(valid, train) if any(judge.endswith("-gram") for judge in judges) else None
    for count, whose in ((seen, "training"), (known if judge_data else 0, "judge's")):
        if count:
            noted(f"{count} of {len(valid)} held-out texts are among the {whose} texts too")
    sources = {
        "data": data or "the run's validation texts", "seen_in_training": seen,
        "judge_data": judge_data or ("the run's training texts" if train else None), "seen_by_judges": known,
        **reading._asdict(),
    }  # fmt: skip
    return valid, train, sources


def overlap(examples: list[Example], texts: list[str]) -> int:
    """How many of the examples have one of the texts."""
    known = set(texts)
    return sum(example.text in known for example in examples)


def read_references(model: str, path: Path, reading: Reading) -> dict[str, list[str]]:
    """The texts for each prompt of a file."""
    found: dict[str, list[str]] = {}
    for example in like_run(model, str(path), reading):
        if example.prompt is None:
            raise UserError(f"{path} has texts without prompts: references are pairs of prompt and text")
        found.setdefault(example.prompt, []).append(example.text)
    return found


def named_judges(specs: list[str], pipe: TextDiffusionPipeline, train: list[str], valid: list[Example]) -> list[Judge]:
    """The judges; n-grams are fitted to real texts as the model could have written them, and must know the words of
    the held-out ones."""
    from embdiff.evaluation.judges import check_words, judge_of
    from embdiff.evaluation.samples import as_written

    if not train and any(spec.endswith("-gram") for spec in specs):
        raise UserError("an n-gram judge needs real texts, and the model has no run beside it: name --judge-data")
    known = as_written(pipe.tokenizer, train)
    judges = [judge_of(spec, known, pipe.device) for spec in specs]
    held_out = as_written(pipe.tokenizer, [example.text for example in valid])
    for judge in judges:
        check_words(judge, held_out)
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UserError(f"two judges are called {max(names, key=names.count)}: give each judge once")
    return judges


def show(figures: dict[str, Any]) -> None:
    """The figures as tables."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    for table in tables(figures):
        console.print(table)


def tables(figures: dict[str, Any]) -> Iterator[Any]:
    """Likelihoods; samples beside real texts; references."""
    from rich.table import Table

    if figures["likelihood"]:
        columns = ("upper bounds, nats", "per token", "+- (texts)", "+- (noise)", "per word", "texts")
        table = Table(*columns, title="likelihood")
        for name, found in figures["likelihood"].items():
            errors = (in_words(found[error]) for error in ("standard_error", "noise_error"))
            place, a_word = (in_words(found[what], ".4f") for what in ("nats_per_token", "nats_per_word"))
            table.add_row(f"{name}, {found['passes']} passes", place, *errors, a_word, str(found["texts"]))
        yield table
    if "samples" in figures:
        table = Table("", "samples", "real texts", title="texts", caption=caption(figures))
        samples, real = (with_errors(figures[column]) for column in ("samples", "real"))
        for name, value in samples.items():
            table.add_row(name, value, real.get(name, "-"))
        yield table
    if "conditional" in figures:
        kinds = figures["conditional"]
        table = Table("", *kinds, title="references")
        for name in next(iter(kinds.values())):
            table.add_row(name.replace("_", " "), *(str(found[name]) for found in kinds.values()))
        yield table


def caption(figures: dict[str, Any]) -> str | None:
    """What to bear in mind with these figures."""
    remarks = []
    samples, real = (figures[column]["texts"] for column in ("samples", "real"))
    if real < samples:
        remarks.append(f"{real} real texts beside {samples} samples: entropy, distinct n and self-BLEU go by number")
    if figures["too_long"]:
        remarks.append(f"{figures['too_long']} texts too long for the model are left out")
    return "; ".join(remarks) or None


def in_words(value: Any, form: str = "g") -> str:
    """A figure, several, or none."""
    if isinstance(value, list):
        return " ".join(in_words(one, form) for one in value)
    return "-" if value is None else f"{value:{form}}"


def with_errors(figures: dict[str, Any]) -> dict[str, str]:
    """Figures in words, with their standard errors."""
    known = flat(figures["standard_errors"])
    rows = flat({name: value for name, value in figures.items() if name != "standard_errors"})
    return {
        name: in_words(value) + ("" if known.get(name) is None else f" +- {known[name]:.2g}")
        for name, value in rows.items()
    }


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures in figures as one level, each under its own and its parent's name."""
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            rows |= {f"{name}, {inner}".replace("_", " "): number for inner, number in value.items()}
        else:
            rows[name.replace("_", " ")] = value
    return rows
