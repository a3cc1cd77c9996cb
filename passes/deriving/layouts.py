"""Values with the indices that their axes are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.roofline import VIEWS
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.deriving.expressions import Axes, Axis, Index


@dataclass(frozen=True)
class Laid:
    """A value, and the indices that its axes are made of."""

    value: Value
    axes: Axes

    @property
    def flat(self) -> Axis:
        return tuple(index for axis in self.axes for index in axis)


def has_whole(axes: Axes, indices: Iterable[Index]) -> bool:
    """Whether each axis has all of its indices among these, or none."""
    given = set(indices)
    return all(given.issuperset(axis) or not given & set(axis) for axis in axes)


def is_weight(value: object) -> bool:
    """Whether a value is a weight, or a part of one in some layout."""
    while isinstance(value, Value) and value.producer is not None and value.producer.op in VIEWS:
        value = value.producer.inputs[0]
    return isinstance(value, Parameter)


def cut_weights(build: Builder, nodes: Iterable[Node]) -> list[Node]:
    """Let parts of weights that nothing else reads take their place; gives the nodes that are left."""
    left = []
    for node in nodes:
        weight = node.inputs[0] if node.op == "slice" else None
        if not isinstance(weight, Parameter) or len(weight.uses) != 1 or not weight.stored or is_fixed(node):
            left.append(node)
            continue
        dim, start, end, step = (node.attributes[name] for name in ("dim", "start", "end", "step"))
        at = (*(slice(None),) * dim, slice(start, end, step))
        shape = tuple(int(size) for size in node.output.shape)
        new = build.folded(weight, lambda tensor, at=at: tensor[at].clone(), shape=shape)
        replace_uses(build.graph, node.output, new)
        remove_node(build.graph, node)
        settle_successors(build.graph, build)
    return left
