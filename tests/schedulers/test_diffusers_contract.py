"""What diffusers asks of its own schedulers in `SchedulerCommonTest`, check by check, in our words.

A latent of text is [B, L, D]; every check runs for every solver.
"""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import logging as diffusers_logging

from embdiff.schedulers import SCHEDULERS

diffusers_logging.set_verbosity_error()
pytestmark = pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS)
OPTIONS = {"num_train_timesteps": 1000, "noise_schedule": "cosine"}
STEPS = 50


def sample() -> torch.Tensor:
    return torch.rand(4, 16, 32, generator=torch.Generator().manual_seed(0))


def stepped(scheduler, timestep, **options):
    """One step with a prediction of a tenth of the sample."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    return scheduler.step(0.1 * sample(), timestep, sample(), generator=generator, **options)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
@pytest.mark.parametrize("changed", [{}, {"num_train_timesteps": 200}, {"noise_schedule": "sqrt"}, {"nodes": "karras"}])
def test_a_saved_scheduler_steps_alike(cls, changed, timestep, tmp_path):
    scheduler = cls(**OPTIONS | changed)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    ours, theirs = (stepped(s, timestep).prev_sample for s in (scheduler, loaded))
    assert torch.equal(ours, theirs)


def test_it_has_compatibles_and_its_config_survives_each(cls):
    scheduler = cls(**OPTIONS)
    assert scheduler.compatibles
    for other in scheduler.compatibles:
        back = cls.from_config(other.from_config(scheduler.config).config)
        assert {name: value for name, value in back.config.items() if name in scheduler.config} == dict(
            scheduler.config
        )
        added = set(back.config) - set(scheduler.config)
        assert not added & set(inspect.signature(cls.__init__).parameters)


def test_a_loaded_config_is_the_saved_one(cls, tmp_path):
    scheduler = cls(**OPTIONS)
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert config == cls.from_pretrained(tmp_path).config


def test_steps_keep_the_shape(cls):
    scheduler = cls(**OPTIONS)
    first = stepped(scheduler, 0).prev_sample
    assert first.shape == stepped(scheduler, 1).prev_sample.shape == sample().shape


def test_tuples_and_outputs_hold_the_same(cls):
    scheduler = cls(**OPTIONS)
    for one, other in zip(stepped(scheduler, 0, return_dict=False), stepped(scheduler, 0).to_tuple(), strict=True):
        assert torch.equal(one, other)


def test_the_public_names_are_there(cls):
    scheduler = cls(**OPTIONS)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(sample(), 0.0).shape == sample().shape
    assert callable(scheduler.step)
    assert len(scheduler) == 1000


def test_noise_is_added_at_a_timestep_of_the_schedule(cls):
    scheduler = cls(**OPTIONS)
    scheduler.set_timesteps(100)
    clean = scheduler.scale_model_input(sample(), 0.0)
    assert scheduler.add_noise(clean, torch.randn_like(clean), scheduler.timesteps[5][None]).shape == clean.shape


def test_there_are_no_deprecated_arguments(cls):
    assert "kwargs" not in inspect.signature(cls.__init__).parameters
    assert not cls._deprecated_kwargs


def test_trained_betas_are_kept(cls, tmp_path):
    scheduler = cls(**OPTIONS, trained_betas=np.array([0.1, 0.3]))
    kept = torch.sigmoid(-scheduler.gamma_of(torch.tensor([500.0, 1000.0])))
    assert torch.allclose(kept, torch.tensor([0.9, 0.9 * 0.7]), atol=1e-6)
    scheduler.save_pretrained(tmp_path)
    assert scheduler.betas.tolist() == cls.from_pretrained(tmp_path).betas.tolist()
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["trained_betas"] is None


def test_attributes_are_found_and_options_warn(cls):
    scheduler = cls(**OPTIONS)
    scheduler.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_a_pipeline_of_diffusers_can_set_its_timesteps(cls):
    """`retrieve_timesteps`, which diffusers' pipelines call, with a number and with timesteps."""
    scheduler = cls(**OPTIONS)
    times, steps = retrieve_timesteps(scheduler, 10)
    assert steps == len(times) == 10
    if scheduler.order == 1:
        times, steps = retrieve_timesteps(scheduler, timesteps=[900.0, 500.0, 100.0])
        assert steps == 3
        assert times.tolist() == [900.0, 500.0, 100.0]
