"""Patterns: a piece of a graph written as a Python function.

    def pattern(op, x, w, b=None):
        return op.relu(op.linear(x, w, b))

``op`` stands for the operators, the other parameters are *variables*: each matches any one operand, wherever it stands
the same one. A variable with the default None also matches an operand that is absent. A number matches that number,
given as such or as a constant of one repeated element.

Attributes are written as keywords: a value must be equal, a variable matches any value and captures it, ``...`` matches
any, and ``attributes=...`` frees all of them. An attribute that is not written must have its default, so that a pattern
never matches more than it says. With ``name=`` the matched node is captured under that name, None where an alternative
without it was taken. ``...`` as the last operand matches any number of operands, none included.

A function may return several results: the pattern has several roots, each of which must share a node or an operand with
those before it. ``op.split(...).every_result()`` stands for all results of a call, however many a node has.

``op.either(a, b)`` stands for alternatives, tried in this order: two spellings of one thing, or a node that may be
missing, ``op.either(op.dropout(x, p=...), x)``. The first root may be one, the others not. One call object stands for
one node; where it does not matter whether something is computed once or twice, write the call twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType
from typing import Any, TypeAlias

from regauge.ir.errors import PatternError
from regauge.ir.operator import get_operator


@dataclass(frozen=True, eq=False)
class Variable:
    """Stands for one operand, or one attribute value; ``optional`` where the operand may be absent."""

    name: str
    optional: bool = False

    def __str__(self) -> str:
        return self.name + ("?" if self.optional else "")


@dataclass(frozen=True, eq=False)
class CallPattern:
    """One operator call; patterns that share an object share the node."""

    ops: tuple[str, ...]
    operands: tuple[PatternOperand, ...]
    attributes: dict[str, Any]
    name: str = ""
    free: bool = False  # whether attributes that are not written may have any value
    index: int = 0  # of the result that stands for the call in other calls

    def results(self, count: int) -> tuple[ResultPattern, ...]:
        """Patterns of the first ``count`` results of a call that has several."""
        return tuple(ResultPattern(self, index) for index in range(count))

    def every_result(self) -> ResultPattern:
        """A root that stands for all results of the call: the replacement returns as many values, None where unread."""
        return ResultPattern(self, EVERY)

    @property
    def fixed(self) -> tuple[PatternOperand, ...]:
        """The operands less the ``...`` at their end."""
        return self.operands[:-1] if self.variadic else self.operands

    @property
    def variadic(self) -> bool:
        return bool(self.operands) and self.operands[-1] is ...

    def __str__(self) -> str:
        parts = [*map(_shown, self.operands), *(f"{key}={_shown(value)}" for key, value in self.attributes.items())]
        return f"{'|'.join(self.ops)}({', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class ResultPattern:
    """One of several results of a call."""

    call: CallPattern
    index: int  # or EVERY

    def __str__(self) -> str:
        return f"{self.call}[{'...' if self.index == EVERY else self.index}]"


EVERY = -1


@dataclass(frozen=True, eq=False)
class Either:
    """One of several patterns; samples may choose one under its name, else a rule is proved with each."""

    options: tuple[PatternOperand, ...]
    name: str = ""

    def __str__(self) -> str:
        return "(" + " or ".join(map(str, self.options)) + ")"


PatternOperand: TypeAlias = Variable | CallPattern | ResultPattern | Either | bool | int | float | EllipsisType | None


def _shown(value: Any) -> str:
    return "..." if value is ... else str(value)


class Operators:
    """The ``op`` of a pattern function: ``op.linear(x, w)``, ``op.any_of(("relu", "gelu"), x)``."""

    def __getattr__(self, op: str) -> Callable[..., CallPattern]:
        if op.startswith("_"):
            raise AttributeError(op)
        return lambda *operands, **attributes: self.any_of((op,), *operands, **attributes)

    def either(self, *options: Any, name: str = "") -> Either:
        """Any of these patterns, the first that fits."""
        return Either(options, name)

    def any_of(self, ops: Sequence[str], *operands: Any, name: str = "", **attributes: Any) -> CallPattern:
        """A call of one of several operators, which must all have the attributes that are written."""
        free = attributes.pop("attributes", None) is ...
        for op in ops:
            record = get_operator(op)
            given = [o for o in operands if o is not None and o is not ... and not getattr(o, "optional", False)]
            if len(given) > len(record.slots) and not (record.slots and record.slots[-1].startswith("*")):
                slots = ", ".join(record.slots)
                raise PatternError(f"{op} takes {len(record.slots)} operands ({slots}), got {len(given)}")
            for attribute in attributes:
                if attribute not in record.attributes:
                    raise PatternError(f"{op} has no attribute {attribute!r}: it has {', '.join(record.attributes)}")
            for attribute, default in record.attributes.items():
                if default is inspect.Parameter.empty and attribute not in attributes and not free:
                    raise PatternError(f"{op} needs the attribute {attribute!r}: give a value, a variable or ...")
        return CallPattern(tuple(ops), operands, attributes, name, free)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern function: its variables and its roots, of which the first anchors the search."""

    variables: tuple[Variable, ...]
    roots: tuple[CallPattern | ResultPattern | Either, ...]
    calls: tuple[CallPattern, ...] = field(default=())

    @cached_property
    def anchors(self) -> tuple[CallPattern | ResultPattern, ...]:
        """What the first root may be."""
        return tuple(_alternatives(self.roots[0]))

    @cached_property
    def leads(self) -> tuple[tuple[CallPattern, int, frozenset[str]], ...]:
        """Of each anchor the first operand that only a call fits, and the operators that may compute it; none: -1."""
        return tuple(_lead(call_of(anchor)) for anchor in self.anchors)

    def __str__(self) -> str:
        return ", ".join(map(str, self.roots))


