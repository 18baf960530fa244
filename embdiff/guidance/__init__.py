"""Guidance modules, one file each."""

from embdiff.guidance.base import Guidance
from embdiff.guidance.classifier_free import ClassifierFreeGuidance

__all__ = ["ClassifierFreeGuidance", "Guidance"]
