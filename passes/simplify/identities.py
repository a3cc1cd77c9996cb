"""Nodes that compute what they are given: neutral numbers, casts that lose nothing, steps taken twice.

    add(x, 0), mul(x, 1), pow(x, 1)      x
    cast(cast(x, f64), f32)              x, where x is f32
    relu(relu(x)), clamp(clamp(x))       relu(x), clamp(x)

A result keeps its shape and type: what broadcasts or promotes its operand stays. Nothing here is true only of numbers
that are no NaN: x * 0 stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import randn

from regauge.ir.dtypes import Dtype, is_real
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.matcher import SMALL
from regauge.ir.rewriting.pattern_instances import Constant
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import same

Sample = dict[str, Any]


def alike(x: Operand, result: Value) -> Value:
    """``x`` where it may stand for the result; refuses where shape or type differ."""
    if not isinstance(x, Value):
        return differs("its operand is a number")
    if x.dtype != result.dtype:
        return differs(f"it makes {result.signature} of {x.signature}")
    if x.rank != result.rank or not all(map(same, x.shape, result.shape)):
        return differs(f"it makes {result.signature} of {x.signature}")
    return x


def is_integral(dtype: Dtype) -> bool:
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point and not dtype.is_complex


# -- one operand, nothing done -----------------------------------------------------------------------------------------


def _whole_slice(node: Node, x: Value) -> bool:
    given = node.attributes
    return given["step"] == 1 and same(given["start"], 0) and same(given["end"], x.shape[given["dim"]])


def _always(node: Node, x: Value) -> bool:
    return True


def _no_amount(attribute: str) -> Callable[[Node, Value], bool]:
    return lambda node, x: all(same(amount, 0) for amount in node.attributes[attribute])


IDLE: Mapping[str, Callable[[Node, Value], bool]] = {
    "identity": _always,
    "cast": _always,  # to the type it has: the type is compared for all of them, and so is the shape
    "reshape": _always,
    "expand": _always,
    "repeat": _always,
    "squeeze": _always,
    "concat": _always,
    "clamp": _always,
    "split": _always,
    "permute": lambda node, x: [d % x.rank for d in node.attributes["dims"]] == list(range(x.rank)),
    "slice": _whole_slice,
    "pad": lambda node, x: all(same(size, 0) for pair in node.attributes["pads"] for size in pair),
    "flip": lambda node, x: all(same(x.shape[dim], 1) for dim in node.attributes["dims"]),
    "roll": _no_amount("shifts"),
    "repeat_interleave": lambda node, x: same(node.attributes["repeats"], 1),
}
"""When an operator of one operand, whose result has the operand's shape and type, does nothing."""


def _idle_samples() -> Iterable[Sample]:
    calls: Mapping[str, Sample] = {
        "identity": {}, "cast": {"dtype": torch.float64}, "reshape": {"shape": (2, 1, 3)},
        "expand": {"shape": (2, 1, 3)}, "repeat": {"repeats": (1, 1, 1)}, "squeeze": {"dims": ()},
        "concat": {"dim": 1}, "clamp": {},
        "split": {"sizes": (3,), "dim": 2}, "permute": {"dims": (0, -2, 2)},
        "slice": {"dim": 2, "start": 0, "end": 3, "step": 1}, "pad": {"pads": ((0, 0), (0, 0), (0, 0))},
        "flip": {"dims": (1,)}, "roll": {"shifts": (0,), "dims": (2,)}, "repeat_interleave": {"repeats": 1, "dim": 0},
    }  # fmt: skip
    for op, attributes in calls.items():
        yield {"x": randn(2, 1, 3).double(), "node.op": op, "node.attributes": attributes}


@rule(lambda op, x: op.any_of(tuple(IDLE), x, attributes=..., name="node"), samples=_idle_samples)
def nothing_done(build: Builder, x: Value, node: Node) -> Value:
    """An identity, a cast to the type it has, a reshape to the shape it has, a slice of all, padding by nothing."""
    kept = alike(x, node.outputs[0])
    return kept if IDLE[node.op](node, x) else differs("it moves entries")


