"""The text form of a graph: ``print(graph)`` reads like a program, and :func:`parse_graph` reads it back.

    graph mlp(%x: f32[batch,8]) {
      symbol batch in 1..
      parameter %fc1.weight: f32[16,8]
      parameter %fc2.weight: f32[4,16] alias "head.weight"

      # fc1: Linear
      %linear = linear(%x, %fc1.weight): f32[batch,16]
      %relu = relu(%linear): f32[batch,16]
      # fc2: Linear
      %linear_1 = linear(%relu, %fc2.weight): f32[batch,4]
      return %linear_1
    }

Weights are not part of the text. Attributes equal to their defaults are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch

from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import format_size

INDENT = "  "


def format_graph(graph: Graph) -> str:
    """The whole graph as text."""
    return "\n".join(_graph_lines(graph, "graph"))


def _graph_lines(graph: Graph, keyword: str) -> Iterator[str]:
    yield f"{keyword} {graph.name}({', '.join(map(repr, graph.inputs))}) {{"
    for symbol, (low, high) in graph.symbols.items():
        yield f"{INDENT}symbol {symbol} in {low}..{'' if high is None else high}"
    for parameter in graph.parameters.values():
        yield INDENT + format_parameter(parameter)
    for state in graph.states:
        returned = " returned" if state.returned else ""
        yield f"{INDENT}state {state.name}: %{state.before.name} -> %{state.after.name}{returned}"
    if graph.parameters or graph.symbols:
        yield ""
    here: tuple[str, str] | None = None
    for node in graph.nodes:
        place = node.scope[-1] if node.scope else None
        if place != here:  # a node without a module that follows one inside a module is outside of it
            path, name = place or ("", "")
            yield f"{INDENT}# {path or 'root'}" + (f": {name}" if name else "")
        here = place
        yield from (INDENT + line for line in _node_lines(node))
    yield f"{INDENT}return {', '.join(map(format_operand, graph.outputs))}"
    yield "}"


def format_parameter(parameter: Parameter) -> str:
    text = f"{parameter.kind} {parameter!r}"
    if parameter.aliases:
        text += " alias " + ", ".join(f'"{name}"' for name in parameter.aliases)
    if parameter.trainable != (parameter.kind == "parameter"):
        text += " trainable" if parameter.trainable else " frozen"
    if not parameter.persistent:
        text += " transient"
    return text


def format_node(node: Node) -> str:
    return "\n".join(_node_lines(node))


def _node_lines(node: Node) -> Iterator[str]:
    results = ", ".join(f"%{value.name}" for value in node.outputs)
    types = ", ".join(value.signature for value in node.outputs)
    arguments = [format_operand(operand) for operand in node.inputs]
    arguments += [f"{name}={format_attribute(value)}" for name, value in shown_attributes(node).items()]
    yield f"{results} = {node.op}({', '.join(arguments)}): {types}" + (" with" if node.regions else "")
    for region in node.regions:
        yield from (INDENT + line for line in _graph_lines(region, "region"))


def shown_attributes(node: Node) -> Mapping[str, Any]:
    """Attributes that differ from their defaults."""
    defaults = node.operator.attributes
    return {name: value for name, value in node.attributes.items() if not _is_default(value, defaults.get(name))}


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def format_operand(operand: Operand) -> str:
    return f"%{operand.name}" if isinstance(operand, Value) else format_attribute(operand)


def format_attribute(value: Any) -> str:
    """An attribute as Python-like text; sizes are printed bare, dtypes as torch writes them."""
    if isinstance(value, sympy.Basic):
        return format_size(value)
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(format_attribute, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{format_attribute(k)}: {format_attribute(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        return f"tensor({value.tolist()})" if value.numel() <= 8 else f"tensor({tuple(value.shape)})"
    return repr(value)
