"""A whole evaluation: likelihood, samples beside real texts, and references where there are prompts.

Every figure stands beside the same figure of real texts, as many of them, for entropy, distinct n-grams and judges
depend on how many texts there are and of what kind. Prompts are never scored. No figure of samples depends on how they
were batched; likelihoods move within their noise error.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from embdiff.batches import encode, spread
from embdiff.errors import UserError
from embdiff.evaluation import metrics
from embdiff.evaluation.judges import Judge, a_word, check_judges, costs
from embdiff.evaluation.likelihood import PASSES, TOLERANCE, Likelihood, bound, flow_bound
from embdiff.evaluation.mauve import divergence
from embdiff.evaluation.ngram import NGram
from embdiff.evaluation.samples import FEWEST, as_written, draw, endable, some
from embdiff.noise import noise_schedule

if TYPE_CHECKING:
    from embdiff.data import Example
    from embdiff.pipeline import TextDiffusionPipeline

Figures = dict[str, Any]
REVERSE_ORDER = 5
LIBRARIES = ("embdiff", "torch", "transformers", "tokenizers", "diffusers", "numpy", "scipy", "sacrebleu")


@dataclass(frozen=True)
class Protocol:
    """What decides the figures, beside model and texts.

    samples: texts to draw, the i-th from seed + i; 0 = none. steps: of sampling. mbr: candidates for each prompt of
    which the one nearest to the others is kept as well (a second set of figures); 0 = off. lowercase: before comparing
    with references. bound_texts: for the variational bound, None = all, 0 = none. levels: noise levels for each of
    them. passes: of self-conditioning at each level, 1 = none, as for a model without it; the flow has at most 2.
    flow_texts, flow_tolerance: of the flow's bound. options: of the pipeline's call.
    """

    samples: int = 1000
    steps: int = 32
    seed: int = 0
    batch_size: int = 50
    mbr: int = 0
    lowercase: bool = False
    bound_texts: int | None = None
    levels: int = 4
    passes: int = PASSES
    flow_texts: int = 0
    flow_tolerance: float = TOLERANCE
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {"samples": 0, "steps": 1, "seed": 0, "batch_size": 1, "mbr": 0, "bound_texts": 0, "passes": 1,
                  "flow_texts": 0}  # fmt: skip
        for name, least in lowest.items():
            if (getattr(self, name) or 0) < least:
                raise UserError(f"{name} {getattr(self, name)} is out of range: give {least} or more")
        if self.mbr == 1:
            raise UserError("mbr 1 has nothing to choose from: give 2 or more candidates, or 0 for none")
        if 0 < self.samples < FEWEST:
            raise UserError(f"{self.samples} samples are too few to judge: draw {FEWEST} or more")
        if self.mbr and not self.samples:
            raise UserError(f"mbr {self.mbr} chooses among samples, and there are none: draw {FEWEST} or more")


def evaluate(
    pipe: TextDiffusionPipeline,
    valid: Sequence[Example],
    judges: Sequence[Judge],
    protocol: Protocol,
    *,
    train: Sequence[str] = (),
    references: dict[str, list[str]] | None = None,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Figures:
    """All figures of a model.

    Args:
        valid: held-out texts, with the prompts of a prompted model.
        train: other real texts, which show what the distances to `valid` are for texts that are real.
        references: texts for each prompt; by default those of `valid`.
        advance: told what is being done, how much of it is done, and how much there is.

    Raises:
        UserError: for too few texts, or prompts without references.
    """
    if references is not None and not protocol.samples:
        raise UserError(f"references are for samples, and there are none: draw {FEWEST} or more")
    start = time.monotonic()
    short = endable(pipe, valid)
    if len(short) < FEWEST:
        limit = pipe.denoiser.config.max_length
        long = f" beside {len(valid) - len(short)} longer than the model's {limit} tokens"
        raise UserError(
            f"{len(short)} texts are too few to evaluate with{long if len(short) < len(valid) else ''}: "
            f"give {FEWEST} or more"
        )
    figures: Figures = {"protocol": described(protocol), "too_long": len(valid) - len(short)}
    # Samples come first: what can't be drawn or judged is so refused before the hours that a bound may take.
    if protocol.samples:
        figures |= _sampled(pipe, short, judges, protocol, train, references, advance)
    figures["likelihood"] = _likelihoods(pipe, short, protocol, advance)
    complete: Figures = finite(figures | {"run": environment(pipe, time.monotonic() - start)})
    return complete


def described(protocol: Protocol) -> Figures:
    """The protocol as JSON has it, guidance with its names."""
    options = dict(protocol.options)
    if "guidance" in options:
        options["guidance"] = [{"name": module.name, **asdict(module)} for module in options["guidance"]]
    return asdict(replace(protocol, options=options))


def counted(advance: Callable[[str, int, int], None], what: str, total: int) -> Callable[[int], None]:
    """`advance` for one thing, told how many more texts were done."""
    done = 0

    def forward(texts: int) -> None:
        nonlocal done
        done += texts
        advance(what, done, total)

    return forward


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, of which JSON has none."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(pipe: TextDiffusionPipeline, seconds: float) -> Figures:
    """What else is needed to repeat figures: versions, device, precision, scheduler."""
    import torch

    device = pipe.device
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "dtype": ("int8 and " if pipe.int8 else "") + str(pipe.denoiser.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in pipe.denoiser.parameters()),
        "scheduler": scheduler_options(pipe.scheduler),
        "temperature": pipe.config.temperature,
        "seconds": round(seconds, 1),
    }


def versions() -> dict[str, str]:
    """Of Python and the libraries that figures depend on, as far as they are there."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def scheduler_options(scheduler: Any) -> Figures:
    """A scheduler's class and options, without the tables that follow from them."""
    options = {key: value for key, value in scheduler.config.items() if key[0] != "_" and key != "trained_betas"}
    return {"name": type(scheduler).__name__, **options}


