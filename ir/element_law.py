"""The law of elements: the expression that a record states for one index, taken over all of them, is what it computes.

Operands are laid along one axis for each Dim of the call, as the axis rule of the record reads them; the expression is
evaluated on that, and its reductions go over the Dims that the rule ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from regauge.ir.extents import Concat, Dim, Extent, leaves, resolve
from regauge.ir.graph import Value
from regauge.ir.operator import Symmetry
from regauge.ir.rules import ENDING_ROLES
from regauge.ir.scalars import Laid, OperandAxis, element_of, evaluate

if TYPE_CHECKING:
    from regauge.ir.law_cases import Case


def check_element(case: Case) -> None:
    """Check the law on one sample; raises LawError.

    A sample for which the record states no element is left, and so is a change of layout whose axes the rule loses
    sight of (a reshape across boundaries): no region reads an element there either.
    """
    expression = element_of(case.node)
    if expression is None:
        return
    if expression.op == "joined":
        _check_joined(case)
        return
    of = case.analysis.of
    values = [*(value for _, value in case.node.operands()), case.node.output]
    dims = list(dict.fromkeys(dim for value in values for extent in of[value] for dim in leaves(extent)))
    ended = [place for place, dim in enumerate(dims) if case.roles(dim) & ENDING_ROLES]
    operands = [
        laid(tensor, of[value], dims) if isinstance(value, Value) else tensor
        for value, tensor in zip(case.node.inputs, case.operands, strict=False)  # absent ones at the end are dropped
    ]

    def of_axis(axis: OperandAxis) -> list[int]:
        slot, place = axis
        value = case.node.inputs[slot]
        assert isinstance(value, Value)
        return [dims.index(dim) for dim in leaves(of[value][place])]

    found = evaluate(expression, operands, Laid([int(dim.size) for dim in dims], ended, of_axis))
    (expected,) = case.results
    actual = _gathered(found, of[case.node.output], dims)
    if actual is None and case.node.operator.symmetry is Symmetry.LAYOUT:
        return
    if actual is None:
        raise case.broken("element", "it has an axis that the result has not", "reduce it, or correct the rule")
    case.expect_same(
        [actual.reshape(expected.shape).to(expected.dtype)], case.results, "element", "correct its element"
    )


def _check_joined(case: Case) -> None:
    """What is joined are the operands, along the axis whose extent is that of them laid end to end."""
    of = case.analysis.of
    for axis, extent in enumerate(of[case.node.output]):
        ends = resolve(Concat([of[value][axis] for _, value in case.node.operands()]))
        if leaves(ends) == leaves(extent):
            case.expect_same([torch.cat(case.operands, axis)], case.results, "element", "correct its element")
            return
    raise case.broken("element", "no axis is that of the operands end to end", "correct the rule")


def laid(tensor: torch.Tensor, axes: Sequence[Extent], dims: Sequence[Dim]) -> torch.Tensor:
    """A tensor with an axis for each of ``dims``: of size 1 where it lacks the Dim."""
    own = [dim for extent in axes for dim in leaves(extent)]
    split = tensor.reshape([int(dim.size) for dim in own])
    order = sorted(range(len(own)), key=lambda place: dims.index(own[place]))
    return split.permute(order).reshape([int(dim.size) if dim in own else 1 for dim in dims])


def _gathered(found: Any, axes: Sequence[Extent], dims: Sequence[Dim]) -> torch.Tensor | None:
    """What was laid along ``dims`` with its axes in the order of a result; None where it has others."""
    found = torch.as_tensor(found)
    found = found.reshape((1,) * (len(dims) - found.dim()) + tuple(found.shape))
    own = [dim for extent in axes for dim in leaves(extent)]
    if any(size > 1 and dim not in own for dim, size in zip(dims, found.shape, strict=True)):
        return None
    full: torch.Tensor = found.expand([int(dim.size) if dim in own else 1 for dim in dims])
    return full.permute([*map(dims.index, own), *(i for i, dim in enumerate(dims) if dim not in own)])
