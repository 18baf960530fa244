"""Training of noise-aware classifiers, which guide sampling towards labels (embdiff.guidance.classifier)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from embdiff import ops
from embdiff.batches import Encoded, encode
from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.guidance.classifier import NoisyClassifier
from embdiff.noise import NoiseSchedule, corrupt, noise_schedule
from embdiff.optim import Muon
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.randomness import mixed_seed

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the fitted schedule, where the accuracy is measured
WARMUP = 50


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained. several: whether labels are joined by `separator` where a text has more than one."""

    max_steps: int = 1500
    batch_size: int = 64
    lr: float = 4e-3
    width: int = 128
    depth: int = 2
    patch: int = 2
    seed: int = 0
    several: bool = False
    separator: str = "|"

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise UserError(f"width {self.width} is out of range: give an even number")
        if self.patch < 1:
            raise UserError(f"patch {self.patch} is out of range: give 1 or more positions")


class Accuracy(NamedTuple):
    """Of held-out texts at one noise level.

    right: the share of labels that are right; guess: without looking. gained: nats a text that looking is worth, which
    tells more than `right` where most labels are rare; below 0 where the classifier is surer than it may be.
    """

    time: float
    gamma: float
    right: float
    guess: float
    gained: float


def train_classifier(
    pipe: TextDiffusionPipeline,
    examples: Sequence[Example],
    config: ClassifierConfig,
    advance: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[NoisyClassifier, list[Accuracy]]:
    """A classifier for the pipeline's embedding space, and how often it is right at low and high noise.

    examples: texts, each with its label in place of a prompt. advance: told step and loss. Raises UserError for bad
    data.
    """
    labels = names(examples, config)
    train, valid = divided(examples, config.seed)
    device, limit = pipe.device, int(pipe.denoiser.config.max_length)
    texts = {name: encode([Example(e.text) for e in part], pipe.tokenizer, limit) for name, part in
             (("train", train), ("valid", valid))}  # fmt: skip
    targets = {name: targets_of(part, labels, config).to(device) for name, part in (("train", train), ("valid", valid))}
    torch.manual_seed(mixed_seed(config.seed, 0x636C73))
    classifier = NoisyClassifier(
        pipe.denoiser.dim, labels, config.several, config.width, config.depth, heads(config.width), patch=config.patch
    ).to(device)
    classifier.remember(pipe.denoiser.space)
    schedule = noise_schedule(dict(pipe.config.fitted_schedule))
    optimizers = optimizers_of(classifier, config.lr)
    classifier.train()
    for step in range(config.max_steps):
        generator = np.random.default_rng((config.seed, step))
        index = generator.integers(len(texts["train"]), size=config.batch_size)
        gamma = levels(schedule, config.batch_size, generator)
        logits = read(pipe, classifier, texts["train"], index, gamma, generator)
        loss = loss_of(logits, targets["train"][index], config.several)
        torch.autograd.backward(loss)
        clip_grad_norm_(classifier.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / WARMUP, 2 * (1 - step / config.max_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        advance(step + 1, float(loss.detach()))
    classifier.eval()
    return classifier, accuracies(pipe, classifier, texts["valid"], targets["valid"], schedule, config)


def heads(width: int) -> int:
    """Attention heads of about 64 dimensions, an even number each, that share out an even width."""
    return next(n for n in range(max(1, width // 64), 0, -1) if width % (2 * n) == 0)


def divided(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Nine tenths to learn from, and the rest; all examples of one text are on one side."""
    texts = sorted({example.text for example in examples})
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out = {texts[i] for i in order[: max(1, len(texts) // 10)]}
    train = [example for example in examples if example.text not in held_out]
    return train, [example for example in examples if example.text in held_out]


def names(examples: Sequence[Example], config: ClassifierConfig) -> list[str]:
    """All labels, the most frequent first."""
    counts = Counter(label for example in examples for label in labels_of(example, config))
    if not config.several and any(example.prompt is None for example in examples):
        bare = next(i for i, example in enumerate(examples) if example.prompt is None)
        raise UserError(f"example {bare + 1} has no label: name the column with --label-column")
    if len(counts) < (1 if config.several else 2):
        fix = (
            "name the column with --label-column" if config.several else "a classifier needs two or more to tell apart"
        )
        raise UserError(f"the data has {len(counts)} label(s): {fix}")
    if len(counts) > len(examples) // 2:
        raise UserError(
            f"the data has {len(counts)} labels for {len(examples)} texts: is the label column the right one?"
        )
    return [label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def labels_of(example: Example, config: ClassifierConfig) -> list[str]:
    """The labels of one text."""
    text = (example.prompt or "").strip()
    parts = text.split(config.separator) if config.several else [text]
    return [part.strip() for part in parts if part.strip()]


def targets_of(examples: Sequence[Example], labels: list[str], config: ClassifierConfig) -> Tensor:
    """[N] int64, or [N, K] of 0 and 1 where a text may have several labels."""
    number = {label: i for i, label in enumerate(labels)}
    if not config.several:
        return torch.tensor([number[labels_of(example, config)[0]] for example in examples])
    found = torch.zeros(len(examples), len(labels))
    for row, example in enumerate(examples):
        found[row, [number[label] for label in labels_of(example, config)]] = 1.0
    return found


def optimizers_of(classifier: NoisyClassifier, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest: AdamW alone learns several times more slowly."""
    matrices = [p for name, p in classifier.blocks.named_parameters() if "modulation" not in name]
    kept = {id(p) for p in matrices}
    others = [p for p in classifier.parameters() if id(p) not in kept]
    return [Muon(matrices, lr, weight_decay=0.01), torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01)]


def levels(schedule: NoiseSchedule, count: int, generator: np.random.Generator) -> NDArray[Any]:
    """gamma [count]: half of them as sampling steps through the schedule, half uniform below its median.

    Most of a schedule's levels show little of a label; without the other half they would drown what the rest teach.
    """
    half = count // 2
    stepped = schedule.gamma((np.arange(count - half) + generator.random(count - half)) / (count - half))
    low, median = schedule.gamma(np.array([0.0, 0.5]))
    return np.concatenate([generator.uniform(low, median, half), stepped])


def read(
    pipe: TextDiffusionPipeline,
    classifier: NoisyClassifier,
    texts: Encoded,
    index: NDArray[Any],
    gamma: NDArray[Any],
    generator: np.random.Generator,
) -> Tensor:
    """The classifier's logits [B, K] of texts made noisy. gamma: [B]."""
    ids = texts.batch(index).ids.to(pipe.device)
    with torch.no_grad():
        x = pipe.denoiser.space.embed(ids)
    noise = torch.from_numpy(generator.standard_normal(tuple(x.shape), dtype=np.float32)).to(pipe.device)
    noisiness = torch.from_numpy(gamma).float().to(pipe.device)
    z, fast = corrupt(x, noisiness, noise), ops.fast_dtype(pipe.device.type)
    with torch.autocast(pipe.device.type, fast, enabled=fast is not torch.float32):
        logits: Tensor = classifier(z, noisiness)
    return logits


def loss_of(logits: Tensor, targets: Tensor, several: bool) -> Tensor:
    """Cross-entropy, nats a text; summed over labels where there may be several."""
    if several:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    return F.cross_entropy(logits, targets)


@torch.no_grad()
def accuracies(
    pipe: TextDiffusionPipeline,
    classifier: NoisyClassifier,
    texts: Encoded,
    targets: Tensor,
    schedule: NoiseSchedule,
    config: ClassifierConfig,
) -> list[Accuracy]:
    """On up to 1,000 held-out texts, at each of TIMES."""
    rows, generator = np.arange(min(len(texts), 1000)), np.random.default_rng(config.seed)
    targets, found = targets[: len(rows)], []
    for time in TIMES:
        gamma, parts = float(schedule.gamma(time)), np.array_split(rows, -(-len(rows) // 100))
        logits = torch.cat(
            [read(pipe, classifier, texts, part, np.full(len(part), gamma), generator) for part in parts]
        )
        if config.several:
            share = targets.mean(0)
            right, guess = ((logits > 0) == (targets > 0.5)).float().mean(), torch.maximum(share, 1 - share).mean()
            blind = (torch.special.entr(share) + torch.special.entr(1 - share)).sum()
        else:
            share = targets.bincount(minlength=logits.shape[1]) / len(targets)
            right, guess = (logits.argmax(1) == targets).float().mean(), share.max()
            blind = torch.special.entr(share).sum()
        gained = blind - loss_of(logits, targets, config.several)
        found.append(Accuracy(time, gamma, float(right), float(guess), float(gained)))
    return found
