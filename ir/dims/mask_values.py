"""Tells of an attention mask, before it is computed, that it is finite, or that each row keeps a key.

Where a whole row is masked with minus infinity, a softmax that is spelled out gives NaN and ``attention`` zero. The
spelled form may only be replaced where that cannot happen. Sums and products of finite numbers are taken for finite.
"""

from __future__ import annotations

import math

import torch

from regauge.ir.folding.known_values import known_tensor
from regauge.ir.graph import Operand, Parameter, Value

MOST = 1 << 22  # elements of a mask that is computed here
DEPTH = 24  # nodes above a mask that are looked at

_LAYOUT = {
    "reshape", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "concat", "stack", "identity", "flip",
    "repeat", "repeat_interleave", "embedding", "index_select", "gather", "split",
}  # fmt: skip
_BOUNDED = {"add", "sub", "mul", "neg", "where", "clamp", "relu", "sigmoid", "tanh", "matmul", "linear", "cast"}


def is_finite(operand: Operand, depth: int = DEPTH) -> bool:
    """Whether all entries are known to be finite: sums, products and choices of weights, integers and truths."""
    if isinstance(operand, int | float):
        return math.isfinite(operand)
    if not isinstance(operand, Value):
        return operand is None
    if not isinstance(operand.dtype, torch.dtype):
        return False
    if not operand.dtype.is_floating_point:
        return not operand.dtype.is_complex
    if isinstance(operand, Parameter):
        return math.prod(operand.weight.shape) <= MOST and bool(torch.isfinite(operand.tensor).all())
    node = operand.producer
    if node is not None and node.op == "full":
        return is_finite(node.attributes["value"])
    if node is None or not depth or node.op not in _LAYOUT | _BOUNDED:
        return False
    return all(is_finite(source, depth - 1) for source in node.inputs)


def keeps_a_key(mask: Value) -> bool:
    """Whether a mask is known, and each of its rows has an entry that is true, or greater than minus infinity."""
    tensor = known_tensor(mask, most=MOST, depth=DEPTH, weights=True)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return False
    kept = tensor if tensor.dtype == torch.bool else tensor > -math.inf
    return bool(kept.any(-1).all())
