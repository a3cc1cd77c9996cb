"""Options of passes: fields of a frozen dataclass, checked against their annotations and ranges."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from regauge.ir.errors import PassError


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a pass with its help text and range; ``above`` and ``below`` exclude the bound itself."""
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "bounds": {name: bound for name, bound in bounds.items() if bound is not None}}
    return field(default=default, metadata=metadata)


def hints(owner: type) -> Mapping[str, Any]:
    """The annotations of a pass class, evaluated."""
    return get_type_hints(owner)


def unknown_option(name: str, option_name: str, valid: list[str]) -> PassError:
    close = get_close_matches(option_name, valid, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return PassError(f"{name} has no option {option_name!r}: {hint}options are {', '.join(valid) or 'none'}")


def check_options(instance: Any) -> None:
    """Bring the fields of a pass to their declared types and check their ranges; raises PassError."""
    annotations = hints(type(instance))
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        where = f"option {entry.name!r} of {instance.name}"
        checked = convert(value, annotations[entry.name], where)
        _check_bounds(checked, entry, where)
        object.__setattr__(instance, entry.name, checked)


def _check_bounds(value: Any, entry: Field[Any], where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    rules: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "above": ("above", lambda v, b: v > b),
        "at_least": ("at least", lambda v, b: v >= b),
        "below": ("below", lambda v, b: v < b),
        "at_most": ("at most", lambda v, b: v <= b),
    }
    bounds: Mapping[str, float] = entry.metadata.get("bounds", {})
    if all(rules[rule][1](value, bound) for rule, bound in bounds.items()):
        return
    words = " and ".join(f"{rules[rule][0]} {bound:g}" for rule, bound in bounds.items())
    raise PassError(f"{where} must be {words}, not {value:g}")


def convert(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as an instance of the annotation; raises PassError.

    Integers serve as floats, and as words, since modules are called ``2``; one item serves as a list of one.
    """
    return _convert(value, annotation, where, annotation)


def _convert(value: Any, annotation: Any, where: str, wanted: Any) -> Any:
    """:func:`convert`, where errors say what is ``wanted``: of an item, the list it stands in."""
    for candidate in _alternatives(annotation):
        found = _try_convert(value, candidate, where)
        if found is not MISSING:
            return found
    if isinstance(value, int) and not isinstance(value, bool) and str in _alternatives(annotation):
        return str(value)
    quoted = isinstance(value, bool | float) and str in _alternatives(annotation)  # what was written is not known
    hint = ': put words that read otherwise in quotes, "0.1"' if quoted else ""
    raise PassError(f"{where} must be {describe(wanted)}, not {value!r}{hint}")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _try_convert(value: Any, annotation: Any, where: str) -> Any:
    """The converted value, or MISSING where it does not fit this one alternative."""
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return value if value in get_args(annotation) else MISSING
    if origin in (tuple, list):
        item = get_args(annotation)[0]
        if isinstance(value, str) or not isinstance(value, list | tuple):
            value = (value,)
        return origin(_convert(part, item, where, annotation) for part in value)
    if origin is not None and issubclass(origin, Mapping):
        key, item = get_args(annotation)
        if not isinstance(value, Mapping):
            return MISSING
        return {convert(k, key, where): convert(v, item, where) for k, v in value.items()}
    if annotation is None or annotation is type(None):
        return None if value is None else MISSING
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and annotation is not bool:
        return MISSING
    return value if isinstance(value, origin or annotation) else MISSING


def describe(annotation: Any) -> str:
    """A type in words: ``a number``, ``one of l1, l2``, ``a list of words``."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a word", Any: "a Python object"}
    plural = {int: "integers", float: "numbers", str: "words"}
    parts = []
    for candidate in _alternatives(annotation):
        origin = get_origin(candidate)
        if origin is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(candidate))))
        elif origin in (tuple, list):
            item = get_args(candidate)[0]
            parts.append(f"a list of {plural[item]}" if item in plural else f"a list ({describe(item)} each)")
        elif origin is not None and issubclass(origin, Mapping):
            parts.append("a mapping {name=value}")
        elif candidate is not type(None):
            parts.append(words.get(candidate, getattr(candidate, "__name__", str(candidate))))
    return " or ".join(dict.fromkeys(parts))
