"""The command line, end to end on small real text, and its manners on bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from typer.testing import CliRunner

from embdiff import ops
from embdiff.cli import app, common, main
from embdiff.cli.common import SOLVERS
from embdiff.errors import UserError
from embdiff.schedulers import SCHEDULERS
from tests.conftest import sentences

SMALL = [
    "--size",
    "tiny",
    "--tokenizer",
    "word",
    "--min-count",
    "1",
    "--max-length",
    "12",
    "--batch-size",
    "8",
    "--no-compile",
    "--dtype",
    "fp32",
]


def run(*arguments: str, **options):
    """One command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from embdiff.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def refused(capsys, monkeypatch, *arguments: str) -> str:
    """The one line that bad input gets."""
    monkeypatch.setattr(sys, "argv", ["embdiff", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("embdiff: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.txt"
    path.write_text("\n".join(f"{' '.join(s.split()[:2])}||{s}" for s in sentences(120)))
    return path


@pytest.fixture(scope="module")
def model(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "model"
    result = CliRunner().invoke(
        app, ["train", str(pairs), "--output", str(out), "--separator", "||", "--max-steps", "30", *SMALL]
    )
    assert result.exit_code == 0, result.output
    return out


def sample(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["sample", *arguments, "--steps", "4", "--device", "cpu", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_training_reports_and_leaves_a_model(model):
    assert (model / "model_index.json").exists()
    assert (model / "run.yaml").exists()


def test_json_has_one_object_a_line_with_all_that_repeats_it(model):
    records = [
        json.loads(line)
        for line in sample(str(model), "--prompt", "the cat", "--num-samples", "3", "--json", "--seed", "7")
    ]
    assert [r["seed"] for r in records] == [7, 8, 9]
    assert {"prompt", "text", "tokens", "seed", "steps", "scheduler"} <= set(records[0])
    assert records[0]["steps"] == 4
    again = json.loads(sample(str(model), "--prompt", "the cat", "--json", "--seed", "8")[0])
    assert again == records[1]


def test_batch_size_changes_nothing(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n\na dog\nthe tree\nthe house\n")
    results = [
        sample(str(model), "--prompts", str(prompts), "--num-samples", "2", "--cfg-scale", "2", "--batch-size", b)
        for b in ("1", "3", "32")
    ]
    assert len(results[0]) == 8
    assert results[0] == results[1] == results[2]


def test_prompts_come_from_stdin_too(model):
    result = CliRunner().invoke(app, ["sample", str(model), "--prompts", "-", "--steps", "2"], input="the cat\na dog\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2


def test_the_help_names_every_scheduler():
    assert set(re.split(r", | or ", SOLVERS)) == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", ["unipc", "churn"])
def test_schedulers_and_noise_schedules_are_chosen_by_name(model, scheduler):
    common = (str(model), "--prompt", "the cat", "--scheduler", scheduler)
    assert len(sample(*common)) == 1
    assert len(sample(*common, "--noise-schedule", "karras")) == 1


def test_show_steps_shows_each_step(model):
    result = CliRunner().invoke(app, ["sample", str(model), "--prompt", "the cat", "--steps", "4", "--show-steps"])
    assert result.exit_code == 0
    assert all(f"{k}/4" in result.stderr for k in (1, 2, 3, 4))


LONG = ["--separator", "||", "--max-steps", "80", "--save-every", "9", *SMALL]
WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert CliRunner().invoke(app, ["train", str(pairs), "--output", str(out), *LONG]).exit_code == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_or_killed_and_resumed_ends_with_the_same_weights(pairs, uninterrupted, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "embdiff.cli", "train", str(pairs), "--output", str(out), *LONG]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    while process.poll() is None and not list((out / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    time.sleep(random.random() * 0.15)  # any step will do, but the last
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, "the run was over before the signal came: make it longer"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert f"embdiff train --output {out} --resume" in err
    assert not (out / "model_index.json").exists()
    assert CliRunner().invoke(app, ["train", "--output", str(out), "--resume"]).exit_code == 0
    assert (out / WEIGHTS).read_bytes() == (uninterrupted / WEIGHTS).read_bytes()


def test_a_config_file_is_overridden_by_the_command_line(pairs, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "max-steps: 50\nmax-time: 10m\nsize: tiny\nseparator: '||'\ntokenizer: word\nmin-count: 1\nmax-length: 12\n"
    )
    out = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["train", str(pairs), "--output", str(out), "--config", str(config), "--max-steps", "1"]
    )
    assert result.exit_code == 0, result.output
    text = (out / "run.yaml").read_text()
    assert "max_steps: 1\n" in text
    assert "max_time: 600" in text


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--cfg-scale", "nan"], "finite"),
        (["--num-samples", "0"], "--num-samples"),
        (["--temperature", "-1"], "--temperature"),
        (["--batch-size", "0"], "--batch-size"),
        (["--scheduler", "cubic"], "cubic"),
        (["--noise-schedule", "cubic"], "cubic"),
        (["--device", "abacus"], "abacus"),
        (["--seed", "-1"], "--seed"),
        (["--dtype", "int3"], "int3"),
        (["--max-length", "500"], "500"),
        (["--prompt", "a", "--prompts", "b"], "--prompts"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--cfg-space", "eps", "--cfg-scale", "2"], "eps"),
        (["--steps", "abc"], "--steps"),
        (["--stepz", "4"], "--stepz"),
        (["--num-samples", "9" * 20], "too large"),
    ],
)
def test_bad_sample_options_get_one_line(model, capsys, monkeypatch, arguments, cause):
    assert cause in refused(capsys, monkeypatch, "sample", str(model), *arguments)


def test_usage_is_told_in_one_line_too(capsys, monkeypatch):
    assert "model" in refused(capsys, monkeypatch, "sample")
    assert "wirte" in refused(capsys, monkeypatch, "wirte")
    for arguments, code in ([], 2), (["--help"], 0), (["--version"], 0):
        monkeypatch.setattr(sys, "argv", ["embdiff", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert (leaving.value.code, "embdiff" in capsys.readouterr().out) == (code, True)


def test_a_slip_in_the_name_of_a_run_asks_no_hub(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("embdiff.pipeline.hub_access", lambda: pytest.fail("it asks the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "no model at runs/mnie" in refused(capsys, monkeypatch, "sample", "runs/mnie")


def test_a_terminal_without_some_characters_shows_others(model, tmp_path):
    (tmp_path / "p.txt").write_text("caf\u00e9\n")
    result = run(
        "sample", str(model), "--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--json",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.returncode == 0
    assert json.loads(result.stdout)["prompt"] == "caf\u00e9"


def test_an_output_may_be_a_link_to_a_file_that_is_not_there_yet(model, tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "there.txt")
    sample(str(model), "--output", str(tmp_path / "link.txt"))
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there.txt").read_text()


def test_an_existing_output_is_not_replaced_unasked(model, tmp_path, capsys, monkeypatch):
    path = tmp_path / "samples.txt"
    path.write_text("precious\n")
    assert "--overwrite" in refused(capsys, monkeypatch, "sample", str(model), "--output", str(path))
    assert path.read_text() == "precious\n"


def test_a_refused_run_does_not_cost_the_file_that_it_would_replace(model, tmp_path, capsys, monkeypatch):
    path = tmp_path / "samples.txt"
    path.write_text("precious\n")
    options = ("--output", str(path), "--overwrite", "--max-length", "500")
    assert "max_length" in refused(capsys, monkeypatch, "sample", str(model), *options)
    assert path.read_text() == "precious\n"


def test_a_negative_prompt_needs_no_prompt(model):
    assert len(sample(str(model), "--negative-prompt", "the cat", "--num-samples", "3", "--cfg-scale", "2")) == 3


def test_long_prompts_are_counted(model):
    result = CliRunner().invoke(app, ["sample", str(model), "--prompt", "the " * 50, "--steps", "1"])
    assert result.exit_code == 0
    assert "1 of 1 prompts" in result.stderr


def test_bad_data_gets_one_line(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    for data, options, cause in [
        ("missing.txt", [], "missing.txt"),
        ("empty.txt", [], "has no example"),
        ("latin.txt", [], "UTF-8"),
        ("rows.csv", ["--text-column", "body"], "body"),
        ("empty.txt", ["--max-time", "soon"], "soon"),
    ]:
        assert cause in refused(capsys, monkeypatch, "train", str(tmp_path / data), "--output", out, *options)
    assert "no data" in refused(capsys, monkeypatch, "train", "--output", out)


def test_a_quickstart_without_time_or_seed_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("embdiff.data.load_corpus", lambda *_: pytest.fail("it has read the data"))
    for options in (["--max-time", "10s"], ["--seed", "-1"], ["--seed", str(2**70)]):
        line = refused(capsys, monkeypatch, "quickstart", "--output", str(tmp_path / "run"), *options)
        assert " ".join(options) in line


def test_an_unfinished_run_is_no_model_yet(tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text("data: x\n")
    assert "not finished" in refused(capsys, monkeypatch, "sample", str(tmp_path))
    assert "no model" in refused(capsys, monkeypatch, "sample", str(tmp_path / "none"))


def test_a_real_process_exits_with_two_and_no_traceback(tmp_path):
    result = run("train", str(tmp_path / "missing.txt"), "--output", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("embdiff: ")


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("1.5m", 90)])
def test_durations(text, value):
    assert common.seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "5x", "m5", "1h30"])
def test_bad_durations_are_refused(text):
    with pytest.raises(UserError, match="time"):
        common.seconds(text)


@pytest.mark.parametrize("units", [True, False])
def test_a_precision_that_the_device_emulates_is_used_with_a_remark(monkeypatch, capsys, units):
    monkeypatch.setattr(ops, "fast_dtype", lambda device_type: torch.bfloat16 if units else torch.float32)
    assert common.dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert ("emulated" in capsys.readouterr().err) != units


def test_a_warning_is_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    common.quiet()
    assert warnings.formatwarning("slower", UserWarning, "file.py", 7) == "slower\n"
