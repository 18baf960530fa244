"""Reading examples from files, folders, the hub or the built-in corpus, and splitting them in two.

An example is a text, with or without the prompt that it answers. A corpus is two lists of examples. Where
embdiff splits them they share neither a prompt nor a text, so that scores on the validation side are never
scores on memory; validation data that you name yourself is kept whole, and only its exact pairs are dropped
from training.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

from embdiff.errors import UserError, reason
from embdiff.paths import local_path

Rows = Iterator[tuple[str, Mapping[str, object]]]  # (where the row is, for messages; column -> value)


@dataclass(frozen=True)
class Example:
    """One text to learn, and the prompt it answers if there is one."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Examples to train on and to validate with; `notes` are one-line remarks for the user."""

    train: list[Example]
    valid: list[Example]
    notes: list[str]


def load_corpus(
    data: str,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    separator: str | None = None,
    validation: str | None = None,
    valid_share: float = 0.05,
    limit: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Read `data` and hold some of it out, or read the held-out part from `validation`.

    Both are sources as in `read_examples`, read with the same options; `limit` applies to `data` only.
    Without `validation` a share of about `valid_share` (between 0 and 1) is held out by a hash of the
    prompt (of the text where there is none): see `split`. With `validation` that source is kept whole,
    and its examples are dropped from `data`. Raises UserError for bad input.
    """
    if not 0 < valid_share < 1:
        raise UserError(f"validation share {valid_share} is not between 0 and 1; try 0.05")

    options = _Options(text_column, prompt_column, separator)
    examples = _read(data, options, limit, progress)
    if validation is None:
        train, valid, notes = split(examples, valid_share)
    else:
        valid = _read(validation, options, None, progress)
        train, notes = _without(examples, valid)
        if not train:
            raise UserError(f"every example of {data!r} is also in {validation!r}; validate with others")
    return Corpus(train=train, valid=valid, notes=options.notes + notes)


def read_examples(
    data: str,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    separator: str | None = None,
    limit: int | None = None,
    progress: bool = True,
    note: Callable[[str], object] = lambda text: None,
) -> list[Example]:
    """All examples of one source with a text that is not blank, in order; at most the first `limit`.

    `data` is one of
      - a .txt file, one example a line; with `separator` a line is "prompt<separator>text";
      - a .jsonl, .csv, .tsv (both with a header) or .parquet file;
      - a folder, for all such files in and below it in the order of their paths, hidden ones left out and
        folders of training runs (with a run.yaml) too;
      - the word "docstrings", for the built-in corpus ("./docstrings" is a file or folder of that name);
      - a data set on the hub, "owner/name:config[split]": ":config" and "[split]" may be left out, and then
        it is the default configuration and the split "train". Slices such as "[train[:1000]]" do too.

    Tables have their text in `text_column`: by default the column "text" or else the first with strings,
    and then the column "prompt", if there is one, has the prompts. What the columns are is looked up in the
    first 100 rows. A row may lack its prompt, but not its text. A prompt, or label, that is a number or a list of
    texts becomes a text, joined by |. `note` is told of what was guessed. Raises UserError for bad input.
    """
    options = _Options(text_column, prompt_column, separator)
    examples = _read(data, options, limit, progress)
    for text in options.notes:
        note(text)
    return examples


@dataclass(frozen=True)
class _Options:
    text_column: str | None
    prompt_column: str | None
    separator: str | None
    notes: list[str] = field(default_factory=list)  # filled while reading


def _read(data: str, options: _Options, limit: int | None, progress: bool) -> list[Example]:
    if not data.strip():
        raise UserError(f"the data {data!r} is a blank name; give a file, a folder, a hub id or 'docstrings'")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves no example; give at least 1, or none for all")
    if options.separator == "":
        raise UserError("the separator is empty; give what stands between prompt and text, such as '||'")
    examples = list(islice(_examples(data, options, progress), None if limit is None else min(limit, sys.maxsize)))
    if not examples:
        raise UserError(f"{data!r} has no example that is not blank; give data with some text in it")
    return examples


def _examples(data: str, options: _Options, progress: bool) -> Iterator[Example]:
    path = local_path(data)
    if data == "docstrings":
        from embdiff import docstrings

        if any((options.text_column, options.prompt_column, options.separator)):
            raise UserError("docstrings has its prompts and texts already; leave columns and separator out")
        return iter(docstrings.build(progress=progress))
    if path.is_dir():
        return _folder_examples(path, options)
    if path.exists():
        return _file_examples(path, options)
    hub = _HUB_DATA.fullmatch(data)
    if hub is None or Path(hub["name"]).suffix.lower() in _READERS:
        raise UserError(f"no such file or folder: {data!r}; check the path")
    return _table_examples(_hub_rows(**hub.groupdict(), progress=progress), options)


def _folder_examples(folder: Path, options: _Options) -> Iterator[Example]:
    files = files_in(folder)
    if not files:
        where = f"{str(folder)!r}, hidden ones and training runs aside"
        raise UserError(f"no {_SUFFIXES} file in {where}; give a folder that has one")
    for file in files:
        yield from _file_examples(file, options)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that are data, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _READERS and path.is_file())
    # The logs and samples in the folder of a training run are no data.
    runs = {path.parent for path in folder.rglob("run.yaml")}
    own = [path for path in files if runs.isdisjoint(path.parents)]
    return [p for p in own if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def _file_examples(path: Path, options: _Options) -> Iterator[Example]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{str(path)!r} is of no known kind; give a {_SUFFIXES} file")
    return reader(path, options)


# --- lines of text ---------------------------------------------------------------------------------------


def _txt_examples(path: Path, options: _Options) -> Iterator[Example]:
    if options.text_column or options.prompt_column:
        raise UserError(f"{str(path)!r} has no columns, only lines; use a separator for prompts, or a table")
    for where, line in lines(path, _read_bytes(path)):
        prompt: str | None = None
        text = line
        if options.separator is not None:
            prompt, found, text = line.partition(options.separator)
            if not found:
                raise UserError(f"{where}: no separator {options.separator!r}; add it or choose another")
        if text.strip():
            yield _example(text.strip(), prompt.strip() if prompt else None)


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a file, or of stdin for `-`, stripped and without blank ones. what: it is called in errors."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    return [line.strip() for _, line in lines("stdin" if path == "-" else path, content)]


def lines(name: str | Path, content: bytes) -> Iterator[tuple[str, str]]:
    """(name:line, line) of the lines that are not blank. Only newlines end a line: U+2028 is just text."""
    for number, line in enumerate(_decode(name, content).split("\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", line


def _decode(name: str | Path, content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from None


def _example(text: str, prompt: str | None) -> Example:
    """A blank prompt is no prompt: it would tie together examples that have nothing in common."""
    return Example(text=text, prompt=prompt if prompt and prompt.strip() else None)


# --- tables ----------------------------------------------------------------------------------------------

_ROWS_TO_LOOK_AT = 100  # for columns: a single row may lack some


def _jsonl_rows(path: Path) -> Rows:
    for where, line in lines(path, _read_bytes(path)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter for objects in objects in objects ...
            raise UserError(f"{where}: not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object but {type(row).__name__}; write one object a line")
        yield where, row


def _csv_rows(path: Path) -> Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Strict: else a quote that nothing closes takes in the rest of the file.
    reader = csv.reader(io.StringIO(_decode(path, _read_bytes(path)), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not header:
                header = row
                if repeated := [name for name in header if header.count(name) > 1]:
                    raise UserError(f"{where}: two columns are named {repeated[0]!r}; rename one of them")
            elif row and len(row) != len(header):
                raise UserError(f"{where}: {len(row)} fields for {len(header)} columns; mind the quotes")
            elif row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; repair the line") from None


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"reading {str(path)!r} needs pyarrow; pip install 'embdiff[train]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, ValueError, ArrowException) as error:  # bad UTF-8 is among these
        raise UserError(f"cannot read {str(path)!r} as parquet: {reason(error)}; write the file again") from None


def _table_examples(rows: Rows, options: _Options) -> Iterator[Example]:
    first = list(islice(rows, _ROWS_TO_LOOK_AT))
    if not first:
        return
    text_column, prompt_column = _choose_columns(first, options)
    for where, row in chain(first, rows):
        text = _cell(where, row, text_column)
        prompt = _cell(where, row, prompt_column, True) if prompt_column is not None and prompt_column in row else None
        if text and text.strip():
            yield _example(text, prompt)


def _choose_columns(rows: Sequence[tuple[str, Mapping[str, object]]], options: _Options) -> tuple[str, str | None]:
    """Names of the text and the prompt column, from the options and the first rows."""
    where = rows[0][0]
    text, prompt = options.text_column, options.prompt_column
    columns: dict[str, set[type]] = {}  # of all rows, in order, with the types of their values
    for _, row in rows:
        for name, value in row.items():
            columns.setdefault(name, set()).add(type(value))
    if options.separator is not None:
        raise UserError(f"{where}: a separator is for .txt files; name the columns of a table instead")
    for named in (text, prompt):
        if named is not None and named not in columns:
            raise UserError(f"{where}: no column {named!r}; choose among {_names(columns)}")
    if text is not None:
        return text, prompt
    if prompt is None and "prompt" in columns:
        prompt = "prompt"
    strings = [name for name, types in columns.items() if types in ({str}, {str, type(None)})]
    candidates = [name for name in strings if name != prompt]
    if not candidates and options.prompt_column is None:  # "prompt" is all there is, so it is the text
        candidates, prompt = strings, None
    if "text" in columns and prompt != "text":
        candidates = ["text"]
    if not candidates:
        raise UserError(f"{where}: no column has text; the columns are {_names(columns)}: choose the text column")
    note = f"texts are column {candidates[0]!r}, " + (f"prompts column {prompt!r}" if prompt else "without prompts")
    if note not in options.notes:  # once for all files of a folder
        options.notes.append(note)
    return candidates[0], prompt


def _cell(where: str, row: Mapping[str, object], column: str, label: bool = False) -> str | None:
    """A text; of a prompt, which may be a label, numbers too, and lists of texts joined by |."""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; choose among {_names(row)}")
    value = row[column]
    if label and isinstance(value, int | float):  # True and False too
        value = str(value)
    elif label and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "|".join(value)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{where}: column {column!r} has {kind}, not text; choose among {_names(row)}")
    if value is not None and has_lone_surrogate(value):
        raise UserError(f"{where}: column {column!r} has half a character (a lone surrogate); repair the text")
    return value


def has_lone_surrogate(text: str) -> bool:
    """Whether there is half a character in a text, which no tokenizer takes: from JSON, or bytes that are not UTF-8."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(repr, columns)) or "none at all"


def _table(rows: Callable[[Path], Rows]) -> Callable[[Path, _Options], Iterator[Example]]:
    return lambda path, options: _table_examples(rows(path), options)


_READERS: dict[str, Callable[[Path, _Options], Iterator[Example]]] = {
    ".txt": _txt_examples,
    ".jsonl": _table(_jsonl_rows),
    ".csv": _table(_csv_rows),
    ".tsv": _table(_csv_rows),
    ".parquet": _table(_parquet_rows),
}
_SUFFIXES = ", ".join(_READERS)


# --- the hub ---------------------------------------------------------------------------------------------

_HUB_ID = r"\w[\w.-]*(?:/\w[\w.-]*)?"
_HUB_DATA = re.compile(rf"(?P<name>{_HUB_ID})(?::(?P<config>[^:/\[\]]+))?(?:\[(?P<split>.+)\])?", re.ASCII)


def looks_like_path(name: str) -> bool:
    """Whether a name cannot be a hub id ("name" or "owner/name") and so must mean a path."""
    return not re.fullmatch(_HUB_ID, name, re.ASCII)


@contextmanager
def hub_access() -> Iterator[None]:
    """Within it the hub's clients use their local cache only, at once, if the hub cannot be reached.

    Left alone they would retry for half a minute and more per file. HF_HUB_OFFLINE is heeded.
    """
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the reason and whichever HTTP library: not reachable
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_rows(name: str, config: str | None, split: str | None, progress: bool) -> Rows:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name!r} is no local file; for the hub: pip install 'embdiff[train]'") from None
    if not progress:
        datasets.disable_progress_bars()
    try:
        with hub_access():
            rows = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # no network, no such data set, a broken one; the library lists what there is
        raise UserError(
            f"{name!r} is neither a local file nor a data set that the hub gives ({reason(error, 300)}); "
            "check the name, written owner/name:config[split], and the network"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


# --- the split -------------------------------------------------------------------------------------------


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example], list[str]]:
    """(train, valid, notes): two parts in the given order that share neither a prompt nor a text.

    The side of an example depends on a hash of its prompt (its text where it has none) and on nothing
    else, so that it is the same in any order and beside any other examples. Examples of the validation
    side whose text is also on the train side are dropped, with a note. Only where one side would be left
    empty, as with a handful of examples, the prompt or text of the lowest hash that can stand alone is
    held out. Duplicates within the train side are kept: how often a thing is said is information.
    """
    held_out = {key for key in map(_key, examples) if _hash_unit(key) < share}
    train, valid, dropped = _divide(examples, held_out)
    if not (train and valid):
        train, valid, dropped = _divide(examples, _smallest_holdout(examples))
    notes = []
    if dropped:
        notes.append(f"{dropped:,} validation examples dropped, as their text is also in the training data")
    if not valid:
        notes.append("no validation examples: there are no two examples that share neither prompt nor text")
    return train, valid, notes


