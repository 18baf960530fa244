"""embdiff train-classifier"""

from __future__ import annotations

from pathlib import Path

import typer

from embdiff.cli.common import check_counts, check_local, check_seed, load_pipeline, noted, quiet, shown
from embdiff.cli.train import DATA_HELP
from embdiff.errors import UserError


def train_classifier(
    data: str = typer.Argument(..., help=DATA_HELP),
    model: Path = typer.Option(..., help="Folder that embdiff train wrote; the classifier is stored in it."),
    label_column: str | None = typer.Option(None, help="Column of the label."),
    text_column: str | None = typer.Option(None, help="Column of the text."),
    separator: str | None = typer.Option(None, help="What stands between label and text in the lines of a .txt."),
    name: str = typer.Option("classifier", help="What guidance will call it."),
    several: bool = typer.Option(False, help="A text may have several labels, joined by |, or none."),
    max_steps: int = typer.Option(1500, help="Training steps."),
    batch_size: int = typer.Option(64, help="Texts a step."),
    width: int = typer.Option(128, help="Of the Transformer."),
    depth: int = typer.Option(2, help="Layers."),
    patch: int = typer.Option(2, help="Neighbouring positions that it reads as one; 1 is finer and half as fast."),
    limit: int | None = typer.Option(None, help="Use only the first examples of DATA."),
    seed: int = typer.Option(0, help="Seed of everything random."),
    overwrite: bool = typer.Option(False, help="Replace a classifier of the same name."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
) -> None:
    """Train a classifier of noisy texts, for guidance towards its labels.

    [bold]embdiff train-classifier reviews.csv --label-column sentiment --model runs/mine --name sentiment[/bold]
    """
    check_counts(max_steps=max_steps, batch_size=batch_size, width=width, depth=depth, patch=patch)
    check_seed(seed)
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"--name {name!r}: use letters, digits, - and _ alone")
    quiet()
    from embdiff.checkpoint import classifier_folder, save_folder
    from embdiff.classification import ClassifierConfig, train_classifier
    from embdiff.data import read_examples

    config = ClassifierConfig(max_steps, batch_size, width=width, depth=depth, patch=patch, seed=seed, several=several)
    target = classifier_folder(model, name)
    if target.exists() and not overwrite:
        raise UserError(f"{model} already has a classifier {name!r}: use --overwrite, or another --name")
    pipe = load_pipeline(str(model), device, "fp32")
    check_local(model)
    examples = read_examples(
        data, text_column=text_column, prompt_column=label_column, separator=separator, limit=limit, note=noted
    )
    with shown() as advance:
        classifier, found = train_classifier(
            pipe, examples, config, lambda step, loss: advance("training", step, max_steps)
        )
    save_folder(target, classifier.save_pretrained)
    labels = list(classifier.config.labels)
    print(f"{len(labels)} labels: {', '.join(labels[:12])}{' ..' if len(labels) > 12 else ''}")
    print("noise level t   right   by guessing   nats a text gained")
    for row in found:
        print(f"{row.time:11.1f} {row.right:9.1%} {row.guess:11.1%} {row.gained:14.2f}")
    print(f"stored in {target}; use it with --guidance classifier:classifier={name},label={labels[0]},strength=1.5")
