"""What has changed in a graph since it was loaded from ONNX: the imported graph and the present one, matched by names.

Passes never rename values, and copies of a graph share names, origins and weights; a weight that is another object than
the imported one was replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regauge.ir.graph import Graph, Node, Operand, Parameter, Value


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
    """Every difference between a graph as imported and as it is now; regions are compared with regions."""

    weights: list[Parameter] = field(default_factory=list)
    shapes: list[tuple[Value, Value]] = field(default_factory=list)  # (imported, present)
    attributes: list[Node] = field(default_factory=list)
    added: list[Node] = field(default_factory=list)
    removed: list[Node] = field(default_factory=list)
    rewired: list[Rewired] = field(default_factory=list)

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
        return any((self.weights, self.shapes, self.attributes, self.added, self.removed, self.rewired))


def find_changes(imported: Graph, graph: Graph) -> Changes:
    """Compare two graphs of which the second came from the first through passes."""
    changes = Changes()
    _compare(imported, graph, changes)
    return changes


def _compare(imported: Graph, graph: Graph, changes: Changes) -> None:
    _compare_values(imported.inputs, graph.inputs, changes)
    for name, parameter in graph.parameters.items():
        before = imported.parameters.get(name)
        if before is not None:
            _compare_values([before], [parameter], changes)
            if before.weight is not parameter.weight:
                changes.weights.append(parameter)
    old, new = _by_name(imported), _by_name(graph)
    changes.removed += [node for name, node in old.items() if name not in new]
    for name, node in new.items():
        if name not in old or old[name].op != node.op:
            changes.added.append(node)
        else:
            _compare_nodes(old[name], node, graph, changes)
    changes.removed += [node for name, node in old.items() if name in new and new[name].op != node.op]
    for slot, (was, now) in enumerate(zip(imported.outputs, graph.outputs, strict=True)):
        if not _same(was, now):
            changes.rewired.append(Rewired(None, slot, was, now, graph))


def _by_name(graph: Graph) -> dict[str, Node]:
    """Nodes by the name of their first result; those without results by operator and count."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        name = node.name
        while name in found:
            name += "'"
        found[name] = node
    return found


def _compare_nodes(was: Node, now: Node, graph: Graph, changes: Changes) -> None:
    _compare_values(was.outputs, now.outputs, changes)
    if was.attributes != now.attributes:
        changes.attributes.append(now)
    before = (*was.inputs, *(None,) * (len(now.inputs) - len(was.inputs)))
    after = (*now.inputs, *(None,) * (len(was.inputs) - len(now.inputs)))
    for slot, (old, new) in enumerate(zip(before, after, strict=True)):
        if not _same(old, new):
            changes.rewired.append(Rewired(now, slot, old, new, graph))
    for old_region, new_region in zip(was.regions, now.regions, strict=True):
        _compare(old_region, new_region, changes)


def _compare_values(was: Any, now: Any, changes: Changes) -> None:
    changes.shapes += [(old, new) for old, new in zip(was, now, strict=True) if old.shape != new.shape]


def _same(was: Operand, now: Operand) -> bool:
    """Numbers and sizes that feed an operand slot are told apart like attributes, values by name."""
    if isinstance(was, Value) and isinstance(now, Value):
        return was.name == now.name
    return type(was) is type(now) and was == now
