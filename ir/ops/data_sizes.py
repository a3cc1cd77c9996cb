"""Operators whose results are as large as their operands say: the places of what is not zero, pieces of computed sizes.

    nonzero(mask)                   n m        -> hits rank        hits: a size of its own, such as u0
    split_computed(x, a, b, dim=0)  n c        -> a c, b c         a and b: integers that data decides

Who builds such a node states its results: a frontend that traced them knows them as sizes of their own. The axes that
data decides keep their indices; all others are carried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Value
from regauge.ir.operator import Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number
from regauge.ir.sizes.expressions import Size


def _whole(call: Call, result: int, axis: int) -> Any:
    """An axis of a result that data decides: it keeps its indices."""
    extent = call.fresh(call.node.outputs[result].shape[axis])
    call.role("whole", extent)
    return extent


def _nonzero_rule(call: Call) -> Axes:
    for extent in call.operand(0):
        call.role("whole", extent)
    return [_whole(call, 0, axis) for axis in range(2)]


@operator(
    rule=_nonzero_rule,
    aten={"nonzero": None},
    samples=lambda: [sample(torch.tensor([[0, 1, 0], [2, 0, 3]])), sample(torch.tensor([True, False, True]))],
    sized_by_data=True,
)
def nonzero(x: torch.Tensor) -> torch.Tensor:
    """One row per entry that is not zero, in order: its place on each axis."""
    return torch.nonzero(x)


def _split_computed_rule(call: Call) -> list[Axes]:
    axes = call.operand(0)
    dim = call.normal(call["dim"], len(axes))
    call.role("whole", axes[dim])
    return [[*axes[:dim], _whole(call, i, dim), *axes[dim + 1 :]] for i in range(len(call.node.outputs))]


def split_computed_into(build: Builder, x: Value, sizes: Sequence[Size | Value], dim: int) -> tuple[Value, ...]:
    """The pieces of ``x`` as a tuple; raises OperatorError where the framework did not say how large they are."""
    results = [result for result in build.expected if result is not None]
    if len(results) != len(sizes):
        raise OperatorError("the sizes of the pieces depend on data")
    pieces = build.split_computed(x, *sizes, dim=axis_number(dim, x.rank), results=results)
    return (pieces,) if isinstance(pieces, Value) else tuple(pieces)


@operator(
    rule=_split_computed_rule,
    samples=lambda: [
        sample(randn(5, 3), torch.tensor(2), torch.tensor(0), 3, dim=0),
        sample(randn(2, 4), torch.tensor(3), torch.tensor(1), dim=-1),
    ],
    symmetry=Symmetry.LAYOUT,
    sized_by_data=True,
)
def split_computed(x: torch.Tensor, *sizes: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
    return torch.split(x, [int(size) for size in sizes], dim)
