"""Vocabularies: the learned ones give back the text, keep the specials apart and survive saving."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff.errors import UserError
from embdiff.vocabulary import (
    before_end,
    build,
    decode,
    fingerprint,
    load,
    pieces,
    sets_blanks,
    train_bpe,
    train_word,
)

TEXTS = ["the cat sat .", "the dog sat , the cat ran .", "naïve café   two  blanks", "the end"] * 3
BPE = train_bpe(TEXTS, 300)
WORD = train_word(TEXTS, 4)


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


@pytest.mark.parametrize("tokenizer", [BPE, WORD], ids=["bpe", "word"])
def test_the_specials_are_the_first_ids_and_never_added(tokenizer: Any) -> None:
    names = ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    specials = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert list(specials) == names
    assert not {0, 1, 2} & set(encode(tokenizer, "the cat sat ."))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@given(st.text() | st.lists(st.sampled_from(["<eos>", "<pad>", " ", "the", "\n", "."])).map("".join))
def test_bpe_gives_back_every_text(text: str) -> None:
    assert decode(BPE, encode(BPE, text)) == text
    assert BPE.decode(encode(BPE, text), skip_special_tokens=True) == text


@given(
    st.lists(st.sampled_from(["the", "cat", "sat", "zebra", "<unk>", "x,y"])),
    st.sampled_from([" ", "  ", "\n"]),
)
def test_words_come_back_with_single_blanks_and_visible_unknowns(words: list[str], blank: str) -> None:
    known = set(WORD.get_vocab())
    expected = " ".join(word if word in known else "<unk>" for word in words)
    assert decode(WORD, encode(WORD, blank.join(words))) == expected


def test_what_looks_like_an_end_is_an_unknown_word(tmp_path: Path) -> None:
    text = "the cat <eos> sat <pad> ."
    assert decode(WORD, encode(WORD, text)) == "the cat <unk> sat <unk> ."
    foreign = train_bpe(TEXTS, 300)
    foreign.split_special_tokens = False
    foreign.save_pretrained(tmp_path)
    assert decode(load(str(tmp_path)), encode(load(str(tmp_path)), text)) == text


def test_what_tokens_add_is_known_where_none_is_letters_alone() -> None:
    numbers = train_word(["60 64 67", "note_60 dur_4"], 1)
    assert set(pieces(numbers)) == {None, " <unk>", " 60", " 64", " 67", " note_60", " dur_4"}
    assert sets_blanks(numbers)


@given(st.lists(st.text(alphabet="abc ", max_size=12), min_size=1).filter(lambda ts: any(map(str.split, ts))))
def test_word_ids_go_by_count_and_then_by_alphabet(texts: list[str]) -> None:
    counts = Counter(word for text in texts for word in text.split())
    tokenizer = train_word(texts, 1)
    words = sorted(counts, key=tokenizer.convert_tokens_to_ids)  # type: ignore[arg-type]
    assert words == sorted(counts, key=lambda word: (-counts[word], word))
    assert len(tokenizer) == len(counts) + 4


def test_decode_cuts_at_the_end_and_drops_bos() -> None:
    cat, sat = encode(WORD, "cat sat")
    assert decode(WORD, [1, cat, 3, sat, 2, cat]) == "cat <unk> sat"
    assert decode(WORD, [cat, 0, 0, sat]) == "cat"
    assert decode(WORD, [2]) == decode(WORD, []) == ""
    assert before_end(WORD, [1, cat, 2, sat]) == before_end(WORD, [1, cat, 0, sat, 2]) == [1, cat]


@pytest.mark.parametrize("tokenizer", [BPE, WORD], ids=["bpe", "word"])
def test_saving_keeps_all(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save_pretrained(tmp_path)
    text = "the naïve  cat <eos> sat ."
    for again in (load(str(tmp_path)), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert fingerprint(again) == fingerprint(tokenizer)
        assert encode(again, text) == encode(tokenizer, text)
        assert decode(again, encode(again, text)) == decode(tokenizer, encode(tokenizer, text))
        assert len(again) == len(tokenizer)
        assert again.pad_token_id == 0


def test_fingerprints_tell_vocabularies_apart() -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert fingerprint(train_word(shuffled, 4)) == fingerprint(WORD)
    assert fingerprint(train_word(TEXTS, 1)) != fingerprint(WORD) != fingerprint(BPE)


def test_a_loaded_tokenizer_gets_what_it_lacks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    bare.save_pretrained(tmp_path)
    tokenizer = load(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id} == {2, 3}


def test_build_follows_the_spec(tmp_path: Path) -> None:
    assert len(build("bpe", TEXTS, vocab_size=270, min_count=1)) == 270
    assert fingerprint(build("word", TEXTS, vocab_size=270, min_count=4)) == fingerprint(WORD)
    WORD.save_pretrained(tmp_path)
    assert fingerprint(build(str(tmp_path), [], vocab_size=270, min_count=4)) == fingerprint(WORD)


def test_bad_input_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    calls = [
        lambda: train_bpe([]),
        lambda: train_bpe(["a"], 259),
        lambda: train_word([]),
        lambda: train_word(["a b"], 0),
        lambda: train_word(["a b"], 2),
        lambda: load("./none"),
        lambda: load("~no.such.user/none"),
        lambda: load("nobody/no-such-tokenizer"),
        lambda: load(str(tmp_path)),
    ]
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