def text_figures(texts: Sequence[str], real: Sequence[str], judges: Sequence[Judge], seed: int = 0) -> Figures:
    """Figures of texts beside held-out real ones; both as a model could have written them (see `as_written`)."""
    return own_figures(texts, judges, seed) | distances(texts, real, seed)


# Figures that have a standard error beside them, with cross-entropies.
COMPARED: dict[str, Callable[[Sequence[str]], float]] = {
    "unigram_entropy": metrics.unigram_entropy,
    "distinct_4": lambda texts: metrics.distinct_n(texts, 4),
    "mean_words": metrics.mean_length,
}


def own_figures(texts: Sequence[str], judges: Sequence[Judge], seed: int = 0) -> Figures:
    """Figures that need no other texts; standard errors of those that are compared most."""
    cost = {judge.name: costs(judge, texts) for judge in judges}
    errors: Figures = {
        "cross_entropy": {name: round(metrics.standard_error(each, a_word, seed), 4) for name, each in cost.items()}
    }
    for name, figure in COMPARED.items():
        errors[name] = round(metrics.standard_error(texts, figure, seed), 4)
    return {
        "texts": len(texts),
        "empty": sum(not text.strip() for text in texts),
        "cross_entropy": {name: round(a_word(each), 4) for name, each in cost.items()},
        "unigram_entropy": round(metrics.unigram_entropy(texts), 4),
        **{f"distinct_{n}": round(metrics.distinct_n(texts, n), 4) for n in (1, 2, 3, 4)},
        "self_bleu": round(metrics.self_bleu(texts, seed=seed), 2),
        "repetition": round(metrics.repetition(texts), 4),
        "rep_4": round(metrics.rep_n(texts, 4), 4),
        "mean_words": round(metrics.mean_length(texts), 2),
        "length_quantiles": metrics.length_quantiles(texts),
        "standard_errors": errors,
    }


