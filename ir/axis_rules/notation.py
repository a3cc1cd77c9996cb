"""The notation in which operators state their axis rules: parser and printer.

    linear       ... i, o i, o?                                   -> ... o
    conv         n (g i) s..., (g o) i k..., (g o)?               -> n (g o) t...    ; window s k t ; groups = g
    layer_norm   ... c..., c...?, c...?                           -> ... c...       ; normalise c ; normalized_shape = c
    embedding    ..., v e                                         -> ... e           ; indexed v

One comma-separated pattern per operand and per result; a pattern is a row of terms, one per axis:

    name        an axis; the same name is the same axis wherever it stands
    name...     a run of zero or more axes; of two in one operand, another operand or an attribute fixes one length
    ...         the leading axes, broadcast against each other as numpy does
    (a b)       one axis that is the row-major product of a and b
    (a + b)     one axis that is a followed by b
    1           an axis of size one

A pattern that ends with ``?`` belongs to an operand that may be absent. After ``;`` follow annotations.
``attribute = name`` says that a size-valued attribute of the operator is the size of that axis. The others name a role:

    normalise a, reduce a          the operator computes something over all of a: cut, it gives other values
    window a b, indexed a,         the indices of a stay: a window slides over it, its entries are found by position,
    whole a, scan a                all of it is needed at once, the operator runs along it in order

Where none is stated, the role follows from the places where the name stands:

    map          in a result and in the first operand             the operator goes through it index by index
    produce      in a result, but not in the first operand        weights, or whatever comes later, bring it forth
    contract     in no result, in two operands or more            summed over, as a matrix product does
    reduce       in no result, in one operand                     something is computed over all of it

Roles say which indices meet, and so what may be cut. They do not say that the operator is linear along an axis: a tanh
of a matrix product has the same rule as the product. That is for the record's symmetry
(:mod:`regauge.ir.gauge.classes`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

from regauge.ir.errors import RuleSyntaxError

PINNING_ROLES = {
    "window": "{operator} slides a window over it",
    "indexed": "{operator} looks entries up by position in it",
    "whole": "{operator} needs all of it at once",
    "scan": "{operator} runs along it in order",
}
"""Roles whose axes keep all their indices, with the reason in words."""
ROLES_IN_WORDS = (*PINNING_ROLES, "normalise", "reduce")


@dataclass(frozen=True)
class Axis:
    """A named axis."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Run:
    """A named run of axes; the empty name is the broadcast run ``...``."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}..."


@dataclass(frozen=True)
class Composite:
    """One axis made of several: a product (``kind`` is a blank) or a concatenation (``kind`` is a plus)."""

    kind: str
    parts: tuple[Axis | Composite, ...]

    def __str__(self) -> str:
        return "(" + (" + " if self.kind == "+" else " ").join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class One:
    """An axis of size one."""

    def __str__(self) -> str:
        return "1"


Term: TypeAlias = Axis | Run | Composite | One


@dataclass(frozen=True)
class Pattern:
    """The axes of one operand or result."""

    terms: tuple[Term, ...]
    optional: bool = False

    @cached_property
    def names(self) -> frozenset[str]:
        """All names in the pattern, runs included; the broadcast run has the empty name."""
        return frozenset(name for term in self.terms for name in _all_names(term))

    @cached_property
    def runs(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms if isinstance(term, Run))

    @cached_property
    def fixed(self) -> int:
        """How many terms stand for exactly one axis."""
        return len(self.terms) - len(self.runs)

    def __str__(self) -> str:
        return " ".join(map(str, self.terms)) + ("?" if self.optional else "")


@dataclass(frozen=True)
class Rule:
    """A parsed axis rule; ``str(rule)`` is canonical notation that parses back to an equal rule."""

    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]
    roles: tuple[tuple[str, tuple[str, ...]], ...] = ()
    derived: tuple[tuple[str, str], ...] = ()

    @cached_property
    def plans(self) -> dict[tuple[int | None, ...], Any]:
        """The plans of the rule by the ranks of its operands; see :mod:`regauge.ir.axis_rules.plan`."""
        return {}

    @cached_property
    def _roles_of(self) -> dict[tuple[bool, ...], dict[str, str]]:
        return {}

    def roles_with(self, present: tuple[bool, ...]) -> dict[str, str]:
        """The role of every name when only the ``present`` operands are given: as stated, else by where it stands."""
        found = self._roles_of.get(present)
        if found is None:
            found = self._roles_of[present] = self._derive_roles(present)
        return found

    def _derive_roles(self, present: tuple[bool, ...]) -> dict[str, str]:
        operands = [
            pattern.names if here else frozenset[str]() for pattern, here in zip(self.operands, present, strict=True)
        ]
        results = frozenset[str]().union(*(pattern.names for pattern in self.results))
        roles = {name: role_by_place(name, operands, results) for name in results.union(*operands)}
        return roles | {name: role for role, names in self.roles for name in names}

    def __str__(self) -> str:
        text = ", ".join(map(str, self.operands)) + " -> " + ", ".join(map(str, self.results))
        text += "".join(f" ; {role} {' '.join(names)}" for role, names in self.roles)
        return text + "".join(f" ; {attribute} = {name}" for attribute, name in self.derived)


def role_by_place(name: str, operands: Sequence[frozenset[str]], results: frozenset[str]) -> str:
    """The role a name has by where it stands; see the module docstring."""
    holders = [index for index, names in enumerate(operands) if name in names]
    if name in results:
        return "map" if 0 in holders else "produce"
    return "contract" if len(holders) > 1 else "reduce"


def _all_names(term: Term) -> tuple[str, ...]:
    if isinstance(term, Axis | Run):
        return (term.name,)
    return tuple(name for part in term.parts for name in _all_names(part)) if isinstance(term, Composite) else ()


_TOKEN = re.compile(r"\s*(?:(?P<arrow>->)|(?P<dots>\.\.\.)|(?P<name>[A-Za-z_][A-Za-z0-9_']*)|(?P<mark>[(),;?+=1]))")


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.tokens: list[tuple[str, int, bool]] = []  # text, position, whether blanks precede it
        at = 0
        stripped = len(text.rstrip())
        while at < stripped:
            match = _TOKEN.match(text, at)
            if match is None:
                raise self.error("this character does not belong to the rule notation", at + _blanks(text, at))
            start = match.start(match.lastgroup or 0)
            self.tokens.append((match.group(match.lastgroup or 0), start, start > at))
            at = match.end()

    def place(self) -> int:
        """Where the next token stands in the text."""
        return self.tokens[self.position][1] if self.position < len(self.tokens) else len(self.text)

    def error(self, reason: str, at: int | None = None) -> RuleSyntaxError:
        at = self.place() if at is None else at
        return RuleSyntaxError(f"{reason}\n  {self.text}\n  {' ' * at}^")

    def peek(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else ""

    def glued(self) -> bool:
        """Whether the next token follows the last one without a blank."""
        return self.position < len(self.tokens) and not self.tokens[self.position][2]

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise self.error(f"expected {expected!r}" if expected else "the rule ends too early")
        self.position += 1
        return token

    def name(self) -> str:
        token = self.peek()
        if not (token[:1].isalpha() or token[:1] == "_"):
            raise self.error("expected the name of an axis")
        return self.take()

    def axis(self) -> str:
        """The name of an axis in a pattern, which is no word of an annotation."""
        word = self.peek()
        if word in ROLES_IN_WORDS:
            raise self.error(f"{word!r} names a role, not an axis: roles stand behind all patterns, as in '; {word} n'")
        return self.name()


def _blanks(text: str, at: int) -> int:
    return len(text[at:]) - len(text[at:].lstrip())


@cache
def parse_rule(text: str) -> Rule:
    """Parse a rule; raises RuleSyntaxError with a caret under the place."""
    reader = _Reader(text)
    operands = _patterns(reader, stop="->")
    reader.take("->")
    results = _patterns(reader, stop=";")
    roles: list[tuple[str, tuple[str, ...]]] = []
    derived: list[tuple[str, str]] = []
    known = {name for pattern in (*operands, *results) for name in names_of(pattern)}
    while reader.peek() == ";":
        reader.take(";")
        start = reader.place()
        word = reader.name()
        if reader.peek() == "=":
            reader.take("=")
            derived.append((word, _known_name(reader, known, f"{word} = ")))
            continue
        if word not in ROLES_IN_WORDS:
            raise reader.error(f"unknown annotation {word!r}: expected one of {', '.join(ROLES_IN_WORDS)}", start)
        names = []
        while reader.peek() not in (";", ""):
            names.append(_known_name(reader, known, f"{word} "))
        roles.append((word, tuple(names)))
    if reader.peek():
        raise reader.error("nothing may follow here")
    return Rule(operands, results, tuple(roles), tuple(derived))


def _known_name(reader: _Reader, known: set[str], before: str) -> str:
    """The name of an axis in an annotation, which some operand or result must have."""
    start = reader.place()
    name = reader.name()
    if name not in known:
        raise reader.error(f"{before}{name}: no operand or result has the axis {name!r}", start)
    return name


def _patterns(reader: _Reader, stop: str) -> tuple[Pattern, ...]:
    patterns = [_pattern(reader, stop)]
    while reader.peek() == ",":
        reader.take(",")
        patterns.append(_pattern(reader, stop))
    return tuple(patterns)


def _pattern(reader: _Reader, stop: str) -> Pattern:
    terms: list[Term] = []
    optional = False
    while reader.peek() not in (",", stop, ";", ""):
        if optional:
            raise reader.error("'?' ends an operand: a ',' or '->' must follow")
        if reader.peek() == "?":
            reader.take("?")
            optional = True
            continue
        terms.append(_term(reader))
    if sum(isinstance(term, Run) for term in terms) > 2:
        raise reader.error("an operand can hold two runs of axes at most")
    return Pattern(tuple(terms), optional)


def _term(reader: _Reader) -> Term:
    match reader.peek():
        case "...":
            reader.take()
            return Run("")
        case "1":
            reader.take()
            return One()
        case "(":
            return _composite(reader)
    name = reader.axis()
    if reader.peek() == "..." and reader.glued():
        reader.take()
        return Run(name)
    return Axis(name)


def _composite(reader: _Reader) -> Composite:
    reader.take("(")
    parts: list[Axis | Composite] = []
    kind = ""
    while reader.peek() != ")":
        if parts:
            separator = "+" if reader.peek() == "+" else " "
            if separator == "+":
                reader.take("+")
            if kind not in ("", separator):
                raise reader.error("products and sums may not be mixed: add parentheses")
            kind = separator
        parts.append(_composite(reader) if reader.peek() == "(" else Axis(reader.axis()))
    reader.take(")")
    if not parts:
        raise reader.error("empty parentheses")
    return Composite(kind or " ", tuple(parts))


def names_of(pattern: Pattern) -> tuple[str, ...]:
    """Names in a pattern from left to right, runs included."""
    return tuple(name for term in pattern.terms for name in _term_names(term))


def _term_names(term: Term) -> tuple[str, ...]:
    if isinstance(term, Axis | Run):
        return (term.name,) if term.name else ()
    if isinstance(term, Composite):
        return tuple(name for part in term.parts for name in _term_names(part))
    return ()
