"""Scales in a row become one, and so do shifts in a row.

    mul(div(x, a), b)    mul(x, b / a)
    sub(add(x, a), b)    add(x, a - b)
    (x * a) @ (y * b)    (x * (a * b)) @ y      for numbers a and b
    x * (1 / sqrt(y))    x / sqrt(y)

Only for real numbers: integers wrap and divide differently. Two shifts of which the larger one rounds x to whole
numbers (``x + 2**23 - 2**23``) are left alone, and so are scales whose product the type of x cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.dims.extents import fresh
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.passes.simplify.affine_steps import affine_of, moving_slot
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, successor
from regauge.passes.simplify.linear_map import must_fit

SCALES = ("mul", "div")
SHIFTS = ("add", "sub")


def _samples(ops: Sequence[str]) -> Iterable[dict[str, Any]]:
    a, b = (Weight(rand(4, 1).double() + 0.5) for _ in "ab")
    for inner in ops:
        for pair in ({"a": 3.0, "b": 0.5}, {"a": a, "b": 2.0}, {"a": 2, "b": b}, {"a": a, "b": b}):
            yield {"x": randn(2, 4, 3).double(), "inner.op": inner, **pair}


def _operand(build: Builder, node: Node, slot: int) -> tuple[Operand, Fixed]:
    """What a node combines its operand in ``slot`` with, and that as a factor of it, or as what is added to it."""
    x, given = node.inputs[slot], node.inputs[1 - slot]
    assert isinstance(x, Value)
    step = affine_of(build, node, slot, [fresh(size) for size in x.shape])
    if step.scale is not None and step.shift is not None:
        return refuse(f"{node.op} is more than a shift")
    value = fixed(build, given)
    assert value is not None  # or it would be no affine step
    return given, combined({"div": torch.reciprocal, "sub": torch.neg}.get(node.op, torch.clone), value)


def _joined(build: Builder, inner: Node, outer: Node, op: str) -> Value:
    """``op(x, f)``, where f does what both nodes do."""
    slot = moving_slot(build, inner)
    outer_slot = next(slot for slot, value in outer.operands() if value is inner.output)
    (a, first), (b, second) = _operand(build, inner, slot), _operand(build, outer, outer_slot)
    both = combined(torch.mul if op == "mul" else torch.add, first, second)
    _check_range(both, [first, second], op, inner.output.dtype)
    other = _stored(build, (a, b), both, inner.output.dtype)
    with build.at(outer):
        return must_fit(build(op, inner.inputs[slot], other), outer.output)


def _check_range(both: Fixed, parts: Sequence[Fixed], op: str, dtype: Any) -> None:
    limits = torch.finfo(dtype)
    result, *given = (_values(part) for part in (both, *parts))
    if op == "mul":
        sizes = result[result != 0].abs()
        if not torch.isfinite(result).all() or bool(((sizes > limits.max) | (sizes < limits.tiny)).any()):
            refuse("the product of the two scales is out of range")
    elif any(bool((value.abs() * limits.eps >= 0.5).any()) for value in given):
        refuse("so large a shift rounds what it is added to")


def _values(value: Fixed) -> torch.Tensor:
    return value.function(*(source.tensor.double() for source in value.sources))


def _stored(build: Builder, given: Sequence[Operand], both: Fixed, dtype: Any) -> Operand:
    """A number where both are numbers, else a weight in place of those that nothing else reads."""
    if not both.sources:
        return float(_values(both))
    if any(source.dtype != dtype or len(source.uses) > 1 for source in both.sources):
        return refuse("one of the two is read by others, or of another type")
    shapes = [tuple(operand.shape) if isinstance(operand, Value) else () for operand in given]
    shape = tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    if math.prod(shape) > sum(math.prod(source.weight.shape) for source in both.sources):
        return refuse("together they would be larger than both of them")
    old = next((operand for operand in given if isinstance(operand, Parameter)), both.sources[0])
    return successor(build, old, both, shape)


def _pattern(ops: Sequence[str]) -> Any:
    def pattern(op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.any_of(ops, op.any_of(ops, x, a, name="inner"), b, name="outer")

    return pattern


@rule(_pattern(SCALES), samples=lambda: _samples(SCALES))
def scales_in_a_row(build: Builder, inner: Node, outer: Node) -> Value:
    """Two scales by weights or numbers are one."""
    return _joined(build, inner, outer, "mul")


@rule(_pattern(SHIFTS), samples=lambda: _samples(SHIFTS))
def shifts_in_a_row(build: Builder, inner: Node, outer: Node) -> Value:
    """Two shifts by weights or numbers are one."""
    return _joined(build, inner, outer, "add")


def _factor_samples() -> Iterable[dict[str, Any]]:
    for op in SCALES:
        x, y = randn(2, 4, 3).double(), randn(2, 3, 5).double()
        yield {"x": x, "y": y, "a": 0.5, "b": 4.0, "first.op": op, "second.op": "mul"}
        yield {"x": x, "y": y, "a": 2.0, "b": 0.5, "first.op": "mul", "second.op": op}


@rule(
    lambda op, x, y, a, b: op.matmul(
        op.any_of(SCALES, x, a, name="first"), op.any_of(SCALES, y, b, name="second"), name="product"
    ),
    samples=_factor_samples,
)
def scales_of_both_factors(build: Builder, x: Value, y: Value, a: Operand, b: Operand, product: Node) -> Value:
    """Numbers that scale both factors of a product scale the first: queries and keys, each by the root of a scale."""
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (a, b)):
        return differs("its factors are not both scaled by numbers")
    scales = []
    for operand in product.inputs:
        node = operand.producer if isinstance(operand, Value) else None
        assert node is not None
        scales.append(_operand(build, node, moving_slot(build, node))[1])
    both = combined(torch.mul, *scales)
    _check_range(both, scales, "mul", product.output.dtype)
    return build.matmul(build.mul(x, float(_values(both))), y, name=product.name)  # type: ignore[no-any-return]


@rule(
    lambda op, x, y: op.mul(x, op.reciprocal(op.sqrt(y, name="root"))),
    samples=lambda: [{"x": randn(2, 4, 3).double(), "y": rand(2, 4, 1).double() + 0.5}],
)
def quotient_by_root(build: Builder, x: Operand, root: Node) -> Value:
    """The inverse of a root as a factor is the root as a divisor, as runtimes know it from an RMS norm.

    Of a root, because its inverse is in range: that of a very small number may be infinite where the quotient is not.
    """
    return build.div(x, root.output)  # type: ignore[no-any-return]


RULES = RuleSet([scales_in_a_row, shifts_in_a_row, scales_of_both_factors, quotient_by_root])
