"""A graph and a changed copy of it, run together: what each layer is given now, and what it should give.

Layers are looked at in the order of the graph, with the inputs that the changed layers before them give. The target is
what the layer gave in the original. Where its output is only added to another branch, the layer takes over what that
branch has lost: the target is the original sum minus the other addend (He et al. 2017, Channel Pruning for Accelerating
Very Deep Networks, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from regauge.ir.dims.kept import Keep, part_kept
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.batch_norms import before_norm
from regauge.passes.calibration.layers import Layer


class SideBySide:
    """One run of both graphs on all batches; ``changed`` has the nodes of ``original``, resized to ``keep``.

    for was, node in run.steps():           # both about to run; weights of ``node`` may still be changed
        run.inputs(layer), run.targets(layer, was)
    """

    def __init__(self, original: Graph, changed: Graph, batches: Sequence[Any], keep: Keep | None = None) -> None:
        self.original, self.changed, self.keep = original, changed, keep or {}
        self.before, self.now = Lockstep(original, batches), Lockstep(changed, batches)
        self.twin: dict[Value, Value] = dict(zip(changed.inputs, original.inputs, strict=True))
        self.drifted: set[Value] = set()

    def steps(self) -> Iterator[tuple[Node, Node]]:
        """The nodes of both graphs; that of the original has run, that of the copy runs when the next is asked for."""
        for was, node in zip(self.before.steps(), self.now.steps(), strict=True):
            if was.name != node.name or was.op != node.op:
                raise PassError(f"{node.label} does not stand where {was.label} stood: it cannot be compensated")
            self.twin.update(zip(node.outputs, was.outputs, strict=True))
            self.before.execute(was)
            yield was, node
            self.now.execute(node)
            if self.reads_other(node, was):
                self.drifted.update(node.outputs)

    def reads_other(self, node: Node, was: Node) -> bool:
        """Whether a node reads, itself or inside its regions, something else than it did in the original."""
        read = zip(_read(node), _read(was), strict=True)
        return any(value in self.drifted or _differs(value, old) for value, old in read)

    def inputs(self, layer: Layer) -> Sequence[torch.Tensor]:
        """What the layer is given now, for each batch."""
        return self.now.values(layer.node.inputs[0])

    def as_it_was(self, layer: Layer) -> bool:
        """Whether the layer reads what it did in the original, and makes up for no other one: nothing is to be fitted,
        which would leave its weight as it is but for the rounding of sums."""
        return layer.node.inputs[0] not in self.drifted and self._lost_beside(layer.norm or layer.node) is None

    def targets(self, layer: Layer, was: Node) -> Iterator[torch.Tensor]:
        """What the layer should give, for each batch in turn."""
        norm, targets = layer.norm, (self.kept(tensor, was.output) for tensor in self.before.values(was.output))
        lost = self._lost_beside(norm or layer.node)
        if lost is None:
            return targets
        if norm is not None:
            lost = before_norm(norm, lost)
        return (target + part for target, part in zip(targets, lost, strict=True))

    def _lost_beside(self, node: Node) -> Iterator[torch.Tensor] | None:
        """What the other addend was and is no more, where the node's result is only added to one that runs before."""
        result = node.output
        users = list(result.uses)
        if len(users) != 1 or users[0][0].op != "add":
            return None
        add, slot = users[0]
        other = add.inputs[1 - slot]
        if not isinstance(other, Value) or other not in self.drifted or other.shape != result.shape:
            return None
        old = self.twin.get(other)
        if old is None or not self.now.holds(other) or not self.before.holds(old):
            return None
        values = zip(self.before.values(old), self.now.values(other), strict=True)
        return (self.kept(was, old) - now for was, now in values)

    def kept(self, tensor: torch.Tensor, value: Value, ends: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor of the original as the cut leaves it; ``ends`` are where the rows of each expert end."""
        if not self.keep:
            return tensor
        experts = None if ends is None else torch.searchsorted(ends, torch.arange(len(tensor)), right=True)
        rows = None if experts is None or ends is None else experts.clamp(max=len(ends) - 1).numpy()
        return part_kept(tensor, self.original.axes.of[value], self.keep, rows)


def _differs(value: Value, old: Value) -> bool:
    return isinstance(value, Parameter) and isinstance(old, Parameter) and value.weight is not old.weight


def _read(node: Node) -> Iterator[Value]:
    """What a node reads, itself or inside its regions."""
    yield from (value for _, value in node.operands())
    for inner in inside(node):
        yield from (value for _, value in inner.operands())


def inside(node: Node) -> list[Node]:
    """The nodes in the regions of a node, in order."""
    return [inner for region in node.regions for _, inner in region.walk()]
