"""The built-in corpus: pairs (signature, first sentence of its docstring) from the Python that runs us.

Nothing is downloaded and nothing is shipped. The standard library and the installed packages are read
as source text and never imported, so the corpus differs a little between machines; a cached copy makes
the second build instant.

    prompt  "def Path.exists(follow_symlinks=True)"
    text    "Whether this path exists."
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from embdiff.data import Example
from embdiff.errors import UserError
from embdiff.paths import cache_dir

Pair = tuple[str, str]  # (prompt, text)

_FORMAT = 1  # raise it when the rules below change, so that older cached copies are left aside
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "site-packages", "dist-packages"}
_MAX_FILE_BYTES = 1_000_000  # larger sources are generated tables, slow to parse and without prose
_MAX_PROMPT_CHARS = 120
_MAX_DEFAULT_CHARS = 20
_MIN_WORDS, _MAX_WORDS = 3, 30
_MIN_LETTERS = 0.8  # of all characters but blanks
_MAX_TEXT_CHARS = 600  # far more than a sentence; bounds the work on a docstring that is one long table


def build(roots: Sequence[Path] | None = None, *, progress: bool = True, refresh: bool = False) -> list[Example]:
    """All pairs under `roots` (default: `default_roots()`), without exact duplicates, in order of file paths.

    A file that cannot be read or parsed is passed over. The result is cached in `cache_dir()`, under a key
    of the roots, the Python version and the distributions installed in the roots; `refresh` builds it
    again, as is needed after files were edited in place. `progress` shows a bar on stderr if that is a
    terminal. Raises UserError if there is no pair at all.
    """
    folders = sorted({Path(root).resolve() for root in (default_roots() if roots is None else roots)})
    cached = cache_dir() / f"docstrings-{_fingerprint(folders)}.json"
    pairs = None if refresh else _read_cache(cached)
    if pairs is None:
        pairs = _collect(_source_files(folders), progress)
        if not pairs:
            names = ", ".join(map(str, folders)) or "no folder at all"
            raise UserError(f"no documented Python source in {names}; give a folder with some, or other data")
        _write_cache(cached, pairs)
    return [Example(text=text, prompt=prompt) for prompt, text in pairs]


def default_roots() -> list[Path]:
    """The standard library and every site-packages folder on `sys.path`, each once."""
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    packages = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return sorted({path.resolve() for path in library + packages if path.is_dir()})


# --- from files to pairs ---------------------------------------------------------------------------------


def _source_files(roots: Iterable[Path]) -> list[Path]:
    """The .py files under the roots, each once, sorted; tests, hidden folders and nested
    site-packages are left out (the latter are roots of their own where they matter)."""
    files: set[Path] = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith(".")]
            files.update(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(files)


def _collect(files: Sequence[Path], progress: bool) -> list[Pair]:
    unique: dict[Pair, None] = {}  # a dict keeps the order of first appearance
    with _file_results(files) as results:
        for pairs in _with_bar(results, len(files), progress):
            unique.update(dict.fromkeys(pairs))
    return list(unique)


@contextmanager
def _file_results(files: Sequence[Path]) -> Iterator[Iterable[list[Pair]]]:
    """`file_pairs` of every file, in order, from one process per core where that pays."""
    cores = _cores()
    in_worker = multiprocessing.parent_process() is not None
    pool = None
    if cores > 1 and len(files) > 100 and not in_worker:
        try:
            pool = _start_pool(cores)
        except (OSError, ImportError, RuntimeError):  # e.g. a sandbox without semaphores: one core will do
            pool = None
    if pool is None:
        yield map(file_pairs, files)
        return
    with pool:
        yield pool.imap(file_pairs, files, chunksize=16)


def _cores() -> int:
    """The cores that we may use: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_pool(cores: int) -> multiprocessing.pool.Pool:
    # Forked workers need no guard around the caller's main module. They only parse text, so the threads
    # that a caller may have started (what Python >= 3.12 warns of) do not matter to them. Syntax trees
    # have no reference cycles: collecting garbage there would be a third of the time, for nothing.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return context.Pool(cores, initializer=_prepare_worker)


