"""What decides a training run: its options, their ranges, and the YAML files that hold them."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from embdiff.baselines import BASELINES
from embdiff.denoiser import SIZES
from embdiff.errors import UserError
from embdiff.noise import FITS

if TYPE_CHECKING:
    from embdiff.data import Corpus


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; written to run.yaml. Times are in seconds, lengths in tokens."""

    data: str = "docstrings"
    validation: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    separator: str | None = None
    valid_share: float = 0.05
    limit: int | None = None

    tokenizer: str = "bpe"
    vocab_size: int = 8192
    min_count: int = 2

    size: str = "small"
    dim: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    max_length: int = 64
    max_prompt_length: int = 64
    on_long: str = "truncate"

    max_steps: int | None = None
    max_time: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0

    optimizer: str = "muon"
    lr: float = 2e-3
    matrix_lr: float = 4e-3
    embedding_lr: float = 6e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.5
    clip: float = 1.0
    dropout: float = 0.0
    ema: float = 0.999

    objective: str = "ce"
    schedule: str = "gumbel"
    self_condition: float = 0.9
    drop_prompt: float = 0.1
    infill: float = 0.1
    window: float = 0.6
    draws: int = 1
    filter_ramp: int = 300
    transitions: int = 64

    dtype: str = "auto"
    compile: bool | None = None
    gradient_checkpointing: bool = False

    save_every: int = 500
    keep: int = 2
    validate_every: int = 500
    log_every: int = 10
    previews: int = 3
    tracker: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, str(f.type), getattr(self, f.name)))
            most = MOST.get(f.name, LARGEST)
            if isinstance(getattr(self, f.name), int) and getattr(self, f.name) > most:
                raise UserError(f"{f.name} is too large: give at most {most:,}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}")
        for name, lowest in LOWEST.items():
            if not lowest <= getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} is out of range: give a number from {lowest} on")
        for name in ("self_condition", "drop_prompt", "infill", "window", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is out of range: give a share between 0 and 1")
        for name in ("lr", "matrix_lr", "embedding_lr", "clip", "max_steps", "max_time"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} {value} is out of range: give a number above 0")
        for name in SHAPE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is out of range: give 1 or more")
        if self.window == 1:
            raise UserError("window 1 is out of range: some steps must look at whole texts; give a share below 1")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema {self.ema} is out of range: give a decay from 0 (off) to below 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} is out of range: give a share from 0 (off) to below 1")

    @property
    def steps(self) -> int | None:
        """max_steps; 10,000 where neither steps nor time are limited."""
        return 10_000 if self.max_steps is None and self.max_time is None else self.max_steps

    @property
    def shape(self) -> dict[str, int]:
        """Dimensions of the model: those of `size`, but for the ones that are given."""
        given = {name: getattr(self, name) for name in SHAPE}
        return SIZES[self.size] | {name: value for name, value in given.items() if value is not None}

    def corpus(self, progress: bool = True) -> Corpus:
        """What the run is trained and validated with."""
        from embdiff.data import load_corpus

        return load_corpus(
            self.data,
            text_column=self.text_column,
            prompt_column=self.prompt_column,
            separator=self.separator,
            validation=self.validation,
            valid_share=self.valid_share,
            limit=self.limit,
            progress=progress,
        )

    def located(self) -> TrainConfig:
        """The same run with local paths in full, so that it can be resumed from any folder."""
        return replace(
            self,
            data=in_full(self.data, "docstrings"),
            validation=None if self.validation is None else in_full(self.validation, "docstrings"),
            tokenizer=in_full(self.tokenizer, "bpe", "word"),
        )

    def idle(self) -> list[str]:
        """A line for each option that was set but does nothing beside the others."""
        rules = (
            ("min_count", self.tokenizer != "word", f"tokenizer {self.tokenizer}"),
            ("vocab_size", self.tokenizer != "bpe", f"tokenizer {self.tokenizer}"),
            ("matrix_lr", self.optimizer != "muon", f"optimizer {self.optimizer}"),
            ("valid_share", self.validation is not None, f"validation {self.validation}"),
            *((name, self.objective in BASELINES, f"objective {self.objective}") for name in DIFFUSION_ONLY),
            *((name, self.objective == "autoregressive", "objective autoregressive") for name in NOISY_ONLY),
        )
        default = {f.name: f.default for f in fields(self)}
        return [
            f"{name} {getattr(self, name)} has no effect with {other}"
            for name, ignored, other in rules
            if ignored and getattr(self, name) != default[name]
        ]

    def save(self, folder: Path) -> None:
        """Writes DIR/run.yaml, whole or not at all."""
        fresh = folder / ".run.yaml.tmp"
        fresh.write_text(yaml.safe_dump(asdict(self), sort_keys=False))
        fresh.replace(folder / "run.yaml")


