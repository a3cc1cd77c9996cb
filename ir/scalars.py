"""What an operator computes for one index of its result, as an expression over scalars.

The ``element`` of an operator record is such an expression of its operands:

    silu        lambda x: x * scalars.sigmoid(x)
    softmax     lambda x, dim: e / scalars.sum_(e), where e = exp(x - scalars.amax(x))
    linear      lambda x, weight, bias=None: scalars.sum_(x * weight) + bias

It says nothing of axes: an operand is read where its own axes say, by the axis rule of the record, and ``sum_``,
``amax`` and ``amin`` go over the axes that the rule ends (contracts, reduces or normalises over), ``count()`` being how
many indices these have. An operator with reductions over different axes names the axis of each, ``sum_(x, (0, -1))``
being over the last axis of operand 0; ``index((0, -1))`` is the place along it. Kernels are printed from elements; a
law (:mod:`regauge.ir.laws.elements`) holds each to what its operator computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from regauge.ir.errors import OperatorError, blamed_on

if TYPE_CHECKING:
    from regauge.ir.graph import Node

Number: TypeAlias = bool | int | float
OperandAxis: TypeAlias = tuple[int | None, int]
"""A slot, and an axis of the operand there; None for the result."""


@dataclass(frozen=True, eq=False, slots=True)
class Scalar:
    """A node of an expression: ``op`` is a name in PRIMITIVES or in REDUCTIONS, or one of

    ``operand``  the value of operand ``value``, a slot number; a ``truth`` value where its type is that
    ``number``   the number ``value``
    ``index``    the place along the axis ``value`` of an operand
    ``from_end`` the same, counted from the end of the axis: -1 is the last place
    ``count``    how many indices the axis ``value`` of an operand has, or where that is None all ended axes together
    ``epsilon``  what a norm takes for an ``eps`` of None, by the type of the result
    ``joined``   of the arguments the one in whose segment of the result the index lies
    ``moved``    the operand at other places of some axes: ``value`` is a :class:`Moved`
    ``inside``   whether the places of the :class:`Moved` ``value`` are on the axes of the operand
    ``digit``    digit i of an integer to the base ``value``, i being the index within the last axis of the result
    ``spread``   where bit i of the first argument, an integer, is set, the argument behind it whose number is how many
                 bits are set below, and else 0; i is the index within the last axis of the result
    ``compact``  where bit i of the second argument is set, the entry of the first one whose number is the third one
                 and how many bits are set below, and else 0; all are operands
    ``picked``   of the first argument, an operand, the entry whose number the second one holds; ``value`` is a
                 :class:`Pick`

    A reduction goes over the axis ``value`` of an operand, or where that is None over all axes that the rule ends.

    Only derivatives ask (:mod:`regauge.ir.derivatives`) for the ``value`` of ``maximum`` and ``minimum``, the number of
    the argument that has the gradient where both are equal (None: each half of it), and whether a result does not
    depend on an ``amax``, which is ``steady``.
    """

    op: str
    args: tuple[Scalar, ...] = ()
    value: Any = None
    truth: bool = False
    steady: bool = False

    def __add__(self, other: Operand) -> Scalar:
        return _call("add", self, other)

    def __radd__(self, other: Operand) -> Scalar:
        return _call("add", other, self)

    def __sub__(self, other: Operand) -> Scalar:
        return _call("sub", self, other)

    def __rsub__(self, other: Operand) -> Scalar:
        return _call("sub", other, self)

    def __mul__(self, other: Operand) -> Scalar:
        return _call("mul", self, other)

    def __rmul__(self, other: Operand) -> Scalar:
        return _call("mul", other, self)

    def __truediv__(self, other: Operand) -> Scalar:
        return _call("div", self, other)

    def __rtruediv__(self, other: Operand) -> Scalar:
        return _call("div", other, self)

    def __neg__(self) -> Scalar:
        return _call("neg", self)

    def __abs__(self) -> Scalar:
        return _call("abs", self)

    def __pow__(self, exponent: Number) -> Scalar:
        found = power(self, number(exponent))
        if found is None:
            raise TypeError(f"{exponent} is no power without a logarithm: write exp({exponent} * log(x))")
        return found

    def __bool__(self) -> bool:
        raise TypeError("what is computed for each index is neither true nor false: choose by regauge.scalars.where")

    def __lt__(self, other: Operand) -> Scalar:
        return _call("lt", self, other)

    def __le__(self, other: Operand) -> Scalar:
        return _call("le", self, other)

    def __gt__(self, other: Operand) -> Scalar:
        return _call("gt", self, other)

    def __ge__(self, other: Operand) -> Scalar:
        return _call("ge", self, other)


Operand: TypeAlias = Scalar | Number
Element: TypeAlias = "Callable[..., Scalar | None]"
"""``element(*operands, **attributes)``: operands are Scalars, or None where absent. None where it cannot be stated."""


def _call(op: str, *args: Operand) -> Scalar:
    return Scalar(op, tuple(arg if isinstance(arg, Scalar) else number(arg) for arg in args))


def number(value: Number) -> Scalar:
    return Scalar("number", value=value)


def operand(slot: int, *, truth: bool = False) -> Scalar:
    return Scalar("operand", value=slot, truth=truth)


def index(axis: OperandAxis, *, from_end: bool = False) -> Scalar:
    """The place along an axis of an operand, or of the result, from 0 on, or ``from_end``: -1 is the last one."""
    return Scalar("from_end" if from_end else "index", value=axis)


def count(axis: OperandAxis | None = None) -> Scalar:
    """The number of indices on an axis of an operand, by default on the ended axes together."""
    return Scalar("count", value=axis)


def epsilon() -> Scalar:
    """The ``eps`` of a norm that is given as None, by the type of the result."""
    return Scalar("epsilon")


@dataclass(frozen=True, slots=True)
class Along:
    """An index that a place depends on: that of an axis of operand ``slot``, or of the result where that is None; of
    no tensor where there is a ``window``, which says how many indices it has. ``axis`` may count from the end."""

    axis: int
    slot: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A place on an axis: indices times steps, ``lengths`` times how many indices the axis has, and ``offset``."""

    steps: tuple[tuple[Along, int], ...] = ()
    offset: int = 0
    lengths: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """Places on axes of an operand; ``guarded`` where they may lie outside, and are not read there."""

    places: tuple[tuple[int, Place], ...]
    guarded: bool = False


