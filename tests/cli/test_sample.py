"""embdiff sample: what it goes on with, what it refuses, and what it says about the samples."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from embdiff import ops, vocabulary
from embdiff.cli import app, common, main
from embdiff.errors import UserError
from embdiff.pipeline import TextDiffusionPipeline
from tests.conftest import lively


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def sample(*arguments):
    common = ["--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    return CliRunner().invoke(app, ["sample", *common, *map(str, arguments)], catch_exceptions=False)


def records(*arguments):
    return [json.loads(line) for line in sample(*arguments, "--json").stdout.split("\n")[:-1]]


@pytest.fixture
def interrupted(model, tmp_path, monkeypatch):
    """Stops a run after its fourth sample, in the middle of a line: the arguments for it, and its output."""
    call, batches = TextDiffusionPipeline.__call__, []

    def begin(suffix):
        output = tmp_path / f"samples{suffix}"
        arguments = [model, "--prompt", "the cat", "-n", "7", "--batch-size", "2", "--output", output]

        def stopping(*arguments, **options):
            batches.append(1)
            if len(batches) == 3:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(TextDiffusionPipeline, "__call__", stopping)
            assert sample(*arguments).exit_code != 0
        with output.open("a") as file:
            file.write("half a li")
        return arguments, output

    return begin


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_an_interrupted_output_is_finished_to_the_same_file(interrupted, tmp_path, suffix):
    arguments, output = interrupted(suffix)
    assert len(output.read_text().splitlines()) == 5
    assert sample(*arguments, "--resume").exit_code == 0
    whole = tmp_path / f"whole{suffix}"
    assert sample(*arguments[:-1], whole).exit_code == 0
    assert output.read_text() == whole.read_text()
    assert sample(*arguments, "--resume").exit_code == 0  # complete: nothing to do
    assert output.read_text() == whole.read_text()
    assert sample(*arguments, "-n", "9", "--resume").exit_code == 0  # and more of the same
    assert output.read_text().startswith(whole.read_text())
    assert len(output.read_text().splitlines()) == 9


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", "5"],
        ["--json"],
        ["--max-length", "5"],
        ["--prompt", "a dog"],
        ["--scheduler", "ddim"],
        ["--cfg-scale", "2"],
    ],
)
def test_an_output_is_not_finished_with_other_options(interrupted, change):
    arguments, output = interrupted(".txt")
    before = output.read_bytes()
    with pytest.raises(UserError, match="not begun with this model"):
        sample(*arguments, *change, "--resume")
    assert output.read_bytes() == before


def test_an_output_is_not_finished_with_another_model(interrupted, pipe, model):
    arguments, output = interrupted(".jsonl")
    before = output.read_bytes()
    lively(pipe.denoiser, seed=9)
    pipe.save_pretrained(model)
    with pytest.raises(UserError, match="not begun with this model"):
        sample(*arguments, "--resume")
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", ["precious\nno newline at the end", "precious\n", "no newline"])
def test_a_foreign_file_is_not_gone_on_with(model, tmp_path, content):
    foreign = tmp_path / "notes.txt"
    foreign.write_text(content)
    with pytest.raises(UserError, match="not begun with this model"):
        sample(model, "--output", foreign, "--resume", "-n", "2")
    assert foreign.read_text() == content


def test_a_file_with_more_samples_than_asked_for_is_refused(model, tmp_path):
    sample(model, "--output", tmp_path / "three.txt", "-n", "3")
    with pytest.raises(UserError, match="holds 3 samples, more than the 2"):
        sample(model, "--output", tmp_path / "three.txt", "-n", "2", "--resume")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--resume", "--overwrite", "--output", "x.txt"], "both --resume and --overwrite"),
        (["--resume"], "--resume is for a file"),
        (["--overwrite"], "--overwrite is for a file"),
        (["--output", "."], "is a folder: name a file"),
        (["--output", "no/where/samples.txt"], "there is no folder"),
        (["--prompt", "a\udcff"], "--prompt 'a.udcff' is not UTF-8"),
        (["--negative-prompt", "a\udcff", "--cfg-scale", "2"], "--negative-prompt"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--dtype", "fp77"], "dtype 'fp77' is unknown"),
        (["--shortlist", "0"], "shortlist 0"),
    ],
)
def test_bad_options_are_refused(model, options, cause):
    with pytest.raises(UserError, match=cause) as caught:
        sample(model, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--device", "meta"], "device 'meta' can't be used here"),
        (["--dtype", "fp16"], "dtype 'fp16' is not supported: going on in"),
        (["--device", "meta", "--dtype", "int8"], "device 'meta' can't be used here"),
    ],
)
def test_what_this_machine_lacks_is_done_without_and_noted(model, options, note):
    result = sample(model, "-n", "2", *options)
    (line,) = result.stderr.splitlines()
    assert line.startswith(note)
    assert len(result.stdout.splitlines()) == 2


def test_the_best_of_what_is_there_takes_the_place_of_what_is_not(monkeypatch, capsys):
    zeros = torch.zeros

    def one_gpu(*size, device):
        if device.index:
            raise RuntimeError("invalid device ordinal")
        return zeros(*size)

    def broken_gpu(*size, device):
        if device.type == "cuda":
            raise RuntimeError
        return zeros(*size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", one_gpu)
    assert common.device("cuda:1") == torch.device("cuda")
    assert "going on on cuda" in capsys.readouterr().err
    monkeypatch.setattr(torch, "zeros", broken_gpu)
    assert common.device("auto") == torch.device("cpu")
    assert "a seed gives another text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "taken"), [("fp64", torch.float32), ("half", torch.bfloat16), ("bf16", torch.bfloat16)]
)
def test_precisions_give_way_to_no_coarser_one_than_need_be(monkeypatch, name, taken):
    monkeypatch.setattr(ops, "fast_dtype", lambda device_type: torch.bfloat16)
    assert common.dtype(name, torch.device("cpu")) is taken


def test_8_bits_are_for_a_cpu(model, monkeypatch, capsys):
    assert common.dtype("int8", torch.device("cpu")) is ops.fast_dtype("cpu")
    assert not capsys.readouterr().err
    monkeypatch.setattr(ops, "fast_dtype", lambda device_type: torch.bfloat16)
    assert common.dtype("int8", torch.device("cuda")) is torch.bfloat16
    assert "int8 is for a CPU: going on in bfloat16" in capsys.readouterr().err
    assert common.load_pipeline(str(model), dtype_name="int8").int8
    result = sample(model, "-n", "2", "--steps", "2", "--device", "cpu", "--dtype", "int8")
    assert len(result.stdout.splitlines()) == 2


def test_options_without_effect_are_noted_and_not_recorded(model):
    for options, note in [
        (["--negative-prompt", "a dog"], "--negative-prompt has no effect"),
        (["--cfg-scale", "2"], "--cfg-scale 2 has no effect"),
        (["--guidance", "cfg"], "--guidance cfg has no effect"),
    ]:
        (line,) = sample(model, *options).stderr.splitlines()
        assert line.startswith(note)
        assert records(model, *options)[0]["cfg_scale"] == 1
    for options in (["--prompt", "a dog"], ["--negative-prompt", "a dog"]):
        assert not sample(model, *options, "--cfg-scale", "2").stderr
        assert records(model, *options, "--cfg-scale", "2")[0]["cfg_scale"] == 2
        assert not sample(model, *options, "--guidance", "cfg:scale=1.7").stderr
        assert records(model, *options, "--guidance", "cfg:scale=1.7")[0]["cfg_scale"] == 1.7
        both = records(model, *options, "--cfg-scale", "2", "--guidance", "cfg:scale=1.5")[0]
        one = records(model, *options, "--cfg-scale", "2.5")[0]
        assert (both["cfg_scale"], both["text"]) == (2.5, one["text"])
    assert records(model, "--guidance", "cfg:scale=2")[0]["cfg_scale"] == 1


def test_tokens_are_those_of_the_text(model, tokenizer):
    for record in records(model, "-n", "20"):
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(record["tokens"])
        assert vocabulary.decode(tokenizer, record["tokens"]) == record["text"]


def test_prompts_are_read_as_data_is(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    content = "\ufeffthe cat\r\n\na\u2028dog\x0cand\n".encode()
    prompts.write_bytes(content)
    assert [r["prompt"] for r in records(model, "--prompts", prompts)] == ["the cat", "a\u2028dog\x0cand"]
    result = CliRunner().invoke(app, ["sample", model, "--prompts", "-", "--steps", "1", "--json"], input=content)
    assert [json.loads(line)["prompt"] for line in result.stdout.split("\n")[:-1]] == ["the cat", "a\u2028dog\x0cand"]
    prompts.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(UserError, match=r"prompts\.txt:2: byte 7 is not UTF-8"):
        sample(model, "--prompts", prompts)


def test_guidance_by_name_reaches_every_sample(model):
    drawn = records(
        model, "-n", 5, "--batch-size", 2, "--guidance", "length:words=4", "--guidance", "lexical:exclude=the"
    )
    assert [len(record["text"].split()) for record in drawn] == [4] * 5
    assert all(record["text"].endswith(".") and "the" not in record["text"].split() for record in drawn)


def test_each_sample_has_its_own_length_whatever_its_batch(model, tmp_path):
    lengths = [3, 1, 5, 2, 4]
    spec = "length:complete=no,words=" + "|".join(map(str, lengths))
    arguments = [model, "-n", 5, "--batch-size", 2, "--guidance", spec]
    assert [len(record["text"].split()) for record in records(*arguments)] == lengths
    output = tmp_path / "samples.jsonl"
    sample(*arguments, "--output", output)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:3]))
    sample(*arguments, "--output", output, "--resume")
    assert output.read_text() == whole
    with pytest.raises(UserError, match="5 lengths in words for 6 samples"):
        sample(*arguments, "-n", 6)
    # What one of them can't have is found before the first is drawn, and named by its place among all.
    with pytest.raises(UserError, match=r"sample 4"):
        sample(model, "-n", 5, "--batch-size", 2, "--guidance", f"{spec}9", "--output", output, "--overwrite")
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("rhyme", "unknown"),
        ("length:words=99", "no text of at most 12 tokens"),
        ("length", "words=12"),
        ("lexical:include=caf\udce9", "not UTF-8"),
    ],
)
def test_guidance_that_cannot_be_is_refused(model, spec, cause):
    with pytest.raises(UserError, match=cause):
        sample(model, "--guidance", spec)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 TB")]
)
def test_out_of_memory_is_told_in_one_line_and_keeps_what_was_drawn(model, tmp_path, monkeypatch, capsys, error):
    call, output, batches = TextDiffusionPipeline.__call__, tmp_path / "samples.txt", []

    def short_of_memory(*arguments, **options):
        batches.append(1)
        if len(batches) == 3:
            raise error
        return call(*arguments, **options)

    monkeypatch.setattr(TextDiffusionPipeline, "__call__", short_of_memory)
    arguments = ["sample", model, "-n", "7", "--batch-size", "2", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["embdiff", *arguments, "--output", str(output)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embdiff: ")]
    assert len(told) == 1
    assert "out of memory: lower --batch-size" in told[0]
    assert len(output.read_text().splitlines()) == 4
    monkeypatch.setattr(TextDiffusionPipeline, "__call__", call)
    sample(model, "-n", "7", "--batch-size", "2", "--output", output, "--resume")
    assert len(output.read_text().splitlines()) == 7
