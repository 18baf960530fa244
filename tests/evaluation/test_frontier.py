"""The frontier: points in their order, reproducible, read off between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff.cli.common import set_scheduler
from embdiff.errors import UserError
from embdiff.evaluation.frontier import Point, at_entropy, frontier, picture, point
from embdiff.evaluation.judges import NGramJudge
from embdiff.evaluation.samples import draw
from embdiff.schedulers import ChurnScheduler, DDIMScheduler, DPMSolver3SDEScheduler, with_solver
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
    ordered = sorted(entropies)
    points = [at(entropy, 1 + slope * entropy)._replace(temperature=i + 1) for i, entropy in enumerate(ordered)]
    found = at_entropy(points, wanted)
    if min(entropies) <= wanted <= max(entropies):
        assert found.cross_entropy == pytest.approx(1 + slope * wanted, abs=1e-6)
        assert found.entropy == pytest.approx(wanted, abs=1e-6)
        assert found[:2] == points[0][:2]
    else:
        assert found is None


def test_a_curve_that_turns_is_read_where_it_is_lowest():
    """Neighbours are neighbours in temperature, not in entropy."""
    curve = [(0.5, 4.3, 1.7), (0.65, 4.5, 1.9), (0.8, 4.55, 2.0), (1.0, 4.5, 2.6)]
    points = [at(entropy, value)._replace(temperature=t) for t, entropy, value in curve]
    for shuffled in (points, points[::-1]):
        assert at_entropy(shuffled, 4.52).cross_entropy == pytest.approx(1.94)


def test_a_named_solver_has_its_defaults_and_not_what_was_tuned_for_another(pipe):
    tuned = DPMSolver3SDEScheduler.from_config(pipe.scheduler.config, levels={"2": [3.0, 1.0]}, eta=0.5)
    for name in ("dpm++3m-sde", "dpm++sde"):
        other = with_solver(tuned, name)
        assert other.config.levels is None
        assert other.config.eta == 1.0
        assert other.noise_schedule == tuned.noise_schedule
    pipe.scheduler = tuned
    set_scheduler(pipe, "dpm++3m-sde")  # as `embdiff sample` has it
    assert pipe.scheduler is tuned
    set_scheduler(pipe, "churn")
    assert pipe.scheduler.config.churn == ChurnScheduler().config.churn


def test_the_picture_is_drawn_or_refused_in_one_line(tmp_path):
    points = [at(4.0, 2.0), at(4.5, 2.5)]
    picture(points, at(4.5, 2.0), "5-gram", tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().count("</svg>") == 1
    with pytest.raises(UserError, match="cannot write the picture"):
        picture(points, at(4.5, 2.0), "5-gram", tmp_path / "frontier.nonsense")
