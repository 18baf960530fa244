"""What the benchmarks share: a model trained once, the machine in words, and where figures go."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from embdiff.checkpoint import checkpoints, read_state
from embdiff.cli.common import load_pipeline, quiet, reuse_memory, run_config
from embdiff.cli.train import Display
from embdiff.config import TrainConfig, read_config
from embdiff.data import read_examples
from embdiff.errors import UserError
from embdiff.evaluation.frontier import point
from embdiff.evaluation.judges import Judge
from embdiff.evaluation.samples import as_written
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.training import train

FACTS = "training.json"  # beside a model that was published


def finish(output: Path, config: TrainConfig) -> None:
    """Does nothing for a run that was finished before, continues one that was stopped, or trains from the start."""
    quiet()
    reuse_memory()
    if (output / "model_index.json").exists() or (output / "model").exists():
        return
    started = run_config(output)  # a run goes on with the options that it was started with
    with Display() as display:
        train(started or config, output, resume=started is not None, reporter=display)


def trained(
    output: Path, config: TrainConfig, dtype: str = "fp32", publish: Path | None = None
) -> TextDiffusionPipeline:
    """The diffusion model of a run, see `finish`; put into the folder `publish` too, if there is one."""
    if publish is not None and publish.exists():
        raise UserError(f"{publish} exists: name another folder for --ship")
    finish(output, config)
    if publish is not None:
        ship(output, publish)
    return load_pipeline(str(output), dtype_name=dtype)


def ship(output: Path, folder: Path) -> None:
    """The model of a run as it is published: bf16 in safetensors, half the size, read back as fp32; and how it came
    about. Such a folder serves as the folder of a run that is finished."""
    pipe = load_pipeline(str(output)).to(torch.bfloat16)
    pipe.save_pretrained(folder)
    facts = training_facts(output, pipe.denoiser) | {"machine": machine()}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def training_facts(output: Path, model: torch.nn.Module) -> dict[str, Any]:
    """How a model came about."""
    if (output / FACTS).exists():
        return cast(dict[str, Any], json.loads((output / FACTS).read_text()))
    state = read_state(checkpoints(output)[-1])
    options = read_config(output / "run.yaml")
    return {"steps": state["step"], "seconds": round(state["seconds"]), "tokens": state["tokens"],
            "texts": len(read_examples(options["data"])),
            "parameters": sum(p.numel() for p in model.parameters()), "dtype": state["dtype"],
            **{name: options[name] for name in ("size", "batch_size", "draws")}}  # fmt: skip


def machine() -> str:
    """The machine, as far as figures depend on it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}"


def chosen(only: Sequence[str], all_of: Iterable[str]) -> list[str]:
    """The names that are asked for, or all there are. Raises UserError for others."""
    known = list(all_of)
    for name in only:
        if name not in known:
            raise UserError(f"--only {name!r} is unknown: choose of {', '.join(known)}")
    return list(only) or known


def failure(error: BaseException) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def write(path: Path, figures: dict[str, Any]) -> None:
    """Prints the figures and keeps them, with the machine."""
    keep(path, figures)
    print(path.read_text())


def keep(path: Path, figures: dict[str, Any]) -> None:
    """Keeps the figures, with the machine."""
    path.write_text(json.dumps(figures | {"machine": machine()}, indent=1) + "\n")


def judged(judge: Judge, texts: list[str]) -> dict[str, float]:
    """The four numbers that say most; texts as the model could have written them."""
    found = point(judge, texts)
    return {"cross_entropy": round(found.cross_entropy, 4), "unigram_entropy": round(found.entropy, 4),
            "mean_words": round(found.mean_words, 2), "distinct_4": round(found.distinct_4, 4)}  # fmt: skip


def real_texts(pipe: TextDiffusionPipeline, path: Path) -> list[str]:
    """The texts of a file as the model could have written them."""
    return as_written(pipe.tokenizer, [example.text for example in read_examples(str(path))])


def generators(start: int, count: int) -> list[torch.Generator]:
    """One for each sample: seeds start .. start + count - 1."""
    return [torch.Generator().manual_seed(seed) for seed in range(start, start + count)]
