"""What is computed of parameters alone: the parameters below a value, and its number in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.ir.graph import Parameter, Value
from regauge.ir.purity import is_pure


def parameters_below(value: Value) -> list[Parameter] | None:
    """The parameters that a value is computed of; None where it depends on inputs, or is drawn or written."""
    if isinstance(value, Parameter):
        return [value]
    node = value.producer
    if node is None or node.regions or not is_pure(node) or not any(node.operands()):
        return None
    found: dict[Parameter, None] = {}
    for _, operand in node.operands():
        below = parameters_below(operand)
        if below is None:
            return None
        found.update(dict.fromkeys(below))
    return list(found)


def number_of(value: Value, given: Mapping[Parameter, torch.Tensor] | None = None) -> torch.Tensor:
    """What such a value is, computed in double precision of its parameters, or of what is ``given`` for them."""
    if isinstance(value, Parameter):
        return value.tensor.detach().double() if given is None else given[value]
    node = value.producer
    assert node is not None
    operands: list[Any] = [number_of(o, given) if isinstance(o, Value) else o for o in node.inputs]
    with torch.no_grad():
        result = node.operator.evaluate(*operands, **node.attributes)
    found: torch.Tensor = result[value.index] if isinstance(result, tuple | list) else result
    return found
