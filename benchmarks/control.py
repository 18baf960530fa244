"""Control: how often texts are what was asked for, and what it costs in fluency, variety and time.

    python benchmarks/control.py e2e DATA MODEL --judge runs/judge      length, words, labels on E2E descriptions
    python benchmarks/control.py prompted DATA PROMPTED                 the share of slots realised against the scale
    python benchmarks/control.py toxicity PARADETOX DAVIDSON LEXICON --output runs/toxicity --judge runs/toxicity-judge
    python benchmarks/control.py costs DATA MODEL PROMPTED LEXICON      time with each module; after e2e, machine idle

DATA is a folder with the E2E set; MODEL one that `benchmarks/e2e_text.py` made, PROMPTED `e2e_prompted.py`. PARADETOX
is paradetox.tsv, DAVIDSON labeled_data.csv, LEXICON a list of words. Judges are trained on the same texts, with room
for the longest that the model can write:

    embdiff train DATA/train.txt --objective autoregressive --tokenizer word --min-count 11 --max-length 96 \\
        --max-time 15m --output runs/judge
    python benchmarks/control.py lines PARADETOX runs/toxicity-lines.txt
    embdiff train runs/toxicity-lines.txt --objective autoregressive --tokenizer bpe --vocab-size 4096 \\
        --max-length 96 --max-time 15m --output runs/toxicity-judge

Protocol. Unguided texts of the same model and steps stand beside, under the same prompts where there are any; fluency
is that of unguided texts of the same lengths. `e2e` keeps its texts in --output, and called again goes on from them.

Labels: the 79 of Diffusion-LM's targets. A text has one if it has its value word by word (their protocol), and so the
classifier learns a label from the texts that say it; what share of real texts with a label in their meaning does so
stands beside. Whether a place is family friendly is told by a scorer of finished texts, trained on the validation half.
The strength is the smallest that reaches 92 %, else the best, on texts of other seeds.

Toxicity: judged by a scorer trained on other data than the guide, and by the lexicon; no text is printed or kept. Other
data is of another kind, so the scorer's threshold is where it holds one real neutral line in twenty for toxic. The
strength is the smallest that lowers the share of toxic texts by 80 %, else the largest with all fluencies within 10 %
and variety within 5 %, else the smallest, together with the lexicon and on texts of other seeds.
Prompts are first words of lines, without a word of the lexicon; the negative prompt is the beginning that most more
toxic lines have than neutral ones.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import typer
from common import trained, training_facts, write
from numpy.typing import NDArray

from embdiff import checkpoint
from embdiff.batches import spread
from embdiff.classification import ClassifierConfig, train_classifier
from embdiff.cli.common import load_pipeline, quiet, seconds, set_scheduler, shown
from embdiff.config import TrainConfig
from embdiff.data import Example, read_examples
from embdiff.errors import UserError
from embdiff.evaluation import control
from embdiff.evaluation.control import Check, Kept, Sample, Sampling, Trial, outcome, share
from embdiff.evaluation.control import costs as costs_of
from embdiff.evaluation.judges import Judge, NGramJudge, check_judges, cross_entropy, judge_of
from embdiff.evaluation.samples import as_written
from embdiff.evaluation.scorer import Scorer
from embdiff.guidance import ClassifierFreeGuidance, ClassifierGuidance, Guidance, Length, TopP, Toxicity
from embdiff.guidance.toxicity import read_lexicon
from embdiff.pipeline import TextDiffusionPipeline

app = typer.Typer(add_completion=False)
FRIENDLY = "family friendly"
FALSE_ALARMS = 0.05  # of real neutral lines, where the scorer's threshold of toxicity is
WORDS = 12  # of a text, where its length is given
EXPRESSED, FALL, FLUENT, VARIED = 0.92, 0.8, 1.1, 0.95  # what the strength is chosen by
UNGUIDED, CHOOSING = 10**6, 2 * 10**6  # first seeds; guided texts have those from 0 on
COSTS = {"length": 1.1, "lexical": 1.1, "lexicon": 1.1, "classifier": 1.3, "cfg": 1.7}  # at most, where any is asked


@app.command()
def e2e(
    data: Path,
    model: Path,
    output: Path = typer.Option(Path("runs/control"), help="Folder where texts are kept."),
    judge: list[str] = typer.Option([], help="Judges beside the 5-gram: autoregressive runs."),
    targets: int = typer.Option(200, help="Demands of each control."),
    each: int = typer.Option(50, help="Texts for each demand."),
    plain: int = typer.Option(5000, help="Unguided texts."),
    steps: int = typer.Option(16, help="Denoising steps."),
    solver: str | None = typer.Option(None, help="By default the model's own scheduler."),
    temperature: float | None = typer.Option(None, help="Of the words; by default the pipeline's own."),
    strength: list[float] = typer.Option([1.0, 1.5, 2.0, 3.0], help="Of classifier guidance, to choose among."),
    choosing: int = typer.Option(10, help="Texts of each label for each strength."),
    gradient: float = typer.Option(2.0, help="Of lexical control, where it is on."),
    classifier_steps: int = typer.Option(4000, help="Training steps of the classifier."),
    results: Path = typer.Option(Path("benchmarks/results/control_e2e.json"), help="Where the figures go."),
) -> None:
    """Length, lexical and semantic control on the unconditional model."""
    quiet()
    pipe = load_pipeline(str(model), "auto", "auto")
    set_scheduler(pipe, solver)
    train, real = (as_written(pipe.tokenizer, texts(data / f"{name}.txt")) for name in ("train", "valid"))
    judges = ready_judges(judge, pipe, train)
    labelled = attributes(data / "src1_train.txt")
    ensure_classifier(pipe, model, "attributes", said(labelled), ClassifierConfig(classifier_steps, several=True))
    friendly = Scorer(*zip(*friendliness(data / "src1_valid.txt"), strict=True))
    asked, unknown = told_apart(target_labels(data), pipe.classifiers["attributes"].config.labels)
    sampling = Sampling(steps, options={} if temperature is None else {"temperature": temperature})
    output.mkdir(parents=True, exist_ok=True)
    kept = Kept(output / "texts.jsonl")

    def drawn(what: str, trials: Sequence[Trial], seed: int = 0) -> list[list[Sample]]:
        with shown() as advance:
            return control.draw_trials(pipe, trials, replace(sampling, seed=seed), partial(advance, what), kept)

    def check(label: str) -> Check:
        return control.scored(friendly, label) if label.startswith(FRIENDLY) else control.mentioned(label)

    def labels(strength: float, count: int) -> list[Trial]:
        return control.label_trials("attributes", asked, count, strength, checks.__getitem__)

    checks = {label: check(label) for label in asked}
    unguided = flat(drawn("unguided", [Trial((), bool, each)] * -(-plain // each), UNGUIDED))[:plain]
    choices = {}
    for s in strength:
        trials = labels(s, choosing)
        choices[s] = outcome(f"labels, {s:g}", trials, drawn(f"labels, {s:g}", trials, CHOOSING), unguided, judges)
    best = control.weakest({s: found.success for s, found in choices.items()}, EXPRESSED)
    demands = {
        "tokens": control.length_trials(pipe, real, "tokens", targets, each),
        "words": control.length_trials(pipe, real, "words", targets, each),
        "lexical": (words := control.lexical_trials(real, control.known_words(pipe), targets, each)),
        "lexical, gradient": following(words, gradient),
        "labels": labels(best, max(1, targets * each // len(asked))),
    }
    real_shares = {label: share(checks[label], found) for label, found in of_labels(pipe, labelled, asked).items()}
    figures: dict[str, Any] = {
        "steps": steps, "solver": type(pipe.scheduler).__name__, "temperature": temperature or pipe.config.temperature,
        "labels": len(asked), "labels_unknown": unknown, "labels_in_real_texts": statistics.fmean(real_shares.values()),
        "strengths": {f"{s:g}": found._asdict() for s, found in choices.items()}, "strength": best,
        "gradient": gradient, "controls": {},
    }  # fmt: skip
    for name, trials in demands.items():
        parts = drawn(name, trials)
        figures["controls"][name] = outcome(name, trials, parts, unguided, judges)._asdict()
        if name == "labels":
            figures["each_label"] = {label: {"success": share(checks[label], part), "in_real_texts": real_shares[label]}
                                     for label, part in zip(asked, parts, strict=True)}  # fmt: skip
        write(results, rounded(figures))


@app.command()
def toxicity(
    paradetox: Path,
    davidson: Path,
    lexicon: Path,
    output: Path = typer.Option(..., help="Folder of the run."),
    judge: list[str] = typer.Option([], help="Judges beside the 5-gram: autoregressive runs."),
    max_time: str = typer.Option("15m", help="Training time."),
    max_steps: int | None = typer.Option(None, help="Training steps, instead of a time."),
    samples: int = typer.Option(1000, help="Texts of each setting."),
    steps: int = typer.Option(32, help="Denoising steps."),
    strength: list[float] = typer.Option([1.0, 3.0, 10.0], help="Of classifier guidance, to choose among."),
    classifier_steps: int = typer.Option(4000, help="Training steps of the classifier."),
    results: Path = typer.Option(Path("benchmarks/results/control_toxicity.json"), help="Where the figures go."),
) -> None:
    """Away from toxicity, alone and together with a prompt and an exact length, on a model of toxic and neutral lines.

    The model is trained with the first words of a line as its prompt, dropped in half of the lines.
    """
    rows = paradetox_rows(paradetox)
    output.mkdir(parents=True, exist_ok=True)
    prompted_lines = output.parent / f"{output.name}-texts.txt"
    prompted_lines.write_text("\n".join(f"{opening(example.text)}||{example.text}" for example in rows) + "\n")
    config = TrainConfig(
        data=str(prompted_lines), separator="||", tokenizer="bpe", vocab_size=4096, size="small", max_length=48,
        max_prompt_length=16, drop_prompt=0.5, batch_size=32, infill=0.0, save_every=200, previews=0,
        max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    pipe = trained(output, config)
    judges = ready_judges(judge, pipe, [example.text for example in rows])
    ensure_classifier(pipe, output, "toxicity", rows, ClassifierConfig(classifier_steps))
    scorer = Scorer(*zip(*davidson_rows(davidson), strict=True))
    least = float(np.quantile(scorer([e.text for e in rows if e.prompt == "neutral"], "neutral"), FALSE_ALARMS))
    neutral, clean_words = control.scored(scorer, "neutral", least), control.free_of(read_lexicon(str(lexicon)))
    sampling, banned = Sampling(steps), str(lexicon)
    prompts = [begun for begun in sorted({opening(e.text) for e in rows}) if clean_words(Sample(begun, 0))]
    prompts = [prompts[i] for i in spread(len(prompts), min(40, len(prompts)))]

    def trials(modules: Sequence[Guidance], asked: Sequence[str | None]) -> list[Trial]:
        return [Trial(modules, neutral, max(1, samples // len(asked)), prompt) for prompt in asked]

    def drawn(trials: Sequence[Trial], seed: int = 0) -> list[list[Sample]]:
        return control.draw_trials(pipe, trials, replace(sampling, seed=seed))

    def shares(trials: Sequence[Trial], parts: Sequence[Sequence[Sample]]) -> dict[str, float]:
        found = flat(parts)
        begun = [opening(s.text) == t.prompt for t, part in zip(trials, parts, strict=True) for s in part if t.prompt]
        return {"toxic": 1 - share(neutral, found), "in_lexicon": 1 - share(clean_words, found),
                "of_that_length": share(lambda s: len(s.text.split()) == WORDS, found),
                **({"begins_with_prompt": statistics.fmean(begun)} if begun else {})}  # fmt: skip

    plain, figures = {}, dict[str, Any](steps=steps, training=training_facts(output, pipe.denoiser))
    for name, asked in (("unguided", [None]), ("prompt", prompts)):
        parts = drawn(trials((), asked), UNGUIDED)
        plain[name], figures[name] = flat(parts), shares(trials((), asked), parts)
    figures["least_neutral"] = least
    figures["real"] = {kind: 1 - share(neutral, [Sample(e.text, 0) for e in rows if e.prompt == kind])
                       for kind in ("toxic", "neutral")}  # fmt: skip

    def measured(
        name: str, modules: Sequence[Guidance], asked: Sequence[str | None] = (None,), seed: int = 0
    ) -> dict[str, Any]:
        beside = "unguided" if asked[0] is None else "prompt"
        parts = drawn(trials(modules, asked), seed)
        found = outcome(name, trials(modules, asked), parts, plain[beside], judges)._asdict()
        return found | shares(trials(modules, asked), parts) | {"beside": beside}

    strengths = {s: measured(f"{s:g}", [Toxicity(s, lexicon=banned)], seed=CHOOSING) for s in strength}
    best = strongest_needed(strengths, figures["unguided"]["toxic"])
    figures |= {"strengths": {f"{s:g}": found for s, found in strengths.items()}, "strength": best, "settings": {}}
    guide, words, cfg = Toxicity(best, lexicon=banned), Length(words=WORDS, complete=False), ClassifierFreeGuidance(2.0)
    settings: dict[str, tuple[list[Guidance], Sequence[str | None]]] = {
        "classifier": ([Toxicity(best)], [None]),
        "lexicon": ([Toxicity(0.0, lexicon=banned)], [None]),
        "negative prompt": ([Toxicity(0.0, negative=toxic_opening(rows))], [None]),
        "classifier and lexicon": ([guide], [None]),
        "length": ([words], [None]),
        "classifier, lexicon and length": ([guide, words], [None]),
        "prompt, CFG": ([cfg], prompts),
        "prompt, classifier and lexicon": ([guide], prompts),
        "prompt, CFG, classifier, lexicon and length": ([cfg, guide, words], prompts),
    }
    for name, (modules, asked) in settings.items():
        figures["settings"][name] = measured(name, modules, asked)
        write(results, rounded(figures))


@app.command()
def prompted(
    data: Path,
    model: Path,
    scale: list[float] = typer.Option([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], help="Guidance scales; 1 = off."),
    space: list[str] = typer.Option(["x0", "logits"], help="Where predictions are combined."),
    every: list[int] = typer.Option([1], help="Steps from one unconditional prediction to the next."),
    meanings: int | None = typer.Option(None, help="Of the validation set; by default all."),
    seeds: int = typer.Option(1, help="Texts of each meaning."),
    steps: int = typer.Option(32, help="Denoising steps."),
    temperature: float = typer.Option(0.5, help="Of the words."),
    results: Path = typer.Option(Path("benchmarks/results/control_prompted.json"), help="Where the figures go."),
) -> None:
    """The share of a meaning's slots that its text realises, against the scale of classifier-free guidance, in each
    space, and how likely the texts are to a 5-gram of the training texts.

    Standard errors are of meanings.
    """
    quiet()
    pipe = load_pipeline(str(model), "auto", "auto")
    references = references_of(pipe, data / "src1_valid.txt")
    sources = list(references)
    sources = [sources[i] for i in spread(len(sources), meanings or len(sources))]
    judge = NGramJudge(as_written(pipe.tokenizer, [text for _, text in pairs(data / "src1_train.txt")]))
    sampling = Sampling(steps, options={"temperature": temperature})

    def realised(texts: Sequence[Sequence[str]]) -> dict[str, float]:
        return over_meanings(sources, texts) | {judge.name: cross_entropy(judge, list(chain.from_iterable(texts)))}

    figures: dict[str, Any] = {
        "meanings": len(sources), "seeds": seeds, "steps": steps, "temperature": temperature,
        "references": realised([references[source] for source in sources]),
        "slots_realised": {},
    }  # fmt: skip
    for s, where, often in product(scale, space, every):
        drawn = sampling.draw(pipe, sources * seeds, 0, ClassifierFreeGuidance(s, where, every=often))
        by_meaning = [[sample.text for sample in drawn[i :: len(sources)]] for i in range(len(sources))]
        name = where if often == 1 else f"{where}, every {often}"
        figures["slots_realised"].setdefault(name, {})[f"{s:g}"] = realised(by_meaning)
        write(results, rounded(figures))


@app.command()
def costs(
    data: Path,
    model: Path,
    prompted: Path,
    lexicon: Path,
    steps: int = typer.Option(16, help="Denoising steps."),
    solver: str | None = typer.Option(None, help="By default the models' own schedulers."),
    strength: float = typer.Option(1.5, help="Of classifier guidance."),
    gradient: float = typer.Option(2.0, help="Of lexical control, where it is on."),
    rounds: int = typer.Option(12, help="Of timing."),
    compile: bool = typer.Option(False, help="Whether the denoiser is compiled, on both sides."),
    results: Path = typer.Option(Path("benchmarks/results/control_costs.json"), help="Where the figures go."),
) -> None:
    """What a step costs with a module, or with the same outside its interval, over one without; and what a run does.

    MODEL has the classifier that `e2e` trained.
    """
    quiet()
    pipe, other = (load_pipeline(str(folder), "auto", "auto", compile) for folder in (model, prompted))
    for each in (pipe, other):
        set_scheduler(each, solver)
    real, source = as_written(pipe.tokenizer, texts(data / "valid.txt")), pairs(data / "src1_valid.txt")[0][0]

    def one(*modules: Guidance, prompt: str | None = None) -> list[Trial]:
        return [Trial(modules, bool, 1, prompt)]

    label = told_apart(target_labels(data), pipe.classifiers["attributes"].config.labels)[0][0]
    timed: dict[str, tuple[TextDiffusionPipeline, list[Trial]]] = {
        "length in tokens": (pipe, control.length_trials(pipe, real, "tokens", 99, 1)),
        "length in words": (pipe, control.length_trials(pipe, real, "words", 99, 1)),
        "lexical": (pipe, words := control.lexical_trials(real, control.known_words(pipe), 1, 1)),
        "gradient of lexical": (pipe, following(words, gradient)),
        "lexicon": (pipe, one(Toxicity(0.0, lexicon=str(lexicon)))),
        "classifier": (pipe, one(ClassifierGuidance(label, "attributes", strength=strength))),
        "top-p": (pipe, one(TopP(0.9))),
        "cfg in x0": (other, one(ClassifierFreeGuidance(2.0, "x0"), prompt=source)),
        "cfg in logits": (other, one(ClassifierFreeGuidance(2.0, "logits"), prompt=source)),
        "cfg in x0, every 2": (other, one(ClassifierFreeGuidance(2.0, "x0", every=2), prompt=source)),
        "cfg in logits, every 2": (other, one(ClassifierFreeGuidance(2.0, "logits", every=2), prompt=source)),
    }
    figures: dict[str, Any] = {"steps": steps, "compile": compile, "rounds": rounds, "modules": {}}
    for name, (model_pipe, trials) in timed.items():
        found = costs_of(model_pipe, trials, Sampling(steps), rounds)._asdict()
        asked = next((most for what, most in COSTS.items() if name.startswith(what)), None)
        figures["modules"][name] = {"asked": asked} | {part: ratio._asdict() for part, ratio in found.items()}
        write(results, rounded(figures))


@app.command()
def lines(paradetox: Path, output: Path) -> None:
    """Writes the lines that `toxicity` trains on, for a judge to be trained on them too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(example.text for example in paradetox_rows(paradetox)) + "\n", encoding="utf-8")


