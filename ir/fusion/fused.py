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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeAlias

import sympy

from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder, inline_region, remove_node, replace_uses, set_input
from regauge.ir.fusion.plan import Plan, moves_nothing, plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.roofline import DEVICES, Device
from regauge.ir.sizes.expressions import symbols_in

LONGEST_NAME = 40
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


def region_name(nodes: Sequence[Node]) -> str:
    """What a region is called: the operators that do something, each once."""
    name = "_".join(dict.fromkeys(node.op for node in nodes if not moves_nothing(node)))
    return name[:LONGEST_NAME].rstrip("_")


def named_sizes(nodes: Sequence[Node]) -> set[sympy.Symbol]:
    """The dynamic sizes in the attributes and operands of nodes."""
    operands = [[operand for operand in node.inputs if not isinstance(operand, Value)] for node in nodes]
    return symbols_in([*operands, *(list(node.attributes.values()) for node in nodes)])


def hidden_size(nodes: Sequence[Node]) -> str | None:
    """A dynamic size that nodes name and that none of their operands from outside has; None where there is none."""
    shown = {size for value in _read_by(nodes) for size in value.shape}
    return next((str(size) for size in sorted(named_sizes(nodes), key=str) if size not in shown), None)


@dataclass(frozen=True)
class Fusion:
    """What was fused: the plan that it follows, the fused nodes, and why other regions of the plan are none."""

    plan: Plan
    nodes: tuple[Node, ...]
    left: tuple[str, ...]


def fuse_graph(graph: Graph, device: Device | None = None, *, rounding: Rounding = "fused", by: str = "fuse") -> Fusion:
    """Fuse all regions of a graph that gain on a device, by default a GPU, but for products, which are left to the
    library of the runtime, and for regions of one node, for which the runtime has a kernel.

    Attention as one node becomes a region on a GPU: torch's kernels there take only some masks and types.
    """
    alone = ("attention",) if device is None or device == DEVICES["gpu"] else ()
    plan = plan_fusion(graph, device, contractions=False, attention=rounding == "fused")
    build = Builder(graph, by=by)
    nodes: list[Node] = []
    left: list[str] = []
    for region in plan.regions:
        if region.kind not in alone and sum(not moves_nothing(node) for node in region.nodes) < 2:
            continue
        size = hidden_size(region.nodes)
        if size is None:
            nodes.append(fuse(build, region, rounding))
        else:
            left.append(f"it reads the dynamic size {size}, which no operand of it has")
    return Fusion(plan, tuple(nodes), tuple(left))


def fuse(build: Builder, region: Region, rounding: Rounding) -> Node:
    """Put a fused node in the place of the nodes of a region."""
    graph, nodes = build.graph, region.nodes
    writes, reads = region.outputs, _read_by(nodes)
    inside = set(nodes)
    body = Graph(region_name(nodes))
    build.scope = _common_scope(nodes)
    results = [(value.shape, value.dtype) for value in writes]
    found = build(FUSED, *reads, regions=[body], results=results, rounding=rounding)
    made = (found,) if isinstance(found, Value) else found
    build.release(value.name for value in made)
    for old, new in zip(writes, made, strict=True):
        inner = [(user, slot) for user, slot in old.uses if user in inside]
        _replace(graph, old, new)
        for user, slot in inner:
            set_input(user, slot, old, graph)
        new.name, new.origin = old.name, old.origin
    formals = {value: Value(name=value.name, shape=value.shape, dtype=value.dtype) for value in reads}
    for node in nodes:
        for slot, value in list(node.operands()):
            if value in formals:
                set_input(node, slot, formals[value], graph)
        body._nodes[node] = None
        del graph._nodes[node]
    body.inputs, body.outputs = list(formals.values()), list(writes)
    body.version += 1
    graph.version += 1
    return build.added[-1]


def _read_by(nodes: Sequence[Node]) -> list[Value]:
    """What nodes read from outside."""
    inside = set(nodes)
    return list(dict.fromkeys(v for node in nodes for _, v in node.operands() if v.producer not in inside))


def _replace(graph: Graph, old: Value, new: Operand) -> None:
    """:func:`replace_uses`, also where regions hand on a value of the graph around them."""
    replace_uses(graph, old, new)
    for part in graph.nested():
        part.outputs = [new if output is old else output for output in part.outputs]


def _common_scope(nodes: Sequence[Node]) -> tuple[tuple[str, str], ...]:
    """The modules that all nodes ran in."""
    levels = zip(*(node.scope for node in nodes), strict=False)
    return tuple(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


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
        _replace(graph, old, new)
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


def traced(body: Graph) -> Region:
    """The region that the nodes of a body are; raises FusionError where they are none."""
    outputs = [output for output in body.outputs if isinstance(output, Value)]
    return trace(body.nodes, outputs, list(_beside(body, outputs)))


def _beside(body: Graph, outputs: Sequence[Value]) -> Iterator[Value]:
    """Of each part of a body that no node connects with the others the first result with most axes.

    A sum over what another part has to itself, too, has fewer: what both read connects them.
    """
    part: dict[Node, set[Node]] = {node: {node} for node in body.nodes}
    for node in body.nodes:
        for _, value in node.operands():
            if value.producer is not None and part[value.producer] is not part[node]:
                joined = part[value.producer] | part[node]
                part.update(dict.fromkeys(joined, joined))
    seen: set[int] = set()
    most = max((output.rank for output in outputs), default=0)
    for output in sorted(outputs, key=lambda value: -value.rank):
        if output.producer is not None and id(part[output.producer]) not in seen and output.rank == most:
            seen.add(id(part[output.producer]))
            yield output
