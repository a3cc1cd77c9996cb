"""Reductions: sums, means, extremes, norms and spreads over axes, with or without keeping them as axes of size one.

``dims`` is a tuple of axes, or None for all of them. A reduced axis is not pinned: a mean over an axis that is cut is
the mean of what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import ONE
from regauge.ir.errors import OperatorError
from regauge.ir.operator import Adapter, OnnxForm, Operator, Sample, Symmetry, operator, register_operator, sample
from regauge.ir.ops import spell_reduction as spelling
from regauge.ir.ops.conversion import as_dtype
from regauge.ir.ops.elementwise import Function, positive
from regauge.ir.ops.layout import axis_number
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling

Dims = int | Sequence[int] | None


def reduced_axes(call: Call) -> tuple[int, ...]:
    """The axes that the node reduces, counted from the front; an empty tuple of ``dims`` means all, as in torch."""
    rank, dims = call.rank(0), call["dims"]
    if dims is None or dims == ():
        return tuple(range(rank))
    return tuple(call.normal(dim, max(rank, 1)) for dim in dims)


def _reduced(call: Call, role: str = "reduce") -> Axes:
    axes, gone = call.operand(0), reduced_axes(call)
    for position in gone:
        if position < len(axes):
            call.role(role, axes[position])
    if call["keepdim"]:
        return [ONE if i in gone else extent for i, extent in enumerate(axes)]
    return [extent for i, extent in enumerate(axes) if i not in gone]


def reduce_rule(call: Call) -> list[Axes]:
    return [_reduced(call) for _ in call.node.outputs]


def _product_rule(call: Call) -> list[Axes]:
    """What is left of a product once factors are gone is no product with zeros."""
    return [_reduced(call, "whole")]


def dims_of(x: Any, dim: Dims) -> tuple[int, ...] | None:
    """Axes as ATen writes them (one, several, none at all) in the record's form."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return None
    return tuple(axis_number(d, x.rank) for d in ([dim] if isinstance(dim, int) else dim))


# -- adapters ----------------------------------------------------------------------------------------------------------


