"""The law of elements: the expression that a record states for one index, taken over all of them, is what it computes.

Operands are laid along one axis for each Dim of the call, as the axis rule of the record reads them; the expression is
evaluated on that, and its reductions go over the Dims that the rule ends. What it reads at other places is an operand
of its own, gathered at these places, along the Dims that they depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from regauge.ir.atoms import Atoms
from regauge.ir.axis_rules.rules import ENDING_ROLES
from regauge.ir.dims.extents import ONE, Concat, Dim, Extent, leaves, resolve, size_of
from regauge.ir.graph import Value
from regauge.ir.laws.evaluation import Laid, evaluate
from regauge.ir.operator import Symmetry
from regauge.ir.scalars import Along, OperandAxis, Place, Scalar, element_of, operand, parts_of

if TYPE_CHECKING:
    from regauge.ir.laws.cases import Case


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
    if expression.op == "digit":
        _check_digits(case, expression.value)
        return
    if expression.op in ("spread", "compact"):
        _check_masked(case, compact=expression.op == "compact")
        return
    of = case.analysis.of
    elsewhere = _Elsewhere(case)
    expression = elsewhere.as_operands(expression)
    atoms = Atoms()
    values = [*(value for _, value in case.node.operands()), case.node.output]
    all_axes = [*(of[value] for value in values), *(axes for _, axes in elsewhere.gathered)]
    dims = list(dict.fromkeys(dim for axes in all_axes for extent in axes for dim in atoms.of(extent)))
    ends = [extent for role, extent in case.analysis.calls[case.node].roles if role in ENDING_ROLES]
    over = {dim for extent in [*ends, *elsewhere.ended] for dim in atoms.of(extent)}
    ended = [place for place, dim in enumerate(dims) if dim in over]
    operands = [
        laid(tensor, of[value], dims, atoms) if isinstance(value, Value) else tensor
        for value, tensor in zip(case.node.inputs, case.operands, strict=False)  # absent ones at the end are dropped
    ]
    operands += [laid(tensor, axes, dims, atoms) for tensor, axes in elsewhere.gathered]

    def of_axis(axis: OperandAxis) -> list[int]:
        slot, place = axis
        value = case.node.output if slot is None else case.node.inputs[slot]
        assert isinstance(value, Value)
        return [dims.index(dim) for dim in atoms.of(of[value][place])]

    found = evaluate(expression, operands, Laid([int(dim.size) for dim in dims], ended, of_axis))
    (expected,) = case.results
    actual = _gathered(found, of[case.node.output], dims, atoms)
    if actual is None and case.node.operator.symmetry is Symmetry.LAYOUT:
        return
    if actual is None:
        raise case.broken("element", "it has an axis that the result has not", "reduce it, or correct the rule")
    case.expect_same(
        [actual.reshape(expected.shape).to(expected.dtype)], case.results, "element", "correct its element"
    )


class _Elsewhere:
    """What an expression reads at other places, each as an operand behind those of the call, with its axes.

    ``ended`` are axes that places depend on and the result has not; ``windows`` are Dims of no operand.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.gathered: list[tuple[torch.Tensor, list[Extent]]] = []
        self.windows: dict[Along, Dim] = {}
        self.ended: list[Extent] = []

    def as_operands(self, expression: Scalar) -> Scalar:
        known: dict[Scalar, Scalar] = {}
        for one in parts_of(expression, ("moved", "inside", "picked")):
            known[one] = operand(len(self.case.node.inputs) + len(self.gathered))
            self.gathered.append(self._pick(one) if one.op == "picked" else self._gather(one))

        def replaced(one: Scalar) -> Scalar:
            if one not in known:
                known[one] = Scalar(one.op, tuple(map(replaced, one.args)), one.value) if one.args else one
            return known[one]

        return replaced(expression)

    def _pick(self, picked: Scalar) -> tuple[torch.Tensor, list[Extent]]:
        """Entries at the numbers that another operand holds, along the axes of that one in place of the axis."""
        (x, axes), (index, others) = (self._operand(arg.value) for arg in picked.args)
        axis = picked.value.axis % x.dim()
        there = ((index >= 0) & (index < x.shape[axis])).reshape(-1)
        taken = x.index_select(axis, index.reshape(-1).where(there, 0))
        taken = taken.movedim(axis, -1).where(there, 0).movedim(-1, axis)  # a number of no entry reads zeros
        taken = taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])
        return taken, [*axes[:axis], *others, *axes[axis + 1 :]]

    def _operand(self, slot: int) -> tuple[torch.Tensor, list[Extent]]:
        value = self.case.node.inputs[slot]
        assert isinstance(value, Value)
        return self.case.operands[slot], list(self.case.analysis.of[value])

    def _gather(self, moved: Scalar) -> tuple[torch.Tensor, list[Extent]]:
        tensor, axes = self._operand(moved.args[0].value)
        places = sorted(((axis % len(axes), place) for axis, place in moved.value.places), reverse=True)
        if moved.op == "inside":
            keeps = {axis for axis, _ in places}
            tensor = torch.ones([n if axis in keeps else 1 for axis, n in enumerate(tensor.shape)], dtype=torch.bool)
            axes = [extent if axis in keeps else ONE for axis, extent in enumerate(axes)]
        for axis, place in places:
            sources = [self._source(along) for along, _ in place.steps]
            found = self._places(place, sources, tensor.shape[axis])
            there = (found >= 0) & (found < tensor.shape[axis])
            if not moved.value.guarded and moved.op == "moved" and not bool(there.all()):
                raise self.case.broken("element", "it reads outside of an operand", "say what is there")
            picked = tensor.index_select(axis, found.clamp(0, tensor.shape[axis] - 1).reshape(-1))
            tensor = picked.reshape([*tensor.shape[:axis], *found.shape, *tensor.shape[axis + 1 :]])
            if moved.op == "inside":
                tensor = tensor & there.reshape([*there.shape, *(1 for _ in axes[axis + 1 :])])
            axes[axis : axis + 1] = sources
        return tensor, axes

    def _source(self, along: Along) -> Extent:
        """The extent of the index that a place depends on."""
        if along.window is not None:
            dim = self.windows.setdefault(along, Dim(along.window))
            self.ended.append(dim)
            return dim
        result = self.case.analysis.of[self.case.node.output]
        if along.slot is None:
            return result[along.axis]
        value = self.case.node.inputs[along.slot]
        assert isinstance(value, Value)
        self.ended.append(self.case.analysis.of[value][along.axis])
        return self.ended[-1]

    @staticmethod
    def _places(place: Place, sources: Sequence[Extent], length: int) -> torch.Tensor:
        """The places for all indices that they depend on, an axis for each of ``sources``."""
        found = torch.tensor(place.offset + place.lengths * length)
        for (_, step), extent in zip(place.steps, sources, strict=True):
            found = found.unsqueeze(-1) + step * torch.arange(int(size_of(extent)))
        return found