SHAPE = ("dim", "width", "depth", "heads")
CHOICES = {
    "size": tuple(SIZES),
    "optimizer": ("muon", "adamw"),
    "objective": ("ce", "vlb", "mixed", *BASELINES),
    "schedule": tuple(FITS),
    "dtype": ("auto", "bf16", "fp32"),
    "on_long": ("truncate", "drop"),
}
LOWEST = {
    "max_length": 2, "max_prompt_length": 1, "batch_size": 1, "accumulate": 1, "draws": 1, "save_every": 1, "keep": 1,
    "validate_every": 1, "log_every": 1, "seed": 0, "warmup": 0, "filter_ramp": 0, "transitions": 0, "previews": 0,
    "weight_decay": 0,
}  # fmt: skip
# Options that only some objectives look at: diffusion, and all that look at texts through noise or a mask.
DIFFUSION_ONLY = ("dim", "schedule", "self_condition", "drop_prompt", "filter_ramp", "transitions")
NOISY_ONLY = ("infill", "window", "draws")
LARGEST = 2**63 - 1  # torch's seeds and sizes are 64-bit
# More would fail somewhere in a library, before memory runs out.
MOST = {
    "vocab_size": 2**24, "dim": 2**16, "width": 2**16, "depth": 2**12, "heads": 2**12, "transitions": 2**16,
    "max_length": 2**20, "max_prompt_length": 2**20, "batch_size": 2**20, "draws": 2**12, "previews": 2**12,
}  # fmt: skip
# What decides the weights of a run beside data and model: a resumed run must have the same.
DECISIVE = (
    "tokenizer", "vocab_size", "min_count", "on_long",
    "optimizer", "objective", "schedule", "seed", "batch_size", "accumulate", "draws", "window", "self_condition",
    "drop_prompt", "dropout", "infill", "filter_ramp", "transitions",
)  # fmt: skip


def _typed(name: str, annotation: str, value: Any) -> Any:
    """The value as the type that the option has; YAML reads 1e-3 as a string."""
    if value is None and "None" in annotation:
        return None
    kind = {"int": int, "float": float, "str": str, "bool": bool}[annotation.removesuffix(" | None")]
    try:
        if value is None or isinstance(value, list | dict | set):  # which would be text, too
            raise ValueError
        converted = value if kind is bool or isinstance(value, bool) else kind(value)
        if type(converted) is not kind or (kind is int and isinstance(value, float) and value != converted):
            raise ValueError
    except (TypeError, ValueError, OverflowError):  # an infinite int, an int that no float reaches
        raise UserError(f"{name} {value!r} is not of the right kind: it takes {kind.__name__}") from None
    return converted


def in_full(source: str, *words: str) -> str:
    """The whole path of what is local; the words that mean something else, and names on the hub, as they are."""
    path = os.path.expanduser(source)
    return str(Path(path).absolute()) if source not in words and os.path.exists(path) else source


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, checked against the names of TrainConfig; dashes and underscores are alike."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no date, too many digits
        raise UserError(f"cannot read config {path}: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"config {path} is not a list of `option: value` lines")
    options = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    unknown = set(options) - {f.name for f in fields(TrainConfig)}
    if unknown:
        raise UserError(f"config {path} has unknown option {', '.join(sorted(unknown))}: see embdiff train --help")
    return options
