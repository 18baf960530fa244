"""The guidance protocol.

Guidance is apart from solvers: a module changes what the denoiser predicts, never how a step is taken. A module is a
frozen dataclass of options. Before the first step it is told of the run and gives its parts, of which there are six
kinds:

    Branch       another prediction, under another prompt or by another denoiser, that is combined with the main one
    Tilt         a change of the logits of words, in closed form
    Ban          tokens that no position's posterior is to have
    Constraint   what every text must be, see `embdiff.guidance.language`: exact in the end, and guiding on the way
    Veto         what no text may have, found in whole texts
    Gradient     of a log-probability in z, added to x0 and, to first order, to the logits of the last rounding

Modules are given to the pipeline as a list. All branches run in one batch. Outside its interval of gamma a part costs
nothing; at the end of the run constraints and vetoes hold all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from embdiff import vocabulary
from embdiff.batches import Prompts
from embdiff.errors import UserError
from embdiff.guidance.language import Language

if TYPE_CHECKING:
    from embdiff.denoiser import Context, Denoiser


@dataclass(frozen=True)
class Run:
    """What modules may know before the first step.

    samples: B, prompt after prompt, `repeat` of each. length: L positions. prompts, negative_prompts: B / repeat
    strings, or None without. context: [B] of the prompts. classifiers: stored with the model, by name.
    """

    denoiser: Denoiser
    tokenizer: Any
    samples: int
    length: int
    repeat: int = 1
    prompts: Sequence[str] | None = None
    negative_prompts: Sequence[str] | None = None
    context: Context | None = None
    classifiers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """Where the loop runs."""
        return cast(torch.device, self.denoiser.device)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.denoiser.config.vocab_size)

    @cached_property
    def pieces(self) -> list[str | None]:
        """What each token adds to a text, see `vocabulary.pieces`."""
        return vocabulary.pieces(self.tokenizer)

    def encode(self, prompts: Sequence[str], denoiser: Denoiser | None = None) -> Context:
        """The context [B] of B / repeat prompts, by default of the run's denoiser."""
        denoiser = denoiser or self.denoiser
        if not (limit := int(denoiser.config.max_prompt_length)):
            raise UserError("this model was trained without prompts: leave the prompt out, or train on pairs")
        encoded = Prompts.tokenized(self.tokenizer, prompts, limit).to(self.device)
        return denoiser.encode_context(encoded.ids, encoded.present, encoded.positions).repeat(self.repeat)


Combine = Callable[[Tensor, Tensor], Tensor]


class Branch(NamedTuple):
    """A prediction beside the main one. `combine(main, other)` gives the guided value: of features, which logits are
    linear in, if space is "logits"; of the posterior's means and probabilities if it is "x0".

    context: what it looks at, None = nothing. denoiser: one of the same space, only for "x0"; None = the run's own.
    self_conditioned: whether it is given the last x0. means: combines mean embeddings [.., D], in place of `combine`.
    scale: where all of it is other + scale (main - other), which fused kernels can do; None = it is something else.
    every: steps from one prediction to the next, for the run's own denoiser; between, main - other, as features, stays
        what it was.
    """

    combine: Combine
    space: str
    context: Context | None = None
    denoiser: Denoiser | None = None
    self_conditioned: bool = True
    means: Combine | None = None
    scale: float | None = None
    every: int = 1

    @property
    def linear(self) -> bool:
        """Whether means are combined as features are, and not as the means say."""
        return self.means is None or self.scale is not None

    def due(self, before: int | None, turn: int) -> bool:
        """Whether this turn asks for a new prediction. before: the turn of the one that is held, if any."""
        return before is None or turn - before >= self.every

    def held(self, first: bool) -> bool:
        """Whether main - other is to be held. At first there is no x0, so what is not given it differs by nothing."""
        return self.every > 1 and (self.self_conditioned or not first)


