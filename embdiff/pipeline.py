"""TextDiffusionPipeline: from noise to text.

    B samples   L target positions   D embedding dim   N steps

The loop is the algorithm: predict x0, take a solver step, repeat; then round x0 to tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from embdiff import baselines, vocabulary
from embdiff.checkpoint import CLASSIFIERS, classifier_folder
from embdiff.data import hub_access
from embdiff.denoiser import Denoiser
from embdiff.errors import UserError, reason
from embdiff.forward import Forward
from embdiff.guidance import ClassifierFreeGuidance, Guidance
from embdiff.guidance.automaton import Automaton
from embdiff.guidance.base import Constraint, Run
from embdiff.guidance.classifier import NoisyClassifier
from embdiff.noise import GumbelSchedule, noise_schedule
from embdiff.prediction import Predictor
from embdiff.randomness import DeviceNoise, Noise, noise_of, sample_generators, uniform
from embdiff.schedulers import EmbeddingScheduler, adapted

if TYPE_CHECKING:
    from embdiff.loop import Loops
    from embdiff.schedulers.foreign import ForeignScheduler

Callback = Callable[["TextDiffusionPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

# Lengths are decided in the first fifth of the schedule, where nothing else is decided yet.
DRAW_LENGTH_ABOVE = 0.8


@dataclass
class TextDiffusionOutput(BaseOutput):  # type: ignore[misc]
    """texts: one string a sample; sequences: token ids [B, L]; latents: z [B, L, D] if output_type is "latent"."""

    texts: list[str]
    sequences: Tensor
    latents: Tensor | None = None


class TextDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates text by denoising embeddings.

    Args:
        denoiser, tokenizer: what `embdiff train` made.
        scheduler: any `EmbeddingScheduler`, or one of diffusers' own (see `embdiff.schedulers.foreign`); assign another
            one to `pipe.scheduler` at any time.
        fitted_schedule: config of the noise schedule that training fitted, by default the scheduler's. It decides where
            lengths are drawn, whatever scheduler is assigned, and is saved with the pipeline.
        temperature: what a call takes where it names none; `embdiff tune-steps` changes it.

    compile: set it to True to compile the denoiser at once, to False never to; None = once it has worked for about a
    minute. A CPU that has a native step (see `embdiff.native`) takes that one, unless it is False.
    int8: set it to True to take the products of layers and head in 8 bits (see `embdiff.forward.Int8Linear`), on a CPU.
    """

    denoiser: Denoiser
    tokenizer: PreTrainedTokenizerBase
    scheduler: Any

    compile: bool | None = None
    int8: bool = False
    _num_timesteps: int
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "x0"]

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: Any,
        fitted_schedule: Mapping[str, Any] | None = None,
        temperature: float = 0.76,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, tokenizer=tokenizer, scheduler=scheduler)
        if fitted_schedule is None:
            fitted_schedule = (
                scheduler.noise_schedule
                if isinstance(scheduler, EmbeddingScheduler)
                else GumbelSchedule.initial(denoiser.dim, len(tokenizer))
            ).config()
        self.register_to_config(fitted_schedule=dict(fitted_schedule), temperature=temperature)
        self.classifiers: dict[str, NoisyClassifier] = {}
        self._forward: Forward | None = None
        self._loops: Loops | None = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """As diffusers does, with the classifiers beside the other parts, and without the path that it came from."""
        parts: list[Any] = [self, self.denoiser, *self.classifiers.values()]
        for part in parts:
            config = {name: value for name, value in part.config.items() if name != "_name_or_path"}
            part._internal_dict = FrozenDict(config)
        super().save_pretrained(save_directory, **options)
        for name, classifier in self.classifiers.items():
            classifier.save_pretrained(classifier_folder(Path(save_directory), name))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> TextDiffusionPipeline:
        """As diffusers does, with the classifiers that lie beside the other parts of a local folder."""
        pipe = cast(
            TextDiffusionPipeline, super().from_pretrained(name_or_path, **{"use_safetensors": True, **options})
        )
        for folder in sorted(Path(name_or_path).glob(f"{CLASSIFIERS}/*/config.json")):
            pipe.classifiers[folder.parent.name] = NoisyClassifier.from_pretrained(folder.parent, use_safetensors=True)
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 32,
        guidance_scale: float = 1.0,
        guidance: Sequence[Guidance] = (),
        temperature: float | None = None,
        draw_length: bool = True,
        length_bias: float = 1.0,
        noise_scale: float = 1.0,
        max_length: int | None = None,
        skip_padding: bool | None = None,
        shortlist: int | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: str = "text",
        return_dict: bool = True,
    ) -> TextDiffusionOutput | tuple[Any, ...]:
        """Generates `num_samples` texts for each prompt, in the order of the prompts.

        Args:
            prompt: one, several, or None for text from nothing.
            negative_prompt: what guidance steers away from; None = the absence of a prompt.
            num_inference_steps: N >= 1, denoiser evaluations.
            guidance_scale: classifier-free guidance u + s (c - u); 1 = off, and needs a prompt to act.
            guidance: further modules.
            temperature: of the words in the token posterior, at least 0.001, None = the pipeline's own; 1 samples the
                model as it is, less is more fluent and less diverse. The probabilities of end-of-text and padding stay
                as they are, so that texts do not shrink.
            draw_length: while noise is high (t > 0.8) each sample's length is drawn: with one number u in (0, 1) a
                sample, a position is padding, or the end of text, where u lies in the posterior's share of it, so
                lengths are distributed as the model has them. False mixes embeddings by probability there too.
            length_bias: nats, -50 to 50, taken from the log-odds of padding and end of text wherever embeddings are
                mixed. One embedding for all padding outweighs the scattered embeddings of words, so without it texts
                come out short. 0 is the textbook's posterior mean.
            noise_scale: of all noise, from 0 on; 1 = as in training. Less gives more typical texts and less variety, as
                truncation does in other generators (BigGAN, arXiv:1809.11096, section 3.1): 0.5 to 0.7 where a prompt
                wants one faithful answer.
            max_length: target positions, at most what the model was trained for (the default).
            skip_padding: positions behind a text that are surely padding (below t = 0.8, by 0.99) are computed no
                more, nor seen by the others; None = on a CPU, where that saves their time.
            shortlist: words of each text, drawn in the first step and halfway, that the steps in between look at
                (see `embdiff.shortlist`); None = at the whole vocabulary, always. For large vocabularies, on a CPU: 512
                for 64 tokens. Steps with tilts, bans or exact control look at all words.
            generator: one from which each sample's seed is drawn, or one for each sample. Noise is drawn sample by
                sample, so a text does not depend on the batch that it was in.
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": z, "x0": x0}) after each step;
                what it returns replaces the latents.
            output_type: "text", "seq" (no decoding) or "latent" (neither rounding nor decoding).

        Returns:
            TextDiffusionOutput, or the tuple (texts, sequences) where `return_dict` is False; with latents as its third
            part where those are asked for.

        Raises:
            UserError: for arguments out of range.
        """
        prompts = several("prompt", prompt)
        if not prompts:
            raise UserError("the list of prompts is empty: give one or more, or None")
        negatives = None if negative_prompt is None else several("negative_prompt", negative_prompt)
        if negatives is not None and isinstance(negative_prompt, str):
            negatives *= len(prompts)
        solver = adapted(self.scheduler)
        length = self._length(max_length)
        if not isinstance(num_samples, Integral) or num_samples < 1:
            raise UserError(f"num_samples {num_samples}: ask for a whole number, at least 1")
        temperature = float(self.config.temperature) if temperature is None else temperature
        if not 1e-3 <= temperature < math.inf:
            raise UserError(f"temperature {temperature} is out of range: give 0.001 or more, 1 is neutral")
        if not -50 <= length_bias <= 50:
            raise UserError(f"length_bias {length_bias} is out of range: give -50 to 50; 0 is neutral, 1 the default")
        if not 0 <= noise_scale < math.inf:
            raise UserError(f"noise_scale {noise_scale} is out of range: give 0 or more, 1 is neutral")
        if noise_scale != 1 and not isinstance(solver, EmbeddingScheduler):
            raise UserError(f"noise_scale {noise_scale}: {type(self.scheduler).__name__} draws its own noise; use 1")
        if output_type not in ("text", "seq", "latent"):
            raise UserError(f"output_type {output_type!r} is unknown: choose text, seq or latent")
        if shortlist is not None and (not isinstance(shortlist, Integral) or shortlist < 1):
            raise UserError(f"shortlist {shortlist}: give how many words of each text to look at, or None for all")
        B = len(prompts) * int(num_samples)
        generators = sample_generators(generator, B)
        run = self._run(prompts, negatives, int(num_samples), length)
        device = run.device  # asked once: diffusers looks through all modules for it
        noise = noise_of(generators, (length, self.denoiser.dim), device, noise_scale)

        solver.set_timesteps(num_inference_steps, device=device)
        solver.set_begin_index(0)
        gammas: list[float] = solver.gammas.tolist()
        # Noise made on the device waits, for a recorded loop makes its own; generators are asked in a fixed order.
        first = None if isinstance(noise, DeviceNoise) else noise()
        predictor = Predictor(
            run,
            [ClassifierFreeGuidance(guidance_scale), *guidance],
            gammas=gammas,
            temperature=temperature,
            kept=self._kept_tokens(),
            quantile=uniform(generators, device, 1)[:, 0] if draw_length else None,
            draw_above=float(noise_schedule(dict(self.config.fitted_schedule)).gamma(DRAW_LENGTH_ABOVE)),
            length_bias=length_bias,
            network=self._network(device),
            skip_padding=device.type == "cpu" if skip_padding is None else skip_padding,
            shortlist=None if shortlist is None else int(shortlist),
            uniform=partial(uniform, generators, device),
        )
        self._num_timesteps = len(gammas)
        if callback_on_step_end is None and (ending := self._recorded(predictor, solver, gammas, noise)) is not None:
            return self._finished(predictor, ending, output_type, return_dict)
        z = (noise() if first is None else first) * solver.init_noise_sigma
        x0: Tensor | None = None
        rounded = callback_on_step_end is None and output_type != "latent"
        with self.progress_bar(total=len(gammas)) as progress:
            for i, t in enumerate(solver.timesteps):
                seen = solver.scale_model_input(z, t)
                if rounded and i == len(gammas) - 1 and predictor.ends(seen, gammas[i], x0):
                    progress.update()
                    break
                x0 = predictor(seen, gammas[i], x0)
                source: dict[str, Any] = {"generator": generators}
                if isinstance(solver, EmbeddingScheduler):
                    source = {"variance_noise": noise()} if solver.noisy[i] else {}
                z = solver.step(x0, t, z, return_dict=False, **source)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, t, {"latents": z, "x0": x0})
                    if changed and "latents" in changed:
                        z = changed["latents"]
                        predictor.forget()
                progress.update()

        return self._finished(predictor, z, output_type, return_dict)

    def check(self, guidance: Sequence[Guidance], samples: int, max_length: int | None = None) -> None:
        """Raises UserError where no text can be what constraints ask of one of so many samples.

        A call refuses that for its own; this is for samples that come in several.
        """
        length = self._length(max_length)
        run = Run(self.denoiser, self.tokenizer, samples, length, classifiers=self.classifiers)
        asked = [part for module in guidance for part in module.parts(run) if isinstance(part, Constraint)]
        if asked:
            cause = ", ".join(part.cause for part in asked)
            Automaton.of([part.language for part in asked], run.pieces, samples, length, cause)

    @property
    def num_timesteps(self) -> int:
        """Denoiser evaluations of the last run."""
        return self._num_timesteps

    def decode(self, sequences: Tensor) -> list[str]:
        """The texts of token ids [B, L], each up to its end of text."""
        return [vocabulary.decode(self.tokenizer, ids) for ids in sequences.tolist()]

    def _network(self, device: torch.device) -> Forward:
        """The denoiser's forward pass on its device, that of the denoiser in use."""
        known, int8 = self._forward, self.int8 and device.type == "cpu"
        if known is None or (known.denoiser, known.wanted, known.int8) != (self.denoiser, self.compile, int8):
            known = self._forward = Forward(self.denoiser, self.compile, int8)
        known.renew()
        return known

    def _recorded(
        self, predictor: Predictor, solver: EmbeddingScheduler | ForeignScheduler, gammas: list[float], noise: Noise
    ) -> Tensor | None:
        """The last latents, by a recorded loop where there is one for this device and run; else None."""
        if not isinstance(solver, EmbeddingScheduler) or not isinstance(noise, DeviceNoise):
            return None
        from embdiff.loop import Loops, fits

        if not fits(predictor, gammas):
            return None
        self._loops = self._loops or Loops()
        z, features = self._loops.run(predictor, solver.table, gammas, self._kept_tokens(), noise.seeds, noise.scale)
        predictor.see(gammas[-1], features)
        return z

    def _finished(
        self, predictor: Predictor, z: Tensor, output_type: str, return_dict: bool
    ) -> TextDiffusionOutput | tuple[Any, ...]:
        """What a call returns, from the last latents."""
        if output_type == "latent":
            sequences = torch.empty(len(z), 0, dtype=torch.long)
            return TextDiffusionOutput([], sequences, z) if return_dict else ([], sequences, z)
        sequences = predictor.round(z)
        texts = [] if output_type == "seq" else self.decode(sequences)
        return TextDiffusionOutput(texts, sequences) if return_dict else (texts, sequences)

    def _kept_tokens(self) -> tuple[int, int]:
        """The tokens that make up a text's length; padding first, for what follows an end is padding."""
        return (int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id))

    def _length(self, max_length: int | None) -> int:
        trained = int(self.denoiser.config.max_length)
        if max_length is None:
            return trained
        if not isinstance(max_length, Integral) or not 1 <= max_length <= trained:
            raise UserError(f"max_length {max_length} is out of range: this model writes 1 to {trained} tokens")
        return int(max_length)

    def _run(self, prompts: list[str | None], negatives: list[str | None] | None, num_samples: int, length: int) -> Run:
        """What guidance may know. negatives: one for each prompt, if any; they alone stand beside an empty prompt."""
        run = Run(
            self.denoiser, self.tokenizer, len(prompts) * num_samples, length, num_samples, classifiers=self.classifiers
        )
        if all(p is None for p in prompts) and negatives is None:
            return run
        positive = [p or "" for p in prompts]
        if negatives is not None and len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
        known = None if negatives is None else [negative or "" for negative in negatives]
        return replace(run, prompts=positive, negative_prompts=known, context=run.encode(positive))


