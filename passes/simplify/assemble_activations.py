"""Activations put together again from products, exponentials and clamps.

    x * 0.5 * (1 + erf(x / sqrt(2)))       gelu(x)            exp(x) / sum(exp(x))       softmax(x)
    x * sigmoid(x)                         silu(x)            x * relu6(x + 3) / 6       hardswish(x)
    x * tanh(softplus(x))                  mish(x)            maximum(x, a * x)          leaky_relu(x)

Where an exponential overflows, a softmax, a softplus or a sigmoid that is spelled out may give inf or NaN; the whole
operator gives what the formula says. Everywhere else the two are equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Operand, Value
from regauge.ir.rewriting.matcher import Match, number_of
from regauge.ir.rewriting.pattern_instances import Constant
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse, rule

Pattern = Any  # what the methods of ``op`` return, or a variable, or a number


def product(op: Any, *factors: Pattern) -> Pattern:
    """The product of the factors in any grouping, a number also as a division by its inverse."""
    if len(factors) == 1:
        return factors[0]
    first, *rest = factors
    options = []
    for count in range(len(rest)):
        for beside in combinations(range(len(rest)), count):
            left = [first, *(rest[i] for i in beside)]
            right = [factor for i, factor in enumerate(rest) if i not in beside]
            options += _halves(op, left, right) + (_divided(op, left, right) + _divided(op, right, left))
    return op.either(*options)


def _is_constant(factors: Sequence[Pattern]) -> bool:
    return all(isinstance(factor, int | float) for factor in factors)


def _halves(op: Any, left: Sequence[Pattern], right: Sequence[Pattern]) -> list[Pattern]:
    if any(_is_constant(side) and len(side) > 1 for side in (left, right)):
        return []  # nobody multiplies numbers in a graph
    return [op.mul(product(op, *left), product(op, *right))]


def _divided(op: Any, left: Sequence[Pattern], right: Sequence[Pattern]) -> list[Pattern]:
    if len(right) > 1 or not _is_constant(right) or _is_constant(left):
        return []
    return [op.div(product(op, *left), 1 / right[0])]


def _in_floats(x: Operand, match: Match) -> str | bool:
    """Activations take floating-point tensors and give tensors of their type."""
    if not isinstance(x, Value) or not isinstance(x.dtype, torch.dtype) or not x.dtype.is_floating_point:
        return f"{x} is no floating-point tensor"
    return x.dtype == match.root.output.dtype or f"its type is {match.root.output.dtype}, that of {x.name} {x.dtype}"


def _samples() -> Iterable[dict[str, Any]]:
    return [{"x": randn(2, 3, 4).double() * 2}]


def function_of_x(
    name: str,
    pattern: Callable[..., Any],
    samples: Callable[[], Iterable[dict[str, Any]]] = _samples,
    **attributes: Any,
) -> RewriteRule:
    """The rule that a pattern of one variable ``x`` is the operator ``name``."""

    def replacement(build: Builder, x: Value) -> Value:
        return build(name, x, **attributes)  # type: ignore[no-any-return]

    variant = "-".join((name.replace("_", "-"), *(str(value) for value in attributes.values())))
    replacement.__doc__ = f"A spelling of {name}."
    return RewriteRule(f"{variant}-assembled", pattern, replacement, _in_floats, samples)


# -- gelu --------------------------------------------------------------------------------------------------------------


def _gelu(op: Any, x: Any) -> Any:
    error = op.erf(product(op, x, math.sqrt(0.5)))
    whole = product(op, x, 0.5, op.add(error, 1))
    return op.either(*whole.options, op.mul(x, op.add(product(op, error, 0.5), 0.5)))


def _gelu_by_tanh(op: Any, x: Any) -> Any:
    """Hendrycks and Gimpel's approximation: the argument is sqrt(2 / pi) (x + 0.044715 x^3)."""
    scale, bend = math.sqrt(2 / math.pi), 0.044715
    square = op.either(op.mul(x, x), op.pow(x, 2))
    cube = op.either(op.pow(x, 3), op.mul(square, x))
    bent = op.either(op.mul(cube, bend), op.mul(x, op.mul(square, bend)), op.mul(op.mul(op.mul(x, bend), x), x))
    stretch = op.add(op.either(op.mul(square, bend), op.mul(op.mul(x, bend), x)), 1)
    argument = op.either(op.mul(op.add(x, bent), scale), op.mul(op.mul(x, scale), stretch))
    return product(op, x, 0.5, op.add(op.tanh(argument), 1))


