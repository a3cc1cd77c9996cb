"""Regions as nodes of the graph: ``fused`` has as its only region what one kernel computes.

    before  %silu = silu(%gate): f32[5,16]
            %mul = mul(%silu, %up): f32[5,16]

    after   %mul = fused(%gate, %up): f32[5,16] with
              region silu_mul(%gate: f32[5,16], %up: f32[5,16]) {
                %silu = silu(%gate): f32[5,16]
                %mul = mul(%silu, %up): f32[5,16]
                return %mul
              }

All that the region reads is an operand, weights too. Names inside are those outside, so that :func:`unfuse` gives back
the graph as it was.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import sympy

from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder, inline_region, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.sizes.expressions import symbols_in

Rounding: TypeAlias = Literal["fused", "eager"]
"""``fused``: single precision inside, results are rounded once. ``eager``: what each node gives is rounded to its type,
as torch does it node by node."""


def fused_nodes(graph: Graph) -> list[Node]:
    """The fused nodes of a graph and of its regions."""
    return [node for _, node in graph.walk() if node.op == FUSED]


def body_of(node: Node) -> Graph:
    """The region of a fused node."""
    (body,) = node.regions
    return body


def named_sizes(nodes: Sequence[Node]) -> set[sympy.Symbol]:
    """The dynamic sizes in the attributes and operands of nodes."""
    operands = [[operand for operand in node.inputs if not isinstance(operand, Value)] for node in nodes]
    return symbols_in([*operands, *(list(node.attributes.values()) for node in nodes)])


def replace_everywhere(graph: Graph, old: Value, new: Operand) -> None:
    """:func:`replace_uses`, also where regions hand on a value of the graph around them."""
    replace_uses(graph, old, new)
    for part in graph.nested():
        part.outputs = [new if output is old else output for output in part.outputs]


def unfuse(graph: Graph, wanted: Callable[[Node], bool] = lambda node: True) -> int:
    """Put the nodes of fused nodes in their place again, in regions too; returns how many fused nodes there were.

    Only of those that are ``wanted``.
    """
    count = 0
    for owner in list(graph.nested()):
        nodes = [node for node in owner.nodes if node.op == FUSED and wanted(node)]
        build = Builder(owner)
        for node in nodes:
            _inline(build, node)
        count += len(nodes)
    return count


def _inline(build: Builder, node: Node) -> None:
    graph = build.graph
    names = [value.name for value in node.outputs]
    results = inline_region(build, node, body_of(node), node.inputs)
    for old, new in zip(node.outputs, results, strict=True):
        replace_everywhere(graph, old, new)
    remove_node(graph, node)
    build.release(names)
    for name, new in zip(names, results, strict=True):
        if isinstance(new, Value) and new.producer is not None and build.free(name):
            build.release([new.name])
            new.name = build.unique(name)


def without_fused(graph: Graph) -> Graph:
    """The graph, or a copy without fused nodes where it has some."""
    if not fused_nodes(graph):
        return graph
    result = graph.copy()
    unfuse(result)
    return result


def canonical(body: Graph) -> Graph:
    """A copy of a region as a graph whose text says what it computes and nothing of where it stands.

    Values are called as before but for paths and the numbers at their ends, and by names that Python can have.
    """
    result = copy_graph(body)
    taken: set[str] = set()
    for value in result.values():
        value.name = _plain_name(value.name, taken)
    for node in result.nodes:
        node.scope, node.source, node.origin, node.metadata = (), "", None, {}
    return result


def content(body: Graph) -> str:
    """The text of a region, whatever its values are called: equal for regions that compute the same on equal types."""
    result = canonical(body)
    for number, value in enumerate(result.values()):
        value.name = f"v{number}"
    return str(result)


def _plain_name(name: str, taken: set[str]) -> str:
    stem = re.sub(r"(?<=\D)_?\d+$", "", re.sub(r"\W", "_", name.rpartition(".")[2])).lower()
    stem = f"v_{stem}" if not stem or not stem[0].isalpha() or keyword.iskeyword(stem) else stem
    found, number = stem, 1
    while found in taken:
        found, number = f"{stem}_{number}", number + 1
    taken.add(found)
    return found
