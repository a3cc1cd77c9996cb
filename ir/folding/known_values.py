"""Tensors that are known before a graph runs: constants, and small expressions of constants.

Single entries of an ONNX file, which does not tell constants from weights, count as constants, and so do all its
weights where the caller asks about a file as it is.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import count


def known_tensor(operand: Operand, *, most: int, depth: int, weights: bool = False) -> Any:
    """The tensor of an operand that depends on no input and draws nothing; None where it does, or is not small.

    ``most`` bounds the elements of all tensors on the way, ``depth`` the nodes in a row. With ``weights`` the
    initializers of a file are known too. Numbers are returned as they are.
    """
    if isinstance(operand, Parameter):
        return operand.tensor if _is_fixed(operand, most, weights) else None
    if not isinstance(operand, Value):
        return None if isinstance(operand, sympy.Basic) else operand
    node, size = operand.producer, count(operand.shape)
    if node is None or not depth or not isinstance(size, int) or size > most or _is_closed(node):
        return None
    if len(node.outputs) > 1 or _varies((operand.shape, *node.attributes.values())):
        return None
    operands = []
    for source in node.inputs:
        found = known_tensor(source, most=most, depth=depth - 1, weights=weights)
        if found is None and source is not None:
            return None
        operands.append(found)
    return node.operator.evaluate(*operands, **node.attributes)


def _is_closed(node: Node) -> bool:
    """Whether a node may draw, or do what nobody has said: operators that were kept as they are."""
    return node.operator.random or bool(node.regions) or node.op in ("onnx_call", "torch_call")


def _varies(value: Any) -> bool:
    """Whether a dynamic size is in a shape or an attribute."""
    return isinstance(value, sympy.Basic) or isinstance(value, tuple) and any(map(_varies, value))


def _is_fixed(parameter: Parameter, most: int, weights: bool) -> bool:
    if not isinstance(parameter.dtype, torch.dtype) or not 0 < math.prod(parameter.weight.shape) <= most:
        return False
    if parameter.origin is not None and (weights or math.prod(parameter.weight.shape) == 1):
        return True
    return parameter.kind == "constant" and not parameter.trainable