# -- neutral numbers ---------------------------------------------------------------------------------------------------

NEUTRAL: Mapping[str, float] = {
    "add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1,
    "logical_or": False, "logical_xor": False, "logical_and": True,
    "bitwise_or": 0, "bitwise_xor": 0, "bitwise_left_shift": 0, "bitwise_right_shift": 0,
}  # fmt: skip
"""The number that changes nothing as the second operand of an operator, and as the first of a commutative one."""


def is_exactly(operand: Operand, number: float) -> bool:
    """Whether an operand is this number to the last bit: as given, or as a constant full of it."""
    if not isinstance(operand, Parameter):
        return isinstance(operand, bool | int | float) and operand == number
    if operand.kind != "constant" or operand.trainable or not isinstance(operand.dtype, torch.dtype):
        return False
    if not 0 < math.prod(operand.weight.shape) <= SMALL:
        return False
    return bool((operand.tensor == number).all())


def _neutral_samples() -> Iterable[Sample]:
    whole, truth = torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3) % 2 == 0
    for op, number in NEUTRAL.items():
        x = truth if op.startswith("logical") else whole if op.startswith("bitwise") else randn(2, 3).double()
        if not op.startswith("logical"):  # torch takes numbers for no truths
            yield {"x": x, "y": number, "node.op": op}
        yield {"x": x, "y": Constant(torch.full((1,), number, dtype=x.dtype)), "node.op": op}
    yield {"x": whole, "y": 1, "node.op": "div", "node.attributes": {"rounding_mode": "trunc"}}


@rule(lambda op, x, y: op.any_of(tuple(NEUTRAL), x, y, attributes=..., name="node"), samples=_neutral_samples)
def neutral_number(build: Builder, x: Operand, y: Operand, node: Node) -> Value:
    """x + 0, x - 0, x * 1, x / 1, x ** 1, and likewise for truths and bits."""
    number = NEUTRAL[node.op]
    if not is_exactly(y, number):
        x, y = (y, x) if node.operator.commutative else (x, y)
    if not is_exactly(y, number):
        return differs(f"its operand is not {number}")
    kept = alike(x, node.output)
    if node.attributes.get("rounding_mode") is not None and not is_integral(kept.dtype):
        return refuse("it rounds")
    return kept


# -- casts -------------------------------------------------------------------------------------------------------------


def is_lossless(a: Dtype, b: Dtype) -> bool:
    """Whether every number of type ``a`` is one of type ``b``."""
    if not isinstance(a, torch.dtype) or not isinstance(b, torch.dtype) or a.is_complex or b.is_complex:
        return a == b
    if a == b or a == torch.bool:
        return True
    if b == torch.bool or (a.is_floating_point and not b.is_floating_point):
        return False
    if a.is_floating_point:
        own, wide = torch.finfo(a), torch.finfo(b)
        return wide.eps <= own.eps and wide.max >= own.max and wide.smallest_normal <= own.smallest_normal
    own_range = torch.iinfo(a)
    if b.is_floating_point:
        exact = 2 / torch.finfo(b).eps  # integers up to here
        return own_range.max <= min(exact, torch.finfo(b).max)
    return torch.iinfo(b).min <= own_range.min and torch.iinfo(b).max >= own_range.max


def is_skipped_by(a: Dtype, b: Dtype, c: Dtype) -> bool:
    """Whether a cast from ``a`` to ``c`` gives the same by way of ``b``."""
    if not is_lossless(a, b):
        return False
    if a == c or a == torch.bool or c == torch.bool:
        return True
    floats = [isinstance(t, torch.dtype) and t.is_floating_point for t in (a, b, c)]
    return floats in ([True] * 3, [False, False, False], [False, False, True])  # else it rounds or wraps another way


