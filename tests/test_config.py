"""Options of a training run: ranges, kinds and files."""

import math

import pytest
import yaml

from embdiff.config import CHOICES, TrainConfig, read_config
from embdiff.denoiser import SIZES
from embdiff.errors import UserError
from embdiff.objectives import OBJECTIVES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "huge"),
        ("batch_size", 0),
        ("infill", 1.5),
        ("lr", -1.0),
        ("lr", math.nan),
        ("ema", 1.0),
        ("dropout", 1.0),
        ("max_time", 0.0),
        ("weight_decay", math.nan),
        ("weight_decay", math.inf),
        ("warmup", math.inf),
        ("seed", 2**63),
        ("dim", 0),
        ("depth", 2.5),
        ("seed", 10**400),
        ("lr", 10**400),
        ("window", 1.0),
        ("max_length", 2**62),
        ("batch_size", 2**62),
        ("dim", 2**62),
        ("vocab_size", 10**12),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        TrainConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("max_length", "many"),
        ("max_steps", 2.5),
        ("compile", "si"),
        ("data", ["a", "b"]),
        ("tokenizer", None),
    ],
)
def test_options_of_the_wrong_kind_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        TrainConfig(**{option: value})


def test_the_largest_seed_will_do():
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1


def test_options_without_effect_are_told():
    assert not TrainConfig().idle()
    assert not TrainConfig(tokenizer="word", min_count=5).idle()
    idle = TrainConfig(min_count=5, optimizer="adamw", matrix_lr=1.0, validation="v.txt", valid_share=0.1).idle()
    assert [line.split(" has no effect with ") for line in idle] == [
        ["min_count 5", "tokenizer bpe"],
        ["matrix_lr 1.0", "optimizer adamw"],
        ["valid_share 0.1", "validation v.txt"],
    ]
    noisy = {"infill": 0.3, "draws": 2, "window": 0.1}
    diffusion = {"schedule": "table", "self_condition": 0.2, "drop_prompt": 0.0, "filter_ramp": 7}
    assert not TrainConfig(objective="vlb", **noisy, **diffusion).idle()
    for objective, without in (("masked", diffusion), ("autoregressive", diffusion | noisy)):
        idle = TrainConfig(objective=objective, **noisy, **diffusion).idle()
        assert {*idle} == {f"{k} {value} has no effect with objective {objective}" for k, value in without.items()}


def test_the_shape_is_that_of_the_size_but_for_what_is_given():
    assert TrainConfig(size="tiny").shape == SIZES["tiny"]
    assert TrainConfig(size="tiny", dim=7, depth=3).shape == SIZES["tiny"] | {"dim": 7, "depth": 3}


def test_every_objective_can_be_chosen():
    assert CHOICES["objective"] == tuple(OBJECTIVES)


def test_local_paths_are_stored_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("texts.txt", "docstrings", "bpe"):
        (tmp_path / name).touch()
    here = TrainConfig(data="texts.txt", validation="./docstrings", tokenizer="bpe").located()
    assert here.data == str(tmp_path / "texts.txt")
    assert here.validation == str(tmp_path / "docstrings")
    assert here.tokenizer == "bpe"
    elsewhere = TrainConfig(data="docstrings", validation="owner/name", tokenizer="gpt2")
    assert elsewhere.located() == elsewhere


def test_yaml_numbers_become_numbers():
    assert TrainConfig(lr="1e-3", max_length="32").lr == 1e-3


def test_config_files_are_read_and_checked(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"max-steps": 5, "lr": 0.001}))
    assert read_config(path) == {"max_steps": 5, "lr": 0.001}
    path.write_text("max_stepz: 5")
    with pytest.raises(UserError, match="max_stepz"):
        read_config(path)
    for text in ("seed: " + "9" * 5000, "data: 2024-99-99"):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot read"):
            read_config(path)
    path.write_text("just words")
    with pytest.raises(UserError, match="config"):
        read_config(path)
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
