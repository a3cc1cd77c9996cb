"""From a layer to the sum that it writes into: what lies between, and how to go back.

    layer -> batch_norm / scale / permute / reshape / dropout -> + (other addends) -> the residual stream

Of what a sum should give more, the way back says what the layer should give more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regauge.ir.graph import Node, Parameter, Value
from regauge.passes.calibration.batch_norms import before_norm, divided_by
from regauge.passes.depth.branches import is_sum

_PASSED = ("dropout", "identity")

Read = Callable[[Any], Sequence[Any]]  # an operand, for each batch


@dataclass
class Route:
    """The way from a layer's output to the outermost sum that takes it in, with the other addends."""

    sum: Node
    entry: Value  # the addend that the layer gives
    others: list[Value]
    between: list[Node]

    def back(self, lost: Sequence[torch.Tensor], read: Read) -> list[torch.Tensor]:
        """What the layer's output lacks, where the sum lacks ``lost``; 0 where that cannot be told."""
        found = list(lost)
        for node in reversed(self.between):
            found = _back(node, found, read)
        return found


def route_of(node: Node, computed: Callable[[Value], bool]) -> Route | None:
    """The route from a node's output; ``computed`` says which other addends are known when the node runs."""
    value, between, found = node.output, list[Node](), None
    while len(value.uses) == 1:
        user, slot = next(iter(value.uses))
        if is_sum(user):
            other = user.inputs[1 - slot]
            if not isinstance(other, Value) or not computed(other) or other.shape != user.output.shape:
                break
            found = (
                Route(user, value, [other], between)
                if found is None
                else replace(found, sum=user, others=[*found.others, other])
            )
        elif found is None and slot == 0 and _is_invertible(user):
            between.append(user)
        elif found is None and user.op in ("mul", "add") and _is_fixed(user, 1 - slot):
            between.append(user)
        elif not (found is not None and user.op in _PASSED):
            break
        value = user.outputs[0]
    return found


def _is_fixed(node: Node, slot: int) -> bool:
    """Whether an operand of a product or a sum is a scale or a bias that does not change the shape of the other."""
    operand, other = node.inputs[slot], node.inputs[1 - slot]
    if isinstance(operand, Parameter):
        return isinstance(other, Value) and other.shape == node.output.shape
    return isinstance(operand, int | float) and operand != 0


def _is_invertible(node: Node) -> bool:
    if node.op in (*_PASSED, "permute", "reshape"):
        return True
    return node.op == "batch_norm" and not node.attributes.get("training") and isinstance(node.inputs[4], Parameter)


def _back(node: Node, lost: list[torch.Tensor], read: Read) -> list[torch.Tensor]:
    if node.op == "permute":
        dims = node.attributes["dims"]
        inverse = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
        return [part.permute(inverse) for part in lost]
    if node.op == "reshape":
        source = node.inputs[0]
        assert isinstance(source, Value)
        sizes = zip(*(read(size) for size in source.shape), strict=True)
        return [part.reshape([int(n) for n in shape]) for part, shape in zip(lost, sizes, strict=True)]
    if node.op == "batch_norm":
        return list(before_norm(node, lost))
    if node.op == "mul":
        scale = next(operand for slot, operand in enumerate(node.inputs) if _is_fixed(node, slot))
        gain = scale.tensor.detach() if isinstance(scale, Parameter) else torch.as_tensor(scale)
        return [divided_by(part, gain) for part in lost]
    return lost