def distances(texts: Sequence[str], real: Sequence[str], seed: int = 0) -> Figures:
    """How far texts are from held-out real ones."""
    return {
        "reverse_cross_entropy": round(reverse_cross_entropy(texts, real), 4),
        "length_distance": round(metrics.length_distance(texts, real), 3),
        "mauve_style": round(divergence(texts, real, seed=seed), 4),
    }


def reverse_cross_entropy(texts: Sequence[str], real: Sequence[str]) -> float:
    """Nats a word and end of real texts under an n-gram of others, which knows the words of the real ones."""
    words = {word for text in real for word in text.split()}
    return NGram.fit(texts, order=REVERSE_ORDER, vocabulary=words).cross_entropy(real)


def reference_figures(texts: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> Figures:
    """Overlap with references, one list for each text: BLEU and chrF as sacrebleu has them (13a), ROUGE lower-cased."""
    return {
        "prompts": len(texts),
        "references": sum(len(each) for each in references),
        "case": "lower" if lowercase else "as written",
        "bleu": round(metrics.corpus_bleu(texts, references, lowercase=lowercase), 2),
        "chrf": round(metrics.corpus_chrf(texts, references, lowercase=lowercase), 2),
        "rouge_1": round(metrics.rouge_n(texts, references, 1), 2),
        "rouge_2": round(metrics.rouge_n(texts, references, 2), 2),
        "rouge_l": round(metrics.rouge_l(texts, references), 2),
    }


def _likelihoods(
    pipe: TextDiffusionPipeline,
    valid: Sequence[Example],
    protocol: Protocol,
    advance: Callable[[str, int, int], None],
) -> Figures:
    config = pipe.denoiser.config
    schedule = noise_schedule(dict(pipe.config.fitted_schedule))
    passes = protocol.passes if pipe.denoiser.self_conditions else 1  # others would be the same

    def measured(count: int | None, what: str, measure: Callable[..., Likelihood], **settings: Any) -> Figures:
        chosen = list(valid) if count is None else [valid[i] for i in spread(len(valid), count)]
        encoded = encode(
            chosen, pipe.tokenizer, config.max_length, config.max_prompt_length, on_long="drop", what="text"
        )
        found = measure(
            pipe.denoiser, encoded, schedule, seed=protocol.seed, batch_size=protocol.batch_size,
            advance=counted(advance, what, len(encoded)), **settings,
        )  # fmt: skip
        words = sum(len(example.text.split()) + 1 for example in chosen)  # and ends
        return {
            "nats_per_token": round(found.nats_per_token, 4),
            "nats_per_word": round(found.nats_per_token * found.tokens / words, 4),
            "standard_error": round(found.standard_error, 4),
            "noise_error": round(found.noise_error, 4),
            "parts": {name: round(value, 4) for name, value in found.parts.items()},
            "texts": found.texts,
            "tokens": found.tokens,
            "words": words,
            "passes": settings["passes"],
        }

    figures: Figures = {}
    if protocol.bound_texts != 0:
        figures["bound"] = measured(protocol.bound_texts, "bound", bound, samples=protocol.levels, passes=passes)
    if protocol.flow_texts:
        figures["flow"] = measured(
            protocol.flow_texts, "flow", flow_bound, tolerance=protocol.flow_tolerance, passes=min(passes, 2)
        )
    return figures


def _sampled(
    pipe: TextDiffusionPipeline,
    valid: Sequence[Example],
    judges: Sequence[Judge],
    protocol: Protocol,
    train: Sequence[str],
    references: dict[str, list[str]] | None,
    advance: Callable[[str, int, int], None],
) -> Figures:
    limit = int(pipe.denoiser.config.max_length)
    prompts, answers = _prompts(pipe, valid, protocol.samples, references, protocol.mbr)
    known = as_written(pipe.tokenizer, [example.text for example in valid])
    others = as_written(pipe.tokenizer, train, limit)
    beside = _beside(pipe, valid, known, prompts, protocol.seed)
    for module in protocol.options.get("guidance", ()):
        for count in (len(prompts), len(prompts) * max(1, protocol.mbr)):
            module.for_samples(0, count, count)  # refuses what is not there for each sample, before any is drawn
    check_judges(judges, pipe, known)
    if answers:
        reference_figures(known[:1], [known[:1]])  # and so does a library that isn't there

    def drawn(what: str, seed: int, each: int = 1) -> list[str]:
        wanted = [p for p in prompts for _ in range(each)]
        return draw(
            pipe, wanted, seed=seed, batch_size=protocol.batch_size, advance=counted(advance, what, len(wanted)),
            num_inference_steps=protocol.steps, **protocol.options,
        )  # fmt: skip

    texts = drawn("samples", protocol.seed)
    figures: Figures = {"samples": text_figures(texts, known, judges, protocol.seed)}
    # A judge knows training texts by heart, so held-out ones are judged; near to held-out texts are training texts.
    figures["real"] = own_figures(beside, judges, protocol.seed)
    names = [name for name in figures["samples"] if name not in figures["real"]]
    enough = len(others) >= len(texts)
    near = distances(some(others, len(texts), protocol.seed), known, protocol.seed) if enough else dict.fromkeys(names)
    figures["real"] |= near
    chosen: list[str] = []
    if answers:
        figures["conditional"] = {"one sample a prompt": reference_figures(texts, answers, protocol.lowercase)}
        if protocol.mbr:
            # Their seeds begin behind those of the samples.
            many = drawn("candidates", protocol.seed + len(prompts), protocol.mbr)
            groups = [many[i : i + protocol.mbr] for i in range(0, len(many), protocol.mbr)]
            chosen = metrics.mbr(groups)
            figures["conditional"][f"mbr of {protocol.mbr}"] = reference_figures(chosen, answers, protocol.lowercase)
    figures["texts"] = [
        {"prompt": prompt, "text": text, "seed": protocol.seed + i}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    for entry, text in zip(figures["texts"], chosen, strict=False):
        entry["mbr"] = text
    return figures


def _beside(
    pipe: TextDiffusionPipeline, valid: Sequence[Example], known: list[str], prompts: list[str | None], seed: int
) -> list[str]:
    """Real texts to stand beside the samples: as many at random, or all there are; one of each prompt with prompts."""
    if prompts[0] is None:
        return some(known, min(len(prompts), len(known)), seed)
    order = np.random.default_rng((seed, 0x6F6E65)).permutation(len(known))
    one_of_each = {valid[i].prompt or "": known[i] for i in order}
    return [one_of_each[prompt or ""] for prompt in prompts]


def _prompts(
    pipe: TextDiffusionPipeline,
    valid: Sequence[Example],
    count: int,
    references: dict[str, list[str]] | None,
    mbr: int = 0,
) -> tuple[list[str | None], list[list[str]]]:
    """The prompts to draw from, each once, and the references of each; no prompts for a model that takes none."""
    if not int(pipe.denoiser.config.max_prompt_length) or not any(example.prompt for example in valid):
        if references is not None:
            raise UserError("references are for prompts: this model takes none, or the texts have none")
        if mbr:
            raise UserError(f"mbr {mbr} is for prompts: this model takes none, or the texts have none")
        return [None] * count, []
    own: dict[str, list[str]] = {}
    for example in valid:
        own.setdefault(example.prompt or "", []).append(example.text)
    answers = own if references is None else references
    missing = [prompt for prompt in own if not answers.get(prompt)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(own)} prompts have no reference, the first is {missing[0]!r}: "
            "give references for the prompts of the data, written alike"
        )
    if len(own) < FEWEST:
        raise UserError(f"{len(own)} different prompts are too few to judge their samples: give {FEWEST} or more")
    different = list(own)
    chosen = [different[i] for i in spread(len(different), count)]
    return list(chosen), [answers[prompt] for prompt in chosen]
