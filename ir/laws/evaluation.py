"""An element over all indices at once, in torch: what the law of elements holds an operator to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.dtypes import epsilon_of
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS, OperandAxis, Scalar


@dataclass(frozen=True)
class Laid:
    """Operands laid along the same axes, with the size 1 where they lack one.

    ``sizes`` are how many indices the axes have; ``ended`` those that the rule ends; ``of`` tells which of them an axis
    of an operand is made of, the slowest first.
    """

    sizes: Sequence[int]
    ended: Sequence[int]
    of: Callable[[OperandAxis], Sequence[int]]

    def size(self, axes: Sequence[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def index(self, axis: OperandAxis) -> torch.Tensor:
        """The places along an axis."""
        own = self.of(axis)
        split = torch.arange(self.size(own)).reshape([self.sizes[place] for place in own])
        order = sorted(range(len(own)), key=lambda i: own[i])
        return split.permute(order).reshape([size if place in own else 1 for place, size in enumerate(self.sizes)])


def evaluate(expression: Scalar, operands: Sequence[Any], laid: Laid) -> Any:
    """The expression in torch: operands are tensors that broadcast, laid as ``laid`` says, or numbers.

    Reduced axes stay, with the size 1. An operand that is only broadcast along a reduced axis counts once for each
    index of it.
    """
    known: dict[Scalar, Any] = {}

    def value(node: Scalar) -> Any:
        if node not in known:
            known[node] = _evaluated(node, value, operands, laid)
        return known[node]

    return value(expression)


def _evaluated(node: Scalar, value: Callable[[Scalar], Any], operands: Sequence[Any], laid: Laid) -> Any:
    match node.op:
        case "operand":
            return operands[node.value]
        case "number":
            return node.value
        case "count":
            return laid.size(laid.ended if node.value is None else laid.of(node.value))
        case "epsilon":
            return epsilon_of(operands[0].dtype)
        case "index" | "from_end":
            return laid.index(node.value) - (laid.size(laid.of(node.value)) if node.op == "from_end" else 0)
    args = [value(arg) for arg in node.args]
    if node.op in PRIMITIVES:
        return PRIMITIVES[node.op](*args)
    (x,) = args
    ended = tuple(laid.ended if node.value is None else laid.of(node.value))
    if not ended:
        return x
    reduced = REDUCTIONS[node.op](x, ended)
    met = math.prod(x.shape[axis] for axis in ended)
    return reduced * (laid.size(ended) // met) if node.op == "sum" and met else reduced