def _key(example: Example) -> str:
    return example.text if example.prompt is None else example.prompt


def _hash_unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, on every machine and in every process."""
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _divide(examples: Sequence[Example], held_out: set[str]) -> tuple[list[Example], list[Example], int]:
    """(train, valid, number of examples dropped because their text is on the train side)."""
    train = [example for example in examples if _key(example) not in held_out]
    valid = [example for example in examples if _key(example) in held_out]
    texts = {example.text for example in train}
    clean = [example for example in valid if example.text not in texts]
    return train, clean, len(valid) - len(clean)


def _smallest_holdout(examples: Iterable[Example]) -> set[str]:
    """The key of the lowest hash with a text that no other key has; empty if all belong together."""
    keys_of_text: defaultdict[str, set[str]] = defaultdict(set)
    for example in examples:
        keys_of_text[example.text].add(_key(example))
    alone = {key for keys in keys_of_text.values() if len(keys) == 1 for key in keys}
    if len(set().union(*keys_of_text.values())) < 2:
        return set()
    return set(sorted(alone, key=lambda key: (_hash_unit(key), key))[:1])


def _without(examples: Sequence[Example], valid: Iterable[Example]) -> tuple[list[Example], list[str]]:
    """`examples` less those that are in `valid`, prompt and text alike, and a note if there were any."""
    known = set(valid)
    train = [example for example in examples if example not in known]
    dropped = len(examples) - len(train)
    note = f"{dropped:,} training examples dropped, as they are also in the validation data"
    return train, [note] if dropped else []
