"""Samples by the hundred, and texts as a model could have written them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from embdiff import vocabulary
from embdiff.errors import UserError

if TYPE_CHECKING:
    from embdiff.data import Example
    from embdiff.pipeline import TextDiffusionPipeline

Item = TypeVar("Item")
FEWEST = 8  # texts: below that entropies, distances and judges say nothing


def draw(pipe: TextDiffusionPipeline, prompts: Sequence[str | None], **options: Any) -> list[str]:
    """One text for each prompt; options: of `outputs`."""
    return [text for output in outputs(pipe, prompts, **options) for text in output.texts]


def outputs(
    pipe: TextDiffusionPipeline,
    prompts: Sequence[str | None],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 50,
    advance: Callable[[int], None] = lambda texts: None,
    **options: Any,
) -> Iterator[Any]:
    """The pipeline's output for each batch of prompts (None = from nothing); text i comes from seed + i, whatever its
    batch.

    seeds: of each text, in place of those. options: of the pipeline's call; guidance with options for each text has
    them for all. advance: told how many texts were drawn.
    """
    modules = options.pop("guidance", ())
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    for start in range(0, len(prompts), batch_size):
        part: Any = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(each) for each in seeds[start : start + batch_size]]
        guidance = [module.for_samples(start, start + len(part), len(prompts)) for module in modules]
        yield pipe(part, generator=generators, guidance=guidance, **options)
        advance(len(part))


def as_written(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> list[str]:
    """The texts after a way through the tokenizer: words that it doesn't know are `<unk>` then, as in samples.

    max_length: of the model in tokens; longer texts are left out, as it could not end them.
    """
    tokens = _tokens(tokenizer, texts)
    return [vocabulary.decode(tokenizer, ids) for ids in tokens if max_length is None or len(ids) < max_length]


def endable(pipe: TextDiffusionPipeline, examples: Sequence[Example]) -> list[Example]:
    """The examples with texts that the model can end: shorter than its positions."""
    limit = int(pipe.denoiser.config.max_length)
    tokens = _tokens(pipe.tokenizer, [example.text for example in examples])
    return [example for example, ids in zip(examples, tokens, strict=True) if len(ids) < limit]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return cast(list[list[int]], found)


def some(texts: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` of the texts at random, without repetition, in their order; files are often sorted, so heads mislead."""
    if count > len(texts):
        raise UserError(f"{count} texts are wanted of {len(texts)}: ask for fewer, or give more")
    chosen = np.random.default_rng((seed, 0x736F6D65)).choice(len(texts), size=count, replace=False)
    return [texts[i] for i in sorted(chosen)]
