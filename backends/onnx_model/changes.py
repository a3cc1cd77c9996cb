"""Matches the imported graph of an ONNX model with the present one, and lists what has changed.

Nodes are matched by name, and where a pass renamed one, by the ONNX value that its first result stands for, across
regions: a node that moved out of a branch is the same node. Copies of a graph share names, origins and weights; a
weight that is another object than the imported one was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import same

_FORMALS: dict[str, Callable[[Node], int]] = {
    "cond": lambda node: 0,
    "loop": lambda node: 2 + int(node.attributes["carried"]),
    "scan": lambda node: int(node.attributes["carried"]) + len(node.attributes["input_axes"]),
}


@dataclass
class Rewired:
    """An operand slot of a kept node, or an output of a graph (``node`` is None), that reads something else now."""

    node: Node | None
    slot: int
    before: Operand
    after: Operand
    graph: Graph


@dataclass
class Changes:
    """Every difference between a graph as imported and as it is now; regions are compared with regions.

    ``old_of`` leads from a node of the present graph to the imported one that it is, ``same`` does so for values, and
    ``captured`` leads from an input of a region (of either graph) to the value around the region that it stands for.
    """

    weights: list[Parameter] = field(default_factory=list)
    shapes: list[tuple[Value, Value]] = field(default_factory=list)  # (imported, present)
    attributes: list[Node] = field(default_factory=list)
    added: list[Node] = field(default_factory=list)
    removed: list[Node] = field(default_factory=list)
    rewired: list[Rewired] = field(default_factory=list)
    inlined: dict[Any, int] = field(default_factory=dict)  # ONNX nodes that a pass replaced by a nested graph of theirs
    old_of: dict[Node, Node] = field(default_factory=dict)
    same: dict[Value, Value] = field(default_factory=dict)
    captured: dict[Value, Value] = field(default_factory=dict)

    @property
    def restated(self) -> list[Node]:
        """Nodes whose attributes changed though no size around them did: they compute something else now."""
        resized = {after for _, after in self.shapes}
        return [
            node
            for node in self.attributes
            if not resized.intersection((*(v for _, v in node.operands()), *node.outputs))
        ]

    def __bool__(self) -> bool:
        return any((self.weights, self.shapes, self.attributes, self.added, self.removed, self.rewired, self.inlined))


def find_changes(imported: Graph, graph: Graph) -> Changes:
    """Compare two graphs of which the second came from the first through passes."""
    comparison = _Comparison(imported, graph)
    comparison.run()
    return comparison.changes


class _Comparison:
    def __init__(self, imported: Graph, graph: Graph) -> None:
        self.imported = imported
        self.graph = graph
        inlined = dict(graph.metadata.get("inlined_regions", {}))
        self.changes = Changes(inlined=inlined, captured={**_captured(imported), **_captured(graph)})
        self.old_of = _matched([n for _, n in imported.walk()], [n for _, n in graph.walk()])
        self.changes.old_of = self.old_of
        self.changes.same.update(zip(graph.inputs, imported.inputs, strict=True))
        for new, old in self.old_of.items():
            self.changes.same.update(zip(new.outputs, old.outputs, strict=True))
            for now, was in zip(new.regions, old.regions, strict=True):
                self.changes.same.update(zip(self._formals(now), self._formals(was), strict=True))
        self.still_there = set(self.changes.same.values())

    def run(self) -> None:
        self._values(self.imported.inputs, self.graph.inputs)
        self._parameters()
        new_of = {old: new for new, old in self.old_of.items()}
        self.changes.removed += [node for _, node in self.imported.walk() if node not in new_of]
        for owner, node in self.graph.walk():
            if node in self.old_of:
                self._node(self.old_of[node], node, owner)
            else:
                self.changes.added.append(node)
        self._outputs(self.imported, self.graph)

    def _parameters(self) -> None:
        before = {parameter.name: parameter for parameter in self.imported.all_parameters()}
        by_origin = {p.origin: p for p in before.values() if p.origin is not None}
        for parameter in self.graph.all_parameters():
            was = before.get(parameter.name)
            if was is None or was.origin is not parameter.origin:
                was = by_origin.get(parameter.origin)
            if was is not None:
                self._values([was], [parameter])
                if was.weight is not parameter.weight:
                    self.changes.weights.append(parameter)

    def _node(self, was: Node, now: Node, owner: Graph) -> None:
        self._values(was.outputs, now.outputs)
        if was.attributes != now.attributes:
            self.changes.attributes.append(now)
        before, after = self._explicit(was), self._explicit(now)
        before = (*before, *(None,) * (len(after) - len(before)))
        after = (*after, *(None,) * (len(before) - len(after)))
        for slot, (old, new) in enumerate(zip(before, after, strict=True)):
            if not self._same(old, new):
                self.changes.rewired.append(Rewired(now, slot, self._outer(old), self._outer(new), owner))
        for old_region, new_region in zip(was.regions, now.regions, strict=True):
            self._values(self._formals(old_region), self._formals(new_region))
            self._outputs(old_region, new_region)

    def _formals(self, region: Graph) -> list[Value]:
        """The inputs of a region but for what it captures, of which a pass may have dropped some."""
        return [value for value in region.inputs if value not in self.changes.captured]

    def _explicit(self, node: Node) -> tuple[Operand, ...]:
        """The operands but for those that regions capture, which are compared where they are read."""
        captures = sum(value in self.changes.captured for value in node.regions[0].inputs) if node.regions else 0
        return node.inputs[: len(node.inputs) - captures]

    def _outputs(self, was: Graph, now: Graph) -> None:
        for slot, (old, new) in enumerate(zip(was.outputs, now.outputs, strict=True)):
            if not self._same(old, new):
                self.changes.rewired.append(Rewired(None, slot, self._outer(old), self._outer(new), now))

    def _values(self, was: Sequence[Value], now: Sequence[Value]) -> None:
        self.changes.shapes += [(old, new) for old, new in zip(was, now, strict=True) if not same_shape(old, new)]

    def _outer(self, operand: Operand) -> Operand:
        while isinstance(operand, Value) and operand in self.changes.captured:
            operand = self.changes.captured[operand]
        return operand

    def _same(self, was: Operand, now: Operand) -> bool:
        """Numbers and sizes that feed an operand slot are told apart like attributes; a new value that took over the
        name of one that went is that one to its readers, but not inside an ONNX node: that computes the old one."""
        was, now = self._outer(was), self._outer(now)
        if isinstance(was, Parameter) and isinstance(now, Parameter):
            return was.origin is now.origin and (was.origin is not None or was.name == now.name)
        if isinstance(was, Value) and isinstance(now, Value):
            if now not in self.changes.same:
                return was.origin is not None and was.name == now.name and was not in self.still_there
            return self.changes.same[now] is was or (was.origin is None and self._equal(was, now))
        return type(was) is type(now) and was == now

    def _equal(self, was: Value, now: Value) -> bool:
        """Whether a value inside an ONNX node was merged with one that is computed alike: then that node may stay."""
        a, b = was.producer, now.producer
        if a is None or b is None or a.op != b.op or a.attributes != b.attributes or was.index != now.index:
            return False
        if not is_pure(a) or a.regions or len(a.inputs) != len(b.inputs):
            return False
        return all(map(self._same, a.inputs, b.inputs))


def same_shape(a: Value, b: Value) -> bool:
    """Whether two values have equal sizes, however they are written."""
    return a.shape == b.shape or (a.rank == b.rank and all(map(same, a.shape, b.shape)))


def _matched(old: Iterable[Node], new: Iterable[Node]) -> dict[Node, Node]:
    """Present nodes with the imported ones that they are."""
    by_name = _by_name(old)
    by_origin = {node.outputs[0].origin: node for node in by_name.values() if node.outputs}
    found: dict[Node, Node] = {}
    for name, node in _by_name(new).items():
        if name in by_name and _alike(by_name[name], node):
            found[node] = by_name[name]
    taken = set(found.values())
    for node in new:
        origin = node.outputs[0].origin if node.outputs else None
        candidate = by_origin.get(origin) if origin is not None and node not in found else None
        if candidate is not None and candidate not in taken and _alike(candidate, node):
            found[node] = candidate
            taken.add(candidate)
    return found


def _alike(old: Node, new: Node) -> bool:
    if old.op != new.op or old.origin is not new.origin or len(old.regions) != len(new.regions):
        return False
    if len(old.outputs) != len(new.outputs):
        return False
    pairs = zip(old.outputs, new.outputs, strict=True)
    return all(a.dtype == b.dtype and (a.origin is b.origin or b.origin is None) for a, b in pairs)


def _by_name(nodes: Iterable[Node]) -> dict[str, Node]:
    """Nodes by the name of their first result; those without results by operator and count."""
    found: dict[str, Node] = {}
    for node in nodes:
        name = node.name
        while name in found:
            name += "'"
        found[name] = node
    return found


def _captured(graph: Graph) -> dict[Value, Value]:
    """Inputs of regions that stand for a value around the region, with that value.

    They come behind the formal ones, which ONNX passes by position: If has none.
    """
    found: dict[Value, Value] = {}
    for _, node in graph.walk():
        for region in node.regions:
            first = _FORMALS[node.op](node) if node.op in _FORMALS else len(region.inputs)
            outside = node.inputs[len(node.inputs) - len(region.inputs) :] if region.inputs else ()
            for inner, outer in list(zip(region.inputs, outside, strict=False))[first:]:
                if isinstance(outer, Value):
                    found[inner] = outer
    return found