class Words(NamedTuple):
    """What a tilt may look at.

    logits: [R, V] of R positions in a row, tempered, -inf for the end of text and padding.
    rows: [R] int64, which of the B L positions these are, b L + l; not all, where padding is left out.
    draft: [B, L] tokens of the last x0; None at the first step, and for tilts that don't look around.
    """

    logits: Tensor
    rows: Tensor
    draft: Tensor | None


class Tilt(NamedTuple):
    """`apply(words)` gives new logits [R, V]. looks_around: whether it needs the draft."""

    apply: Callable[[Words], Tensor]
    looks_around: bool = False


class Ban(NamedTuple):
    """No position's posterior has one of these tokens (ids). Bans come before tilts, which then choose among the words
    that are left; where tilts leave none, none of them acts. What must hold in the end whatever the last latents are
    needs a `Veto` too."""

    tokens: Sequence[int]


class Constraint(NamedTuple):
    """The texts must be in the language; `cause` says what was asked for. strength: 1 = in every step what is certain
    is taken as certain; towards 0, constraints guide less on the way and still hold at the end. gradient: how much the
    rest of a text follows: times the gradient, through the denoiser, of log p(all constraints | z)."""

    language: Language
    cause: str
    strength: float = 1.0
    gradient: float = 0.0


class Veto(NamedTuple):
    """`find(tokens [B, L])` marks positions [B, L] bool whose tokens must be others; `cause` says why.

    What is marked in the last x0 is not proposed there in this step, and texts are rounded until nothing is marked.
    members: marks [B, L] all tokens of which one must be another; by default those that `find` marks. A constraint may
    need the one that `find` marks. drafts: whether steps look for it; they needn't where bans keep all of it out of x0.
    """

    find: Callable[[Tensor], Tensor]
    cause: str
    members: Callable[[Tensor], Tensor] | None = None
    drafts: bool = True


class Gradient(NamedTuple):
    """`of(z, gamma)` is the gradient [B, L, D] of log p(y | z) at noise level gamma; strength multiplies it. It moves
    x0 and the posterior of words."""

    of: Callable[[Tensor, float], Tensor]
    strength: float


Part = Branch | Tilt | Ban | Constraint | Veto | Gradient


def check_demand(name: str, strength: float, gradient: float) -> None:
    """Refuses options of constraints that are out of range."""
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength} of {name} is out of range: give 0 to 1")
    if not 0 <= gradient <= 100:
        raise UserError(
            f"gradient {gradient} of {name} is out of range: give 0 (off) to 100, 1 is as Bayes' rule has it"
        )
    if gradient and not strength:
        raise UserError(
            f"gradient {gradient} of {name} at strength 0 does nothing: raise it, or leave the gradient out"
        )


def check_differentiable(module: nn.Module, called: str) -> None:
    """Refuses a module that has no gradients."""
    if any(weight.is_inference() for weight in module.parameters()):
        raise UserError(f"{called} was loaded in torch.inference_mode, so it has no gradients: load it outside")


@dataclass(frozen=True)
class Guidance:
    """Abstract. min_gamma, max_gamma: the interval of noise levels in which the module acts.

    A subclass adds its options as fields, refuses bad ones in `__post_init__` (calling this one's), and gives `parts`.
    """

    name: ClassVar[str]  # what the command line calls it

    min_gamma: float = field(default=-math.inf, kw_only=True)
    max_gamma: float = field(default=math.inf, kw_only=True)

    def __post_init__(self) -> None:
        if not self.min_gamma <= self.max_gamma:
            raise UserError(f"min_gamma {self.min_gamma} must not be above max_gamma {self.max_gamma}")

    def active(self, gamma: float) -> bool:
        """Whether the module acts at this noise level."""
        return self.min_gamma <= gamma <= self.max_gamma

    def for_samples(self, first: int, last: int, total: int) -> Guidance:
        """The module for the samples from `first` to before `last` of `total`, where it has options for each of them.

        Raises UserError where these are not as many.
        """
        return self

    def parts(self, run: Run) -> Iterable[Part]:
        """What the module does in this run; nothing if it is switched off. Raises UserError for what can't be done."""
        raise NotImplementedError