# -- sigmoids and what they gate ---------------------------------------------------------------------------------------


def _sigmoid(op: Any, x: Any) -> Any:
    denominator = op.add(op.exp(op.neg(x)), 1)
    return op.either(op.reciprocal(denominator), op.div(1, denominator))


def _silu(op: Any, x: Any) -> Any:
    return op.either(op.mul(x, op.sigmoid(x)), op.div(x, op.add(op.exp(op.neg(x)), 1)))


def _between(op: Any, x: Any, low: float, high: float) -> Any:
    return op.either(op.clamp(x, low, high), op.hardtanh(x, min_val=low, max_val=high))


def _hard_sigmoid(op: Any, x: Any) -> Any:
    line = op.add(product(op, x, 1 / 6), 0.5)
    return op.either(*product(op, _between(op, op.add(x, 3), 0.0, 6.0), 1 / 6).options, _between(op, line, 0.0, 1.0))


def _hard_swish(op: Any, x: Any) -> Any:
    spelled = product(op, x, _between(op, op.add(x, 3), 0.0, 6.0), 1 / 6)
    return op.either(op.mul(x, op.hardsigmoid(x)), *spelled.options)


# -- softplus ----------------------------------------------------------------------------------------------------------


def _log_of_exp(op: Any, x: Any) -> Any:
    return op.either(op.log1p(op.exp(x)), op.log(op.add(op.exp(x), 1)))


def _softplus_beyond(op: Any, x: Any, bound: Any, beta: Any = None) -> Any:
    def scaled() -> Any:
        return op.mul(x, beta)

    steep = op.either(op.softplus(scaled(), threshold=..., name="steep"), _log_of_exp(op, scaled()))
    plain = op.either(op.softplus(x, threshold=..., name="inner"), _log_of_exp(op, x))
    return op.either(op.where(op.gt(x, bound), x, plain), op.where(op.gt(scaled(), bound), x, op.div(steep, beta)))


@rule(
    _softplus_beyond,
    where=_in_floats,
    samples=lambda: [
        {"x": randn(9).double() * 20, "bound": 20.0, "beta": 0.5, "inner.threshold": 20, "steep.threshold": 20}
    ],
)
def softplus_threshold(build: Builder, x: Value, bound: Operand, beta: Operand, inner: Any, steep: Any) -> Value:
    """Beyond the threshold a softplus is its operand."""
    threshold, factor = number_of(bound), 1 if beta is None else number_of(beta)
    if threshold is None or factor is None or not factor > 0:
        return refuse("its threshold or its steepness is computed")
    for softplus in (inner, steep):
        threshold = threshold if softplus is None else min(threshold, softplus.attributes["threshold"])
    return build.softplus(x, beta=factor, threshold=threshold)  # type: ignore[no-any-return]


# -- rectifiers --------------------------------------------------------------------------------------------------------


@rule(
    lambda op, x, slope: op.either(
        op.maximum(x, op.mul(x, slope), name="largest"),
        op.where(op.any_of(("gt", "ge"), x, 0), x, op.mul(x, slope)),
        op.where(op.any_of(("lt", "le"), x, 0), op.mul(x, slope), x),
    ),
    where=_in_floats,
    samples=lambda: [{"x": randn(9).double(), "slope": 0.2}],
)
def leaky_relu_assembled(build: Builder, x: Value, slope: Operand, largest: Any) -> Value:
    """The value above zero, a part of it below."""
    number = number_of(slope)
    if number is None:
        return refuse("its slope is computed")
    if largest is not None and not 0 < number <= 1:
        return refuse(f"the larger of x and {number} x is no leaky relu")
    return build.leaky_relu(x, negative_slope=float(number))  # type: ignore[no-any-return]


