"""Control: how often texts are what was asked for, and what it costs in fluency, variety and time.

    python benchmarks/control.py e2e DATA MODEL --judge RUN             length, words, labels on E2E descriptions
    python benchmarks/control.py toxicity PARADETOX DAVIDSON LEXICON --output runs/toxicity
    python benchmarks/control.py prompted DATA MODEL                    the share of slots realised against the scale

DATA is a folder with the E2E set, and MODEL one that `benchmarks/e2e_text.py` or `e2e_prompted.py` made; a judge is a
run of `embdiff train DATA/train.txt --objective autoregressive --tokenizer word --min-count 11`. PARADETOX is
paradetox.tsv, DAVIDSON labeled_data.csv, LEXICON a list of words.

Protocol. Unguided texts of the same model, steps and seeds stand beside; fluency is that of unguided texts of the same
lengths. Labels: the 79 of Diffusion-LM's targets, a text has one if it has its value word by word (their protocol);
whether a place is family friendly is told by a scorer of finished texts, trained on the validation half. Toxicity:
judged by a scorer trained on other data than the guide, and by the lexicon; no text is printed or kept.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from common import trained, training_facts, write

from embdiff import checkpoint
from embdiff.classification import ClassifierConfig, train_classifier
from embdiff.cli.common import load_pipeline, quiet, seconds, set_scheduler
from embdiff.config import TrainConfig
from embdiff.data import Example, read_examples
from embdiff.evaluation import control
from embdiff.evaluation.control import Check, Outcome, Sampling, Trial, cost, outcome
from embdiff.evaluation.judges import Judge, NGramJudge, judge_of
from embdiff.evaluation.samples import as_written
from embdiff.evaluation.scorer import Scorer
from embdiff.guidance import ClassifierFreeGuidance, Guidance, Length, Toxicity
from embdiff.guidance.lexical import matcher
from embdiff.pipeline import TextDiffusionPipeline

app = typer.Typer(add_completion=False)
FRIENDLY = "family friendly"
WORDS = 12  # of a text, where its length is given


@app.command()
def e2e(
    data: Path,
    model: Path,
    judge: list[str] = typer.Option([], help="Judges beside the 5-gram: autoregressive runs."),
    targets: int = typer.Option(200, help="Demands of each control."),
    each: int = typer.Option(50, help="Texts for each demand."),
    plain: int = typer.Option(5000, help="Unguided texts."),
    steps: int = typer.Option(32, help="Denoising steps."),
    solver: str | None = typer.Option(None, help="By default the model's own scheduler."),
    temperature: float | None = typer.Option(None, help="Of the words; by default the pipeline's own."),
    strength: float = typer.Option(5.0, help="Of classifier guidance."),
    classifier_steps: int = typer.Option(4000, help="Training steps of the classifier."),
    rounds: int = typer.Option(5, help="Of timing."),
    results: Path = typer.Option(Path("benchmarks/results/control_e2e.json"), help="Where the figures go."),
) -> None:
    """Length, lexical and semantic control on the unconditional model."""
    quiet()
    pipe = load_pipeline(str(model))
    set_scheduler(pipe, solver)
    train, real = (as_written(pipe.tokenizer, texts(data / f"{name}.txt")) for name in ("train", "valid"))
    judges: list[Judge] = [NGramJudge(train), *(judge_of(spec, train, pipe.device) for spec in judge)]
    sampling = Sampling(steps, options={} if temperature is None else {"temperature": temperature})
    labelled = attributes(data / "src1_train.txt")
    ensure_classifier(pipe, model, "attributes", labelled, ClassifierConfig(classifier_steps, several=True))
    friendly = Scorer(*zip(*friendliness(data / "src1_valid.txt"), strict=True))
    known = set(pipe.classifiers["attributes"].config.labels)
    asked = [label for label in target_labels(data / "control_target" / "target_attribute.json") if label in known]

    def check(label: str) -> Check:
        return control.scored(friendly, label) if label.startswith(FRIENDLY) else control.mentioned(label)

    demands = {
        "tokens": control.length_trials(pipe, real, "tokens", targets, each),
        "words": control.length_trials(pipe, real, "words", targets, each),
        "lexical": control.lexical_trials(real, control.known_words(pipe), targets, each),
        "labels": control.label_trials("attributes", asked, max(1, targets * each // len(asked)), strength, check),
    }
    unguided = sampling.draw(pipe, [None] * plain, 10**6)
    figures: dict[str, Any] = {
        "steps": steps,
        "solver": type(pipe.scheduler).__name__,
        "temperature": temperature or pipe.config.temperature,
        "strength": strength,
        "labels": len(asked),
        "controls": {},
    }
    for name, trials in demands.items():
        found = outcome(name, trials, control.draw_trials(pipe, trials, sampling), unguided, judges)
        figures["controls"][name] = row(found, cost(pipe, trials[0], sampling, rounds))
        write(results, figures)


@app.command()
def toxicity(
    paradetox: Path,
    davidson: Path,
    lexicon: Path,
    output: Path = typer.Option(..., help="Folder of the run."),
    max_time: str = typer.Option("15m", help="Training time."),
    max_steps: int | None = typer.Option(None, help="Training steps, instead of a time."),
    samples: int = typer.Option(1000, help="Texts of each setting."),
    steps: int = typer.Option(32, help="Denoising steps."),
    strength: list[float] = typer.Option([3.0, 10.0, 30.0], help="Of classifier guidance."),
    classifier_steps: int = typer.Option(4000, help="Training steps of the classifier."),
    rounds: int = typer.Option(5, help="Of timing."),
    results: Path = typer.Option(Path("benchmarks/results/control_toxicity.json"), help="Where the figures go."),
) -> None:
    """Away from toxicity, alone and together with a prompt and an exact length, on a model of toxic and neutral lines.

    The model is trained with the first words of a line as its prompt, dropped in half of the lines.
    """
    rows = paradetox_rows(paradetox)
    output.mkdir(parents=True, exist_ok=True)
    lines = output.parent / f"{output.name}-texts.txt"
    lines.write_text("\n".join(f"{opening(example.text)}||{example.text}" for example in rows) + "\n")
    config = TrainConfig(
        data=str(lines), separator="||", tokenizer="bpe", vocab_size=4096, size="small", max_length=48,
        max_prompt_length=16, drop_prompt=0.5, batch_size=32, infill=0.0, save_every=200, previews=0,
        max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    pipe = trained(output, config)
    ensure_classifier(pipe, output, "toxicity", rows, ClassifierConfig(classifier_steps))
    judge = NGramJudge([example.text for example in rows])
    scorer = Scorer(*zip(*davidson_rows(davidson), strict=True))
    sampling, plain = Sampling(steps), Sampling(steps).draw(pipe, [None] * samples, 10**6)
    words, away = Length(words=WORDS, complete=False), Toxicity(strength[-1], lexicon=str(lexicon))
    prompts = sorted({opening(example.text) for example in rows[:: max(1, len(rows) // 40)]})[:40]
    settings: dict[str, tuple[list[Guidance], Sequence[str | None]]] = {
        **{f"classifier {s:g}": ([Toxicity(s)], [None]) for s in strength},
        "lexicon": ([Toxicity(0.0, lexicon=str(lexicon))], [None]),
        **{f"classifier {s:g} and lexicon": ([Toxicity(s, lexicon=str(lexicon))], [None]) for s in strength},
        "length": ([words], [None]),
        "classifier, lexicon and length": ([away, words], [None]),
        "prompt": ([], prompts),
        "prompt with CFG": ([ClassifierFreeGuidance(2.0)], prompts),
        "prompt with CFG, classifier, lexicon and length": ([ClassifierFreeGuidance(2.0), away, words], prompts),
    }
    figures: dict[str, Any] = {
        "steps": steps, "training": training_facts(output, pipe.denoiser),
        "unguided": shares(plain, scorer, lexicon), "settings": {},
    }  # fmt: skip
    for name, (modules, asked) in settings.items():
        # Success: a text begins with its prompt.
        trials = [
            Trial(modules, begins_with(prompt) if prompt else bool, max(1, samples // len(asked)), prompt)
            for prompt in asked
        ]
        drawn = control.draw_trials(pipe, trials, sampling)
        found = outcome(name, trials, drawn, plain, [judge])
        toxic = shares([text for part in drawn for text in part], scorer, lexicon)
        figures["settings"][name] = row(found, cost(pipe, trials[0], sampling, rounds)) | toxic
        write(results, figures)


@app.command()
def prompted(
    data: Path,
    model: Path,
    scale: list[float] = typer.Option([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], help="Guidance scales; 1 = off."),
    meanings: int = typer.Option(300, help="Of the validation set."),
    steps: int = typer.Option(32, help="Denoising steps."),
    temperature: float = typer.Option(0.5, help="Of the words."),
    results: Path = typer.Option(Path("benchmarks/results/control_prompted.json"), help="Where the figures go."),
) -> None:
    """The share of a meaning's slots that its text realises, against the scale of classifier-free guidance."""
    quiet()
    pipe = load_pipeline(str(model))
    sources = list(dict.fromkeys(line.split("||")[0].strip() for line in texts(data / "src1_valid.txt")))
    sources = sources[:: max(1, len(sources) // meanings)][:meanings]
    sampling = Sampling(steps, options={"temperature": temperature})
    shares = {}
    for s in scale:
        drawn = sampling.draw(pipe, sources, 0, ClassifierFreeGuidance(s))
        shares[s] = sum(map(control.realised, sources, drawn)) / len(sources)
        print(s, round(shares[s], 4), flush=True)
    write(results, {"meanings": len(sources), "steps": steps, "temperature": temperature, "slots_realised": shares})


def texts(path: Path) -> list[str]:
    """The lines of a file."""
    return [example.text for example in read_examples(str(path))]


def row(found: Outcome, cost: float) -> dict[str, Any]:
    """An outcome and the cost of a step, rounded."""

    def short(value: Any) -> Any:
        return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else (
            round(value, 4) if isinstance(value, float) else value)  # fmt: skip

    return {name: short(value) for name, value in found._asdict().items()} | {"cost": round(cost, 3)}


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


def attributes(path: Path) -> list[Example]:
    """E2E descriptions with their slots as labels, `food : Italian|area : riverside`."""
    pairs = (line.split("||") for line in texts(path))
    return [Example(text.strip(), "|".join(f"{k} : {v}" for k, v in control.slots(source).items()))
            for source, text in pairs]  # fmt: skip


def friendliness(path: Path) -> list[tuple[str, str]]:
    """Descriptions and whether the place is said to be family friendly."""
    pairs = ((control.slots(source), text) for source, text in (line.split("||") for line in texts(path)))
    return [
        (text.strip(), f"{FRIENDLY} : {slots[FRIENDLY]}" if FRIENDLY in slots else "unsaid") for slots, text in pairs
    ]


def target_labels(path: Path) -> list[str]:
    """`food : Italian` of ["food", ":", "Italian"]."""
    return [" ".join(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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


def begins_with(prompt: str) -> Check:
    """Whether a text begins with its prompt."""
    return lambda text: opening(text) == prompt


def shares(found: Sequence[str], scorer: Scorer, lexicon: Path) -> dict[str, float]:
    """The shares of texts that the scorer finds toxic, that have a word of the lexicon, and that have WORDS words."""
    pattern = matcher([line.strip() for line in lexicon.read_text(encoding="utf-8").splitlines() if line.strip()])
    assert pattern is not None
    return {"toxic": round(float((scorer(found, "toxic") > 0.5).mean()), 4),
            "in_lexicon": round(sum(bool(pattern.search(text)) for text in found) / len(found), 4),
            "of_that_length": round(sum(len(text.split()) == WORDS for text in found) / len(found), 4)}  # fmt: skip


if __name__ == "__main__":
    app()
