"""Fusing: regions of a plan become fused nodes, and the nodes of a body the region that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder, set_input
from regauge.ir.errors import FusionError
from regauge.ir.fusion.footprint import Footprints
from regauge.ir.fusion.fused import Rounding, named_sizes, replace_everywhere
from regauge.ir.fusion.plan import Plan, moves_nothing, plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.roofline import DEVICES, Device

LONGEST_NAME = 40


def region_name(nodes: Sequence[Node]) -> str:
    """What a region is called: the operators that do something, each once."""
    name = "_".join(dict.fromkeys(node.op for node in nodes if not moves_nothing(node)))
    return name[:LONGEST_NAME].rstrip("_")


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


def fuse_graph(
    graph: Graph,
    device: Device | None = None,
    *,
    rounding: Rounding = "fused",
    by: str = "fuse",
    footprints: Footprints | None = None,
) -> Fusion:
    """Fuse all regions of a graph that gain on a device, by default a GPU, but for products, which are left to the
    library of the runtime, and for regions of one node, for which the runtime has a kernel.

    Attention as one node becomes a region on a GPU: torch's kernels there take only some masks and types.
    ``footprints`` says what kernels take of the device.
    """
    alone = ("attention",) if device is None or device == DEVICES["gpu"] else ()
    plan = plan_fusion(graph, device, contractions=False, attention=rounding == "fused", footprints=footprints)
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
    """Put a fused node in the place of the nodes of a region; raises FusionError where they are another graph's, or
    the region lacks a result that the graph returns."""
    graph, nodes = build.graph, region.nodes
    writes, reads = region.outputs, _read_by(nodes)
    inside = set(nodes)
    stranger = next((node for node in nodes if node not in graph._nodes), None)
    if stranger is not None:
        raise FusionError(f"{stranger.label} is no node of this graph {graph.name!r}: a copy has nodes of its own")
    missing = next(
        (v for v in graph.outputs if isinstance(v, Value) and v.producer in inside and v not in writes), None
    )
    if missing is not None:
        raise FusionError(f"the graph returns {missing.name}: trace its nodes with the outputs of the graph")
    body = Graph(region_name(nodes))
    build.scope = _common_scope(nodes)
    results = [(value.shape, value.dtype) for value in writes]
    found = build(FUSED, *reads, regions=[body], results=results, rounding=rounding)
    made = (found,) if isinstance(found, Value) else found
    build.release(value.name for value in made)
    for old, new in zip(writes, made, strict=True):
        inner = [(user, slot) for user, slot in old.uses if user in inside]
        replace_everywhere(graph, old, new)
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


def _common_scope(nodes: Sequence[Node]) -> tuple[tuple[str, str], ...]:
    """The modules that all nodes ran in."""
    levels = zip(*(node.scope for node in nodes), strict=False)
    return tuple(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


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