@rule(
    lambda op, x, bound: op.any_of(("maximum", "minimum"), x, bound, name="extreme"),
    where=_in_floats,
    samples=lambda: [{"x": randn(9).double(), "bound": Constant(torch.tensor(0.5).double())}],
)
def clamp_from_extremes(build: Builder, x: Value, bound: Operand, extreme: Any) -> Value:
    """The larger or smaller of a value and a number is the value within a bound."""
    number = number_of(bound)
    if number is None or isinstance(number, float) and math.isnan(number):
        return refuse("its bound is computed")
    assert isinstance(x.dtype, torch.dtype)
    if abs(number) > torch.finfo(x.dtype).max:  # also infinity
        return refuse(f"{number} is no number of type {x.dtype}")
    bounds = (number,) if extreme.op == "maximum" else (None, number)
    return build.clamp(x, *bounds)  # type: ignore[no-any-return]


@rule(
    lambda op, x, low, high: op.either(
        op.clamp(op.clamp(x, low), None, high, name="above"), op.clamp(op.clamp(x, None, high), low)
    ),
    where=_in_floats,
    samples=lambda: [{"x": randn(9).double(), "low": -0.5, "high": 0.5}],
)
def clamp_twice(build: Builder, x: Value, low: Operand, high: Operand) -> Value:
    """A value within a bound below and then one above is within both."""
    bounds = number_of(low), number_of(high)
    if bounds[0] is None or bounds[1] is None or not bounds[0] <= bounds[1]:
        return refuse("its bounds are computed, or cross")
    return build.clamp(x, *bounds)  # type: ignore[no-any-return]


# -- softmax -----------------------------------------------------------------------------------------------------------


def _softmax_samples() -> Iterable[dict[str, Any]]:
    return [{"x": randn(2, 3, 4).double(), "dims": (1,)}, {"x": randn(2, 3, 4).double(), "dims": (-1,)}]


def _from_largest(op: Any, x: Any, dims: Any) -> Any:
    return op.sub(x, op.amax(x, dims=dims, keepdim=True))


def _softmax(op: Any, x: Any, dims: Any) -> Any:
    def shares(exponents: Callable[[], Any]) -> list[Any]:
        total = op.sum(op.exp(exponents()), dims=dims, keepdim=True)
        return [op.div(op.exp(exponents()), total), op.mul(op.exp(exponents()), op.reciprocal(total))]

    return op.either(*shares(lambda: _from_largest(op, x, dims)), *shares(lambda: x))


def _log_softmax(op: Any, x: Any, dims: Any) -> Any:
    largest = _from_largest(op, x, dims)
    return op.either(
        op.sub(x, op.logsumexp(x, dims=dims, keepdim=True)),
        op.sub(largest, op.log(op.sum(op.exp(_from_largest(op, x, dims)), dims=dims, keepdim=True))),
        op.sub(x, op.log(op.sum(op.exp(x), dims=dims, keepdim=True))),
    )


def _one_axis(x: Value, dims: tuple[int, ...] | None) -> int:
    if dims is None or len(dims) != 1:
        return refuse(f"it is taken over the axes {dims}: a softmax has one")
    return dims[0] % x.rank


@rule(_softmax, where=_in_floats, samples=_softmax_samples)
def softmax_assembled(build: Builder, x: Value, dims: tuple[int, ...] | None) -> Value:
    """Exponentials over their sum; what is taken off all of them first falls out."""
    return build.softmax(x, dim=_one_axis(x, dims))  # type: ignore[no-any-return]


@rule(_log_softmax, where=_in_floats, samples=_softmax_samples)
def log_softmax_assembled(build: Builder, x: Value, dims: tuple[int, ...] | None) -> Value:
    """A value less the logarithm of the sum of exponentials."""
    return build.log_softmax(x, dim=_one_axis(x, dims))  # type: ignore[no-any-return]


RULES = RuleSet(
    [
        function_of_x("gelu", _gelu),
        function_of_x("gelu", _gelu_by_tanh, approximate="tanh"),
        function_of_x("sigmoid", _sigmoid),
        function_of_x("silu", _silu),
        function_of_x("mish", lambda op, x: op.mul(x, op.tanh(op.softplus(x)))),
        function_of_x("hardsigmoid", _hard_sigmoid),
        function_of_x("hardswish", _hard_swish),
        softplus_threshold,
        function_of_x("softplus", _log_of_exp),
        leaky_relu_assembled,
        clamp_from_extremes,
        clamp_twice,
        softmax_assembled,
        log_softmax_assembled,
        function_of_x("relu", lambda op, x: op.clamp(x, 0)),
    ]
)
