"""Derivatives of what operators compute for one index: reverse mode over the expressions of regauge.ir.scalars.

    silu        x * sigmoid(x)          g * s + g * x * s * (1 - s), where s = sigmoid(x)
    softmax     e / sum(e)              e * (g / sum(e) - sum(g * y / sum(e))), where y is the result

:data:`GRADIENTS` states one derivative for each primitive, :func:`gradients` chains them (Griewank and Walther 2008,
section 3.2). Where a function has a corner, the derivative is the one that torch takes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from regauge.ir.errors import FusionError
from regauge.ir.scalars import REDUCTIONS, ROUNDED_8, Scalar, cos, eq, exp, sin, sum_, where

Part: TypeAlias = Scalar | None
Axes: TypeAlias = Callable[[Scalar], frozenset[int]]
"""The axes of an expression, by number."""


def _constant(g: Scalar, r: Scalar, *args: Scalar) -> Sequence[Part]:
    return (None,) * len(args)


def _abs(g: Scalar, r: Scalar, x: Scalar) -> Sequence[Part]:
    return (where(x > 0.0, g, where(x < 0.0, -g, 0.0)),)


def _greater(g: Scalar, r: Scalar, x: Scalar, y: Scalar) -> Sequence[Part]:
    return _of_two(g, r, x > y, x < y)


def _less(g: Scalar, r: Scalar, x: Scalar, y: Scalar) -> Sequence[Part]:
    return _of_two(g, r, x < y, x > y)


def _of_two(g: Scalar, r: Scalar, first: Scalar, second: Scalar) -> Sequence[Part]:
    """Of a maximum or minimum ``r``: it is the first argument, the second one, or both, and then ``r.value`` says."""
    if r.value is None:
        return where(first, g, where(second, 0.0, 0.5 * g)), where(second, g, where(first, 0.0, 0.5 * g))
    if r.value == 0:
        return where(second, 0.0, g), where(second, g, 0.0)
    return where(first, g, 0.0), where(first, 0.0, g)


GRADIENTS: Mapping[str, Callable[..., Sequence[Part]]] = {
    "add": lambda g, r, x, y: (g, g),
    "sub": lambda g, r, x, y: (g, -g),
    "mul": lambda g, r, x, y: (g * y, g * x),
    "div": lambda g, r, x, y: (g / y, -(g * r / y)),
    "neg": lambda g, r, x: (-g,),
    "abs": _abs,
    "maximum": _greater,
    "minimum": _less,
    "exp": lambda g, r, x: (g * r,),
    "exp2": lambda g, r, x: (g * (r * math.log(2)),),
    "expm1": lambda g, r, x: (g * (r + 1.0),),
    "log": lambda g, r, x: (g / x,),
    "log2": lambda g, r, x: (g / (x * math.log(2)),),
    "log1p": lambda g, r, x: (g / (x + 1.0),),
    "sqrt": lambda g, r, x: (0.5 * g / r,),
    "rsqrt": lambda g, r, x: (-0.5 * g * (r * r * r),),
    "sigmoid": lambda g, r, x: (g * (r * (1.0 - r)),),
    "tanh": lambda g, r, x: (g * (1.0 - r * r),),
    "erf": lambda g, r, x: (g * (2 / math.sqrt(math.pi) * exp(-(x * x))),),
    "sin": lambda g, r, x: (g * cos(x),),
    "cos": lambda g, r, x: (-(g * sin(x)),),
    "where": lambda g, r, condition, x, y: (None, where(condition, g, 0.0), where(condition, 0.0, g)),
    **dict.fromkeys(("real", "code", *ROUNDED_8.values()), lambda g, r, x: (g,)),  # torch's casts of floats pass it on
    "sum": lambda g, r, x: (g,),
    "amax": lambda g, r, x: _extreme(g, r, x),
    "amin": lambda g, r, x: _extreme(g, r, x),
    **dict.fromkeys(("floor", "ceil", "round", "power_of_two", "eq", "ne", "lt", "le", "gt", "ge"), _constant),
    **dict.fromkeys(("logical_and", "logical_or", "logical_not"), _constant),
}
"""For each primitive and reduction the gradients of its arguments, of ``g``, that of its result ``r``; None is zero."""


def _extreme(g: Scalar, r: Scalar, x: Scalar) -> Sequence[Part]:
    """All entries that are the greatest share alike, as in torch; a shift that nothing depends on has no gradient."""
    if r.steady:
        return (None,)
    there = eq(x, r)
    return (where(there, g / sum_(where(there, 1.0, 0.0)), 0.0),)


def gradients(
    expression: Scalar, seed: Scalar, wanted: Collection[int], axes: Axes, ended: frozenset[int]
) -> dict[int, Scalar]:
    """Of ``seed``, the gradient of an expression, that of each ``wanted`` operand on which the expression depends.

    ``axes`` says along which axes an expression goes, ``ended`` are those that reductions go over. A gradient may have
    more axes than its operand, over which it is to be summed, and may lack some, along which it is the same. Raises
    FusionError where a part of the expression has no derivative. That of a table is of what is looked up in it, along
    the axes of its numbers.
    """
    adjoints: dict[Scalar, Scalar] = {expression: seed}
    found: dict[int, Scalar] = {}
    for one in reversed(_depending(expression, wanted)):
        if one not in adjoints:
            continue
        g = adjoints[one]
        if one.op == "operand":
            found[one.value] = found[one.value] + g if one.value in found else g
            continue
        if one.op == "picked":  # what is looked up has the gradient; whoever asks adds it up in the table
            table, numbers = one.args
            g = g if one.value.still is None else where(eq(numbers, one.value.still), 0.0, g)
            found[table.value] = found[table.value] + g if table.value in found else g
            continue
        for arg, part in zip(one.args, _pulled(one, g), strict=True):
            if part is None or arg.op in ("number", "count", "epsilon"):
                continue
            if axes(part) & ended and not axes(arg) & ended:
                part = sum_(part)
            adjoints[arg] = adjoints[arg] + part if arg in adjoints else part
    return found


def _depending(expression: Scalar, wanted: Collection[int]) -> list[Scalar]:
    """The parts of an expression that depend on operands, arguments before what they are arguments of."""
    depends: dict[Scalar, bool] = {}

    def visit(one: Scalar) -> bool:
        if one not in depends:
            below = [visit(arg) for arg in one.args]
            depends[one] = any(below) or (one.op == "operand" and one.value in wanted)
        return depends[one]

    visit(expression)
    return [one for one, does in depends.items() if does]


def _pulled(one: Scalar, g: Scalar) -> Sequence[Part]:
    """Gradients of arguments. What is not chosen stays outside of the products: it may be infinite."""
    if g.op == "where" and one.op not in REDUCTIONS:
        condition, *branches = g.args
        for place, branch in enumerate(branches):
            if branch.op == "number" and branch.value == 0:
                parts = _pulled(one, branches[1 - place])
                return [None if part is None else _chosen(condition, place, part) for part in parts]
    if one.op not in GRADIENTS:
        raise FusionError(f"the derivative of {one.op} is not stated")
    return GRADIENTS[one.op](g, one, *one.args)


def _chosen(condition: Scalar, zero: int, part: Scalar) -> Scalar:
    return where(condition, part, 0.0) if zero == 1 else where(condition, 0.0, part)