def _cast_samples() -> Iterable[Sample]:
    chains = [
        (torch.float32, torch.float64, torch.float32), (torch.float16, torch.float32, torch.float64),
        (torch.int8, torch.int64, torch.int16), (torch.bool, torch.float16, torch.int64),
        (torch.int32, torch.int64, torch.float32), (torch.bfloat16, torch.float32, torch.float16),
        (torch.uint8, torch.float16, torch.uint8),
    ]  # fmt: skip
    for a, b, c in chains:
        yield {"x": (randn(3, 4) * 50).to(torch.int64).to(a), "inner": b, "outer": c}


@rule(lambda op, x, inner, outer: op.cast(op.cast(x, dtype=inner), dtype=outer), samples=_cast_samples, shared=True)
def cast_of_cast(build: Builder, x: Value, inner: torch.dtype, outer: torch.dtype) -> Value:
    """A cast to a type that holds every number of the one before may be skipped; never one that narrows."""
    if not is_skipped_by(x.dtype, inner, outer):
        return refuse(f"a cast from {x.dtype} to {inner} and to {outer} is not the cast to {outer}")
    kept: Value = x if x.dtype == outer else build.cast(x, dtype=outer)
    return kept


# -- twice and back ----------------------------------------------------------------------------------------------------

INVOLUTIONS = ("neg", "logical_not", "bitwise_not")


def _twice_samples() -> Iterable[Sample]:
    yield {"x": randn(2, 3).double(), "outer.op": "neg", "inner.op": "neg"}
    yield {"x": torch.arange(4, dtype=torch.int8) - 2, "outer.op": "neg", "inner.op": "neg"}
    yield {"x": randn(2, 3) > 0, "outer.op": "logical_not", "inner.op": "logical_not"}
    yield {"x": torch.arange(4), "outer.op": "bitwise_not", "inner.op": "bitwise_not"}


@rule(
    lambda op, x: op.any_of(INVOLUTIONS, op.any_of(INVOLUTIONS, x, name="inner"), name="outer"),
    samples=_twice_samples,
    shared=True,
)
def there_and_back(build: Builder, x: Value, inner: Node, outer: Node) -> Value:
    """-(-x), not (not x)."""
    return alike(x, outer.output) if inner.op == outer.op else differs(f"{inner.op} is not undone by {outer.op}")


IDEMPOTENT = ("abs", "sign", "floor", "ceil", "trunc", "round")
WHOLE = ("floor", "ceil", "trunc", "round")  # their results are whole, on which each of them does nothing
NOT_NEGATIVE = ("abs", "relu", "sigmoid", "exp", "hardsigmoid", "softmax")  # or NaN


def _idempotent_samples() -> Iterable[Sample]:
    for name in IDEMPOTENT:
        yield {"x": randn(3, 4).double() * 4, "outer.op": name, "inner.op": name}
    yield {"x": randn(3, 4).double() * 4, "outer.op": "ceil", "inner.op": "round"}
    for name in ("relu", "sigmoid", "exp", "hardsigmoid"):
        yield {"x": randn(3, 4).double(), "outer.op": "abs", "inner.op": name}
        yield {"x": randn(3, 4).double(), "outer.op": "relu", "inner.op": name}
    yield {"x": randn(3, 4).double(), "outer.op": "relu", "inner.op": "softmax", "inner.attributes": {"dim": 1}}


