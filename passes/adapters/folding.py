"""Finds values that are computed of parameters alone, with those parameters, and evaluates them in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.sizes.expressions import symbols_in


def computed_of_parameters(graph: Graph) -> dict[Value, list[Parameter]]:
    """The parameters below each result of a node that reads nothing else, nor a size, and neither draws nor writes."""
    found: dict[Value, list[Parameter]] = {}
    for node in graph.nodes:
        operands = [value for _, value in node.operands()]
        sizes = symbols_in([*node.inputs, *node.attributes.values()])
        if not operands or node.regions or not is_pure(node) or sizes:
            continue
        if all(isinstance(value, Parameter) or value in found for value in operands):
            below = dict.fromkeys(p for v in operands for p in ([v] if isinstance(v, Parameter) else found[v]))
            found.update(dict.fromkeys(node.outputs, list(below)))
    return found


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
