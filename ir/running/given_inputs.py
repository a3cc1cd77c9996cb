"""Data at the door: what is given for inputs is held to the types and shapes that they have before a node sees it.

Numbers that only have another width are brought to the type that the model takes: numpy makes double precision where
nothing else is said. All else that differs is an error which names the input, not the node that would fail on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.dtypes import Dtype, dtype_name
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Value

Inputs = Sequence[Any] | Mapping[str, Any]


def fitted(graph: Graph, inputs: Inputs) -> tuple[Inputs, list[str]]:
    """Inputs in order or by name as the graph takes them, and what was brought to another type for it.

    Names of no input, and lists that have too few for the graph, are left to who reads them. Raises GraphError for an
    input of another kind of numbers, another rank or other sizes.
    """
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        defaults = graph.metadata.get("input_defaults", {})
        names = [value.name for value in graph.inputs]
        names = names if len(inputs) == len(names) else [name for name in names if name not in defaults]
        if len(inputs) != len(names):
            return inputs, []
        named = dict(zip(names, inputs, strict=True))
    notes = []
    for value in graph.inputs:
        if value.name in named:
            named[value.name], note = fitted_to(value, named[value.name])
            notes += [note] if note else []
    return (named if isinstance(inputs, Mapping) else tuple(named.values())), notes


def fitted_to(value: Value, given: Any) -> tuple[Any, str]:
    """One input, and what was changed about it; raises GraphError."""
    return fitted_array(value.name, given, value.dtype, value.shape if value.ranked else None)


def fitted_array(name: str, given: Any, dtype: Dtype, shape: Sequence[Any] | None) -> tuple[Any, str]:
    """:func:`fitted_to` for an input of this type and shape, where sizes that are no integers may be any.

    A model without a dynamic size in front stands for one number of examples, on whichever axis they are: one of its
    sizes may differ, as data may have another number of them. What is neither tensor nor array is left as it is.
    """
    numbers = isinstance(given, np.ndarray) and given.dtype.kind in "biufc"
    tensor = torch.as_tensor(given) if numbers else given
    if not isinstance(tensor, torch.Tensor) or not isinstance(dtype, torch.dtype):
        return given, ""
    found, taken = _signature(tensor.dtype, tensor.shape), _signature(dtype, ["..."] if shape is None else shape)
    if shape is not None and not _shape_fits(shape, tensor.shape):
        raise GraphError(f"{name} is {found}, the model takes {taken}: give it in that shape")
    if tensor.dtype == dtype:
        return given, ""
    if not _may_become(tensor, dtype):
        raise GraphError(f"{name} is {found}, the model takes {taken}: give it in that type")
    return tensor.to(dtype), f"{name} is {found}, taken as {dtype_name(dtype)}"


def _signature(dtype: Dtype, shape: Sequence[Any]) -> str:
    return f"{dtype_name(dtype)}[{','.join(map(str, shape))}]"


def _shape_fits(declared: Sequence[Any], sizes: Sequence[int]) -> bool:
    if len(declared) != len(sizes):
        return False
    other = sum(isinstance(size, int) and size != n for size, n in zip(declared, sizes, strict=True))
    return other <= (1 if declared and isinstance(declared[0], int) else 0)


def _may_become(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Floats may lose digits; integers and truths must stay what they are. Neither becomes the other."""
    if tensor.dtype.is_complex or dtype.is_complex:
        return tensor.dtype.is_complex and dtype.is_complex
    if tensor.dtype.is_floating_point or dtype.is_floating_point:
        return tensor.dtype.is_floating_point and dtype.is_floating_point
    return tensor.device.type == "meta" or bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())
