"""What the sampling defaults are worth: solvers, temperatures and ways to decide lengths, on a model without prompts.

    python benchmarks/sampling.py runs/e2e DATA --samples 256

MODEL is what e2e_text.py trained, DATA its folder. One option is changed at a time; samples are judged as there.
Entropy grows with the number of samples, so the real text beside them is as many random lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from common import judged, machine, real_texts

from embdiff.cli.common import load_pipeline, quiet
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.samples import draw, some
from embdiff.schedulers import with_solver

# What differs from the defaults of `embdiff sample`.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"length_bias": 0.0},
    {"length_bias": 0.5},
    {"length_bias": 1.5},
    {"draw_length": False},
    {"draw_length": False, "length_bias": 0.0},
    {"scheduler": "renoise"},
    {"scheduler": "ddim"},
    {"scheduler": "dpm++"},
    {"scheduler": "ddpm"},
    {"scheduler": "ddpm", "temperature": 1.0, "draw_length": False, "length_bias": 0.0},
]
COLUMNS = ("cross_entropy", "unigram_entropy", "mean_words", "distinct_4")


def main(
    model: Path,
    data: Path,
    samples: int = 256,
    steps: int = 32,
    results: Path = Path("benchmarks/results/sampling_defaults.md"),
) -> None:
    """Writes a table in Markdown."""
    quiet()
    pipe = load_pipeline(str(model))
    trained = pipe.scheduler
    judge = NGramJudge(real_texts(pipe, data / "train.txt"))
    rows = [("real text", judged(judge, some(real_texts(pipe, data / "valid.txt"), samples)))]
    for setting in SETTINGS:
        options = dict(setting)
        name = options.pop("scheduler", None)
        pipe.scheduler = trained if name is None else with_solver(trained, name)
        texts = draw(pipe, [None] * samples, num_inference_steps=steps, **options)
        rows.append((describe(setting), judged(judge, texts)))
        print(rows[-1], flush=True)
    results.write_text(table(rows, samples, steps))


def describe(setting: dict[str, Any]) -> str:
    """The setting in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "defaults"


def table(rows: list[tuple[str, dict[str, float]]], samples: int, steps: int) -> str:
    """The whole page."""
    lines = [
        "# What the sampling defaults are worth",
        "",
        f"By `benchmarks/sampling.py`: the model of `e2e_text.json`, {samples} samples a setting, {steps} steps.",
        f"Machine: {machine()}.",
        "",
        "| setting | 5-gram cross-entropy | unigram entropy | words | distinct 4-grams |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join([name, *(f"{figures[c]:.3f}" for c in COLUMNS)]) + " |" for name, figures in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