@rule(
    lambda op, x: op.any_of(
        (*IDEMPOTENT, "relu"),
        op.any_of(tuple(dict.fromkeys((*IDEMPOTENT, *NOT_NEGATIVE))), x, attributes=..., name="inner"),
        attributes=..., name="outer",
    ),
    samples=_idempotent_samples,
    shared=True,
)  # fmt: skip
def nothing_left_to_do(build: Builder, inner: Node, outer: Node) -> Value:
    """abs(abs(x)), relu(sigmoid(x)), floor(round(x)): the outer step finds its work done."""
    if any(node.attributes.get("decimals", 0) for node in (inner, outer)):
        return refuse("it rounds to decimals")
    done = inner.op == outer.op or (inner.op in WHOLE and outer.op in WHOLE)
    positive = inner.op in NOT_NEGATIVE and is_real(inner.output.dtype)  # of the least integer, abs is negative
    if not done and not (positive and outer.op in ("abs", "relu")):
        return differs(f"{outer.op} changes what {inner.op} gives")
    return alike(inner.output, outer.output)


# -- bounds ------------------------------------------------------------------------------------------------------------

BOUNDED = ("relu", "clamp", "hardtanh")
Bounds = tuple[float, float]


def bounds_of(node: Node) -> Bounds:
    """The numbers between which an operator of BOUNDED puts its operand; refuses where they are tensors."""
    if node.op == "relu":
        return 0, math.inf
    low, high = (
        (node.attributes["min_val"], node.attributes["max_val"])
        if node.op == "hardtanh"
        else [*node.inputs[1:], None, None][:2]
    )
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not all(isinstance(b, int | float) and not isinstance(b, bool) and not math.isnan(b) for b in (low, high)):
        return refuse("its bounds are computed")
    return low, high  # type: ignore[return-value]


def _bounds_samples() -> Iterable[Sample]:
    def sample(outer: str, inner: str, a: tuple[Any, Any] = (None, None), c: tuple[Any, Any] = (None, None)) -> Sample:
        given: Sample = {"x": randn(4, 5).double() * 3, "outer.op": outer, "inner.op": inner}
        for name, op, (low, high) in (("inner", inner, a), ("outer", outer, c)):
            if op == "hardtanh":
                given[f"{name}.attributes"] = {"min_val": low, "max_val": high}
            if op == "clamp":
                given[f"{name}.operands"] = lambda build, low=low, high=high: [low, high]
        return given

    yield sample("relu", "relu")
    yield sample("clamp", "relu", c=(None, 6.0))
    yield sample("relu", "clamp", a=(-1.0, 6.0))
    yield sample("clamp", "clamp", a=(-1.0, 2.0), c=(0.5, None))
    yield sample("clamp", "clamp", a=(3.0, 4.0), c=(0.5, 1.0))
    yield sample("clamp", "clamp", a=(1.0, -1.0), c=(-0.5, 0.5))
    yield sample("hardtanh", "hardtanh", a=(0.0, 6.0), c=(0.0, 6.0))


@rule(
    lambda op, x: op.any_of(
        BOUNDED, op.any_of(BOUNDED, x, ..., attributes=..., name="inner"), ..., attributes=..., name="outer"
    ),
    samples=_bounds_samples,
    shared=True,
)
def bounds_of_bounds(build: Builder, x: Value, inner: Node, outer: Node) -> Value:
    """Two clamps in a row (relu is one) are one with the bounds of the inner put between those of the outer."""
    if not isinstance(x.dtype, torch.dtype) or not x.dtype.is_floating_point:
        return refuse("bounds may change the type of integers")
    (a, b), (c, d) = bounds_of(inner), bounds_of(outer)
    if c > d:
        return refuse("its bounds are crossed")
    low, high = min(max(a, c), d), min(max(b, c), d)
    for node in (outer, inner):  # the names that people gave: relu, relu6
        if bounds_of(node) == (low, high):
            if node is inner:
                return alike(inner.output, outer.output)
            return build(node.op, x, *node.inputs[1:], **node.attributes)  # type: ignore[no-any-return]
    limits = [None if math.isinf(bound) else bound for bound in (low, high)]
    merged: Value = build.clamp(x, *limits)
    return merged


RULES = RuleSet([nothing_done, neutral_number, cast_of_cast, there_and_back, nothing_left_to_do, bounds_of_bounds])
