"""Reading the text form of :mod:`regauge.ir.printing.text` back into a graph."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.dtypes import Dtype, dtype_from_name
from regauge.ir.errors import GraphError, RegaugeError
from regauge.ir.graph import Graph, Node, Operand, Parameter, State, Value, add_use
from regauge.ir.operator import get_operator
from regauge.ir.sizes.expressions import UNKNOWN_RANK, Size, parse_size, symbol
from regauge.ir.storage.weights import LazyWeight, Weight

_NAME = r"[A-Za-z0-9_.:/-]+"
_VALUE = re.compile(rf"%({_NAME}): ([A-Za-z0-9_]+)\[([^\]]*)\]")
_HEAD = re.compile(r"(graph|region) (\S+?)\((.*)\) \{$")
_SYMBOL = re.compile(r"symbol (\w+) in (\d+)\.\.(\d*)$")
_STATE = re.compile(rf"state (\S+): %({_NAME}) -> %({_NAME})( returned)?$")
_NODE = re.compile(rf"(%{_NAME}(?:, %{_NAME})*) = (\w+)\((.*)\): (.*?)( with)?$")
_TYPE = re.compile(r"([A-Za-z0-9_]+)\[([^\]]*)\]")


def parse_graph(text: str, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """The graph that ``text`` describes; raises GraphError with the line that cannot be read.

    Parameters take their data from ``weights`` by name; one that is not given can be analysed but not run.
    """
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    reader = _Reader(lines, dict(weights or {}))
    graph = reader.graph({})
    if reader.at < len(lines):
        raise reader.error("nothing may follow the graph")
    return graph


@dataclass
class _Reader:
    lines: list[tuple[int, str]]
    weights: dict[str, torch.Tensor]
    at: int = 0
    known: dict[str, Value] = field(default_factory=dict)

    def error(self, reason: str) -> GraphError:
        number, line = self.lines[min(self.at, len(self.lines) - 1)] if self.lines else (1, "")
        return GraphError(f"line {number}: {reason}: {line}")

    def next(self) -> str:
        if self.at >= len(self.lines):
            raise self.error("the text ends too early")
        self.at += 1
        return self.lines[self.at - 1][1]

    def graph(self, outer: Mapping[str, Value]) -> Graph:
        head = _HEAD.match(self.next())
        if head is None:
            self.at -= 1
            raise self.error("expected 'graph name(%input: f32[...]) {'")
        result = Graph(name=head.group(2))
        scope = dict(outer)
        for name, dtype, shape in _VALUE.findall(head.group(3)):
            value = Value(name=name, shape=_shape(shape), dtype=dtype_from_name(dtype))
            result.inputs.append(value)
            scope[name] = value
        pending_states: list[tuple[str, str, str, bool]] = []
        while True:
            line = self.next()
            if line == "}":
                break
            self.statement(line, result, scope, pending_states)
        result.states = [
            State(name, self.value(before, scope), self.value(after, scope), returned)
            for name, before, after, returned in pending_states
        ]
        return result

    def statement(
        self, line: str, graph: Graph, scope: dict[str, Value], states: list[tuple[str, str, str, bool]]
    ) -> None:
        if match := _SYMBOL.match(line):
            name, low, high = match.groups()
            graph.symbols[symbol(name)] = (int(low), int(high) if high else None)
        elif line.split(" ", 1)[0] in ("parameter", "buffer", "constant"):
            parameter = self.parameter(line)
            graph.parameters[parameter.name] = parameter
            scope[parameter.name] = parameter
        elif match := _STATE.match(line):
            states.append((match.group(1), match.group(2), match.group(3), match.group(4) is not None))
        elif line.startswith("return"):
            graph.outputs = [self.operand(part, scope) for part in _split(line.removeprefix("return"))]
        elif match := _NODE.match(line):
            self.node(match, graph, scope)
        else:
            self.at -= 1
            raise self.error("this is no statement")

    def parameter(self, line: str) -> Parameter:
        kind, rest = line.split(" ", 1)
        match = _VALUE.match(rest)
        if match is None:
            self.at -= 1
            raise self.error("expected '%name: type[shape]'")
        name, dtype, shape = match.groups()
        tail = rest[match.end() :]
        aliases = re.findall(r'"([^"]+)"', tail)
        words = set(re.sub(r'"[^"]+"', "", tail).split())
        trainable = True if "trainable" in words else False if "frozen" in words else None
        weight = self.weights.get(name)
        return Parameter(
            name=name,
            weight=weight if weight is not None else _absent(name, _shape(shape), dtype_from_name(dtype)),
            kind=kind,  # type: ignore[arg-type]
            aliases=aliases,
            trainable=trainable,
            persistent="transient" not in words,
        )

    def node(self, match: re.Match[str], graph: Graph, scope: dict[str, Value]) -> None:
        results, op, arguments, types, has_regions = match.groups()
        operands: list[Operand] = []
        attributes: dict[str, Any] = {}
        for part in _split(arguments):
            named = re.match(r"([A-Za-z_]\w*)=(?!=)", part)
            if named:
                attributes[named.group(1)] = self.literal(part[named.end() :])
            else:
                operands.append(self.operand(part, scope))
        regions = []
        while has_regions and self.at < len(self.lines) and self.lines[self.at][1].startswith("region "):
            regions.append(self.graph({}))
        given, full = get_operator(op).bind(operands, attributes)
        node = Node(op=op, inputs=given, attributes=full, regions=regions)
        names = [name.strip().removeprefix("%") for name in results.split(",")]
        found = _TYPE.findall(types)
        if len(found) != len(names):
            self.at -= 1
            raise self.error(f"{len(names)} results but {len(found)} types")
        node.outputs = tuple(
            Value(name=name, shape=_shape(shape), dtype=dtype_from_name(dtype), producer=node, index=index)
            for index, (name, (dtype, shape)) in enumerate(zip(names, found, strict=True))
        )
        for slot, value in node.operands():
            add_use(value, node, slot)
        scope.update({value.name: value for value in node.outputs})
        graph._nodes[node] = None
        graph.version += 1

    def operand(self, text: str, scope: Mapping[str, Value]) -> Operand:
        text = text.strip()
        return self.value(text[1:], scope) if text.startswith("%") else self.literal(text)

    def value(self, name: str, scope: Mapping[str, Value]) -> Value:
        if name not in scope:
            self.at -= 1
            raise self.error(f"%{name} is not defined before it is used")
        return scope[name]

    def literal(self, text: str) -> Any:
        try:
            return _literal(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RegaugeError):
            self.at -= 1
            raise self.error(f"{text.strip()!r} is not an attribute value") from None


def _absent(name: str, shape: tuple[Size, ...], dtype: Dtype) -> Weight:
    def read() -> torch.Tensor:
        raise GraphError(f"parameter {name!r} was parsed from text and has no data: pass weights to parse_graph")

    return LazyWeight(tuple(int(size) for size in shape), dtype, read)


def _shape(text: str) -> tuple[Size, ...]:
    return UNKNOWN_RANK if text == "..." else tuple(parse_size(part.strip()) for part in _split(text))


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[position - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _literal(node: ast.expr) -> Any:
    """Python literals, sizes, ``torch.*`` constants; never evaluates code."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=parts):
            return tuple(_literal(part) for part in parts)
        case ast.List(elts=parts):
            return tuple(_literal(part) for part in parts)
        case ast.Dict(keys=keys, values=values):
            return {_literal(k): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Name(id="inf" | "nan" as name):
            return float(name)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return float("-inf")
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, int | float | complex):
            return -value
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return getattr(torch, name)
        case ast.Call(func=ast.Name(id="device"), args=[], keywords=[ast.keyword(arg="type", value=value)]):
            return torch.device(_literal(value))
    return parse_size(ast.unparse(node))
