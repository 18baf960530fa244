"""Options of a training run: ranges, kinds and files."""

import math

import pytest
import yaml

from embdiff.config import TrainConfig, read_config
from embdiff.errors import UserError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "huge"),
        ("batch_size", 0),
        ("infill", 1.5),
        ("lr", -1.0),
        ("lr", math.nan),
        ("ema", 1.0),
        ("max_time", 0.0),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        TrainConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"), [("seed", -1), ("max_length", "many"), ("max_steps", 2.5), ("compile", "si")]
)
def test_options_of_the_wrong_kind_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        TrainConfig(**{option: value})


def test_yaml_numbers_become_numbers():
    assert TrainConfig(lr="1e-3", max_length="32").lr == 1e-3


def test_config_files_are_read_and_checked(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"max-steps": 5, "lr": 0.001}))
    assert read_config(path) == {"max_steps": 5, "lr": 0.001}
    path.write_text("max_stepz: 5")
    with pytest.raises(UserError, match="max_stepz"):
        read_config(path)
    path.write_text("just words")
    with pytest.raises(UserError, match="config"):
        read_config(path)
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