def _prepare_worker() -> None:
    gc.disable()
    # A caller's own handlers would be inherited: the pool ends its workers with SIGTERM, and Ctrl-C is the caller's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _with_bar(results: Iterable[list[Pair]], total: int, progress: bool) -> Iterator[list[Pair]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = progress and console.is_terminal
    label = "Reading docstrings"
    yield from track(results, label, total=total, console=console, transient=True, disable=not shown)


def file_pairs(path: Path) -> list[Pair]:
    """The pairs of one source file, in order of appearance; none if it cannot be read or parsed."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return []
        source = path.read_bytes()  # bytes, so that the parser heeds an encoding declaration
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_tree_pairs(ast.parse(source).body, ""))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _tree_pairs(body: Iterable[ast.stmt], owner: str) -> Iterator[Pair]:
    """Pairs of the classes, functions and methods in `body`; `owner` is the enclosing class ("" if none)."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            text = first_sentence(docstring) if docstring else None
            if text is not None:
                yield signature(node, owner), text
            if isinstance(node, ast.ClassDef):
                yield from _tree_pairs(node.body, f"{owner}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform or an import
            yield from _tree_pairs([*node.body, *node.orelse], owner)


# --- the prompt ------------------------------------------------------------------------------------------


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, owner: str = "") -> str:
    """One line of at most about 120 characters, without annotations, `self` and `cls`; what is too long
    becomes an ellipsis. `owner` goes before the name, as in "def Path.exists(...)"."""
    if isinstance(node, ast.ClassDef):
        bases = [_short(base, 40) for base in node.bases]
        head = f"class {owner}{node.name}"
        return _join(head, bases) if bases else head
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    arguments = _arguments(node.args)
    if owner and arguments and arguments[0] in ("self", "cls"):
        arguments = arguments[1:]
    return _join(f"{keyword} {owner}{node.name}", arguments)