def several(name: str, prompts: str | Sequence[str | None] | None) -> list[str | None]:
    """One or more prompts as a list."""
    if prompts is None or isinstance(prompts, str):
        return [prompts]
    found = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if not all(p is None or isinstance(p, str) for p in found):
        raise UserError(f"{name} {prompts!r:.80} is no string: give one string, a list of strings, or None")
    return found


def load(model: str) -> TextDiffusionPipeline:
    """The pipeline in a local folder, or of a name on the hub; anything else raises UserError in one line."""
    folder = Path(model)
    # Beside other folders of runs it is a slip of the pen, and no name on the hub.
    if not folder.exists() and (model.startswith((".", "/")) or model.count("/") != 1 or folder.parent.is_dir()):
        raise UserError(f"no model at {model}: name the folder that embdiff train wrote")
    if folder.exists() and not (folder / "model_index.json").exists():
        if (found := baselines.kind(folder)) is not None:
            raise UserError(
                f"the {found} model in {model} is a baseline, for embdiff eval --judge and benchmarks: "
                "name a folder that embdiff train wrote with --objective ce, vlb or mixed"
            )
        if (folder / "run.yaml").exists():
            raise UserError(
                f"the run in {model} is not finished: continue it with embdiff train --output {model} --resume"
            )
        raise UserError(f"{model} holds no embdiff model: name the folder that embdiff train wrote")
    try:
        with nullcontext() if folder.exists() else hub_access():
            pipe = TextDiffusionPipeline.from_pretrained(model)
    except UserError:
        raise
    except Exception as error:
        if not folder.exists():
            raise UserError(
                f"no model {model!r}: there is no such folder, and the hub gives none ({reason(error)})"
            ) from error
        raise UserError(
            f"cannot load the model in {model}: {reason(error)}; the folder is damaged or of another kind"
        ) from error
    if not isinstance(pipe.denoiser, Denoiser):
        raise UserError(f"{model} is no embdiff model: its denoiser is a {type(pipe.denoiser).__name__}")
    vocabulary_size = int(pipe.denoiser.config.vocab_size)
    if len(pipe.tokenizer) != vocabulary_size:
        raise UserError(
            f"the tokenizer in {model} has {len(pipe.tokenizer)} tokens, its denoiser {vocabulary_size}: no pair"
        )
    return pipe