def call_of(pattern: CallPattern | ResultPattern) -> CallPattern:
    return pattern.call if isinstance(pattern, ResultPattern) else pattern


def _lead(call: CallPattern) -> tuple[CallPattern, int, frozenset[str]]:
    for slot, operand in enumerate(call.fixed):
        options = list(_alternatives(operand))
        if all(isinstance(option, CallPattern | ResultPattern) for option in options):
            return call, slot, frozenset(op for option in options for op in call_of(option).ops)
    return call, -1, frozenset()


def _alternatives(pattern: Any) -> Iterator[Any]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _alternatives(option)
    else:
        yield pattern


def parse_pattern(function: Callable[..., Any]) -> Pattern:
    """Call a pattern function with variables; raises PatternError where it is none."""
    first, *rest = inspect.signature(function).parameters.values()
    variables = tuple(Variable(p.name, p.default is None) for p in rest)
    try:
        result = function(Operators(), *variables)
    except TypeError as error:
        if "operand type" not in str(error):
            raise
        raise PatternError(
            f"the pattern {function.__name__} computes with {', '.join(map(str, variables))}: "
            f"write calls, as in {first.name}.mul(x, 2), not signs"
        ) from error
    roots = tuple(result) if isinstance(result, tuple | list) else (result,)
    for root in (*_alternatives(roots[0]), *roots[1:]):
        if not isinstance(root, CallPattern | ResultPattern):
            raise PatternError(
                f"the pattern {function.__name__} returns {root!r}: return a call such as {first.name}.relu(x)"
            )
    calls = tuple(dict.fromkeys(part for root in roots for part in _parts(root) if isinstance(part, CallPattern)))
    _check_roots(function, roots, calls)
    found = {part for root in roots for part in _parts(root)}
    found |= {value for call in calls for value in call.attributes.values() if isinstance(value, Variable)}
    for variable in variables:
        if not variable.optional and variable not in found:
            raise PatternError(f"the variable {variable} of the pattern {function.__name__} is in none of its calls")
    return Pattern(variables, roots, calls)


def _check_roots(
    function: Callable[..., Any],
    roots: tuple[CallPattern | ResultPattern | Either, ...],
    calls: tuple[CallPattern, ...],
) -> None:
    reached = {id(part) for part in _parts(roots[0])}
    for root in roots[1:]:
        parts = {id(part) for part in _parts(root)}
        if not parts & reached:
            raise PatternError(
                f"the pattern {function.__name__} has a root that shares nothing with the ones before it"
            )
        reached |= parts
    names = [call.name for call in calls if call.name]
    if len(names) != len(set(names)):
        raise PatternError(f"the pattern {function.__name__} gives two nodes one name: {', '.join(names)}")


def _parts(pattern: Any) -> Iterator[CallPattern | Variable]:
    """The calls and variables in a pattern, whichever alternatives they are in."""
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _parts(option)
    elif isinstance(pattern, CallPattern | ResultPattern):
        yield call_of(pattern)
        for operand in call_of(pattern).operands:
            yield from _parts(operand)
    elif isinstance(pattern, Variable):
        yield pattern
