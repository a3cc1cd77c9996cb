"""Checks an operator record when it is registered: a fault there is its author's, not the first graph's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from regauge.ir.axis_rules.notation import PINNING_ROLES, Pattern, Rule, names_of, parse_rule
from regauge.ir.errors import OperatorError, RuleSyntaxError

if TYPE_CHECKING:
    from regauge.ir.operator import Operator


def check_record(record: Operator) -> None:
    """Raises OperatorError or RuleSyntaxError for a record that no call could fit, or that no backend could emit."""
    _check_function(record.name, record.evaluate)
    _check_fields(record)
    if isinstance(record.rule, str):
        try:
            rule = parse_rule(record.rule)
        except RuleSyntaxError as error:  # several may be registered at once
            raise RuleSyntaxError(f"the rule of {record.name}: {error}") from None
        _check_operands(record, rule)
        _check_results(record, rule)
    elif not callable(record.rule):
        raise OperatorError(f"the rule of {record.name} is a string in rule notation or a function of a Call")
    if not is_built_in(record):  # those name what other versions of torch have
        for name in record.aten:
            check_aten_name(record.name, name)
        for name in record.onnx:
            check_onnx_name(record.name, name)


def is_built_in(record: Operator) -> bool:
    return record.evaluate.__module__.startswith("regauge.ir.ops.")


_FUNCTIONS = {
    "samples": "lambda: [sample(...)]",
    "macs": "lambda call: ...",
    "element": "lambda x: ...",
    "spell": "lambda onnx, node: ...",
}


def _check_fields(record: Operator) -> None:
    """The name is a word, as the text form has it, and fields are mappings and functions where these are wanted."""
    if not re.fullmatch(r"\w+", record.name):
        raise OperatorError(f"an operator cannot be called {record.name!r}: use letters, digits and underscores")
    for field in ("aten", "onnx"):
        given = getattr(record, field)
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise OperatorError(f"{field} of {record.name} is a {kind}: write {field}={{NAME: None}}, or an adapter")
    for field, form in _FUNCTIONS.items():
        given = getattr(record, field)
        if given is not None and not callable(given):
            raise OperatorError(f"{field} of {record.name} is a {type(given).__name__}: write {field}={form}")


def _check_function(name: str, evaluate: Callable[..., Any]) -> None:
    """Emitted modules contain the source of the function, so it has to be found in a file."""
    if not isinstance(evaluate, FunctionType) or evaluate.__name__ == "<lambda>":
        kind = "a lambda" if isinstance(evaluate, FunctionType) else f"a {type(evaluate).__name__}"
        raise OperatorError(f"evaluate of {name} is {kind}, whose source cannot be emitted: define a function with def")


def _check_operands(record: Operator, rule: Rule) -> None:
    """One pattern for each operand slot, with a ``?`` where the slot has a default; a variadic slot takes the rest."""
    slots = record.slots
    variadic = bool(slots) and slots[-1].startswith("*")
    named = slots[:-1] if variadic else slots
    patterns = rule.operands if slots or rule.operands != (Pattern(()),) else ()
    if len(patterns) < len(named) or (len(patterns) > len(named) and not variadic):
        raise OperatorError(
            f"the rule of {record.name} has {len(patterns)} operands, its function takes {len(named)} "
            f"({', '.join(slots) or 'none'}): write one pattern for each, attributes behind a '*'; the rule is {rule}"
        )
    for slot, pattern in zip(named, patterns, strict=False):
        may_be_absent = record.signature.parameters[slot].default is not inspect.Parameter.empty
        if pattern.optional != may_be_absent:
            says = "may be absent by the rule, but has no default" if pattern.optional else "has a default, but no '?'"
            raise OperatorError(
                f"operand {slot!r} of {record.name} {says}: end its pattern with '?' where the function gives it a "
                f"default, and only there; the rule is {rule}"
            )


def _check_results(record: Operator, rule: Rule) -> None:
    """A name that only results have is an axis made here: something has to say how long it is, or that it stays."""
    for attribute, _ in rule.derived:
        if attribute not in record.attributes:
            takes = ", ".join(record.attributes) or "none"
            raise OperatorError(
                f"the rule of {record.name} says {attribute} = ..., but its function has no such attribute ({takes}): "
                f"attributes are keyword-only parameters"
            )
    settled = {name for pattern in rule.operands for name in names_of(pattern)}
    settled.update(name for _, name in rule.derived)
    settled.update(name for role, names in rule.roles if role in PINNING_ROLES for name in names)
    for pattern in rule.results:
        for name in names_of(pattern):
            if name not in settled:
                raise OperatorError(
                    f"the axis {name!r} in a result of {record.name} is in no operand: is it misspelt? Else name the "
                    f"attribute that is its size (attribute = {name}), or a role that keeps it (whole {name}); "
                    f"the rule is {rule}"
                )


@cache
def _known_to_torch() -> frozenset[str]:
    names = [str(n).removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    return frozenset(names).union(name.partition(".")[0] for name in names)


def check_aten_name(operator: str, name: str) -> None:
    """Raises OperatorError for a name that no call can have: neither an ATen overload nor ``namespace::name``."""
    namespace, colons, rest = name.partition("::")
    if colons:
        if not namespace or not rest or namespace == "aten" or "." in rest:
            stem = rest.partition(".")[0] if namespace != "aten" else rest
            wanted = f"{namespace}::{stem}" if namespace not in ("", "aten") else stem
            raise OperatorError(f"{operator} cannot stand for {name!r}: write {wanted!r}")
        return
    if name in _known_to_torch():
        return
    stem, dot, rest = name.partition(".")
    if stem in _known_to_torch():
        advice = f"write {stem!r}" if rest == "default" else f"{stem} has no such overload"
    elif dot:
        advice = f"a custom operator is written {stem + '::' + rest.partition('.')[0]!r}"
    else:
        advice = "is it misspelt? A custom operator is written 'namespace::name'"
    raise OperatorError(f"{operator} cannot stand for {name!r}, which is no ATen operator that torch has: {advice}")


def check_registered(record: Operator) -> None:
    """Raises OperatorError for a custom operator of ``aten`` that no library has registered with torch by now.

    :func:`check_record` cannot ask that: records may be registered before the library is imported.
    """
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    for name in record.aten:
        if "::" not in name or name in known:
            continue
        close = get_close_matches(name, known, 1)
        advice = f"did you mean {close[0]!r}?" if close else "import what registers it before the record is checked"
        raise OperatorError(f"{record.name} stands for {name!r}, but torch has no such operator registered: {advice}")


@cache
def _known_to_onnx() -> frozenset[str]:
    from onnx.defs import get_all_schemas

    return frozenset(schema.name for schema in get_all_schemas())


def check_onnx_name(operator: str, name: str) -> None:
    """Raises OperatorError for a name without a domain that no operator of the ONNX standard has."""
    domain, _, op_type = name.rpartition("::")
    if domain or op_type in _known_to_onnx():
        return
    close = get_close_matches(op_type, _known_to_onnx(), 1)
    advice = f"did you mean {close[0]!r}?" if close else "an operator of another domain is written 'domain::Name'"
    raise OperatorError(f"{operator} cannot stand for {name!r}, which is no operator of the ONNX standard: {advice}")
