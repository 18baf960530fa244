"""Guidance by name, as the command line gives it: `length:words=8-12,complete=false`.

Other packages add theirs by an entry point in the group `embdiff.guidance`:

    [project.entry-points."embdiff.guidance"]
    rhyme = "mypackage:Rhyme"
"""

from __future__ import annotations

import csv
from dataclasses import MISSING, Field, fields
from importlib.metadata import entry_points
from typing import Any

from embdiff.errors import UserError, reason
from embdiff.guidance.base import Guidance
from embdiff.guidance.classifier import ClassifierGuidance
from embdiff.guidance.classifier_free import Autoguidance, ClassifierFreeGuidance
from embdiff.guidance.length import Length
from embdiff.guidance.lexical import Lexical
from embdiff.guidance.sampling import MinP, NoRepeatNgram, RepetitionPenalty, TopK, TopP
from embdiff.guidance.toxicity import Toxicity

BUILT_IN: tuple[type[Guidance], ...] = (
    ClassifierFreeGuidance, Autoguidance, ClassifierGuidance, Toxicity, Length, Lexical,
    TopK, TopP, MinP, RepetitionPenalty, NoRepeatNgram,
)  # fmt: skip


def find(name: str) -> type[Guidance]:
    """The module of a name; one of another package is loaded only now, so that a broken one troubles no other.

    Raises UserError for an unknown name, and for what can't be loaded.
    """
    found = {built_in.name: built_in for built_in in BUILT_IN}
    others = {entry.name: entry for entry in entry_points(group="embdiff.guidance")}
    if name in found:
        return found[name]
    if name not in others:
        raise UserError(f"guidance {name!r} is unknown: choose one of {', '.join(sorted({*found, *others}))}")
    try:
        loaded = others[name].load()
    except Exception as error:  # another package's code may fail in every way
        kind = type(error).__name__
        raise UserError(f"guidance {name!r} of another package cannot be loaded: {kind}: {reason(error)}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Guidance)):
        raise UserError(f"guidance {name!r} of another package is no subclass of embdiff.guidance.Guidance")
    return loaded


def parse(spec: str) -> Guidance:
    """The module that `name:option=value,option=value` names.

    Lists are separated by `|`, as in `lexical:include=cheap pub|riverside`; a value with a comma goes into quotes:
    `lexical:"include=no, thanks"`.
    """
    name, _, rest = spec.partition(":")
    chosen = find(name)
    options = {field.name: field for field in fields(chosen)}
    given: dict[str, Any] = {}
    for pair in pairs_of(name, rest):
        option, equals, value = pair.strip().partition("=")
        option = option.strip().replace("-", "_")
        if not equals or option not in options:
            raise UserError(
                f"guidance {name} has no option {option!r}: choose among {', '.join(options)}, "
                f"as in {name}:{next(iter(options))}=.."
            )
        if option in given:
            raise UserError(f"guidance {spec!r} gives {option} twice: join a list with |")
        given[option] = converted(name, options[option], value.strip())
    missing = [o for o, field in options.items() if field.default is field.default_factory is MISSING]
    if lacking := [option for option in missing if option not in given]:
        raise UserError(f"guidance {name} needs {', '.join(lacking)}, as in {name}:{lacking[0]}=..")
    return chosen(**given)


def pairs_of(name: str, text: str) -> list[str]:
    """The parts between commas; those in quotes may have commas and line breaks."""
    try:
        return next(csv.reader([text])) if text else []
    except csv.Error:
        raise UserError(
            f"the options of guidance {name} can't be read: a value with a comma or a line break goes into quotes, "
            f'as in {name}:"option=value"'
        ) from None


def converted(name: str, field: Field[Any], text: str) -> Any:
    """An option's value as its field's annotation has it; what is no number, list or mapping stays text."""
    # A class, or its name where the module postpones annotations.
    kind = (field.type.__name__ if isinstance(field.type, type) else str(field.type)).removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
        if kind in ("int", "float"):
            return {"int": int, "float": float}[kind](text)
        if kind.startswith(("Sequence", "tuple", "list")):
            return tuple(part.strip() for part in text.split("|"))
        if kind.startswith(("Mapping", "dict")):
            pairs = (part.split("=", 1) for part in text.split("|"))
            return {int(key): value.strip() for key, value in pairs}
    except (KeyError, ValueError):
        form = "position=text|position=text" if kind.startswith(("Mapping", "dict")) else kind
        raise UserError(f"{field.name} {text!r} of guidance {name} is not of the right kind: it takes {form}") from None
    return text
