"""Blocks of one structure anywhere in a graph, with the weights that stand for each other in them.

Pieces of a graph (:mod:`regauge.passes.depth.blocks`) are drawn as labelled graphs: operators with their attributes and
numbers, weights with their shapes, what is read from outside with its shape; edges say which operand a value is, but
for operators whose two operands may be exchanged. Those with one Weisfeiler-Lehman hash (Shervashidze et al. 2011) are
compared by isomorphism (Cordella et al. 2004, VF2), which also says which weight of one is which of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.depth.blocks import repeated_blocks
from regauge.passes.depth.branches import residual_branches
from regauge.passes.depth.parts import Order, Part

_Placed: TypeAlias = tuple[Part, dict[Any, Any]]  # with what stands in it for each node and weight of the first one


@dataclass(frozen=True, eq=False)
class Repeated:
    """Blocks of one structure, in the order of the graph; of each its own weights in corresponding order."""

    parts: tuple[Part, ...]
    weights: tuple[tuple[Parameter, ...], ...]  # [blocks][roles]

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    def __str__(self) -> str:
        return f"{len(self.parts)} blocks of one structure: {', '.join(self.names)}"


def repeated(graph: Graph) -> list[Repeated]:
    """All sets of two or more blocks of one structure; no node is in two of them."""
    order = Order(graph)
    return alike_parts(repeated_blocks(order, residual_branches(order, Counter())))


def alike_parts(parts: Iterable[Part]) -> list[Repeated]:
    """The parts sorted by structure; those that are like no other are left out."""
    by_hash: dict[str, list[tuple[Any, list[_Placed]]]] = {}
    for part in parts:
        drawn = _drawn(part)
        key = nx.weisfeiler_lehman_graph_hash(drawn.to_undirected(as_view=True), "label", "label")
        classes = by_hash.setdefault(key, [])
        for first, found in classes:
            mapping = _isomorphism(first, drawn)
            if mapping is not None:
                found.append((part, mapping))
                break
        else:
            classes.append((drawn, [(part, {node: node for node in drawn})]))
    return [_repeated(found) for classes in by_hash.values() for _, found in classes if len(found) > 1]


def _repeated(found: Sequence[_Placed]) -> Repeated:
    first = _own(found[0][0].nodes)
    weights = tuple(tuple(mapping[weight] for weight in first) for _, mapping in found)
    inside = [set(_own(part.nodes)) for part, _ in found]
    roles = [role for role in range(len(first)) if all(w[role] in own for w, own in zip(weights, inside, strict=True))]
    return Repeated(tuple(part for part, _ in found), tuple(tuple(own[role] for role in roles) for own in weights))


def _own(nodes: Sequence[Node]) -> list[Parameter]:
    """Parameters, buffers and constants that nothing but these nodes reads, in the order in which they are read."""
    inside = set(nodes)
    read = dict.fromkeys(value for node in nodes for _, value in node.operands() if isinstance(value, Parameter))
    return [value for value in read if all(user in inside for user, _ in value.uses)]


def _drawn(part: Part) -> Any:
    """A part as a graph of networkx, whose nodes and edges have a ``label``."""
    drawn: Any = nx.DiGraph()
    inside = set(part.nodes)
    for node in part.nodes:
        attributes = sorted((name, repr(value)) for name, value in node.attributes.items())
        numbers = [(slot, repr(o)) for slot, o in enumerate(node.inputs) if not isinstance(o, Value)]
        results = [value.signature for value in node.outputs]
        end = part.result in node.outputs
        drawn.add_node(node, label=repr((node.op, attributes, numbers, results, len(node.regions), end)))
        exchanged = node.operator.commutative and len(node.inputs) == 2
        edges: dict[Any, list[Any]] = {}
        for slot, value in node.operands():
            made = value.producer if value.producer in inside and value is not part.source else None
            if made is None:
                drawn.add_node(value, label=_leaf(value, part.source))
            edges.setdefault(made or value, []).append(("either" if exchanged else slot, value.index if made else 0))
        for end_of, labels in edges.items():
            drawn.add_edge(end_of, node, label=repr(sorted(labels, key=repr)))
    return drawn


def _leaf(value: Value, source: Value) -> str:
    kind = "source" if value is source else value.kind if isinstance(value, Parameter) else "side"
    return repr((kind, value.signature))


def _isomorphism(one: Any, other: Any) -> dict[Any, Any] | None:
    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return bool(a["label"] == b["label"])

    matcher: Any = DiGraphMatcher(one, other, node_match=same, edge_match=same)
    return dict(matcher.mapping) if matcher.is_isomorphic() else None