class Once:
    """A judge that scores no text twice: the unguided ones stand beside every control."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, judge.name
        self.known: dict[str, float] = {}

    def nats(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """-log p of each text and its end, [N]."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known.update(zip(new, self.judge.nats(new).tolist(), strict=True))
        return np.array([self.known[text] for text in texts])


def ready_judges(specs: Sequence[str], pipe: TextDiffusionPipeline, train: Sequence[str]) -> list[Judge]:
    """A 5-gram of the texts and the runs that are named, all of which can read what the model writes."""
    judges: list[Judge] = [Once(NGramJudge(train)), *(Once(judge_of(spec, train, pipe.device)) for spec in specs)]
    check_judges(judges, pipe, train)
    return judges


def strongest_needed(rows: Mapping[float, Mapping[str, Any]], before: float) -> float:
    """The smallest strength that lowers the share of toxic texts by FALL; else the largest whose texts are as fluent
    and varied as unguided ones, within FLUENT and VARIED; else the smallest."""

    def good(row: Mapping[str, Any]) -> bool:
        fluent = all(row["fluency"][j] <= FLUENT * row["plain_fluency"][j] for j in row["fluency"])
        return fluent and all(row[name] >= VARIED * row[f"plain_{name}"] for name in ("distinct_4", "entropy"))

    fallen = [s for s, row in rows.items() if row["toxic"] <= (1 - FALL) * before]
    return min(fallen) if fallen else max((s for s, row in rows.items() if good(row)), default=min(rows))


