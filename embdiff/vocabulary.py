"""Tokenizers: byte-level BPE or whole words learned from the texts at hand, or one that exists already.

All are tokenizers of transformers, saved with `save_pretrained` and loaded with `load`. The learned ones
have <pad>, <bos>, <eos> and <unk> as ids 0 to 3, and add none of them to a text by themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from embdiff.data import hub_access, looks_like_path
from embdiff.errors import UserError, reason
from embdiff.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_BYTES = 256


def build(spec: str, texts: Iterable[str], *, vocab_size: int = 8192, min_count: int = 2) -> PreTrainedTokenizerBase:
    """A tokenizer by its spec: "bpe" and "word" learn one from `texts`, anything else is given to `load`."""
    if spec == "bpe":
        return train_bpe(texts, vocab_size)
    if spec == "word":
        return train_word(texts, min_count)
    return load(spec)


def train_bpe(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is out of vocabulary, and decoding gives back every text exactly.

    `vocab_size` counts the 4 specials and the 256 bytes; few texts may give fewer entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = len(SPECIALS) + _BYTES
    if vocab_size < smallest:
        raise UserError(f"vocabulary size {vocab_size} has no room for all bytes; give at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_non_empty(texts), trainer)
    return _wrap(tokenizer)


def train_word(texts: Iterable[str], min_count: int = 2) -> PreTrainedTokenizerFast:
    """Words between whitespace that occur at least `min_count` times; all others are <unk>.

    Ids go by descending count, then by alphabet, after the 4 specials. Decoding joins the words with single blanks.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    if min_count < 1:
        raise UserError(f"minimum word count {min_count} is below 1; give 1 to keep every word")
    counts = Counter(word for text in _non_empty(texts) for word in text.split())
    specials = list(SPECIALS.values())
    words = [word for word, count in counts.items() if count >= min_count and word not in specials]
    if not words:
        raise UserError(f"no word occurs {min_count} times; lower the minimum word count or give more text")
    entries = specials + sorted(words, key=lambda word: (-counts[word], word))
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # What looks like a special token is a word that isn't known, not an end.
    tokenizer.normalizer = normalizers.Replace(Regex(r"(?<!\S)<(pad|bos|eos)>(?!\S)"), SPECIALS["unk_token"])
    return _wrap(tokenizer)


def load(name_or_path: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or the hub; <pad> and <eos> are added where it has none.

    Raises UserError if it cannot be had, at once if the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    path = local_path(name_or_path)
    if not path.exists() and looks_like_path(name_or_path):
        raise UserError(f"no such tokenizer folder: {name_or_path!r}; check the path, or use 'bpe' or 'word'")
    try:
        with nullcontext() if path.exists() else hub_access():
            # Without remote code, and without the question whether to trust it.
            name = str(path) if path.exists() else name_or_path
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # no network, no such model, a broken file: the library has many errors
        raise UserError(
            f"{name_or_path!r} is neither a tokenizer folder nor one that the hub gives ({reason(error)}); "
            "check the name and the network, or use 'bpe' or 'word'"
        ) from None
    tokenizer.split_special_tokens = True  # an end that stands in a text is characters
    needed = ("pad_token", "eos_token")
    if missing := {role: SPECIALS[role] for role in needed if getattr(tokenizer, role) is None}:
        tokenizer.add_special_tokens(missing)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # The end of a text and what follows it are two things to predict.
        tokenizer.add_special_tokens({"pad_token": SPECIALS["pad_token"]})
    return tokenizer


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def before_end(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[int]:
    """The ids up to the first <eos> or <pad>: what follows is not part of the text."""
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return list(takewhile(lambda i: i not in ends, map(int, ids)))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of one sequence of ids: up to the first <eos> or <pad>, without <bos>, with <unk> visible."""
    kept = [i for i in before_end(tokenizer, ids) if i != tokenizer.bos_token_id]
    text: str = tokenizer.decode(kept, skip_special_tokens=False)
    return text


@lru_cache(maxsize=4)
def pieces(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """What each token adds to a text that has begun; None for special tokens but <unk>, which is read as a word.

    Where the tokenizer sets blanks between tokens, they are the following one's.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    words = (i for i in range(len(tokenizer)) if i not in special)
    before = max(words, key=lambda i: tokenizer.decode([i]).strip().isalpha())  # the first one, or else any token
    begun = tokenizer.decode([before])
    texts = tokenizer.batch_decode([[before, i] for i in range(len(tokenizer))])
    return [None if i in special else text.removeprefix(begun) for i, text in enumerate(texts)]


def sets_blanks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token of a text is written without the blank that it has elsewhere."""
    found = pieces(tokenizer)
    words = (i for i, text in enumerate(found) if text and text.startswith(" ") and text.strip())
    word = next(words, None)
    return word is not None and bool(tokenizer.decode([word]) != found[word])


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary (which token has which id), to tell whether two tokenizers agree."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _wrap(tokenizer: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,  # "a ." stays "a ."
        split_special_tokens=True,  # "<eos>" in a text is five characters, not an end
        **SPECIALS,
    )


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise UserError("no texts to learn a vocabulary from; give at least one")
    return chain([first], iterator)
