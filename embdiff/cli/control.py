"""embdiff eval-control"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from embdiff.cli.common import (
    COMPILE_HELP,
    GUIDANCE_HELP,
    SOLVERS,
    check_counts,
    check_output,
    check_seed,
    json_line,
    load_pipeline,
    note_prompts,
    noted,
    parsed,
    quiet,
    read_prompts,
    set_scheduler,
    shown,
)
from embdiff.cli.evaluate import named_judges, real_texts
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example
    from embdiff.evaluation.control import Check, Sample, Trial
    from embdiff.evaluation.scorer import Scorer
    from embdiff.guidance import Guidance
    from embdiff.pipeline import TextDiffusionPipeline

CONTROLS = ("tokens", "words", "characters", "lexical", "classifier", "cfg", "custom")


def eval_control(
    model: str = typer.Argument(..., help="Folder that embdiff train wrote, or a name on the hub."),
    control: list[str] = typer.Option(
        ["tokens", "words", "lexical"],
        help=f"{', '.join(CONTROLS)}; several times. cfg: slots of prompts 'name : value | ..'; "
        "custom: what --guidance says.",
    ),
    data: str | None = typer.Option(None, help="Real texts, for lengths and words; by default the run's own."),
    prompts: str | None = typer.Option(
        None, help="File of prompts, one a line, or - for stdin; by default those of the real texts, if they have any."
    ),
    targets: int = typer.Option(20, help="Demands of each control."),
    each: int = typer.Option(10, help="Texts for each demand."),
    plain: int = typer.Option(500, help="Unguided texts beside them."),
    classifier: str = typer.Option("classifier", help="For the control classifier: which of the model's."),
    strength: float = typer.Option(1.5, help="Of classifier guidance."),
    scale: list[float] = typer.Option([1.0, 1.5, 2.0, 3.0, 4.0], help="For the control cfg: its scales; 1 = off."),
    guidance: list[str] = typer.Option([], help=f"For the control custom. {GUIDANCE_HELP}"),
    scorer_data: str | None = typer.Option(
        None,
        help="Texts with labels that an independent scorer learns from; without, labels are looked for as words.",
    ),
    label_column: str | None = typer.Option(None, help="Column of the label in --scorer-data."),
    text_column: str | None = typer.Option(None, help="Column of the text in --scorer-data."),
    label: str | None = typer.Option(None, help="For custom: the scorer's label that texts shall have."),
    lexicon: str | None = typer.Option(
        None,
        help="File of words, one a line: also tell what share of texts has any. For custom without --label, "
        "success is to have none.",
    ),
    judge: list[str] = typer.Option(["5-gram"], help="Of fluency, as in embdiff eval; several times."),
    judge_data: str | None = typer.Option(None, help="As in embdiff eval."),
    steps: int = typer.Option(32, help="Denoising steps."),
    scheduler: str | None = typer.Option(None, help=f"{SOLVERS}; by default the model's own."),
    temperature: float | None = typer.Option(None, help="As in embdiff sample; by default the model's own."),
    costs: bool = typer.Option(True, help="Also time each control, and the same outside its interval."),
    seed: int = typer.Option(0, help="Of demands and samples."),
    batch_size: int = typer.Option(50, help="Texts at a time; samples do not depend on it."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    dtype: str = typer.Option("fp32", help="fp32, bf16, auto or int8."),
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
    for module in modules:
        module.for_samples(0, 1, 1)  # drawn and timed in different numbers, so nothing may be of each sample
    if "custom" in control and lexicon is None and (scorer_data is None or label is None):
        raise UserError("--control custom needs to know what success is: give --scorer-data and --label, or --lexicon")
    if label is not None and (scorer_data is None or "custom" not in control):
        raise UserError(f"--label {label!r} is told by a scorer, in --control custom: give it and --scorer-data too")
    for option, value in (("--label-column", label_column), ("--text-column", text_column)):
        if value is not None and scorer_data is None:
            raise UserError(f"{option} {value!r} is for --scorer-data, and none is given")
    check_output(output, overwrite)
    start = time.monotonic()
    quiet()
    from embdiff.evaluation.control import Sampling, draw_trials, free_of, outcome, scored
    from embdiff.evaluation.control import costs as costs_of
    from embdiff.evaluation.judges import check_judges
    from embdiff.evaluation.report import environment, finite
    from embdiff.guidance.toxicity import read_lexicon

    clean = None if lexicon is None else free_of(read_lexicon(lexicon))
    scorer = None if scorer_data is None else new_scorer(scorer_data, text_column, label_column, seed)
    success = clean if scorer is None or label is None else scored(scorer, label)
    pipe = load_pipeline(model, device, dtype, compile)
    set_scheduler(pipe, scheduler)
    valid, train, sources = real_texts(model, data, judge_data, judges=judge)
    real, asked = [example.text for example in valid], prompts_of(pipe, prompts, valid, targets)
    judges = named_judges(judge, pipe, train, valid)
    check_judges(judges, pipe, real)
    demand = Demand(targets, each, seed, classifier, strength, scorer, modules, success)
    demands = {name: prompted(demand.trials(name, pipe, real), asked) for name in control if name != "cfg"}
    if "cfg" in control:
        demands |= curve(asked, scale, each)
    for demanded in {id(trial.guidance): trial.guidance for trials in demands.values() for trial in trials}.values():
        pipe.check(demanded, 1)  # so that nothing is refused after much was drawn
    sampling = Sampling(steps, seed, batch_size, {} if temperature is None else {"temperature": temperature})
    rows: list[dict[str, Any]] = []
    with shown() as advance:
        unguided = sampling.draw(pipe, [asked[i % len(asked)] for i in range(plain)], 10**6)
        for name, trials in demands.items():
            drawn = draw_trials(pipe, trials, sampling, partial(advance, name))
            rows.append({**outcome(name, trials, drawn, unguided, judges)._asdict(), "costs": None})
            rows[-1] |= in_lexicon(clean, [sample for part in drawn for sample in part], unguided)
    for row in rows if costs else ():  # behind all drawing, which may have the denoiser compiled
        found = costs_of(pipe, demands[row["control"]], sampling)._asdict()
        row["costs"] = {part: ratio._asdict() for part, ratio in found.items()}
    figures = {
        "model": model, **sources, "judges": judge, "steps": steps, "targets": targets, "each": each, "plain": plain,
        "seed": seed, "batch_size": batch_size, "temperature": temperature, "classifier": classifier,
        "strength": strength, "scale": scale, "guidance": guidance, "scorer_data": scorer_data, "label": label,
        "lexicon": lexicon,
        "prompts": len([prompt for prompt in asked if prompt is not None]), "controls": rows,
        "run": environment(pipe, time.monotonic() - start),
    }  # fmt: skip
    figures = finite(figures)
    if output is not None:  # first, for who reads the table may close it
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(json_line(figures)) if as_json else show(rows)


def new_scorer(data: str, text_column: str | None, label_column: str | None, seed: int) -> Scorer:
    """A scorer of labelled texts."""
    from embdiff.data import read_examples
    from embdiff.evaluation.scorer import Scorer

    examples = read_examples(data, text_column=text_column, prompt_column=label_column, note=noted)
    bare = next((i for i, example in enumerate(examples) if example.prompt is None), None)
    if bare is not None:
        raise UserError(f"{data}: example {bare + 1} has no label: name the column with --label-column")
    return Scorer([e.text for e in examples], [e.prompt or "" for e in examples], seed)


def prompts_of(
    pipe: TextDiffusionPipeline, path: str | None, valid: list[Example], count: int
) -> list[str] | list[None]:
    """At most `count` prompts, of the file or else of held-out examples; [None] for a model without prompts."""
    from embdiff.batches import spread

    if path is not None:
        found = read_prompts(path)
    else:
        note_prompts(pipe, valid, "name them with --prompts")
        takes = bool(pipe.denoiser.config.max_prompt_length)
        found = list(dict.fromkeys(example.prompt for example in valid if takes and example.prompt))
    return [found[i] for i in spread(len(found), count)] or [None]


def prompted(trials: Sequence[Trial], prompts: Sequence[str | None]) -> list[Trial]:
    """The trials, each under the next prompt."""
    return [replace(trial, prompt=prompts[i % len(prompts)]) for i, trial in enumerate(trials)]


def curve(sources: Sequence[str | None], scales: Sequence[float], each: int) -> dict[str, list[Trial]]:
    """Trials of classifier-free guidance at each scale, under meanings."""
    from embdiff.evaluation.control import scale_trials, slots

    meanings = [source for source in sources if source is not None and slots(source)]
    if len(meanings) < len(sources):
        bare = next(source for source in sources if source is None or not slots(source))
        cause = "there is no prompt" if bare is None else f"{bare!r} is none"
        raise UserError(f"--control cfg counts slots of prompts like 'name : value | name : value', and {cause}")
    return {f"cfg {scale:g}": scale_trials(meanings, scale, each) for scale in scales}


def in_lexicon(clean: Check | None, drawn: list[Sample], plain: list[Sample]) -> dict[str, float]:
    """The shares of texts, guided and not, that are not clean; none without a lexicon."""
    from embdiff.evaluation.control import share

    parts = {"in_lexicon": drawn, "plain_in_lexicon": plain}
    return {} if clean is None else {name: 1 - share(clean, samples) for name, samples in parts.items()}


class Demand(NamedTuple):
    """What is asked of controls. scorer: of labels, None = they are looked for as words; success: of custom."""

    targets: int
    each: int
    seed: int
    classifier: str
    strength: float
    scorer: Scorer | None
    modules: list[Guidance]
    success: Check | None

    def trials(self, name: str, pipe: TextDiffusionPipeline, real: list[str]) -> list[Trial]:
        """Those of one control."""
        from embdiff.evaluation import control

        if name == "lexical":
            return control.lexical_trials(real, control.known_words(pipe), self.targets, self.each, self.seed)
        if name == "classifier":
            if self.classifier not in pipe.classifiers:
                raise UserError(
                    f"the model has no classifier {self.classifier!r}: train one with embdiff train-classifier"
                )
            labels = list(pipe.classifiers[self.classifier].config.labels)[: self.targets]
            return control.label_trials(self.classifier, labels, self.each, self.strength, self._labelled)
        if name == "custom" and self.success is not None:
            return [control.Trial(self.modules, self.success, self.each)] * self.targets
        return control.length_trials(pipe, real, name, self.targets, self.each, self.seed)

    def _labelled(self, label: str) -> Check:
        from embdiff.evaluation.control import mentioned, scored

        return mentioned(label) if self.scorer is None else scored(self.scorer, label)


def show(rows: list[dict[str, Any]]) -> None:
    """The outcomes as a table, a column for each control."""
    from rich.console import Console
    from rich.table import Table

    def pair(row: dict[str, Any], name: str, plain: str, form: str) -> str:
        return f"{row[name]:{form}} ({row[plain]:{form}})"

    lines: dict[str, list[str]] = {
        "texts": [str(row["texts"]) for row in rows],
        "success": [pair(row, "success", "by_chance", ".1%") for row in rows],
        "end with a sentence": [f"{row['ended']:.1%}" for row in rows],
        **{f"nats a word, {judge}": [f"{row['fluency'][judge]:.3f} ({row['plain_fluency'][judge]:.3f})" for row in rows]
           for judge in rows[0]["fluency"]},
        "distinct 4-grams": [pair(row, "distinct_4", "plain_distinct_4", ".3f") for row in rows],
        "entropy": [pair(row, "entropy", "plain_entropy", ".2f") for row in rows],
    }  # fmt: skip
    if "in_lexicon" in rows[0]:
        lines["with words of the lexicon"] = [pair(row, "in_lexicon", "plain_in_lexicon", ".1%") for row in rows]
    if rows[0]["costs"] is not None:
        for what, part in (("time of a run", "run"), ("of a step", "step"), ("of one outside its interval", "outside")):
            lines[what] = [f"x {row['costs'][part]['ratio']:.2f}" for row in rows]
    table = Table("", *(row["control"] for row in rows), title="control, beside unguided texts in brackets")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console(markup=False, emoji=False).print(table)
