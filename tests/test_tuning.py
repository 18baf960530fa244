"""Solver and levels fitted to a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff import tuning
from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.tuning import POWERS, SOLVERS, TEMPERATURES, Examiner, Trial, tune
from tests.conftest import sentences

charges = st.floats(0.0, 5.0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True), st.randoms(use_true_random=False))
def test_the_best_of_all_that_was_tried_is_chosen(steps, random):
    tried = []

    def examiner(n, solver, options, temperature, power=1.0):
        return Trial(n, solver, options, temperature, power, random.uniform(1, 3), random.uniform(1, 3))

    def kind(trial):
        return trial.solver, str(trial.options), trial.temperature

    best = tune(examiner, steps, tried.append)
    assert len(tried) == len(steps) * (len(SOLVERS) * len(TEMPERATURES) + len(POWERS))
    sums = {}
    for trial in tried:
        if trial.power == 1.0:
            sums[kind(trial)] = sums.get(kind(trial), 0.0) + trial.charge
    assert {kind(trial) for trial in best.values()} == {min(sums, key=sums.get)}
    for n, trial in best.items():
        same = [t for t in tried if t.steps == n and kind(t) == kind(trial)]
        assert trial.charge == min(t.charge for t in same)


def examples(count, seed):
    return [Example(text) for text in sentences(count, seed)]


def test_texts_are_charged_for_what_nobody_writes_and_for_what_they_lack(pipe):
    """Real texts are charged least; the same text again and again is fluent but covers little; noise is neither."""
    examiner = Examiner(pipe, examples(400, 1), examples(100, 2), samples=60)
    real, noise = sentences(60, 3), [" ".join(reversed(text.split())) for text in sentences(60, 3)]
    charges = {}
    for name, texts in {"real": real, "one": real[:1] * 60, "noise": noise}.items():
        examiner.draw = lambda scheduler, steps, temperature, texts=texts: texts
        charges[name] = examiner(4, "ddim", {}, 1.0)
    assert charges["real"].charge < min(charges["one"].charge, charges["noise"].charge)
    assert charges["one"].coverage > charges["real"].coverage
    assert charges["noise"].fluency > charges["real"].fluency


def test_texts_are_judged_as_the_model_could_have_written_them(pipe):
    odd = [Example(f"zebra {text}") for text in sentences(100, 1)]
    examiner = Examiner(pipe, odd, odd[:20], samples=1)
    assert "zebra" not in examiner.judge.vocabulary
    assert all(text.startswith("<unk> ") for text in examiner.real)


def test_levels_of_another_solver_are_dropped(pipe):
    first = Examiner(pipe, examples(100, 1), examples(20, 2), samples=1).scheduler("unipc", {}, {8: 1.5})
    pipe.scheduler = first
    examiner = Examiner(pipe, examples(100, 1), examples(20, 2), samples=1)
    assert {*examiner.scheduler("unipc", {}, {4: 0.7}).config.levels} == {"4", "8"}
    assert {*examiner.scheduler("ddim", {}, {4: 0.7}).config.levels} == {"4"}


def test_a_trial_draws_the_same_texts_again_and_leaves_the_pipeline_as_it_was(pipe):
    before = pipe.scheduler
    examiner = Examiner(pipe, examples(100, 1), examples(20, 2), samples=tuning.BATCH + 2, seed=5)
    one, again = (examiner(2, "renoise", {"fresh": 0.5}, 0.9, 0.7) for _ in range(2))
    assert one == again
    assert pipe.scheduler is before
    assert len(examiner.draw(before, 2, 0.9)) == tuning.BATCH + 2


@given(st.sampled_from(SOLVERS), st.integers(1, 30), st.sampled_from((1.0, *POWERS)))
def test_the_scheduler_samples_at_the_levels_that_were_found(candidate, steps, power):
    pipe = test_the_scheduler_samples_at_the_levels_that_were_found.pipe
    solver, options = candidate
    examiner = Examiner(pipe, examples(20, 1), examples(8, 2), samples=1)
    scheduler = examiner.scheduler(solver, options, {steps: power})
    scheduler.set_timesteps(steps)
    expected = pipe.scheduler.noise_schedule.gamma((1 - np.arange(steps) / steps) ** power)
    assert scheduler.gammas.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert {name: scheduler.config[name] for name in options} == options


@pytest.fixture(autouse=True)
def _pipe_for_hypothesis(pipe):
    test_the_scheduler_samples_at_the_levels_that_were_found.pipe = pipe


def test_without_texts_there_is_nothing_to_judge_by(pipe):
    with pytest.raises(UserError, match="too few to judge by"):
        Examiner(pipe, [], examples(3, 0))
