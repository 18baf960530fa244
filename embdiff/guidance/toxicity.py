"""Toxicity: away from it, by up to three means that add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from embdiff.data import read_lines
from embdiff.errors import UserError
from embdiff.guidance.base import Guidance, Part, Run
from embdiff.guidance.classifier import ClassifierGuidance
from embdiff.guidance.classifier_free import ClassifierFreeGuidance
from embdiff.guidance.lexical import without


@dataclass(frozen=True)
class Toxicity(Guidance):
    """Away from toxic text. Whatever is given acts; with nothing given, the model's classifier does.

    classifier: a noise-aware classifier of the model with the label `label`, stored by `embdiff train-classifier`; by
        default the one called toxicity, if there is one. strength: of its gradient, 0 = off.
    lexicon: a file of words and phrases, one a line, that no text may have; they are never shown.
    negative: a prompt that toxic text would answer, for a model with prompts; scale: of its guidance.
    """

    name: ClassVar[str] = "toxicity"

    strength: float = 0.5
    classifier: str | None = None
    label: str = "toxic"
    lexicon: str | None = None
    negative: str | None = None
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ClassifierGuidance(self.label, strength=self.strength)
        ClassifierFreeGuidance(self.scale)

    def parts(self, run: Run) -> Iterable[Part]:
        others = self.lexicon is not None or self.negative is not None
        if self.classifier is not None or "toxicity" in run.classifiers:
            name = self.classifier or "toxicity"
            yield from ClassifierGuidance(self.label, name, against=True, strength=self.strength).parts(run)
        elif not others:
            raise UserError(
                "toxicity has nothing to go by: train a classifier with embdiff train-classifier --name toxicity, "
                "or give lexicon=FILE or negative=PROMPT"
            )
        if self.lexicon is not None:
            yield from without(read_lexicon(self.lexicon), run, "the lexicon")
        if self.negative is not None:
            prompts = [self.negative] * (run.samples // run.repeat)
            yield from ClassifierFreeGuidance(self.scale).parts(in_any_context(run, prompts))


def read_lexicon(path: str) -> list[str]:
    """The phrases of a file, one a line; blank lines and those that begin with # are left out."""
    phrases = [phrase for phrase in read_lines(path, "lexicon") if not phrase.startswith("#")]
    if not phrases:
        raise UserError(f"lexicon {path} has no words: give one word or phrase a line")
    return phrases


def in_any_context(run: Run, negatives: list[str]) -> Run:
    """The run under these negative prompts; without prompts, beside an empty one."""
    context = run.encode([""] * len(negatives)) if run.context is None else run.context
    return replace(run, context=context, negative_prompts=negatives)
