"""Indices of ONNX files: negative ones count from the end there, while torch has operators that do not take them.

What is known not to be negative is read as it is: constants, places that operators give, what is only moved, added or
multiplied of such, and ids of the layers that torch calls Embedding, which takes no negative ones either.
"""

from __future__ import annotations

from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Parameter, Value
from regauge.ir.onnx_places import CLASSES, PATHS

EMBEDDING = "torch.nn.modules.sparse.Embedding"

_PLACES = frozenset({"argmax", "argmin", "argsort", "one_hot", "nonzero", "abs", "relu"})
_SECOND = frozenset({"topk", "sort"})
"""Operators whose second result are places."""

_FROM_NUMBERS = frozenset(
    "cast identity reshape squeeze unsqueeze expand permute slice select split concat stack repeat repeat_interleave "
    "index_select gather flip where add mul sum cumsum maximum minimum amax amin".split()
)
"""Operators that give no negative number of numbers of which none is negative."""

_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def never_negative(index: Value) -> bool:
    """Whether indices are known not to be negative, whatever the inputs of the graph are."""
    known: dict[Value, bool] = {}
    stack = [index]
    while stack:
        value = stack.pop()
        if value in known:
            continue
        found = _said_by(value)
        if found is None:  # what it is made of decides
            known[value] = True
            stack += _numbers_of(value)
        elif not found:
            return False
        else:
            known[value] = True
    return True


def _said_by(value: Value) -> bool | None:
    """Whether a value is never negative; None where it depends on what it is made of."""
    if value.dtype in _UNSIGNED:
        return True
    if isinstance(value, Parameter):
        return value.kind != "parameter" and bool((value.tensor >= 0).all())
    node = value.producer
    if node is None:
        return False
    if node.op in _PLACES or node.op in _SECOND and value.index == 1:
        return True
    if node.op == "arange":
        start, step = node.attributes["start"], node.attributes["step"]
        return all(isinstance(number, int | float) and number >= 0 for number in (start, step))
    numbers = [operand for operand in node.inputs if isinstance(operand, int | float)]
    return None if node.op in _FROM_NUMBERS and all(number >= 0 for number in numbers) else False


def _numbers_of(value: Value) -> list[Value]:
    """The operands that hold numbers, and not places of others."""
    assert value.producer is not None
    given = [operand for _, operand in value.producer.operands()]
    return given[:1] if value.producer.op in ("index_select", "gather") else given


def counts_from_start(call: Any, slot: int) -> bool:
    """Whether the indices that an ONNX operator reads are known not to be negative."""
    known = call.constant(slot)
    return bool((known >= 0).all()) if known is not None else never_negative(call.operand(slot))


def is_torch_embedding(build: Builder, call: Any, table: Value) -> bool:
    """Whether an ONNX node is what torch's exporter writes of a layer Embedding: by the class of the module that it
    notes, or in its older form by the module of a node, which has the weight."""
    notes = call.node.metadata_props
    if PATHS in notes:
        return EMBEDDING in notes.get(CLASSES, "")
    return bool(build.scope) and table.name == f"{build.scope[-1][0]}.weight"


def counted_from_the_start(build: Builder, call: Any, slot: int, x: Value, axis: int) -> Value:
    """The indices for ``torch.gather`` and ``scatter``, which take no negative ones."""
    index: Value = call.operand(slot)
    return index if counts_from_start(call, slot) else build.remainder(index, x.shape[axis])
