"""Nodes taken apart for their gradients: the axes of one node, and its element laid along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from regauge.ir.atoms import Atoms
from regauge.ir.axis_rules.rules import ENDING_ROLES, Axes, Call
from regauge.ir.derivatives import gradients
from regauge.ir.dims.axes import apply_rule
from regauge.ir.dims.extents import Dim, fresh
from regauge.ir.dtypes import epsilon_of
from regauge.ir.edit import Builder
from regauge.ir.errors import AxisError, FusionError
from regauge.ir.fusion.region import no_element
from regauge.ir.fusion.terms import PLACES
from regauge.ir.graph import Node, Value
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS, ROUNDED_8, OperandAxis, Scalar, element_of, operand, parts_of
from regauge.ir.sizes.expressions import is_static, product, same


class Read(Protocol):
    """What gives a frame the operands of its node: ``values`` as they are, ``read`` in the ``wide`` type."""

    build: Builder
    values: dict[Value, Value]
    wide: torch.dtype

    def read(self, given: Any) -> Any: ...

    def typed(self, value: Value, dtype: Any) -> Value: ...


def is_float(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point and value.dtype.itemsize > 1


class Frame:
    """The axes of one node, and its element laid along them: a value has an axis for each, of size 1 where it has none.

    What is computed forward and what is computed backward of an expression share their parts.
    """

    def __init__(self, reverse: Read, node: Node) -> None:
        self.reverse, self.build, self.node = reverse, reverse.build, node
        element = element_of(node)
        if element is None:
            raise FusionError(no_element(node.operator))
        self.element = element
        self.seed = operand(len(node.inputs))
        given: list[Axes | None] = [
            [fresh(size) for size in value.shape] if isinstance(value, Value) else None if value is None else []
            for value in node.inputs
        ]
        call = Call(node, given)
        try:
            (result,) = apply_rule(node.operator, call)
        except (AxisError, ValueError) as error:
            raise FusionError(f"the axis rule of {node.op} does not fit") from error
        atoms = Atoms()
        self.layouts = [[atoms.of(extent) for extent in axes or ()] for axes in (*given, result)]
        longest = sorted(self.layouts, key=lambda layout: -sum(map(len, layout)))
        self.dims: list[Dim] = list(dict.fromkeys(dim for layout in longest for axis in layout for dim in axis))
        ends = [dim for role, extent in call.roles if role in ENDING_ROLES for dim in atoms.of(extent)]
        self.ended = self._ended(frozenset(self.dims.index(dim) for dim in dict.fromkeys(ends)))
        picks = parts_of(element, ("picked",))
        self.tables: dict[int, int] = {pick.args[0].value: pick.args[1].value for pick in picks}
        """Slots of what entries are looked up in, each with that of their numbers."""
        self.operands: list[Any] = [
            reverse.values[value] if slot in self.tables and isinstance(value, Value) else reverse.read(value)
            for slot, value in enumerate(node.inputs)
        ]
        self.known: dict[Scalar, Any] = {}
        self.known_axes: dict[Scalar, frozenset[int]] = {}

    def forward(self) -> Value:
        self.value(self.element)
        if not self._axes(self.element) <= {self.dims.index(dim) for axis in self.layouts[-1] for dim in axis}:
            raise FusionError(f"{self.node.op} moves indices across axes")
        return self._unlaid(self.element, self.layouts[-1])

    def backward(self, gradient: Value) -> dict[int, Value]:
        """The gradients of the operands, by slot; of tables those of what was looked up, an entry for each number."""
        self.operands.append(gradient)
        wanted = [slot for slot, value in self.node.operands() if is_float(value)]
        found = gradients(self.element, self.seed, wanted, self._axes, self.ended)
        return {slot: self._unlaid(part, self._layout(slot)) for slot, part in found.items()}

    # -- axes --------------------------------------------------------------------------------------------------------

    def _ended(self, by_rule: frozenset[int]) -> frozenset[int]:
        """The axes that reductions go over: those that the rule ends, or the ones that all of them name."""
        named = {scalar.value for scalar in parts_of(self.element, REDUCTIONS)}
        if named <= {None}:
            return by_rule
        found = {by_rule if axis is None else frozenset(map(self.dims.index, self._named(axis))) for axis in named}
        if len(found) > 1:
            raise FusionError(f"{self.node.op} reduces over different axes")
        return found.pop()

    def _named(self, axis: OperandAxis) -> tuple[Dim, ...]:
        """The parts of an axis of an operand, or of the result."""
        slot, place = axis
        return self.layouts[len(self.node.inputs) if slot is None else slot][place]

    def _layout(self, slot: int) -> list[tuple[Dim, ...]]:
        """The axes of an operand; of a table those of what is looked up."""
        own = self.layouts[slot]
        return [*self.layouts[self.tables[slot]], *own[1:]] if slot in self.tables else own

    def _axes(self, scalar: Scalar) -> frozenset[int]:
        """The numbers of the axes along which an expression goes."""
        if scalar not in self.known_axes:
            if scalar.op in ("operand", "picked"):
                slot = scalar.value if scalar.op == "operand" else scalar.args[0].value
                found = frozenset(self.dims.index(dim) for axis in self._layout(slot) for dim in axis)
            elif scalar.op in PLACES:
                found = frozenset(map(self.dims.index, self._named(scalar.value)))
            else:
                found = frozenset(axis for arg in scalar.args for axis in self._axes(arg))
            self.known_axes[scalar] = found - self.ended if scalar.op in REDUCTIONS else found
        return self.known_axes[scalar]

    def _laid(self, value: Value, layout: Sequence[tuple[Dim, ...]]) -> Value:
        """A value along the axes of the frame."""
        own = [dim for axis in layout for dim in axis]
        order = sorted(range(len(own)), key=lambda place: self.dims.index(own[place]))
        value = self._reshaped(value, [dim.size for dim in own])
        if order != list(range(len(own))):
            value = self.build.permute(value, dims=tuple(order))
        return self._reshaped(value, [dim.size if dim in own else 1 for dim in self.dims])

    def _unlaid(self, scalar: Scalar, layout: Sequence[tuple[Dim, ...]]) -> Value:
        """An expression as a value with the axes of ``layout``: summed over those that this has not."""
        value, axes = self.value(scalar), self._axes(scalar)
        own = [dim for axis in layout for dim in axis]
        more = [axis for axis in sorted(axes) if self.dims[axis] not in own]
        if more:
            value = self.build.sum(value, dims=tuple(more), keepdim=True)
        target = [dim.size if dim in own else 1 for dim in self.dims]
        if any(dim in own and axis not in axes for axis, dim in enumerate(self.dims)):
            value = self.build.expand(value, shape=tuple(target))
        kept = [dim for dim in self.dims if dim in own]
        value = self._reshaped(value, [dim.size for dim in kept])
        order = [kept.index(dim) for dim in own]
        if order != list(range(len(own))):
            value = self.build.permute(value, dims=tuple(order))
        return self._reshaped(value, [product(dim.size for dim in axis) for axis in layout])

    def _reshaped(self, value: Value, shape: Sequence[Any]) -> Value:
        if len(shape) == value.rank and all(map(same, shape, value.shape)):
            return value
        found: Value = self.build.reshape(value, shape=tuple(shape))
        return found

    # -- values ------------------------------------------------------------------------------------------------------

    def value(self, scalar: Scalar) -> Any:
        """An expression as a value along the axes of the frame, or as a number."""
        if scalar not in self.known:
            self.known[scalar] = self._made(scalar)
        return self.known[scalar]

    def _made(self, scalar: Scalar) -> Any:
        match scalar.op:
            case "operand":
                return self._laid(self.operands[scalar.value], self.layouts[scalar.value])
            case "picked":
                return self._picked(scalar)
            case "index":
                return self._places(self._named(scalar.value))
            case "from_end":
                named = self._named(scalar.value)
                return self.build.sub(self._places(named), product(dim.size for dim in named))
            case "number":
                return scalar.value
            case "count":
                ended = tuple(self.dims[axis] for axis in self.ended)
                size = product(dim.size for dim in (ended if scalar.value is None else self._named(scalar.value)))
                if not is_static(size):
                    raise FusionError(f"{self.node.op} divides by the dynamic size {size}")
                return size
            case "epsilon":
                return epsilon_of(self.node.output.dtype)
        args = [self.value(arg) for arg in scalar.args]
        if scalar.op in REDUCTIONS:
            return self._reduced(scalar, args[0])
        if scalar.op not in PRIMITIVES:
            raise FusionError(f"the derivative of {self.node.op} is not stated")
        return primitive(self.build, partial(self.reverse.typed, dtype=self.reverse.wide), scalar.op, args)

    def _picked(self, scalar: Scalar) -> Value:
        """The entries of a table that an operand has the numbers of."""
        slot, numbers = (arg.value for arg in scalar.args)
        table = self.operands[slot]
        if scalar.value.axis or table.rank > 2:
            raise FusionError(f"the derivative of {self.node.op} is not stated")
        given = self.operands[numbers]
        if table.rank == 2:
            found = self.build.embedding(table, given)
        else:  # weights of classes: a label that is ignored is the number of none, and what it reads is not used
            column, last = self._reshaped(table, (table.shape[0], 1)), table.shape[0] - 1
            found = self._reshaped(self.build.embedding(column, self.build.clamp(given, 0, last)), given.shape)
        return self._laid(self.reverse.typed(found, self.reverse.wide), self._layout(slot))

    def _places(self, dims: Sequence[Dim]) -> Value:
        """The place along an axis of these parts."""
        size = product(dim.size for dim in dims)
        if [*dims] != sorted(dims, key=self.dims.index):
            raise FusionError(f"the places of {self.node.op} lie across its axes")
        return self._laid(self.build.arange(end=size), [tuple(dims)])

    def _reduced(self, scalar: Scalar, x: Any) -> Any:
        if not self.ended:
            return x
        if not self.ended <= self._axes(scalar.args[0]):
            raise FusionError(f"{self.node.op} would reduce an axis that is only broadcast")
        return self.build(scalar.op, x, dims=tuple(sorted(self.ended)), keepdim=True)


def primitive(build: Builder, typed: Callable[[Value], Value], op: str, args: list[Any]) -> Any:
    """A primitive of values, or of numbers; ``typed`` makes a float of a value."""
    if not any(isinstance(arg, Value) for arg in args):
        return float(PRIMITIVES[op](*(torch.tensor(arg, dtype=torch.float64) for arg in args)))
    if op == "code":
        return args[0]
    if op == "real":
        return typed(args[0])
    if op == "power_of_two":
        return _power_of_two(build, args[0])
    for dtype, name in ROUNDED_8.items():
        if op == name:
            return build.cast(build.cast(args[0], dtype=dtype), dtype=args[0].dtype)
    if op in ("maximum", "minimum") and not all(isinstance(arg, Value) for arg in args):
        x, bound = args if isinstance(args[0], Value) else reversed(args)
        return build.clamp(x, bound, None) if op == "maximum" else build.clamp(x, None, bound)
    if op == "where" and isinstance(args[0], Value) and args[0].dtype != torch.bool:
        args = [build.ne(args[0], 0), *args[1:]]
    return build(op, *args)


def _power_of_two(build: Builder, x: Value) -> Any:
    """The least power of two that is not below x; the logarithm is rounded, and may give the one beside it."""
    power = build.exp2(build.ceil(build.log2(x)))
    half, double = build.mul(power, 0.5), build.mul(power, 2.0)
    return build.where(build.lt(half, x), build.where(build.lt(power, x), double, power), half)