def _arguments(args: ast.arguments) -> list[str]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(args.defaults)), *args.defaults]
    shown = [_argument(a, d) for a, d in zip(positional, defaults, strict=True)]
    if args.vararg:
        shown.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        shown.append("*")
    shown += [_argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        shown.append(f"**{args.kwarg.arg}")
    return shown


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    return arg.arg if default is None else f"{arg.arg}={_short(default, _MAX_DEFAULT_CHARS)}"


def _short(node: ast.expr, limit: int) -> str:
    """The source of an expression, or an ellipsis if that is longer than `limit` characters."""
    source = ast.unparse(node)
    return source if len(source) <= limit and source.isprintable() else "..."


def _join(head: str, parts: list[str]) -> str:
    """A line such as "head(a, b)", cut to "head(a, ...)" where it would grow too long."""
    line = f"{head}({', '.join(parts)})"
    while parts and len(line) > _MAX_PROMPT_CHARS:
        parts = parts[:-1]
        line = f"{head}({', '.join([*parts, '...'])})"
    return line


# --- the text --------------------------------------------------------------------------------------------

_MARKUP = [
    (re.compile(r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`"), r"\1"),  # :class:`~a.B`      -> B
    (re.compile(r":[\w:+-]+:`([^`<]+?)\s*<[^`>]*>`"), r"\1"),  # :ref:`title <goal>` -> title
    (re.compile(r":[\w:+-]+:`!?([^`]+)`"), r"\1"),  # :func:`f`                      -> f
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `title <address>`_         -> title
    (re.compile(r"\[`~?(?:\w+\.)*(\w+)`\](?:\([^)]*\))?"), r"\1"),  # [`~a.B`]          -> B
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [title](address)               -> title
    (re.compile(r"`+([^`]*)`+_?"), r"\1"),  # ``x``, `x`                             -> x
    (re.compile(r"\*\*([^*]+)\*\*|(?<!\w)\*(\w[^*]*\w)\*(?!\w)"), r"\1\2"),  # **x**, *xx* -> x, xx
    (re.compile(r"\|(\w+)\|"), r"\1"),  # |x|                                        -> x
]
# A paragraph ends at a blank line, a heading such as "Args:", a field such as ":param x:" or an underline.
_PARAGRAPH_END = re.compile(
    r"\n\s*(?:\n|(?:Args|Arguments|Attributes|Examples?|Notes?|Param(?:eter)?s|Raises|Returns|Yields)\s*:"
    r"|:\w+[ :]|---|===|>>>)"
)
# A sentence ends where a mark is followed by a blank and no lower case, unless it closes an abbreviation.
_ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\b[A-Z])"
_SENTENCE_END = re.compile(_ABBREVIATIONS + r"[.!?](?=\s+[^a-z]|$)")
_PROSE = re.compile(r"[A-Za-z][\w \-.,;:!?'\"()/&%+*]*[.!?]", re.ASCII)
_NOT_PROSE = re.compile(
    r"--|\.\.\.|\*\*|__|https?:|::|\w\(\w+=|^\w+\(|^\w+( \([^)]*\))?:|\w+\.\w+\.\w+\.\w|"
    r"^(?:args|arguments|attributes|copyright|example|examples|note|notes|parameters|params|returns|"
    r"todo|usage|warning|xxx|see also)\b\s*[:\-.]",
    re.IGNORECASE,
)
_ORPHANED_COLON = re.compile(r"[:,;]\.$")


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring as plain English, or None if it does not read as such.

    Markup is taken off, whitespace collapsed and a missing full stop added. What remains must be ASCII,
    start with a letter, have 3 to 30 words and consist mostly of letters.
    """
    paragraph = " ".join(_PARAGRAPH_END.split(docstring.strip(), maxsplit=1)[0].split())[:_MAX_TEXT_CHARS]
    if paragraph.count(" ") < _MIN_WORDS - 1:
        return None
    for pattern, plain in _MARKUP:
        paragraph = pattern.sub(plain, paragraph)
    end = _SENTENCE_END.search(paragraph)
    text = paragraph[: end.end()] if end else paragraph.rstrip(" .") + "."
    return text if _is_prose(text) else None


def _is_prose(text: str) -> bool:
    words = text.split()
    return (
        _MIN_WORDS <= len(words) <= _MAX_WORDS
        and _PROSE.fullmatch(text) is not None
        and not _NOT_PROSE.search(text)
        and not _ORPHANED_COLON.search(text)
        and text.count("(") == text.count(")")
        and text.count('"') % 2 == 0
        and sum(map(str.isalpha, text)) >= _MIN_LETTERS * sum(map(len, words))
        and max(map(len, words)) <= 40
    )


# --- the cache -------------------------------------------------------------------------------------------


def _fingerprint(roots: Iterable[Path]) -> str:
    folders = [str(root) for root in roots]
    installed = importlib.metadata.distributions(path=folders)
    # A half-removed package may have no metadata left: its name is None then.
    versions = sorted((str(d.metadata["Name"]), str(d.version)) for d in installed if d.metadata)
    key = json.dumps([_FORMAT, sys.version_info[:3], folders, versions])
    return blake2b(key.encode(), digest_size=8).hexdigest()


def _read_cache(path: Path) -> list[Pair] | None:
    """The cached pairs, or None if there are none that can be used."""
    try:
        pairs = [(str(prompt), str(text)) for prompt, text in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):  # absent, unreadable or damaged: build again
        return None
    return pairs or None


def _write_cache(path: Path, pairs: list[Pair]) -> None:
    """Write all or nothing, so that a reader beside us never sees half a file; a failure costs only time."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump(pairs, file)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(
            f"the docstring corpus cannot be kept in {path.parent} ({error.strerror}), so it is built anew "
            "each time; let EMBDIFF_CACHE name a folder that can be written",
            stacklevel=3,
        )
