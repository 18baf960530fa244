"""embdiff train: what it says in the terminal, and what it keeps of a run."""

import io
import sys

import pytest
import yaml
from typer.testing import CliRunner

from embdiff import baselines
from embdiff.baselines import BASELINES
from embdiff.cli import app, main
from embdiff.cli.train import Display
from tests.conftest import sentences

METRICS = {"step": 10, "loss": 3.0, "tokens_per_second": 1000.0, "share": 0.5, "seconds_left": 60.0}


def screen(display: Display, terminal: bool) -> io.StringIO:
    """What the display writes, on a terminal or into a file."""
    display.console.file = io.StringIO()
    display.console._force_terminal = terminal
    return display.console.file


def test_a_run_reports_its_size_speed_bound_and_what_to_do_next(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(sentences(60)))
    options = "--size tiny --tokenizer word --min-count 1 --max-length 12 --batch-size 8 --max-steps 10 --no-compile"
    result = CliRunner().invoke(
        app,
        ["train", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "run"), *options.split(), "--dtype", "fp32"],
    )
    assert result.exit_code == 0, result.output
    for part in (
        "M parameters",
        "step 10  loss",
        "tokens/s",
        "step 10  validation bound",
        "model written to",
        "sample",
    ):
        assert part in result.stderr
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["max_steps"] == 10


@pytest.mark.parametrize("objective", list(BASELINES))
def test_a_baseline_is_trained_resumed_and_loaded(tmp_path, capsys, monkeypatch, objective):
    pairs, out = tmp_path / "pairs.txt", tmp_path / "run"
    pairs.write_text("\n".join(f"{' '.join(s.split()[:2])}||{s}" for s in sentences(60)))
    options = "--separator || --size tiny --tokenizer word --min-count 1 --max-length 12 --batch-size 8 --no-compile"
    start = [str(pairs), *options.split(), "--objective", objective, "--dtype", "fp32", "--max-steps", "4"]
    for arguments, steps in ((start, 4), (["--resume", "--max-steps", "6"], 6)):
        result = CliRunner().invoke(app, ["train", *arguments, "--output", str(out)])
        assert result.exit_code == 0, result.output
        for part in (f"step {steps}  validation bound", " -> ", f"model written to {out}", "a baseline; load it"):
            assert part in result.stderr
    assert "resuming at step 4" in result.stderr
    model, tokenizer = baselines.load(out)
    assert len(tokenizer) == model.config.vocab_size
    monkeypatch.setattr(sys, "argv", ["embdiff", "sample", str(out)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert f"embdiff: the {objective} model in {out} is a baseline" in capsys.readouterr().err


def test_without_a_terminal_progress_is_a_line_now_and_then():
    with Display(every=1000.0) as display:
        out = screen(display, terminal=False)
        for share in (0.1, 0.5, 1.0):
            display.progress(METRICS | {"share": share})
    assert out.getvalue().count("step 10  loss 3.000  1,000 tokens/s  1m00s left") == 2


def test_a_closed_stderr_does_not_end_the_run(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Display(every=0.0) as display:
        display.console.file = Closed()
        for _ in range(2):
            display.progress(METRICS)
    assert display.console.quiet


def test_the_bar_waits_for_the_first_progress():
    """Until then the data may draw a bar of their own."""
    with Display() as display:
        out = screen(display, terminal=True)
        display.note("reading")
        assert "training" not in out.getvalue()
        display.progress(METRICS)
    assert "training" in out.getvalue()
    assert "step 10  loss" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_only_the_first_process_speaks(monkeypatch, terminal):
    monkeypatch.setenv("RANK", "1")
    with Display() as display:
        out = screen(display, terminal)
        display.note("reading")
        display.progress(METRICS)
        display.validation({"step": 10, "bound": 1.0}, [(None, "the cat")])
    assert out.getvalue() == ""
