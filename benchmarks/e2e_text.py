"""E2E restaurant descriptions without prompts: the bound on validation text, and samples judged by a 5-gram.

    python benchmarks/e2e_text.py DATA --output runs/e2e                 train 15 minutes on two idle cores
    python benchmarks/e2e_text.py DATA --output runs/e2e --batch-size 32 --dim 16 --max-time 60m   the committed figures
    python benchmarks/e2e_text.py DATA --output runs/e2e --steps 8 --solver unipc    again: continues, or only measures
    embdiff sample runs/e2e --num-samples 40000 --steps 8 --temperature 0.78 --length-bias 1.6 --output drawn.jsonl
    python benchmarks/e2e_text.py DATA --output runs/e2e --drawn drawn.jsonl         what do so many texts cover?

DATA is a folder with the E2E set's train.txt and valid.txt, one word-tokenised text a line.

Protocol. The vocabulary is every word seen more than 10 times in training, the rest `<unk>`, and four specials: 821
entries. What is measured is what `embdiff eval` measures: the bound over every line of valid.txt, 64 positions each,
with three passes of self-conditioning; samples by seeds 0, 1, .. beside as many random lines of valid.txt (the file is
sorted by meaning, so its head is not typical), judged by an interpolated Kneser-Ney 5-gram of train.txt. Coverage: all
of valid.txt under a 5-gram of samples, beside one of train.txt. Figures of one model add up in one file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
from common import real_texts, trained, training_facts, write

from embdiff.cli.common import parsed, seconds, set_scheduler
from embdiff.config import TrainConfig
from embdiff.data import read_examples
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.report import Protocol, evaluate, reverse_cross_entropy
from embdiff.evaluation.samples import as_written


def main(
    data: Path,
    output: Path = typer.Option(..., help="Folder of the run."),
    max_time: str = typer.Option("15m", help="Training time."),
    max_steps: int | None = typer.Option(None, help="Training steps, instead of a time."),
    size: str = typer.Option("mini", help="Model size."),
    batch_size: int = typer.Option(64, help="Texts of 64 positions a step."),
    dim: int | None = typer.Option(None, help="Dimensions of the embeddings; the size's by default."),
    samples: int = typer.Option(1000, help="Samples to judge."),
    steps: list[int] = typer.Option([32], help="Sampling steps; give it several times."),
    solver: str | None = typer.Option(None, help="By default the model's own scheduler."),
    temperature: float | None = typer.Option(None, help="By default the model's own."),
    length_bias: float | None = typer.Option(None, help="By default the pipeline's."),
    guidance: list[str] = typer.Option([], help="As in embdiff sample: autoguidance:scale=1.25."),
    bound: int | None = typer.Option(None, help="Validation lines for the bound; all by default."),
    levels: int = typer.Option(12, help="Noise levels for each of them."),
    drawn: Path | None = typer.Option(None, help="Samples to measure the coverage of, instead of drawing."),
    ship: Path | None = typer.Option(None, help="Folder for the model as it is published."),
    results: Path = typer.Option(Path("benchmarks/results/e2e_text.json"), help="Where the figures go; added to."),
) -> None:
    """Trains, evaluates, prints the figures and adds them to --results; samples go into the run's folder."""
    config = TrainConfig(
        data=str(data / "train.txt"), validation=str(data / "valid.txt"), tokenizer="word", min_count=11,
        size=size, dim=dim, max_length=64, batch_size=batch_size, infill=0.0, window=0.9, save_every=200,
        max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
    )  # fmt: skip
    pipe = trained(output, config, publish=ship)
    set_scheduler(pipe, solver)
    facts = training_facts(output, pipe.denoiser)
    figures: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    known = figures.get("training", {})
    if any(facts.get(name) != value for name, value in known.items()):  # of another model
        figures = {}
    figures["training"] = facts
    if drawn is not None:
        texts = [json.loads(line)["text"] for line in drawn.read_text(encoding="utf-8").splitlines()]
        train, real = (real_texts(pipe, data / f"{name}.txt") for name in ("train", "valid"))
        found = {"samples": reverse_cross_entropy(texts, real), "train": reverse_cross_entropy(train, real)}
        write(results, figures | {"coverage": {"texts": len(texts)} | found})
        return
    valid = read_examples(str(data / "valid.txt"))
    train = [example.text for example in read_examples(str(data / "train.txt"))]
    judge = NGramJudge(as_written(pipe.tokenizer, train))
    options: dict[str, Any] = {"temperature": temperature, "guidance": parsed(guidance)}
    if length_bias is not None:
        options["length_bias"] = length_bias
    if bound != 0 and figures.get("likelihood_of") != [bound, levels]:  # measured once for all samplers
        figures |= {"likelihood": None, "likelihood_of": [bound, levels]}
    for n in steps:
        lines = 0 if figures.get("likelihood") else bound
        protocol = Protocol(samples, n, bound_texts=lines, levels=levels, options=options)
        found = evaluate(pipe, valid, [judge], protocol, train=train)
        sampler = f"{solver or 'default'}, {n} steps, temperature {temperature or found['run']['temperature']:g}"
        biased = [] if length_bias is None else [f"length bias {length_bias:g}"]
        sampler = ", ".join([sampler, *biased, *guidance])
        name = re.sub(r"[^\w .,=:-]", "-", sampler)  # guidance may name files
        (output / f"{name}.txt").write_text("\n".join(each["text"] for each in found.pop("texts")) + "\n")
        figures["likelihood"] = figures.get("likelihood") or found["likelihood"]
        figures[sampler] = {name: found[name] for name in ("samples", "real", "run", "protocol")}
        write(results, figures)


if __name__ == "__main__":
    typer.run(main)
