"""Small models and texts that the tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests share the cores already: threads on top would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels then run on the CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

from embdiff import vocabulary
from embdiff.denoiser import Denoiser
from embdiff.noise import GumbelSchedule
from embdiff.pipeline import TextDiffusionPipeline
from embdiff.schedulers import RenoiseScheduler

settings.register_profile("embdiff", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("embdiff")

WORDS = [
    "the",
    "a",
    "small",
    "large",
    "red",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "sees",
    "likes",
    "finds",
    "and",
    "or",
    "near",
    "under",
    "over",
    ".",
    ",",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Short sentences over a few words, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(18, (n,), generator=generator).tolist()) + " ." for n in lengths]


def lively(denoiser: Denoiser, seed: int = 0) -> Denoiser:
    """Gives every weight of a fresh denoiser a value, so that no part of it is switched off by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim < 2 else p.shape[-1] ** -0.5))
    return denoiser.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return vocabulary.train_word(sentences(200), min_count=1)


@pytest.fixture
def denoiser(tokenizer) -> Denoiser:
    return lively(
        Denoiser(
            len(tokenizer),
            dim=16,
            width=32,
            depth=2,
            heads=2,
            max_length=12,
            max_prompt_length=8,
            condition_width=16,
        )
    )


@pytest.fixture
def pipe(denoiser, tokenizer) -> TextDiffusionPipeline:
    schedule = GumbelSchedule.initial(denoiser.dim, len(tokenizer))
    pipe = TextDiffusionPipeline(denoiser, tokenizer, RenoiseScheduler(noise_schedule=schedule.config()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def chained(pipe) -> TextDiffusionPipeline:
    """A pipeline whose denoiser has transitions that matter."""
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.denoiser.config.items() if name[0] != "_"}
    denoiser = Denoiser(**config | {"transition_rank": 4})
    denoiser.load_state_dict(pipe.denoiser.state_dict(), strict=False)
    torch.nn.init.normal_(denoiser.transitions.right, std=10)
    chained = TextDiffusionPipeline(denoiser.eval(), pipe.tokenizer, pipe.scheduler)
    chained.set_progress_bar_config(disable=True)
    return chained
