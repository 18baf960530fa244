"""The E2E data set: its meanings, its references, the two ways in which its texts are written, and BLEU on it.

E2E is Novikova, Dušek & Rieser (2017), "The E2E dataset: new challenges for end-to-end generation"; a
meaning is its `name[...], eatType[...]` form, a source the `name : ... | Type : ...` form of the
tokenised corpus that models are trained on.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from embdiff.errors import UserError
from embdiff.evaluation import metrics

# The attributes of a meaning and their names in a source, in the order of a source.
_ATTRIBUTES = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}

_CLITIC = r"'(?:s|re|ll|ve|m|d)\b"


def _rules(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


_SPLITS = _rules(
    (r"n 't\b", "n't"),  # the corpus cuts "is n't" in its test part, "isn 't" in the others
    (rf"(?<=[^\W\d_])(n't\b|{_CLITIC})", r" \1"),
    (r'([£$;:?!()"])', r" \1 "),
    (r",(?!\d)", " , "),
    (r"(?<=[^\W\d_])-(?=\w)|(?<=\d)-(?=[\s\d])", " - "),  # kid-friendly and 20-25, but not 5-star
    (r"((?<=[a-z0-9])\.(?=[A-Z])|(?<![\s.])\.+(?=[\s']|$))", r" \1 "),
    (rf"(?<!\S)(?!{_CLITIC})'|'(?!\S)", " ' "),
)

_JOINS = _rules(
    (r" (?=[.,;:?!)](?:\s|$))", ""),
    (r"\( ", "("),
    (r" ?n ?'t\b", "n't"),
    (rf" (?={_CLITIC})", ""),
    (r"([£$]) (?=\d)", r"\1"),
    (r"(?<=\w) ?- ?(?=[\w£])", "-"),
    (r"(?<!\S)' ([^']*) '(?!\w)", r"'\1'"),
)


def read_e2e_references(path: str | Path) -> list[tuple[str, list[str]]]:
    """The meanings of an E2E file with columns mr and ref, each with its references, in file order.

    References are as written there, not tokenised. Raises UserError for a file that cannot be read
    or lacks the columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
        references: dict[str, list[str]] = {}
        for row in rows:
            references.setdefault(row["mr"], []).append(row["ref"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable ({error}); pass the E2E csv file with references") from error
    except KeyError as error:
        raise UserError(f"{path}: no column {error}; pass a csv file with the columns mr and ref") from error
    return list(references.items())


def meaning_to_source(meaning: str) -> str:
    """The source of a meaning: `name[Strada], priceRange[£20-25]` to `name : Strada | price : £ 20 - 25`.

    Raises UserError for a meaning of another form or with an attribute that E2E does not have.
    """
    values: dict[str, str] = dict(re.findall(r"([^,\[\]]+)\[([^\[\]]*)\](?:, |$)", meaning))
    understood = ", ".join(f"{key}[{value}]" for key, value in values.items())
    if not meaning or understood != meaning or not values.keys() <= _ATTRIBUTES.keys():
        names = ", ".join(_ATTRIBUTES)
        raise UserError(f"{meaning!r}: not an E2E meaning; write 'name[...], ...' with {names}")
    pairs = ((name, values[key]) for key, name in _ATTRIBUTES.items() if key in values)
    return " | ".join(f"{name} : {tokenize(value)}" for name, value in pairs)


def tokenize(text: str) -> str:
    """`text` with its tokens set apart by one blank, as the E2E corpus for training writes it.

    The corpus is not cut alike in all its parts; this settles on the form of the test part, and a
    text already tokenised only loses the differences ("isn 't" becomes "is n't").
    """
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def detokenize(text: str) -> str:
    """Tokenised `text` as one would write it; a written text stays itself but for stray blanks."""
    text = " ".join(text.split())
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = True,
    tokenize: str = "13a",
) -> float:
    """BLEU-4 of `hypotheses` against one or more references each, from 0 to 100; see `metrics.corpus_bleu`.

    The defaults are those of the E2E challenge's script (e2e-metrics runs mteval-v13a): its
    tokenisation, case ignored. Hypotheses may be written or tokenised text. "13a" detokenizes them,
    takes references as they are, and leaves the cutting to mteval's rules, under which kid-friendly
    is one token; "e2e" scores the tokens of `tokenize` on both sides, where it is three.

    Raises UserError for no hypotheses, another number of reference lists, an empty one, an unknown
    tokenisation, or sacrebleu not installed.
    """
    if tokenize not in _FORMS:
        raise UserError(f"tokenize={tokenize!r}: not a tokenisation; pass one of {', '.join(_FORMS)}")
    metrics.check_references(hypotheses, references)
    form, of_references, scheme = _FORMS[tokenize]
    return metrics.corpus_bleu(
        [form(text) for text in hypotheses],
        [[of_references(text) for text in texts] for texts in references],
        lowercase=lowercase,
        tokenize=scheme,
    )


# By tokenisation: what is done to hypotheses and to references, and what sacrebleu does next.
_FORMS: dict[str, tuple[Callable[[str], str], Callable[[str], str], str]] = {
    "13a": (detokenize, str, "13a"),
    "e2e": (tokenize, tokenize, "none"),
}
