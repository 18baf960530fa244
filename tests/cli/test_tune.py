"""embdiff tune-steps, end to end."""

import json

import pytest
from typer.testing import CliRunner

from embdiff.cli import app
from embdiff.cli.common import check_local
from embdiff.errors import UserError
from embdiff.pipeline import load
from embdiff.tuning import POWERS, SOLVERS, TEMPERATURES
from tests.conftest import sentences


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(sentences(200)) + "\n")
    return tmp_path


def test_what_is_on_no_folder_here_has_nothing_stored_with_it(tmp_path):
    with pytest.raises(UserError, match="no model's folder on this machine"):
        check_local(tmp_path)


def test_the_best_scheduler_is_saved_with_the_model_and_used(folder):
    model = folder / "model"
    options = ["--data", str(folder / "texts.txt"), "--samples", "6", "--steps", "3", "--steps", "5"]
    result = CliRunner().invoke(app, ["tune-steps", str(model), *options])
    assert result.exit_code == 0, result.output
    tried, best = (
        [line for line in part.splitlines() if line.split()[:1] in (["3"], ["5"])]
        for part in result.output.split("best:")
    )
    assert len(tried) == 2 * (len(SOLVERS) * len(TEMPERATURES) + len(POWERS))
    assert len(best) == 2
    assert set(best) <= set(tried)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert {n: len(levels) for n, levels in config["levels"].items()} == {"3": 3, "5": 5}
    assert json.loads((model / "model_index.json").read_text())["scheduler"][1] == config["_class_name"]
    pipe = load(str(model))
    assert pipe.config.temperature in TEMPERATURES
    assert f"{pipe.config.temperature:g}" in best[0]
    assert type(pipe.scheduler).__name__ == config["_class_name"]
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=5)
    assert pipe.scheduler.gammas.tolist() == pytest.approx(config["levels"]["5"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ([], "name texts with --data"),
        (["--steps", "0"], "--steps 0"),
        (["--samples", "0"], "--samples 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--data", "TINY"], "too few to judge by"),
    ],
)
def test_bad_options_are_refused(folder, options, cause):
    (folder / "tiny.txt").write_text("the cat .\na dog .\n")
    options = [str(folder / "tiny.txt") if option == "TINY" else option for option in options]
    before = (folder / "model" / "scheduler" / "scheduler_config.json").read_text()
    with pytest.raises(UserError, match=cause):
        CliRunner().invoke(app, ["tune-steps", str(folder / "model"), *options], catch_exceptions=False)
    assert (folder / "model" / "scheduler" / "scheduler_config.json").read_text() == before
