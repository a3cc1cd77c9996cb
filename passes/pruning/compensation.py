"""Repairing what a cut did: every layer behind it is refitted to give what it gave before.

For each layer in the order of the graph, with the inputs X that the layers before it give now and the outputs Y that it
gave in the original, W minimises |Y - X W'|^2 + r |W - W0|^2 (the optimal brain surgeon's update for a set of columns,
with the drift of earlier layers in it: OBC, Frantar and Alistarh 2022, eq. 5-6; OBSPA takes X from the pruned prefix).
A constant column takes the mean of what went into the bias, or into the running mean of a batch norm behind the layer.

Where the output is added to another branch, the layer takes over what that branch has lost: its target is the original
sum minus the other addend (He et al. 2017, Channel Pruning for Accelerating Very Deep Networks, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.extents import Dim, flat_indices, touches
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Moments, least_squares

RIDGE = 3e-2  # share of the mean square of a column

Keep = Mapping[Dim, np.ndarray]


def compensate(original: Graph, pruned: Graph, keep: Keep, batches: Sequence[Any], *, by: str) -> int:
    """Refit the layers of ``pruned`` that read something else than in ``original``; returns how many.

    ``pruned`` is ``original`` resized to ``keep``, and is changed. Both run once on the batches, side by side.
    """
    run = _Compensation(original, pruned, keep, batches, by)
    run.run()
    return run.refitted


class _Compensation:
    def __init__(self, original: Graph, pruned: Graph, keep: Keep, batches: Sequence[Any], by: str) -> None:
        self.original, self.pruned, self.keep, self.by = original, pruned, keep, by
        self.before, self.now = Lockstep(original, batches), Lockstep(pruned, batches)
        self.twin: dict[Value, Value] = dict(zip(pruned.inputs, original.inputs, strict=True))
        self.drifted: set[Value] = set()
        self.refitted = 0

    def run(self) -> None:
        for was, node in self._pairs():
            self.before.execute(was)
            layer = layer_of(node)
            read = [value for _, value in node.operands()]
            if layer is not None and read[0] in self.drifted:
                self._refit(layer, was)
                self.refitted += 1
            self.now.execute(node)
            if any(value in self.drifted or self._is_cut(value) for value in read):
                self.drifted.update(node.outputs)

    def _pairs(self) -> Iterator[tuple[Node, Node]]:
        for was, node in zip(self.before.steps(), self.now.steps(), strict=True):
            if was.name != node.name or was.op != node.op:
                raise PassError(f"{node.label} does not stand where {was.label} stood: it cannot be compensated")
            self.twin.update(zip(node.outputs, was.outputs, strict=True))
            yield was, node

    def _is_cut(self, value: Value) -> bool:
        return isinstance(value, Parameter) and value.shape != self.original.parameters[value.name].shape

    # -- one layer ---------------------------------------------------------------------------------------------------

    def _refit(self, layer: Layer, was: Node) -> None:
        weight = layer.matrix(layer.weight.tensor.detach()).double()
        bias = layer.bias.tensor.detach().double() if layer.bias is not None else weight.new_zeros(len(weight))
        found = Moments(weight.shape[1], len(weight))
        inputs = self.now.values(layer.node.inputs[0])
        for x, y in zip(inputs, self._targets(layer, was), strict=True):
            found.add(layer.rows_of_input(x), layer.rows_of_output(y))
        found.check(layer.node.label)
        free = layer.bias is not None or layer.norm is not None
        solved = least_squares(found, torch.cat([weight, bias[:, None]], 1), RIDGE, bias=free)
        set_weight(self.pruned, layer.weight, layer.stored(solved[:, :-1]), by=self.by)
        shifted = layer.shifted(solved[:, -1] - bias)
        if shifted is not None:
            set_weight(self.pruned, *shifted, by=self.by)

    def _targets(self, layer: Layer, was: Node) -> list[torch.Tensor]:
        """What the layer should give, for each batch: what it gave, and what the branch it is added to has lost."""
        targets = [self._kept(y, was.output) for y in self.before.values(was.output)]
        norm = layer.norm
        lost = self._lost_beside(norm or layer.node)
        if lost is None:
            return targets
        if norm is not None:
            gain = _gain(norm).to(targets[0].dtype).reshape([1, -1] + [1] * (targets[0].dim() - 2))
            usable = gain.abs() > 1e-2 * gain.abs().mean()
            lost = [torch.where(usable, part / torch.where(usable, gain, 1.0), 0.0) for part in lost]
        return [target + part for target, part in zip(targets, lost, strict=True)]

    def _lost_beside(self, node: Node) -> list[torch.Tensor] | None:
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
        return [self._kept(was, old) - now for was, now in values]

    def _kept(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """A tensor of the original as the cut leaves it."""
        for axis, extent in enumerate(self.original.axes.of[value]):
            if touches(extent, self.keep):
                tensor = tensor.index_select(axis, torch.from_numpy(flat_indices(extent, self.keep)))
        return tensor


def _gain(norm: Node) -> torch.Tensor:
    """What a batch norm in inference multiplies each channel by."""
    gain, variance = norm.inputs[1], norm.inputs[4]
    assert isinstance(variance, Parameter)
    scale = (variance.tensor.detach().double() + float(norm.attributes["eps"])).rsqrt()
    return scale * gain.tensor.detach().double() if isinstance(gain, Parameter) else scale