def along(axis: int, step: int = 1, offset: int = 0) -> Place:
    """As far along an axis as the result, ``step`` by step."""
    return Place(((Along(axis), step),), offset)


def moved(x: Scalar, places: Mapping[int, Place], fill: Number | None = None) -> Scalar:
    """An operand at other places of some of its axes; outside of it there is ``fill``, None where no place is there."""
    where_ = tuple(places.items())
    if fill is None:
        return Scalar("moved", (x,), Moved(where_))
    return where(inside(x, places), Scalar("moved", (x,), Moved(where_, guarded=True)), fill)


def inside(x: Scalar, places: Mapping[int, Place]) -> Scalar:
    """True where places are on the axes of an operand."""
    return Scalar("inside", (x,), Moved(tuple(places.items())))


@dataclass(frozen=True, slots=True)
class Pick:
    """Entries of an ``axis`` by their numbers; the one with the number ``still`` gets no gradient."""

    axis: int
    still: int | None = None


def picked(x: Scalar, axis: int, index: Scalar, still: int | None = None) -> Scalar:
    """Of an operand the entries of an axis whose numbers another operand holds."""
    return Scalar("picked", (x, index), Pick(axis, still))


def movements(expression: Scalar) -> list[Scalar]:
    """The reads of an expression at other places and its tests of bounds: its ``moved`` and ``inside``."""
    return parts_of(expression, ("moved", "inside"))


def parts_of(expression: Scalar, ops: Collection[str]) -> list[Scalar]:
    """All that an expression is made of and has one of these ``ops``."""
    seen: dict[Scalar, None] = {}
    stack = [expression]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen[one] = None
            stack.extend(one.args)
    return [one for one in seen if one.op in ops]


def joined(*args: Operand) -> Scalar:
    """The concatenation of arguments along an axis of the result, whose extent is the concatenation of theirs."""
    return _call("joined", *args)


def digit(x: Scalar, base: int) -> Scalar:
    """The digits of an integer, the least one first, along the fastest part of the last axis of the result."""
    return Scalar("digit", (x,), base)


