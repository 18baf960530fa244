"""What shortcuts of a step cost in quality: products in 8 bits, and posteriors over a few drawn words.

    embdiff train TRAIN.txt --vocab-size 8192 --size mini --max-length 24 --max-time 20m --batch-size 64 --output RUN
    python benchmarks/shortcuts.py RUN TRAIN.txt VALID.txt

The same seeds are drawn with each shortcut. Texts are judged by a 5-gram of the training texts, and a 3-gram of theirs
judges the validation texts; standard errors stand beside the figures.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from common import write

from embdiff.cli.common import load_pipeline, quiet
from embdiff.data import read_examples
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.report import own_figures, reverse_cross_entropy
from embdiff.evaluation.samples import as_written, draw, some
from embdiff.schedulers import SCHEDULERS

SHORTCUTS: dict[str, tuple[str, int | None]] = {
    "none": ("bf16", None),
    "8 bits": ("int8", None),
    "512 words": ("bf16", 512),
    "128 words": ("bf16", 128),
    "8 bits, 512 words": ("int8", 512),
}
KEPT = ("cross_entropy", "unigram_entropy", "distinct_4", "mean_words", "standard_errors")


def main(
    model: str,
    train: Path,
    valid: Path,
    steps: list[int] = typer.Option([8, 32]),
    samples: int = 1000,
    solver: str = "unipc",
    temperature: float = 0.8,
    results: Path = Path("benchmarks/results/shortcuts.json"),
) -> None:
    """Prints and writes the figures of each shortcut and number of steps, and of real texts, as many as there are."""
    quiet()
    real = [example.text for example in read_examples(str(valid))]
    judge = NGramJudge([example.text for example in read_examples(str(train))])
    figures: dict[str, Any] = {"samples": samples, "solver": solver, "temperature": temperature, "points": []}
    for name, (dtype, words) in SHORTCUTS.items():
        pipe = load_pipeline(model, dtype_name=dtype)
        pipe.scheduler = SCHEDULERS[solver].from_config(pipe.scheduler.config)
        written = as_written(pipe.tokenizer, real, pipe.denoiser.config.max_length)
        if name == "none":
            figures["real"] = kept(some(written, min(samples, len(written))), judge)
        for n in steps:
            start = time.perf_counter()
            texts = draw(pipe, [None] * samples, num_inference_steps=n, temperature=temperature, shortlist=words)
            seconds = time.perf_counter() - start
            point = {"shortcut": name, "steps": n, "seconds": round(seconds, 1)} | kept(texts, judge)
            figures["points"].append(point | {"reverse": round(reverse_cross_entropy(texts, written), 4)})
    write(results, figures)


def kept(texts: list[str], judge: NGramJudge) -> dict[str, Any]:
    """The figures that say most."""
    return {name: value for name, value in own_figures(texts, [judge]).items() if name in KEPT}


if __name__ == "__main__":
    typer.run(main)
