"""Guidance: the protocol in `base`, one file for each kind of control, and their names on the command line."""

from embdiff.guidance.base import Guidance
from embdiff.guidance.classifier import ClassifierGuidance
from embdiff.guidance.classifier_free import Autoguidance, ClassifierFreeGuidance
from embdiff.guidance.length import Length
from embdiff.guidance.lexical import Lexical
from embdiff.guidance.registry import parse
from embdiff.guidance.sampling import MinP, NoRepeatNgram, Processors, RepetitionPenalty, TopK, TopP
from embdiff.guidance.toxicity import Toxicity

__all__ = [
    "Autoguidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Guidance",
    "Length",
    "Lexical",
    "MinP",
    "NoRepeatNgram",
    "Processors",
    "RepetitionPenalty",
    "TopK",
    "TopP",
    "Toxicity",
    "parse",
]
