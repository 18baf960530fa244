"""E2E from meanings to text: BLEU of one sample a meaning on the official test set, all references.

    python benchmarks/e2e_prompted.py DATA --output runs/e2ep                     train 22 minutes on two idle cores
    python benchmarks/e2e_prompted.py DATA --output runs/e2ep --max-steps 5720    or so many steps
    python benchmarks/e2e_prompted.py DATA --output runs/e2ep --evaluate-only     evaluate what is there

DATA is a folder with src1_train.txt, src1_valid.txt (`meaning||text`) and testset_w_refs.csv.

Protocol. 630 meanings, one sample each with seed = its number. BLEU is sacrebleu's corpus BLEU, lower-cased, 13a
tokenisation, without smoothing, as the challenge's own script does; samples are detokenised first.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import typer

from embdiff.cli.common import quiet, seconds
from embdiff.evaluation.metrics import corpus_bleu, meaning_to_source, read_e2e_references
from embdiff.guidance import ClassifierFreeGuidance
from embdiff.pipeline import TextDiffusionPipeline, load
from embdiff.training import TrainConfig, train


def main(
    data: Path,
    output: Path = typer.Option(..., help="Folder of the run."),
    max_time: str = typer.Option("22m", help="Training time."),
    max_steps: int | None = typer.Option(None, help="Training steps, instead of a time."),
    size: str = typer.Option("mini", help="Model size."),
    evaluate_only: bool = typer.Option(False, help="The run is finished: only evaluate it."),
    resume: bool = typer.Option(False, help="Continue the run."),
    meanings: int | None = typer.Option(None, help="Test meanings; all 630 by default."),
    results: Path = typer.Option(Path("benchmarks/results/e2e_prompted.json"), help="Where the figures go."),
) -> None:
    """Trains, then measures BLEU over steps, guidance spaces, scales and temperatures."""
    quiet()
    if not evaluate_only:
        config = TrainConfig(
            data=str(data / "src1_train.txt"), validation=str(data / "src1_valid.txt"), separator="||",
            tokenizer="word", min_count=11, size=size, max_length=64, batch_size=64, infill=0.0, save_every=200,
            max_steps=max_steps, max_time=None if max_steps else seconds(max_time),
        )  # fmt: skip
        from embdiff.cli.train import Display

        with Display() as display:
            train(config, output, resume=resume, reporter=display)
    pipe = load(str(output))
    pipe.set_progress_bar_config(disable=True)
    cases = read_e2e_references(data / "testset_w_refs.csv")[:meanings]
    prompts = [meaning_to_source(meaning) for meaning, _ in cases]
    references = [texts for _, texts in cases]
    rows = []
    for steps in (32, 8):
        for space, scale in (("x0", 1.0), ("x0", 1.5), ("x0", 2.0), ("x0", 3.0), ("logits", 1.5), ("logits", 2.0)):
            for temperature in (0.7, 0.5):
                start = time.monotonic()
                texts = draw(pipe, prompts, steps, scale, space, temperature)
                bleu, taken = corpus_bleu(texts, references), time.monotonic() - start
                row = {"steps": steps, "space": space, "scale": scale, "temperature": temperature,
                       "bleu": round(bleu, 2), "seconds": round(taken, 1)}  # fmt: skip
                print(json.dumps(row), flush=True)
                rows.append(row)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results.write_text(json.dumps({"rows": rows, "meanings": len(cases), "machine": machine}, indent=1) + "\n")


def draw(
    pipe: TextDiffusionPipeline, prompts: list[str], steps: int, scale: float, space: str, temperature: float
) -> list[str]:
    """One sample a prompt."""
    texts: list[str] = []
    for start in range(0, len(prompts), 50):
        part = prompts[start : start + 50]
        out: Any = pipe(
            part, num_inference_steps=steps, guidance=[ClassifierFreeGuidance(scale, space)], temperature=temperature,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        )  # fmt: skip
        texts += out.texts
    return texts


if __name__ == "__main__":
    typer.run(main)