def spread(mask: Scalar, values: Sequence[Scalar]) -> Scalar:
    """The values one after the other where bits of a mask are set, from the lowest bit on, and zeros elsewhere; along
    the fastest part of the last axis of the result."""
    return Scalar("spread", (mask, *values))


def compact(values: Scalar, mask: Scalar, starts: Scalar) -> Scalar:
    """The values behind the one with the number ``starts`` one after the other where bits of a mask are set, from the
    lowest bit on, and zeros elsewhere; along the fastest part of the last axis of the result. All are operands, the
    values with one axis."""
    return Scalar("compact", (values, mask, starts))


def _function(op: str) -> Callable[..., Scalar]:
    def call(*args: Operand) -> Scalar:
        return _call(op, *args)

    return call


def _reduction(op: str) -> Callable[..., Scalar]:
    def call(x: Scalar, axis: OperandAxis | None = None) -> Scalar:
        return Scalar(op, (x,), axis)

    return call


def _where(condition: Any, x: Any, y: Any) -> torch.Tensor:
    return torch.where(torch.as_tensor(condition) != 0, x, y)


def _pairwise(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """A function of two tensors that takes numbers, too."""

    def call(x: Any, y: Any) -> torch.Tensor:
        like = x if isinstance(x, torch.Tensor) else y
        return function(*(torch.as_tensor(v, dtype=like.dtype if isinstance(v, float) else None) for v in (x, y)))

    return call


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    fraction = torch.frexp(x.detach()).mantissa
    return torch.where((fraction > 0.5) & x.isfinite(), x / fraction, x).detach()


def _to(kind: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(kind).to(x.dtype)


PRIMITIVES: Mapping[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
    "neg": lambda x: -x, "abs": torch.abs, "maximum": _pairwise(torch.maximum), "minimum": _pairwise(torch.minimum),
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1,
    "log": torch.log, "log2": torch.log2, "log1p": torch.log1p,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "erf": torch.erf,
    "sin": torch.sin, "cos": torch.cos, "floor": torch.floor, "ceil": torch.ceil,
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "where": _where,
    "logical_and": lambda x, y: (x != 0) & (y != 0), "logical_or": lambda x, y: (x != 0) | (y != 0),
    "logical_not": lambda x: x == 0,
    "round": torch.round, "code": lambda x: x, "power_of_two": _power_of_two,
    "e4m3": _to(torch.float8_e4m3fn), "e5m2": _to(torch.float8_e5m2),
    "e4m3fnuz": _to(torch.float8_e4m3fnuz), "e5m2fnuz": _to(torch.float8_e5m2fnuz),
    "real": lambda x: x if x.is_floating_point() and x.itemsize > 1 else x.double(),
}  # fmt: skip
"""What each primitive is in torch. ``maximum`` and ``minimum`` are NaN where an operand is, as torch's are;
``real`` of an integer, or of a float of 8 bits, is that number in a type that holds what is computed of it; ``code``
says of a number that it is one that the type of the result has. Halves are rounded to even. ``e4m3`` and ``e5m2`` are
the nearest floats of 8 bits as casts of torch 2.13 give them: what is beyond the greatest e4m3 is that, and beyond the
greatest e5m2 infinite; of the two with ``fnuz``, which have neither infinity nor a negative zero, it is no number.
``power_of_two`` is the least one that is not below a normal number, which is greater than 0."""

ROUNDED_8: Mapping[torch.dtype, str] = {
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz", torch.float8_e5m2fnuz: "e5m2fnuz",
}  # fmt: skip
"""The floats of 8 bits that elements round to, and the primitive that does."""

REDUCTIONS: Mapping[str, Callable[..., Any]] = {
    "sum": lambda x, dims: torch.sum(x, dims, keepdim=True),
    "amax": lambda x, dims: torch.amax(x, dims, keepdim=True),
    "amin": lambda x, dims: torch.amin(x, dims, keepdim=True),
}

abs_ = _function("abs")
maximum, minimum = _function("maximum"), _function("minimum")
exp, exp2, expm1 = _function("exp"), _function("exp2"), _function("expm1")
log, log2, log1p = _function("log"), _function("log2"), _function("log1p")
sqrt, rsqrt = _function("sqrt"), _function("rsqrt")
sigmoid, tanh, erf = _function("sigmoid"), _function("tanh"), _function("erf")
sin, cos, floor, ceil = _function("sin"), _function("cos"), _function("floor"), _function("ceil")
real, code, round_ = _function("real"), _function("code"), _function("round")
power_of_two = _function("power_of_two")
eq, ne = _function("eq"), _function("ne")
logical_and, logical_or, logical_not = _function("logical_and"), _function("logical_or"), _function("logical_not")
sum_, amax, amin = _reduction("sum"), _reduction("amax"), _reduction("amin")


def where(condition: Operand, x: Operand, y: Operand) -> Scalar:
    """The second argument where the first one is not zero, else the third one."""
    if isinstance(condition, bool):
        raise TypeError(
            "where takes a condition of each index: x == y tells if two expressions are one, write eq(x, y)"
        )
    return _call("where", condition, x, y)


def float8(x: Scalar, dtype: torch.dtype) -> Scalar | None:
    """The nearest float of 8 bits, as a code of that type; None for types that no primitive rounds to."""
    return code(_call(ROUNDED_8[dtype], real(x))) if dtype in ROUNDED_8 else None


def mean(x: Scalar) -> Scalar:
    return sum_(x) / count()


def centred(x: Scalar) -> Scalar:
    return x - mean(x)


def relu(x: Scalar) -> Scalar:
    return clamp(x, 0.0, None, ties=1)


def clamp(x: Scalar, low: Scalar | Number | None, high: Scalar | Number | None, ties: int = 0) -> Scalar:
    """torch's order: the upper bound wins. On a bound x has the gradient, with ``ties`` 1 the bound has it."""
    x = x if low is None else replace(maximum(x, low), value=ties)
    return x if high is None else replace(minimum(x, high), value=ties)


def shift(x: Scalar, axis: OperandAxis | None = None) -> Scalar:
    """The maximum, as what is subtracted that exponentials stay finite: the result does not depend on it."""
    return replace(amax(x, axis), steady=True)


def softplus(x: Scalar) -> Scalar:
    """log(1 + exp(x)), without overflow."""
    return maximum(x, 0.0) + log1p(exp(-abs_(x)))


def gelu(x: Scalar, approximate: str) -> Scalar:
    """Hendrycks and Gimpel 2016: x times the normal distribution function, or its approximation by tanh."""
    if approximate == "none":
        return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1.0 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def power(x: Scalar, exponent: Scalar) -> Scalar | None:
    """The powers that need no logarithm; None for others."""
    if exponent.op != "number":
        return None
    known: Mapping[float, Callable[[Scalar], Scalar]] = {
        1: lambda x: x, 2: lambda x: x * x, 3: lambda x: x * x * x, 0.5: sqrt, -0.5: rsqrt, -1: lambda x: 1.0 / x,
    }  # fmt: skip
    found = known.get(float(exponent.value))
    return found(x) if found else None


def affine(x: Scalar, gain: Scalar | None, shift: Scalar | None) -> Scalar:
    """``x * gain + shift``, where these are given."""
    x = x if gain is None else x * gain
    return x if shift is None else x + shift


def normalised(x: Scalar, weight: Scalar | None, bias: Scalar | None, eps: float) -> Scalar:
    """Layer, group and instance norm; they differ in the axes alone."""
    deviation = centred(x)
    return affine(deviation * rsqrt(mean(deviation * deviation) + eps), weight, bias)


def element_of(node: Node) -> Scalar | None:
    """The element of a node, its operands being ``operand`` scalars; None where none is stated for such a node.

    Raises OperatorError where the function of the record fails, or gives something else than an expression.
    """
    element = node.operator.element
    if element is None or len(node.outputs) != 1:
        return None
    operands: list[Scalar | None] = []
    for slot, given in enumerate(node.inputs):
        if given is None:
            operands.append(None)
        elif hasattr(given, "shape"):
            operands.append(operand(slot, truth=getattr(given, "dtype", None) == torch.bool))
        elif isinstance(given, bool | int | float):
            operands.append(number(given))
        else:
            return None  # a complex number, or a size that is known when it runs
    with blamed_on(f"operator {node.op}, its element"):
        found = element(*operands, **node.attributes)
    if found is not None and not isinstance(found, Scalar):
        kind = type(found).__name__
        raise OperatorError(f"operator {node.op}, its element: it gives a {kind}: write it with regauge.scalars")
    return found