def following(trials: Sequence[Trial], gradient: float) -> list[Trial]:
    """The trials, with all texts made to fit what is asked for, by its gradient."""
    return [replace(t, guidance=[replace(module, gradient=gradient) for module in t.guidance]) for t in trials]


def texts(path: Path) -> list[str]:
    """The lines of a file."""
    return [example.text for example in read_examples(str(path))]


def flat(parts: Sequence[Sequence[Sample]]) -> list[Sample]:
    """The samples of all trials."""
    return [sample for part in parts for sample in part]


def rounded(value: Any) -> Any:
    """Figures in four digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def ensure_classifier(
    pipe: TextDiffusionPipeline, model: Path, name: str, examples: Sequence[Example], config: ClassifierConfig
) -> None:
    """Trains the model's classifier where it isn't there yet, and prints how often it is right."""
    if name in pipe.classifiers:
        return
    classifier, found = train_classifier(pipe, examples, config)
    print(*found, sep="\n", flush=True)
    checkpoint.save_folder(checkpoint.classifier_folder(model, name), classifier.save_pretrained)
    pipe.classifiers[name] = classifier


def pairs(path: Path) -> list[tuple[str, str]]:
    """Meanings and texts of lines `meaning||text`."""
    return [(example.prompt or "", example.text) for example in read_examples(str(path), separator="||")]


def attributes(path: Path) -> list[Example]:
    """E2E descriptions with their slots as labels, `food : Italian|area : riverside`."""
    return [Example(text, "|".join(f"{k} : {v}" for k, v in control.slots(source).items()))
            for source, text in pairs(path)]  # fmt: skip


def said(examples: Sequence[Example]) -> list[Example]:
    """The examples with the labels alone that their texts say word by word, and whether a place is family friendly."""

    def says(text: str, label: str) -> bool:
        return label.startswith(FRIENDLY) or control.mentioned(label)(Sample(text, 0))

    return [Example(e.text, "|".join(label for label in (e.prompt or "").split("|") if says(e.text, label)))
            for e in examples]  # fmt: skip


def friendliness(path: Path) -> list[tuple[str, str]]:
    """Descriptions and whether the place is said to be family friendly."""
    return [(text, f"{FRIENDLY} : {control.slots(source)[FRIENDLY]}" if FRIENDLY in control.slots(source) else "unsaid")
            for source, text in pairs(path)]  # fmt: skip


def target_labels(data: Path) -> list[str]:
    """Diffusion-LM's targets: `food : Italian` of ["food", ":", "Italian"]."""
    path = data / "control_target" / "target_attribute.json"
    return [" ".join(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def told_apart(wanted: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """The labels that a classifier knows, and those that it doesn't, which are said."""
    asked, unknown = ([label for label in wanted if (label in known) is told] for told in (True, False))
    if unknown:
        print(f"the classifier doesn't know {len(unknown)} labels, left out: {', '.join(unknown)}", flush=True)
    if not asked:
        raise UserError("the classifier knows none of the labels: remove it from the model, and it is trained anew")
    return asked, unknown


def of_labels(
    pipe: TextDiffusionPipeline, labelled: Sequence[Example], labels: Sequence[str]
) -> dict[str, list[Sample]]:
    """Real texts of each label, as the model could have written them."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for text, example in zip(as_written(pipe.tokenizer, [e.text for e in labelled]), labelled, strict=True):
        for label in (example.prompt or "").split("|"):
            found[label].append(Sample(text, 0))
    return {label: found[label] for label in labels}


def references_of(pipe: TextDiffusionPipeline, path: Path) -> dict[str, list[str]]:
    """The texts of each meaning, as the model could have written them."""
    found: dict[str, list[str]] = defaultdict(list)
    sources, written = zip(*pairs(path), strict=True)
    for source, text in zip(sources, as_written(pipe.tokenizer, written), strict=True):
        found[source].append(text)
    return found


def over_meanings(sources: Sequence[str], written: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean share of slots that a meaning's texts realise, with its standard error."""
    shares = [statistics.fmean(control.realised(source, text) for text in each)
              for source, each in zip(sources, written, strict=True)]  # fmt: skip
    error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return {"share": statistics.fmean(shares), "standard_error": error}


def paradetox_rows(path: Path) -> list[Example]:
    """Toxic lines and their neutral rewrites."""
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [
        Example(clean(text), "toxic" if i == 0 else "neutral")
        for line in table
        for i, text in enumerate(line)
        if clean(text)
    ]


def davidson_rows(path: Path) -> list[tuple[str, str]]:
    """Tweets, without mentions and addresses, and whether people found them toxic."""
    with path.open(encoding="utf-8", newline="") as file:
        found = [(clean(re.sub(r"@\w+|https?://\S+|&\S+;|\bRT\b", " ", line["tweet"])), line["class"])
                 for line in csv.DictReader(file)]  # fmt: skip
    return [(text, "neutral" if kind == "2" else "toxic") for text, kind in found if text]


def clean(text: str) -> str:
    """Single blanks."""
    return " ".join(text.split())


def opening(text: str) -> str:
    """What a line begins with, as its prompt."""
    return " ".join(text.split()[:3])


def toxic_opening(rows: Sequence[Example]) -> str:
    """What toxic lines begin with more often than neutral ones, by the largest number of lines."""
    begun = {kind: Counter(opening(e.text) for e in rows if e.prompt == kind) for kind in ("toxic", "neutral")}
    return (begun["toxic"] - begun["neutral"]).most_common(1)[0][0]


if __name__ == "__main__":
    app()
