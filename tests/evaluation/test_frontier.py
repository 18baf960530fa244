"""The frontier: points in their order, reproducible, read off between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.evaluation.frontier import Point, cross_entropy_at, frontier, picture, point
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.samples import draw
from embdiff.schedulers import DDIMScheduler
from tests.conftest import sentences


def at(entropy: float, cross_entropy: float) -> Point:
    return Point("ddim", 8, 1.0, cross_entropy, entropy, 0.5, 10.0)


def test_points_are_those_of_their_samplers(pipe):
    judge, own, told = NGramJudge(sentences(60)), pipe.scheduler, list[Point]()
    points = frontier(
        pipe,
        judge,
        [None] * 6,
        solvers=["own", "ddim"],
        steps=[2, 3],
        temperatures=[0.5, 1.0],
        seed=1,
        batch_size=4,
        report=told.append,
        length_bias=0.5,
    )
    assert points == told
    assert [p[:3] for p in points] == [(s, n, t) for s in ("own", "ddim") for n in (2, 3) for t in (0.5, 1.0)]
    assert pipe.scheduler is own
    pipe.scheduler = DDIMScheduler.from_config(own.config)
    texts = draw(pipe, [None] * 6, seed=1, num_inference_steps=3, temperature=0.5, length_bias=0.5)
    assert point(judge, texts, "ddim", 3, 0.5) == points[6]


def test_what_is_no_solver_leaves_the_pipeline_as_it_was(pipe):
    own = pipe.scheduler
    with pytest.raises(UserError, match="'euclid'"):
        frontier(pipe, NGramJudge(sentences(9)), [None], solvers=["euclid"], steps=[2], temperatures=[1.0])
    assert pipe.scheduler is own


@given(st.lists(st.floats(0, 6), min_size=2, max_size=6, unique=True), st.floats(-2, 2), st.floats(0, 6))
def test_a_straight_curve_is_read_off_exactly(entropies, slope, wanted):
    points = [at(entropy, 1 + slope * entropy) for entropy in entropies]
    found = cross_entropy_at(points, wanted)
    if min(entropies) <= wanted <= max(entropies):
        assert found == pytest.approx(1 + slope * wanted, abs=1e-6)
    else:
        assert found is None


def test_the_picture_is_drawn_or_refused_in_one_line(tmp_path):
    points = [at(4.0, 2.0), at(4.5, 2.5)]
    picture(points, at(4.5, 2.0), "5-gram", tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().count("</svg>") == 1
    with pytest.raises(UserError, match="cannot write the picture"):
        picture(points, at(4.5, 2.0), "5-gram", tmp_path / "frontier.nonsense")