def _aten_reduce(op: str) -> Adapter:
    def adapter(build: Any, x: Any, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        result = build(op, as_dtype(build, x, dtype), dims=dims_of(x, dim), keepdim=keepdim)
        return as_dtype(build, result, dtype)  # sums of small integers have 64 bits unless told otherwise

    return adapter


def onnx_axes(call: Any, since: int) -> tuple[int, ...] | None:
    """The axes of an ONNX reduction: an attribute up to opset ``since - 1``, then an input; None where not given."""
    if call.opset < since or not call.has(1):
        given = call.attribute("axes")
        return None if given is None else tuple(given)
    axes = call.sizes(1)
    if axes is None or not all(isinstance(axis, int) for axis in axes):
        raise OperatorError(f"the axes of {call.op_type} are computed when it runs: the node is kept as it is")
    return tuple(axes)


def _onnx_reduce(op: str, *, since: int = 18, **attributes: Any) -> Adapter:
    """The reader of ``ReduceX``; with ``noop_with_empty_axes`` one without axes keeps its pointwise part only."""

    def reader(build: Any, call: Any) -> Any:
        x, axes, keepdim = call.operand(0), onnx_axes(call, since), bool(call.attribute("keepdims", 1))
        x, finish = _around(build, call.op_type, x)
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return finish(build.abs(x) if op == "vector_norm" else x)
        kept_type = x.dtype
        result = build(op, x, dims=dims_of(x, axes), keepdim=keepdim, **attributes)
        return finish(as_dtype(build, result, kept_type))  # torch sums small integers in 64 bits, ONNX does not

    return reader


def _around(build: Any, op_type: str, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What stands before and after the reduction itself."""
    if op_type == "ReduceSumSquare":
        return build.mul(x, x), lambda y: y
    if op_type == "ReduceLogSum":
        return x, build.log
    return x, lambda y: y


def _cases(draw: Callable[..., Tensor] = randn, **attributes: Any) -> Callable[[], list[Sample]]:
    def samples() -> list[Sample]:
        return [
            sample(draw(2, 3, 4), dims=(1,), keepdim=True, **attributes),
            sample(draw(2, 3, 4), dims=(0, -1), keepdim=False, **attributes),
            sample(draw(3, 4), dims=None, keepdim=False, **attributes),
            sample(draw(3, 4), dims=None, keepdim=True, **attributes),
            sample(draw(5), dims=(0,), keepdim=False, **attributes),
        ]

    return samples


def reduction(
    *,
    aten: Mapping[str, Adapter] | None = None,
    onnx: Mapping[str, Adapter | OnnxForm | None] | None = None,
    draw: Callable[..., Tensor] = randn,
    rule: Callable[[Call], list[Axes]] = reduce_rule,
    **fields: Any,
) -> Callable[[Function], Function]:
    """Register the decorated function as a reduction of one tensor over ``dims``."""

    def register(evaluate: Function) -> Function:
        name = evaluate.__name__.rstrip("_")
        register_operator(
            Operator(
                name=name,
                evaluate=evaluate,
                rule=rule,
                aten={name: _aten_reduce(name)} if aten is None else aten,
                onnx=onnx or {},
                samples=_cases(draw),
                **fields,
            )
        )
        return evaluate

    return register


# -- sums, means and extremes ------------------------------------------------------------------------------------------


def _reduced_shape(x: Any, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> list[Any]:
    gone = {axis_number(dim, x.rank) for dim in dims} if dims else set(range(x.rank))  # none means all, as in torch
    return [1 if axis in gone else size for axis, size in enumerate(x.shape) if keepdim or axis not in gone]


def _over_all(node: Any) -> bool:
    """Whether no axes are named, of which torch's exporter has no form that loads."""
    return node.attributes["dims"] is None


@reduction(
    onnx={"ReduceMean": _onnx_reduce("mean")},
    shape=_reduced_shape,
    symmetry=Symmetry.LINEAR,
    spell=spelling.reduced("ReduceMean"),
    spelled_for_torch=_over_all,
    element=lambda x, **_: scalars.mean(x),
)
def mean(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.mean(x, dims, keepdim)


@reduction(
    aten={
        "sum": _aten_reduce("sum"),
        "count_nonzero": lambda build, x, dim=None: build.sum(build.ne(x, 0), dims=dims_of(x, dim)),
    },
    onnx={
        "ReduceSum": _onnx_reduce("sum", since=13),
        "ReduceSumSquare": _onnx_reduce("sum"),
        "ReduceLogSum": _onnx_reduce("sum"),
    },
    shape=_reduced_shape,
    symmetry=Symmetry.LINEAR,
    spell=spelling.reduced("ReduceSum", since=13),
    scaling=Scaling(powers={"x": 1}, sums=True),
    element=lambda x, **_: scalars.sum_(x),
)
def sum_(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.sum(x, dims, keepdim)


@reduction(
    onnx={"ReduceProd": _onnx_reduce("prod")}, rule=_product_rule, zeroed_by=(), spell=spelling.reduced("ReduceProd")
)
def prod(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    for dim in range(x.dim()) if dims is None else dims:
        x = torch.prod(x, dim, True)
    return x if keepdim else x.squeeze(tuple(range(x.dim())) if dims is None else dims)


def _extreme(build: Any, op: str, x: Any) -> Any:
    return build(op, x, dims=None, keepdim=False)


def _extreme_at(values: str, indices: str) -> Adapter:
    """``max(x, dim)``: the values, and where they stand. Whoever reads only the values frees the axis."""

    def adapter(build: Any, x: Any, dim: int, keepdim: bool = False) -> Any:
        dim = axis_number(dim, x.rank)
        return build(values, x, dims=(dim,), keepdim=keepdim), build(indices, x, dim=dim, keepdim=keepdim)

    return adapter


def _both_extremes(build: Any, x: Any, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = dims_of(x, dim)
    return build.amin(x, dims=dims, keepdim=keepdim), build.amax(x, dims=dims, keepdim=keepdim)


@reduction(
    aten={
        "amax": _aten_reduce("amax"),
        "max": lambda build, x: _extreme(build, "amax", x),
        "max.dim": _extreme_at("amax", "argmax"),
    },
    onnx={"ReduceMax": _onnx_reduce("amax")},
    spell=spelling.reduced("ReduceMax"),
    spelled_for_torch=_over_all,
    shape=_reduced_shape,
    symmetry=Symmetry.HOMOGENEOUS,
    element=lambda x, **_: scalars.amax(x),
)
def amax(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.amax(x, () if dims is None else dims, keepdim)


@reduction(
    aten={
        "amin": _aten_reduce("amin"),
        "min": lambda build, x: _extreme(build, "amin", x),
        "min.dim": _extreme_at("amin", "argmin"),
        "aminmax": _both_extremes,
    },
    onnx={"ReduceMin": _onnx_reduce("amin")},
    spell=spelling.reduced("ReduceMin"),
    spelled_for_torch=_over_all,
    shape=_reduced_shape,
    symmetry=Symmetry.HOMOGENEOUS,
    element=lambda x, **_: scalars.amin(x),
)
def amin(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.amin(x, () if dims is None else dims, keepdim)


def _booleans(*shape: int) -> Tensor:
    return randn(*shape) > 0


@reduction(draw=_booleans, spell=spelling.of_booleans("ReduceMax"))
def any_(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.any(x, dims, keepdim)


@reduction(
    aten={"all": _aten_reduce("all"), "_is_all_true": _aten_reduce("all")},
    draw=_booleans,
    spell=spelling.of_booleans("ReduceMin"),
)
def all_(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.all(x, dims, keepdim)


def _log_sum_exp(x: Scalar, **_: Any) -> Scalar:
    """Where the greatest number is infinite, as it is where all are hidden, it is the result, without a gradient."""
    greatest = scalars.shift(x)
    own = greatest + scalars.log(scalars.sum_(scalars.exp(x - greatest)))
    return scalars.where(scalars.eq(scalars.abs_(greatest), math.inf), greatest, own)


@reduction(
    aten={"logsumexp": _aten_reduce("logsumexp"), "special_logsumexp": _aten_reduce("logsumexp")},
    onnx={"ReduceLogSumExp": _onnx_reduce("logsumexp")},
    spell=spelling.reduced("ReduceLogSumExp"),
    element=_log_sum_exp,
)
def logsumexp(x: Tensor, *, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.logsumexp(x, tuple(range(x.dim())) if dims is None else dims, keepdim)


# -- spreads -----------------------------------------------------------------------------------------------------------


def _spread(build: Any, op: str, x: Any, *given: Any, **named: Any) -> Any:
    """The overloads of var and std: ``(unbiased)``, ``(dim, unbiased, keepdim)``, ``(dim, correction=, keepdim=)``."""
    if given and isinstance(given[0], bool):
        given = (None, *given)
    defaults: tuple[Any, ...] = (None, True, False)
    dim, unbiased, keepdim = given + defaults[len(given) :]
    dim, unbiased = named.get("dim", dim), named.get("unbiased", unbiased)
    correction = named.get("correction", 1 if unbiased else 0)
    return build(
        op,
        x,
        dims=dims_of(x, dim),
        correction=1 if correction is None else correction,
        keepdim=named.get("keepdim", keepdim),
    )


def _spread_adapter(op: str) -> Adapter:
    return lambda build, x, *given, **named: _spread(build, op, x, *given, **named)


def _spread_and_mean(op: str) -> Adapter:
    def adapter(build: Any, x: Any, *given: Any, **named: Any) -> Any:
        spread = _spread(build, op, x, *given, **named)
        attributes = spread.producer.attributes
        return spread, build.mean(x, dims=attributes["dims"], keepdim=attributes["keepdim"])

    return adapter


def _variance(x: Scalar, *, correction: float, **_: Any) -> Scalar:
    deviation = scalars.centred(x)
    return scalars.sum_(deviation * deviation) / (scalars.count() - correction)


@operator(
    rule=reduce_rule,
    aten={"var": _spread_adapter("var"), "var_mean": _spread_and_mean("var")},
    spell=spelling.variance,
    samples=lambda: [*_cases()(), *_cases(correction=0)()],
    zeroed_by=(),
    scaling=Scaling(powers={"x": 2}),
    element=_variance,
)
def var(x: Tensor, *, dims: tuple[int, ...] | None = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    return torch.var(x, dims, correction=correction, keepdim=keepdim)


@operator(
    rule=reduce_rule,
    aten={"std": _spread_adapter("std"), "std_mean": _spread_and_mean("std")},
    spell=lambda onnx, node: onnx.Sqrt(spelling.variance(onnx, node)),
    samples=lambda: [*_cases()(), *_cases(correction=0)()],
    symmetry=Symmetry.HOMOGENEOUS,
    element=lambda x, **attributes: scalars.sqrt(_variance(x, **attributes)),
)
def std(x: Tensor, *, dims: tuple[int, ...] | None = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    return torch.std(x, dims, correction=correction, keepdim=keepdim)


# -- norms -------------------------------------------------------------------------------------------------------------


def _linalg_vector_norm(
    build: Any, x: Any, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    return build.vector_norm(as_dtype(build, x, dtype), ord=ord, dims=dims_of(x, dim), keepdim=keepdim)


def _norm(
    build: Any, x: Any, p: float | None = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    return _linalg_vector_norm(build, x, 2 if p is None else p, dim, keepdim, dtype=dtype)


def _linalg_norm(
    build: Any, x: Any, ord: Any = None, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Without ``ord`` the length of all entries; with one, a matrix norm where two axes are meant."""
    axes = dims_of(x, dim) or tuple(range(x.rank))
    if isinstance(ord, str) or (ord is not None and len(axes) != 1):
        raise OperatorError("a matrix norm needs whole matrices: the node is kept as it is")
    return _linalg_vector_norm(build, x, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


def _frobenius_norm(build: Any, x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return _linalg_vector_norm(build, x, 2, dim, keepdim)


def _cosine_similarity(build: Any, x: Any, y: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """Each vector is divided by its own length, as torch does, so that large vectors do not overflow."""
    dims = dims_of(x, dim)
    x, y = (build.div(v, build.clamp(build.vector_norm(v, ord=2, dims=dims, keepdim=True), eps)) for v in (x, y))
    return build.sum(build.mul(x, y), dims=dims, keepdim=False)


def _onnx_normalise(build: Any, call: Any) -> Any:
    """LpNormalization: every vector along ``axis`` divided by its length; one of zeros stays as it is."""
    x = call.operand(0)
    order, dims = call.attribute("p", 2), dims_of(x, call.attribute("axis", -1))
    length = build.vector_norm(x, ord=order, dims=dims, keepdim=True)
    return build.div(x, build.clamp(length, torch.finfo(x.dtype).tiny))


def _global_lp_pool(build: Any, call: Any) -> Any:
    x = call.operand(0)
    return build.vector_norm(x, ord=call.attribute("p", 2), dims=tuple(range(2, x.rank)), keepdim=True)


@operator(
    rule=reduce_rule,
    aten={
        "linalg_vector_norm": _linalg_vector_norm,
        "linalg_norm": _linalg_norm,
        "norm": _norm,
        "frobenius_norm": _frobenius_norm,
        "cosine_similarity": _cosine_similarity,
    },
    onnx={
        "ReduceL1": _onnx_reduce("vector_norm", ord=1),
        "ReduceL2": _onnx_reduce("vector_norm", ord=2),
        "LpNormalization": _onnx_normalise,
        "GlobalLpPool": _global_lp_pool,
    },
    spell=spelling.vector_norm,
    samples=lambda: [*_cases()(), *_cases(ord=1)(), *_cases(positive, ord=float("inf"))()],
    symmetry=Symmetry.HOMOGENEOUS,
)
def vector_norm(x: Tensor, *, ord: float = 2, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.linalg.vector_norm(x, ord, dims, keepdim)  # type: ignore[no-any-return]
