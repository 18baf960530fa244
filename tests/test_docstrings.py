"""The built-in corpus: what is taken from source files, what is not, and how it is cached."""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embdiff import docstrings
from embdiff.data import Example
from embdiff.docstrings import build, first_sentence, signature
from embdiff.errors import UserError

SOURCE = '''
"""A module docstring is not taken."""

def area(width: float, height: float = 1.0, *, unit="m") -> float:
    """Return the area of a rectangle. More is said here."""

class Shape(Base, metaclass=Meta):
    """Something that can be drawn

    and measured.
    """

    async def draw(self, canvas, **options):
        """Draw the shape on ``canvas`` with :class:`~shapes.Pen`."""

    @classmethod
    def of(cls, *points):
        "Too short."

    def undocumented(self): pass

if True:
    def _late():
        """Defined in a branch of the module."""
'''

EXPECTED = [
    Example("Return the area of a rectangle.", "def area(width, height=1.0, *, unit='m')"),
    Example("Something that can be drawn.", "class Shape(Base)"),
    Example("Draw the shape on canvas with Pen.", "async def Shape.draw(canvas, **options)"),
    Example("Defined in a branch of the module.", "def _late()"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for folder in (root / "sub", root / "tests", root / ".hidden"):
        folder.mkdir(parents=True)
        (folder / "copy.py").write_text('def spare(n):\n    """Comes from the folder %s."""\n' % folder.name)  # noqa: UP031
    (root / "good.py").write_text(SOURCE)
    (root / "good_again.py").write_text(SOURCE)
    (root / "broken.py").write_text('def broken(:\n    """Never seen by anyone at all."""\n')
    (root / "binary.py").write_bytes(b'"""\x00\xff\xfe"""')
    (root / "deep.py").write_text('"""deep"""\n' + "(" * 5000 + ")" * 5000)
    (root / "warned.py").write_text('def warned():\n    """Has a strange \\d escape in it."""\n')
    (root / "latin.py").write_bytes(b'# coding: latin-1\ndef caf\xe9():\n    """Says hello in French."""\n')
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    return root


def test_pairs_come_in_order_without_duplicates_and_without_warnings(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = build([root])
    french = Example("Says hello in French.", "def café()")
    sub = Example("Comes from the folder sub.", "def spare(n)")
    assert examples == [*EXPECTED, french, sub]


def test_many_files_in_a_pool_give_what_one_core_gives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(150):
        (root / f"m{i:03}.py").write_text(f'def f{i}(x):\n    """Adds the number {i} to it."""\n')
    monkeypatch.setattr(docstrings, "_cores", lambda: 2)
    pooled = build([root], refresh=True)
    monkeypatch.setattr(docstrings, "_cores", lambda: 1)
    assert build([root], refresh=True) == pooled
    monkeypatch.setattr(docstrings, "_cores", lambda: 2)
    monkeypatch.setattr(docstrings, "_start_pool", lambda cores: (_ for _ in ()).throw(OSError()))
    assert build([root], refresh=True) == pooled


def test_cores_are_those_that_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert docstrings._cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert docstrings._cores() == 64


def test_the_cache_answers_until_refreshed_and_survives_damage(root: Path, cache: Path) -> None:
    first = build([root])
    (file,) = cache.iterdir()
    (root / "good.py").unlink()
    (root / "good_again.py").unlink()
    assert build([root]) == first
    assert len(build([root], refresh=True)) == len(first) - len(EXPECTED)
    for damaged in ("", "[[1]]", "{", "null", "[]"):
        file.write_text(damaged)
        assert len(build([root])) == len(first) - len(EXPECTED)
    assert list(cache.iterdir()) == [file]


def test_an_installed_package_changes_the_key(root: Path, cache: Path) -> None:
    build([root])
    (root / "thing-1.0.dist-info").mkdir()
    (root / "thing-1.0.dist-info" / "METADATA").write_text("Name: thing\nVersion: 1.0\n")
    build([root, root])  # a root given twice counts once
    assert len(list(cache.iterdir())) == 2


def test_without_a_writable_cache_there_is_a_warning_and_the_corpus(root: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="EMBDIFF_CACHE"):
        assert build([root])


def test_no_source_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        build([tmp_path / "none"])
    with pytest.raises(UserError):
        build([])


def test_default_roots_exist_once_and_hold_the_standard_library() -> None:
    roots = docstrings.default_roots()
    assert len(set(roots)) == len(roots)
    assert any((root / "argparse.py").is_file() for root in roots)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x, e.g. a number. Then more.", "Return x, e.g. a number."),
        ("Load the [title](http://a.b) of [`~a.B`].\n\nMore.", "Load the title of B."),
        ("See :ref:`the guide <guide>`  and\n   **do** it", "See the guide and do it."),
        ("Add two numbers\nArgs:\n  x: one", "Add two numbers."),
        ("Add two numbers\n:param x: one", "Add two numbers."),
        ("Is it a number? Yes.", "Is it a number?"),
        ("Parameters\n----------\nx : int", None),
        ("Args: x (int): a number of things.", None),
        ("x (int, optional): a number of things.", None),
        (">>> run this example now", None),
        ("Two words.", None),
        ("один два три четыре.", None),
        ("word " * 40, None),
        ("", None),
    ],
)
def test_first_sentences(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


@given(st.text() | st.from_regex(r"[A-Z][a-z]+( [a-z*`:.\[\]()]+){2,40}", fullmatch=True))
def test_what_passes_is_one_plain_line(docstring: str) -> None:
    text = first_sentence(docstring)
    if text is not None:
        assert text.isascii()
        assert text[0].isalpha()
        assert text[-1] in ".!?"
        assert 3 <= len(text.split()) <= 30
        assert text == " ".join(text.split())


@given(st.lists(st.from_regex(r"[a-z]{1,40}", fullmatch=True), max_size=30))
def test_signatures_are_short_single_lines(names: list[str]) -> None:
    arguments = ", ".join(f"arg_{name}{i}" for i, name in enumerate(names))
    (node,) = ast.parse(f"def f({arguments}): pass").body
    assert isinstance(node, ast.FunctionDef)
    line = signature(node)
    assert len(line) <= 120
    assert line.startswith("def f(")
    assert line.endswith(")")
    assert ("..." in line) == (len(f"def f({arguments})") > 120)


def test_the_build_ends_under_a_callers_signal_handlers(tmp_path, monkeypatch):
    """Forked workers inherit handlers; one that ignores SIGTERM would keep the pool from closing."""
    from embdiff.cli.train import StopSignal

    for k in range(300):
        (tmp_path / f"m{k}.py").write_text(f'def f{k}(a):\n    """Return the number {k} of this file."""\n')
    monkeypatch.setattr(docstrings, "_cores", lambda: 2)
    with StopSignal():
        for _ in range(5):
            assert len(docstrings.build([tmp_path], progress=False, refresh=True)) == 300
