"""Classifier guidance: towards texts of a label, by a small classifier that reads noisy latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from embdiff.denoiser import Block, Condition, GammaCondition, Rotary, through_blocks
from embdiff.errors import UserError
from embdiff.guidance.base import Gradient, Guidance, Part, Run, check_differentiable
from embdiff.space import EmbeddingSpace

SKETCH = 64  # embeddings that tell one space from another


class NoisyClassifier(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Labels of a text, from its latents z [B, L, D] at noise level gamma.

    Args:
        dim: D, of the embedding space that it was trained in.
        labels: K names.
        several: whether a text may have several labels (or none), else it has exactly one.
        width, depth, heads, condition_width: of the Transformer, see `denoiser.Denoiser`.
        patch: neighbouring positions that it reads as one, as a label needs no finer view: twice as many take half the
            time.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        dim: int,
        labels: Sequence[str],
        several: bool = False,
        width: int = 128,
        depth: int = 2,
        heads: int = 2,
        condition_width: int = 64,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(patch * dim, width, bias=False)
        self.condition = GammaCondition(condition_width)
        self.blocks = nn.ModuleList([Block(width, heads, condition_width) for _ in range(depth)])
        self.rotary = Rotary(width // heads)
        self.final = nn.Linear(condition_width, 2 * width, bias=False)
        self.head = nn.Linear(width, len(labels))
        self.register_buffer("sketch", torch.zeros(SKETCH, dim))
        nn.init.zeros_(self.final.weight)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        """Logits [B, K]. gamma: [B]."""
        condition = Condition(self.condition(gamma[:, None].float()), self.head.weight.new_zeros(0), None)
        x = self.embed(self.patches(z).to(self.embed.weight.dtype))
        h, _, _ = through_blocks(self.blocks, self.final, x, condition, self.rotary(x.shape[1]), None, None)
        # The largest over the positions: a mean would hide a word among all the others.
        logits: Tensor = self.head(h.amax(1))
        return logits if logits.dtype is torch.float64 else logits.float()

    def patches(self, z: Tensor) -> Tensor:
        """[B, L / patch, patch D]: neighbours side by side; what the last one lacks is 0."""
        patch = self.config.patch
        return F.pad(z, (0, 0, 0, -z.shape[1] % patch)).reshape(len(z), -1, patch * z.shape[2])

    def log_probability(self, logits: Tensor, label: int) -> Tensor:
        """log p(label) [B] of logits [B, K]."""
        return F.logsigmoid(logits[:, label]) if self.config.several else logits.log_softmax(-1)[:, label]

    def log_probability_against(self, logits: Tensor, label: int) -> Tensor:
        """log p(not label) [B] of logits [B, K]."""
        if self.config.several:
            return F.logsigmoid(-logits[:, label])
        others = [i for i in range(logits.shape[1]) if i != label]
        return logits.log_softmax(-1)[:, others].logsumexp(-1)

    def remember(self, space: EmbeddingSpace) -> None:
        """Keeps what tells the space that it is trained in from others."""
        table = space.table().detach()[:SKETCH]
        self.sketch[: len(table)] = table

    def check_space(self, name: str, space: EmbeddingSpace) -> None:
        """Raises UserError in another space than the one it was trained in."""
        table = space.table().detach()[:SKETCH].float()
        own = self.sketch[: len(table)].to(table)
        if own.shape != table.shape or float(torch.cosine_similarity(own, table).min()) < 0.99:
            raise UserError(
                f"classifier {name!r} was trained in another embedding space: train it for this model with "
                "embdiff train-classifier"
            )


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Towards a label, by the gradient of log p(label | z) (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    x0 gets (sigma^2 / alpha) strength grad log p(label | z), and words feel the gradient in their logits: one pass
    forwards and backwards through the classifier, none backwards through the denoiser.

    label: one that the classifier knows. classifier: its name, as `embdiff train-classifier` stored it with the model.
    against: away from the label. strength: 1 = x0 moves as Bayes' rule has it.
    """

    name: ClassVar[str] = "classifier"

    label: str = ""
    classifier: str = "classifier"
    against: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1e4:
            raise UserError(f"strength {self.strength} is out of range: give 0 (off) to 1e4, 0.5 to 3 are usual")

    def parts(self, run: Run) -> Iterable[Part]:
        if self.strength > 0:
            yield Gradient(slope(classifier_of(run, self.classifier), self.label, self.against), self.strength)


def classifier_of(run: Run, name: str) -> NoisyClassifier:
    """The model's classifier of this name, which must be of the model's own space, in the denoiser's precision."""
    if name not in run.classifiers:
        known = f"it has {', '.join(sorted(run.classifiers))}" if run.classifiers else "it has none"
        raise UserError(f"the model has no classifier {name!r} ({known}): train one with embdiff train-classifier")
    found: NoisyClassifier = run.classifiers[name]
    found.check_space(name, run.denoiser.space)
    check_differentiable(found, f"classifier {name!r}")
    with torch.inference_mode(False):  # its gradient is to be taken, whoever calls
        ours = deepcopy(found).eval()  # the stored one keeps its precision
        return cast(NoisyClassifier, nn.Module.to(ours, run.device, run.denoiser.dtype))


def slope(classifier: NoisyClassifier, label: str, against: bool) -> Callable[[Tensor, float], Tensor]:
    """The gradient of log p(label | z), or of log p(not label | z), as a function of z [B, L, D] and gamma."""
    labels = list(classifier.config.labels)
    if label not in labels:
        shown = ", ".join(labels[:20]) + (" .." if len(labels) > 20 else "")
        raise UserError(f"the classifier has no label {label!r}: choose one of {shown}")
    score = classifier.log_probability_against if against else classifier.log_probability
    index = labels.index(label)

    def of(z: Tensor, gamma: float) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_()  # cloned, for what was made in inference mode has no gradient
            level = torch.full((len(z),), gamma, device=z.device)
            (gradient,) = torch.autograd.grad(score(classifier(z, level), index).sum(), z)
        return gradient.float()

    return of
