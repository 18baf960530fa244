"""The scorer: it learns what words tell, and nothing else."""

import numpy as np
import pytest

from embdiff.errors import UserError
from embdiff.evaluation.scorer import Scorer
from tests.conftest import sentences


def test_it_learns_from_texts_it_has_seen_about_texts_it_has_not():
    texts = sentences(900)
    labels = ["cat" if "cat" in text.split() else "none" for text in texts]
    scorer = Scorer(texts[:700], labels[:700])
    p = scorer(texts[700:], "cat")
    right = (p > 0.5) == np.array([label == "cat" for label in labels[700:]])
    assert right.mean() > 0.95
    assert np.allclose(p + scorer(texts[700:], "none"), 1.0)
    assert np.array_equal(p, Scorer(texts[:700], labels[:700])(texts[700:], "cat"))


def test_an_empty_text_has_a_score_too():
    assert 0 <= Scorer(["a", "b"], ["x", "y"])([""], "x")[0] <= 1


def test_labels_to_tell_apart_are_needed():
    with pytest.raises(UserError, match="two or more"):
        Scorer(["a", "b"], ["x", "x"])
    with pytest.raises(UserError, match="no label 'z'"):
        Scorer(["a", "b"], ["x", "y"])(["a"], "z")


def test_rare_labels_count_like_frequent_ones():
    """Texts that say nothing of their label are neither: the data's shares are not those of what is scored."""
    texts, labels = ["the same"] * 500, ["often"] * 450 + ["rare"] * 50
    assert abs(Scorer(texts, labels)(["the same"], "rare")[0] - 0.5) < 0.2
