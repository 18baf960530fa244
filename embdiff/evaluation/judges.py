"""Judges: language models that say how likely texts are.

A judge scores text, never ids, so that it may have any tokenizer: it gives the nats of a whole text with its end, and a
mean is over words and ends. Judges with different tokenizers are so on one scale, as long as no word is `<unk>` to one
of them. None sees a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embdiff import vocabulary
from embdiff.errors import UserError, reason
from embdiff.evaluation.ngram import NGram

if TYPE_CHECKING:
    from embdiff.baselines import AutoregressiveModel
    from embdiff.pipeline import TextDiffusionPipeline

BATCH = 32


class Judge(Protocol):
    """name: as results show it. nats: -log p of each text and its end, [N]."""

    name: str

    def nats(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """-log p of each text and its end, [N]."""


def cross_entropy(judge: Judge, texts: Sequence[str]) -> float:
    """Nats per word and end of text. Raises UserError for no texts."""
    return a_word(costs(judge, texts))


def costs(judge: Judge, texts: Sequence[str]) -> list[tuple[float, int]]:
    """Nats of each text with its end, and its words and end, counted. Raises UserError for no texts."""
    if not texts:
        raise UserError("no texts: a mean needs at least one; pass the texts to score")
    return list(zip(judge.nats(texts).tolist(), (len(text.split()) + 1 for text in texts), strict=True))


def a_word(costs: Sequence[tuple[float, int]]) -> float:
    """Nats per word and end of the `costs` of texts, of which there is at least one."""
    nats, words = zip(*costs, strict=True)
    return float(sum(nats) / sum(words))


class NGramJudge:
    """An interpolated Kneser-Ney n-gram of real texts; words that it hasn't seen `min_count` times are `<unk>`."""

    def __init__(self, texts: Sequence[str], order: int = 5, min_count: int = 2) -> None:
        self.model = NGram.fit(texts, order=order, min_count=min_count)
        self.name = f"{order}-gram"

    def nats(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """-log p of each text and its end, [N]."""
        return np.array([-self.model.logprob(text).sum() for text in texts])


def check_words(judge: Judge, texts: Sequence[str]) -> None:
    """Refuses a judge to which most words of real texts are `<unk>`: it would find everything likely."""
    if isinstance(judge, NGramJudge):
        known, words = set(judge.model.vocabulary), [word for text in texts for word in text.split()]
        strange, fix = [word not in known for word in words], "name more of them with --judge-data, or another judge"
    elif isinstance(judge, AutoregressiveJudge | TransformersJudge):
        unknown = judge.tokenizer.unk_token_id
        ids = [token for text in texts for token in vocabulary.tokens(judge.tokenizer, text)]
        strange, fix = [token == unknown for token in ids], "name another judge"
    else:
        return
    share = 1 - sum(strange) / max(1, len(strange))
    if share < 0.5:
        raise UserError(
            f"the {judge.name} judge knows {share:.0%} of the held-out words, as its texts are few or of another kind: "
            + fix
        )


def check_judges(judges: Sequence[Judge], pipe: TextDiffusionPipeline, real: Sequence[str]) -> None:
    """Has each judge score a text as long as the model can write, pieced together from real ones.

    Raises UserError for a judge that can't: before hours of sampling, not behind them.
    """
    limit = int(pipe.denoiser.config.max_length)
    ids = vocabulary.tokens(pipe.tokenizer, " ".join(islice(cycle(real), limit)))[:limit]
    for judge in judges:
        judge.nats([vocabulary.decode(pipe.tokenizer, ids)])


class AutoregressiveJudge:
    """A model of `embdiff train --objective autoregressive`."""

    def __init__(self, model: AutoregressiveModel, tokenizer: Any, name: str = "autoregressive") -> None:
        if model.config.max_prompt_length:
            raise UserError(f"the judge {name} was trained with prompts, and judges see none: train it on texts alone")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name

    def nats(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """-log p of each text and its end, [N]; of what exceeds the model's length, nothing can be said.

        A text may fill that length, and its end be one position beyond: a diffusion model's may, and are to be judged.
        """
        from embdiff.batches import encode
        from embdiff.data import Example

        longest = int(self.model.config.max_length)
        encoded = encode([Example(text) for text in texts], self.tokenizer, longest + 1)
        if encoded.truncated:
            raise UserError(
                f"{encoded.truncated} texts are longer than the {longest} tokens of the judge {self.name}: "
                "train it with a larger --max-length"
            )
        parts = []
        with torch.no_grad():
            for start in range(0, len(encoded), BATCH):
                batch = encoded.batch(range(start, min(start + BATCH, len(encoded)))).to(self.model.device)
                parts.append(-self.model.log_probs(batch).double().sum(1).cpu().numpy())
        return np.concatenate(parts)


class TransformersJudge:
    """Any causal language model of transformers in a local folder, or of a name in the hub's cache."""

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True}
        options["trust_remote_code"] = False  # nor ask whether to
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            found, told = AutoModelForCausalLM.from_pretrained(source, **options)
        except Exception as error:
            raise UserError(
                f"{source!r} is no judge: neither a run of `embdiff train --objective autoregressive` nor a causal "
                f"language model of transformers ({reason(error)})"
            ) from error
        self.name = Path(source).name
        self.model: Any = found.eval().float().to(device)  # in one precision, whichever it was saved in
        if missing := sorted(told["missing_keys"]):
            raise UserError(f"the judge {source!r} lacks the weights {missing[0]}: choose a causal language model")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the judge {source!r} has no end-of-text token: choose another one")
        if not self._is_causal():
            raise UserError(f"the judge {source!r} sees the words that it judges: choose a causal language model")

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Whether another last token leaves what is said before it as it is."""
        row = torch.arange(8, device=self.model.device) % min(8, len(self.tokenizer))
        other = row.clone()
        other[-1] = row[0]
        one, two = self.model(torch.stack([row, other])).logits[:, :-1]
        return bool((one - two).abs().max() <= 1e-5 * one.abs().max())

    @torch.no_grad()
    def nats(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """-log p of each text and its end, [N], from the model's own start of text."""
        end = self.tokenizer.eos_token_id
        start = self.tokenizer.bos_token_id
        first = end if start is None else start
        limit = int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)
        scores = []
        for text in texts:  # one at a time: a batch would need masks, which not every model treats alike
            ids = [first, *self.tokenizer(text, add_special_tokens=False)["input_ids"], end]
            if len(ids) > limit:
                raise UserError(f"a text of {len(ids)} tokens is longer than the judge {self.name} reads ({limit})")
            row = torch.tensor([ids], device=self.model.device)
            logp = self.model(row).logits[0, :-1].double().log_softmax(-1)
            scores.append(-float(logp.gather(-1, row[0, 1:, None]).sum()))
        return np.array(scores)


def judge_of(spec: str, real: Sequence[str], device: torch.device | str = "cpu") -> Judge:
    """A judge by its spec: "N-gram" is fitted to `real`, anything else is a folder (or a name in the hub's cache).

    Raises UserError for what is neither.
    """
    if spec.endswith("-gram"):
        if not re.fullmatch("[1-9]-gram", spec):
            raise UserError(f"judge {spec!r} is unknown: give 1-gram to 9-gram, or a model's folder")
        return NGramJudge(real, int(spec[0]))
    folder = Path(spec)
    if (folder / "run.yaml").exists():
        from embdiff.baselines import AutoregressiveModel, load

        model, tokenizer = load(folder)
        if not isinstance(model, AutoregressiveModel):
            raise UserError(
                f"{folder} holds a {type(model).__name__}, which gives no likelihoods: use an autoregressive one"
            )
        return AutoregressiveJudge(model.to(device), tokenizer, folder.name)
    return TransformersJudge(spec, device)
