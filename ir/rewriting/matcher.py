"""Matching a pattern against a graph, from one node, with the reason why it stopped where it does not fit.

Commutative operators are tried in both orders while matching, never by expanding the pattern. Nodes inside a match
(all but its roots) must be used only by the match unless the rule says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch

from regauge.ir.folding.known_values import known_tensor
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.patterns import (
    EVERY,
    CallPattern,
    Either,
    Pattern,
    PatternOperand,
    ResultPattern,
    Variable,
    call_of,
)

SMALL = 1 << 12  # elements of a constant that is compared with a number
NEAR = 8  # nodes in a row through which a number is computed


@dataclass
class Match:
    """What a pattern matched: operands and attribute values by the names of variables, nodes by their names."""

    bindings: dict[str, Any]
    nodes: dict[CallPattern, Node]
    roots: tuple[Value, ...]
    held: Container[Value] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def read_once(self, value: Value) -> bool:
        """Whether one node alone reads the value, and no output or state is it."""
        return len(value.uses) == 1 and value not in self.held

    def unread(self, value: Value) -> bool:
        return not value.uses and value not in self.held

    @property
    def root(self) -> Node:
        node = self.roots[0].producer
        assert node is not None
        return node


@dataclass
class Miss:
    """The best partial match of a rule: how many nodes matched, where it stopped, and why."""

    matched: int
    where: str
    reason: str
    refused: bool = False  # whether the whole pattern fitted and the rule said no

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} (after {self.matched} matching node{'s' if self.matched != 1 else ''})"


def match(pattern: Pattern, node: Node, *, shared: bool = False, held: Container[Value] = ()) -> Match | Miss:
    """Match a pattern whose first root is ``node``; a Miss tells how far the best attempt came.

    ``held`` are values that something beside nodes reads: outputs and states. With ``shared`` the inner nodes of the
    match may have other readers.
    """
    search = _Search(shared, held)
    for anchor in pattern.anchors:
        for state in search.call(call_of(anchor), node, _State({}, {})):
            for full in search.other_roots(pattern, state):
                roots = tuple(v for root in (anchor, *pattern.roots[1:]) for v in _root_values(root, full))
                found = search.finish(pattern, full, roots)
                if found is not None:
                    return found
    return search.best


def may_match(pattern: Pattern, node: Node) -> bool:
    """A cheap test before :func:`match`: whether the node, or the first operand that a call computes, could fit.

    Where it is False, at most the node itself would match.
    """
    for call, slot, ops in pattern.leads:
        if node.op not in call.ops:
            continue
        if slot < 0:
            return True
        either = node.operator.commutative and len(node.inputs) == 2
        for operand in node.inputs if either else node.inputs[slot : slot + 1]:
            if isinstance(operand, Value) and operand.producer is not None and operand.producer.op in ops:
                return True
    return False


def _root_values(root: Any, state: _State) -> tuple[Value, ...]:
    outputs = state.nodes[call_of(root)].outputs
    return outputs if root.index == EVERY else (outputs[root.index],)


@dataclass(frozen=True)
class _State:
    """Bindings so far; states are never written into, so that a search can go back."""

    bindings: Mapping[str, Any]
    nodes: Mapping[CallPattern, Node]

    def bind(self, name: str, value: Any) -> _State:
        return _State({**self.bindings, name: value}, self.nodes)

    def take(self, pattern: CallPattern, node: Node) -> _State:
        return _State(self.bindings, {**self.nodes, pattern: node})


class _Search:
    def __init__(self, shared: bool, held: Container[Value]) -> None:
        self.shared = shared
        self.held = held
        self.best = Miss(-1, "", "")

    def fail(self, state: _State, node: Node, reason: str, *parts: Any) -> None:
        """Note why an attempt stops, put into words where none came further."""
        if len(state.nodes) > self.best.matched:
            self.best = Miss(len(state.nodes), node.label, reason.format(*parts))

    def call(self, pattern: CallPattern, node: Node, state: _State) -> Iterator[_State]:
        """All ways in which a call pattern matches a node."""
        if pattern in state.nodes:
            if state.nodes[pattern] is node:
                yield state
            return
        if node.op not in pattern.ops:
            self.fail(state, node, "{} is expected", " or ".join(pattern.ops))
            return
        after = self._attributes(pattern, node, state)
        if after is None:
            return
        fixed = pattern.fixed
        operands = list(node.inputs) + [None] * (len(fixed) - len(node.inputs))
        if pattern.variadic:
            operands = operands[: len(fixed)]
        if len(operands) > len(fixed):
            self.fail(state, node, "it has {} operands, the pattern {}", len(operands), len(fixed))
            return
        orders = [operands]
        if node.operator.commutative and len(operands) == 2 and operands[0] is not operands[1]:
            orders.append(operands[::-1])
        for order in orders:
            yield from self._operands(fixed, order, node, after.take(pattern, node))

    def _attributes(self, pattern: CallPattern, node: Node, state: _State) -> _State | None:
        defaults = node.operator.attributes
        for name, value in node.attributes.items():
            wanted = pattern.attributes.get(name, ... if pattern.free else defaults[name])
            if isinstance(wanted, Variable):
                if wanted.name in state.bindings and state.bindings[wanted.name] != value:
                    self.fail(state, node, "its {} is {}, elsewhere {}", name, value, state.bindings[wanted.name])
                    return None
                state = state.bind(wanted.name, value)
            elif wanted is not ... and not _equal(value, wanted):
                self.fail(state, node, "its {} is {}, not {}", name, value, wanted)
                return None
        return state

    def _operands(
        self, patterns: tuple[PatternOperand, ...], operands: list[Operand], node: Node, state: _State
    ) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for after in self._operand(patterns[0], operands[0], node, state):
            yield from self._operands(patterns[1:], operands[1:], node, after)

    def _operand(self, pattern: PatternOperand, operand: Operand, node: Node, state: _State) -> Iterator[_State]:
        if isinstance(pattern, Variable):
            yield from self._variable(pattern, operand, node, state)
        elif isinstance(pattern, Either):
            for option in pattern.options:
                yield from self._operand(option, operand, node, state)
        elif isinstance(pattern, CallPattern | ResultPattern):
            producer = operand.producer if isinstance(operand, Value) else None
            if not isinstance(operand, Value) or producer is None:
                self.fail(state, node, "its operand {} is not computed by {}", operand, "|".join(call_of(pattern).ops))
            elif operand.index != pattern.index:
                self.fail(state, node, "it reads result {} of {}, not {}", operand.index, producer.label, pattern.index)
            else:
                yield from self.call(call_of(pattern), producer, state)
        elif pattern is None:
            if operand is None:
                yield state
            else:
                self.fail(state, node, "its operand {} is not absent", operand)
        elif isinstance(pattern, EllipsisType) or is_number(operand, pattern):
            yield state
        else:
            self.fail(state, node, "its operand {} is not {}", operand, pattern)

    def _variable(self, variable: Variable, operand: Operand, node: Node, state: _State) -> Iterator[_State]:
        if operand is None and not variable.optional:
            self.fail(state, node, "the operand {} is absent", variable)
        elif variable.name not in state.bindings:
            yield state.bind(variable.name, operand)
        elif _same_operand(state.bindings[variable.name], operand):
            yield state
        else:
            self.fail(state, node, "{} is {} here and {} elsewhere", variable, operand, state.bindings[variable.name])

    def other_roots(self, pattern: Pattern, state: _State, at: int = 1) -> Iterator[_State]:
        """Match the second root and those after it, found among the readers of what is matched already."""
        if at == len(pattern.roots):
            yield state
            return
        root = pattern.roots[at]
        assert not isinstance(root, Either)  # parse_pattern has seen to that
        call, taken = call_of(root), set(state.nodes.values())
        for node in self._readers(call, state):
            if node not in taken:
                for after in self.call(call, node, state):
                    yield from self.other_roots(pattern, after, at + 1)

    def _readers(self, call: CallPattern, state: _State) -> list[Node]:
        """Nodes that may be the call: readers (of readers ...) of a matched operand that the call reads too."""
        found: dict[Node, None] = {}
        operands = list(call.operands)
        while operands:
            operand = operands.pop(0)
            if isinstance(operand, Variable):
                value = state.bindings.get(operand.name)
                found.update(dict.fromkeys(value.consumers() if isinstance(value, Value) else ()))
            elif isinstance(operand, Either):
                operands += operand.options
            elif isinstance(operand, CallPattern | ResultPattern):
                inner = call_of(operand)
                sources = [state.nodes[inner]] if inner in state.nodes else self._readers(inner, state)
                for source in sources:
                    found.update(dict.fromkeys(node for value in source.outputs for node in value.consumers()))
        return [node for node in found if node.op in call.ops]

    def finish(self, pattern: Pattern, state: _State, roots: tuple[Value, ...]) -> Match | None:
        """The match, unless something outside reads an inner node."""
        bindings = dict(state.bindings)
        bindings.update({call.name: state.nodes.get(call) for call in pattern.calls if call.name})
        bindings.update({v.name: None for v in pattern.variables if v.name not in bindings})
        found = Match(bindings, dict(state.nodes), roots, self.held)
        if self.shared:
            return found
        inside = set(state.nodes.values())
        for node in inside:
            for value in node.outputs:
                if value in roots:
                    continue
                other = next((user.label for user, _ in value.uses if user not in inside), None)
                if other is not None or value in self.held:
                    self.fail(state, node, "{} reads it too", other or "an output of the graph")
                    return None
        return found


def _same_operand(a: Operand, b: Operand) -> bool:
    if isinstance(a, Value) or isinstance(b, Value):
        return a is b
    return type(a) is type(b) and a == b


def number_of(operand: Operand) -> bool | int | float | None:
    """The number that an operand is: given as such, a constant full of it, or computed from such; None where it is not.

    A tensor of one element in an ONNX file, which does not tell constants from weights, counts as a constant.
    """
    if not isinstance(operand, Value):
        return operand if isinstance(operand, bool | int | float) else None
    most = SMALL if isinstance(operand, Parameter) else 1
    tensor = known_tensor(operand, most=most, depth=NEAR)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype.is_complex:
        return None
    entries = tensor.reshape(-1)
    number: bool | int | float = entries[0].item()
    return number if bool((entries == entries[0]).all()) else None


def is_number(operand: Operand, number: float) -> bool:
    """Whether an operand is this number, up to the precision of its type: as given, or as a constant full of it."""
    if isinstance(operand, Value):
        found = number_of(operand)
        if found is None:
            return False
        precision = torch.finfo(operand.dtype).eps if isinstance(found, float) else 0.0  # type: ignore[arg-type]
        return abs(float(found) - float(number)) <= 4 * precision * abs(float(number))
    if isinstance(operand, bool) or isinstance(number, bool):
        return operand is number
    return isinstance(operand, int | float) and math.isclose(operand, number, rel_tol=1e-6)


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, float) and isinstance(wanted, int | float):
        return math.isclose(value, wanted, rel_tol=1e-6)
    return bool(type(value) is type(wanted) and value == wanted) or value == wanted