def _check_joined(case: Case) -> None:
    """What is joined are the operands, along the axis whose extent is that of them laid end to end."""
    of = case.analysis.of
    for axis, extent in enumerate(of[case.node.output]):
        ends = resolve(Concat([of[value][axis] for _, value in case.node.operands()]))
        if leaves(ends) == leaves(extent):
            case.expect_same([torch.cat(case.operands, axis)], case.results, "element", "correct its element")
            return
    raise case.broken("element", "no axis is that of the operands end to end", "correct the rule")


def _check_digits(case: Case, base: int) -> None:
    """Digits lie along the fastest part of the last axis."""
    (q,) = case.operands
    count = int(leaves(case.analysis.of[case.node.output][-1])[-1].size)
    powers = base ** torch.arange(count)
    digits = (q.long()[..., None] // powers % base).flatten(-2)
    case.expect_same([digits.to(case.results[0].dtype)], case.results, "element", "correct its element")


def _check_masked(case: Case, *, compact: bool) -> None:
    """Values [rows, n, groups], or ``compact`` ones behind the start of their group, lie in rising order where bits of
    it are set."""
    values, mask, *starts = case.operands
    count = int(leaves(case.analysis.of[case.node.output][-1])[-1].size)
    found = torch.zeros(*mask.shape, count, dtype=values.dtype)
    for row, group in product(*map(range, mask.shape)):
        places = [place for place in range(count) if int(mask[row, group]) >> place & 1]
        kept = values[int(starts[0][row, group]) :] if compact else values[row, :, group]
        found[row, group, places] = kept[: len(places)]
    case.expect_same([found.flatten(1)], case.results, "element", "correct its element")


def laid(tensor: torch.Tensor, axes: Sequence[Extent], dims: Sequence[Dim], atoms: Atoms) -> torch.Tensor:
    """A tensor with an axis for each of ``dims``: of size 1 where it lacks the Dim."""
    own = [dim for extent in axes for dim in atoms.of(extent)]
    split = tensor.reshape([int(dim.size) for dim in own])
    order = sorted(range(len(own)), key=lambda place: dims.index(own[place]))
    return split.permute(order).reshape([int(dim.size) if dim in own else 1 for dim in dims])


def _gathered(found: Any, axes: Sequence[Extent], dims: Sequence[Dim], atoms: Atoms) -> torch.Tensor | None:
    """What was laid along ``dims`` with its axes in the order of a result; None where it has others."""
    found = torch.as_tensor(found)
    found = found.reshape((1,) * (len(dims) - found.dim()) + tuple(found.shape))
    own = [dim for extent in axes for dim in atoms.of(extent)]
    if any(size > 1 and dim not in own for dim, size in zip(dims, found.shape, strict=True)):
        return None
    full: torch.Tensor = found.expand([int(dim.size) if dim in own else 1 for dim in dims])
    return full.permute([*map(dims.index, own), *(i for i, dim in enumerate(dims) if dim not in own)])
