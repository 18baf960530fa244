"""embdiff eval-control"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from embdiff.cli.common import (
    COMPILE_HELP,
    GUIDANCE_HELP,
    SOLVERS,
    check_counts,
    check_output,
    check_seed,
    load_pipeline,
    parsed,
    quiet,
    set_scheduler,
    shown,
)
from embdiff.cli.evaluate import named_judges, real_texts
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.evaluation.control import Outcome, Trial
    from embdiff.evaluation.scorer import Scorer
    from embdiff.guidance import Guidance
    from embdiff.pipeline import TextDiffusionPipeline

CONTROLS = ("tokens", "words", "characters", "lexical", "classifier", "custom")


def eval_control(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    control: list[str] = typer.Option(
        ["tokens", "words", "lexical"], help=f"{', '.join(CONTROLS)}; several times. custom: what --guidance says."
    ),
    data: str | None = typer.Option(None, help="Real texts, for lengths and words; by default the run's own."),
    targets: int = typer.Option(20, help="Demands of each control."),
    each: int = typer.Option(10, help="Texts for each demand."),
    plain: int = typer.Option(500, help="Unguided texts beside them."),
    classifier: str = typer.Option("classifier", help="For the control classifier: which of the model's."),
    strength: float = typer.Option(3.0, help="Of classifier guidance."),
    guidance: list[str] = typer.Option([], help=f"For the control custom. {GUIDANCE_HELP}"),
    scorer_data: str | None = typer.Option(
        None,
        help="Texts with labels that an independent scorer learns from; without, labels are looked for as words.",
    ),
    label_column: str | None = typer.Option(None, help="Column of the label in --scorer-data."),
    text_column: str | None = typer.Option(None, help="Column of the text in --scorer-data."),
    label: str | None = typer.Option(None, help="For custom: the scorer's label that texts shall have."),
    judge: list[str] = typer.Option(["5-gram"], help="Of fluency, as in embdiff eval; several times."),
    judge_data: str | None = typer.Option(None, help="As in embdiff eval."),
    steps: int = typer.Option(32, help="Denoising steps."),
    scheduler: str | None = typer.Option(None, help=f"{SOLVERS}; by default the model's own."),
    temperature: float | None = typer.Option(None, help="As in embdiff sample; by default the model's own."),
    costs: bool = typer.Option(True, help="Also time each control against unguided runs."),
    seed: int = typer.Option(0, help="Of demands and samples."),
    batch_size: int = typer.Option(50, help="Texts at a time; samples do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("fp32", help="fp32, bf16 or auto."),
    compile: bool | None = typer.Option(None, help=COMPILE_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of a table."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Also write the JSON here."),
    overwrite: bool = typer.Option(False, help="Replace --output."),
) -> None:
    """Measure control of MODEL: how often texts are what was asked for, and what that costs.

    [bold]embdiff eval-control runs/mine --control words --control lexical --targets 50[/bold]
    """
    check_counts(targets=targets, each=each, plain=plain, steps=steps, batch_size=batch_size)
    check_seed(seed)
    if unknown := [name for name in control if name not in CONTROLS]:
        raise UserError(f"--control {unknown[0]!r} is unknown: choose among {', '.join(CONTROLS)}")
    modules = parsed(guidance)
    if ("custom" in control) != bool(modules):
        raise UserError("--control custom and --guidance belong together: give both, or neither")
    check_output(output, overwrite)
    quiet()
    from embdiff.evaluation.control import Sampling, cost, draw_trials, outcome

    pipe = load_pipeline(model, device, dtype, compile)
    set_scheduler(pipe, scheduler)
    valid, train, _ = real_texts(model, data, judge_data, needed=True)
    scorer = None if scorer_data is None else new_scorer(scorer_data, text_column, label_column, seed)
    judges = named_judges(judge, pipe, train)
    sampling = Sampling(steps, seed, batch_size, {} if temperature is None else {"temperature": temperature})
    real = [example.text for example in valid]
    demands = {
        name: trials(name, pipe, real, targets, each, seed, classifier, strength, modules, scorer, label)
        for name in control
    }
    found: list[tuple[Outcome, float | None]] = []
    with shown() as advance:
        unguided = sampling.draw(pipe, [None] * plain, 10**6)
        for name, asked in demands.items():
            drawn = draw_trials(pipe, asked, sampling, partial(advance, name))
            measured = outcome(name, asked, drawn, unguided, judges)
            found.append((measured, cost(pipe, asked[0], sampling) if costs else None))
    figures = {
        "model": model, "steps": steps, "targets": targets, "each": each, "plain": plain, "seed": seed,
        "controls": [{**one._asdict(), "cost": ratio} for one, ratio in found],
    }  # fmt: skip
    text = json.dumps(figures, indent=None if as_json else 1, ensure_ascii=False)
    print(text) if as_json else show(found)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


def new_scorer(data: str, text_column: str | None, label_column: str | None, seed: int) -> Scorer:
    """A scorer of labelled texts."""
    from embdiff.data import read_examples
    from embdiff.evaluation.scorer import Scorer

    examples = read_examples(data, text_column=text_column, prompt_column=label_column)
    return Scorer([e.text for e in examples], [e.prompt or "" for e in examples], seed)


def trials(
    name: str,
    pipe: TextDiffusionPipeline,
    real: list[str],
    targets: int,
    each: int,
    seed: int,
    classifier: str,
    strength: float,
    modules: list[Guidance],
    scorer: Scorer | None,
    label: str | None,
) -> list[Trial]:
    """What is demanded of one control."""
    from embdiff.evaluation import control

    if name == "lexical":
        return control.lexical_trials(real, control.known_words(pipe), targets, each, seed)
    if name == "classifier":
        if classifier not in pipe.classifiers:
            raise UserError(f"the model has no classifier {classifier!r}: train one with embdiff train-classifier")
        labels = list(pipe.classifiers[classifier].config.labels)[:targets]
        known = set() if scorer is None else set(scorer.labels)
        return control.label_trials(
            classifier, labels, each, strength,
            lambda one: control.scored(scorer, one) if scorer is not None and one in known else control.mentioned(one),
        )  # fmt: skip
    if name == "custom":
        if scorer is None or label is None:
            raise UserError("--control custom needs to know what success is: give --scorer-data and --label")
        return [control.Trial(modules, control.scored(scorer, label), targets * each)]
    return control.length_trials(pipe, real, name, targets, each, seed)


def show(found: list[tuple[Outcome, float | None]]) -> None:
    """The outcomes as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="control, beside unguided texts in brackets")
    judges = list(found[0][0].fluency)
    nats = (f"nats a word, {judge}" for judge in judges)
    for column in ("control", "texts", "success", "end", *nats, "distinct 4", "entropy", "time"):
        table.add_column(column, justify="left" if column == "control" else "right")
    for one, ratio in found:
        table.add_row(
            one.control, str(one.texts), f"{one.success:.1%} ({one.by_chance:.1%})", f"{one.ended:.1%}",
            *(f"{one.fluency[j]:.3f} ({one.plain_fluency[j]:.3f})" for j in judges),
            f"{one.distinct_4:.3f} ({one.plain_distinct_4:.3f})", f"{one.entropy:.2f} ({one.plain_entropy:.2f})",
            "" if ratio is None else f"x {ratio:.2f}",
        )  # fmt: skip
    Console().print(table)
