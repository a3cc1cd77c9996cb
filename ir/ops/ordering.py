"""Order along an axis: running sums, sorting, the largest entries and where they stand.

Positions are results here, so the axis keeps all its indices: it is ``scan`` for running sums and ``whole`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import ONE, Extent
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Adapter, Operator, Sample, Speller, Symmetry, operator, register_operator, sample
from regauge.ir.ops.conversion import as_dtype
from regauge.ir.ops.elementwise import Function
from regauge.ir.ops.layout import axis_number
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import Size, same


def _along(call: Call, role: str) -> Axes:
    """The operand's axes, of which the one the node runs along gets the role; a tensor without axes has none."""
    axes = list(call.operand(0))
    if axes:
        call.role(role, axes[call.normal(call["dim"], len(axes))])
    return axes


def _axis(x: Value, dim: int) -> int:
    return axis_number(dim, x.rank)


# -- running sums ------------------------------------------------------------------------------------------------------


def _scan_rule(call: Call) -> list[Axes]:
    return [_along(call, "scan")]


def _aten_scan(op: str) -> Adapter:
    def adapter(build: Any, x: Any, dim: int, *, dtype: Any = None) -> Any:
        result = build(op, as_dtype(build, x, dtype), dim=_axis(x, dim))
        return as_dtype(build, result, dtype)  # running sums of small integers have 64 bits unless told otherwise

    return adapter


def _onnx_running_sum(build: Any, call: Any) -> Any:
    """CumSum may run from the end and may leave out the entry itself."""
    x, axis = call.operand(0), call.number(1)
    if not isinstance(axis, int):
        raise OperatorError("the axis of CumSum is computed when it runs: the node is kept as it is")
    axis = _axis(x, axis)
    backwards, exclusive = call.attribute("reverse", 0), call.attribute("exclusive", 0)
    ordered = build.flip(x, dims=(axis,)) if backwards else x
    result = as_dtype(build, build.cumsum(ordered, dim=axis), x.dtype)
    if exclusive:  # not the sum less the entry, which may be so great that nothing is left of the others
        moved = build.pad(result, pads=tuple((int(at == axis), 0) for at in range(x.rank)), value=0)
        result = build.slice(moved, dim=axis, start=0, end=x.shape[axis])
    return build.flip(result, dims=(axis,)) if backwards else result


def _scanned() -> list[Sample]:
    return [sample(randn(2, 3, 4), dim=1), sample(randn(2, 3), dim=-1), sample(randn(4), dim=0)]


def _scan_shape(x: Value, *, dim: int) -> Any:
    return x.shape if -x.rank <= dim < x.rank else None


def _running(**fields: Any) -> Callable[[Function], Function]:
    """Register a running reduction along one axis."""

    def register(evaluate: Function) -> Function:
        name = evaluate.__name__
        aten, shape = {name: _aten_scan(name)}, _scan_shape
        register_operator(
            Operator(name=name, evaluate=evaluate, rule=_scan_rule, shape=shape, aten=aten, samples=_scanned, **fields)
        )
        return evaluate

    return register


def _spell_running_sum(onnx: Any, node: Node) -> Any:
    axis = _axis(node.outputs[0], node.attributes["dim"])
    return onnx.CumSum(onnx.operand(0, node.outputs[0].dtype), onnx.constant(axis))


@_running(onnx={"CumSum": _onnx_running_sum}, symmetry=Symmetry.LINEAR, spell=_spell_running_sum)
def cumsum(x: Tensor, *, dim: int) -> Tensor:
    return torch.cumsum(x, dim)


@_running(zeroed_by=())
def cumprod(x: Tensor, *, dim: int) -> Tensor:
    return torch.cumprod(x, dim)


@_running()
def logcumsumexp(x: Tensor, *, dim: int) -> Tensor:
    return torch.logcumsumexp(x, dim)


# -- the position of an extreme ----------------------------------------------------------------------------------------


def _position_rule(call: Call) -> list[Axes]:
    axes = call.operand(0)
    chosen = range(len(axes)) if call["dim"] is None else [call.normal(call["dim"], max(len(axes), 1))]
    for position in chosen:
        if position < len(axes):
            call.role("whole", axes[position])
    if call["keepdim"]:
        return [[ONE if i in chosen else extent for i, extent in enumerate(axes)]]
    return [[extent for i, extent in enumerate(axes) if i not in chosen]]


def _position_shape(x: Value, *, dim: int | None = None, keepdim: bool = False) -> list[Size] | None:
    if dim is None or not x.rank or x.shape[dim] == 0:  # torch says what is wrong with an empty axis
        return None
    place = dim % x.rank
    return [*x.shape[:place], *([1] if keepdim else []), *x.shape[place + 1 :]]


def _aten_position(op: str) -> Adapter:
    def adapter(build: Any, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        return build(op, x, dim=None if dim is None else _axis(x, dim), keepdim=keepdim)

    return adapter


def _onnx_position(op: str) -> Adapter:
    def reader(build: Any, call: Any) -> Any:
        if call.attribute("select_last_index", 0):
            raise OperatorError(f"{call.op_type} with select_last_index differs from torch: the node is kept as it is")
        x = call.operand(0)
        return build(op, x, dim=_axis(x, call.attribute("axis", 0)), keepdim=bool(call.attribute("keepdims", 1)))

    return reader


def _spell_position(op_type: str) -> Speller:
    def spell(onnx: Any, node: Node) -> Any:
        dim, x = node.attributes["dim"], node.inputs[0]
        assert isinstance(x, Value)
        if dim is None:
            place = onnx(op_type, onnx.Reshape(onnx.operand(0), onnx.sizes([-1])), axis=0, keepdims=0)
            return onnx.unsqueeze(place, *range(x.rank)) if node.attributes["keepdim"] else place
        return onnx(op_type, onnx.operand(0), axis=_axis(x, dim), keepdims=node.attributes["keepdim"])

    return spell


def _positioned() -> list[Sample]:
    return [
        sample(randn(2, 3, 4), dim=1, keepdim=True),
        sample(randn(2, 3, 4), dim=-1),
        sample(randn(2, 3), dim=None),
        sample(randn(4), dim=0),
    ]


@operator(
    rule=_position_rule,
    aten={"argmax": _aten_position("argmax")},
    onnx={"ArgMax": _onnx_position("argmax")},
    spell=_spell_position("ArgMax"),
    shape=_position_shape,
    gives=torch.int64,
    samples=_positioned,
    scaling=Scaling(powers={"x": 0}),
)
def argmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return torch.argmax(x, dim, keepdim)


@operator(
    rule=_position_rule,
    aten={"argmin": _aten_position("argmin")},
    onnx={"ArgMin": _onnx_position("argmin")},
    spell=_spell_position("ArgMin"),
    shape=_position_shape,
    gives=torch.int64,
    samples=_positioned,
    scaling=Scaling(powers={"x": 0}),
)
def argmin(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return torch.argmin(x, dim, keepdim)


# -- an entry and its position -----------------------------------------------------------------------------------------


def _entry_rule(call: Call) -> list[Axes]:
    """Values and positions, without the axis they were found on."""
    (axes,) = _position_rule(call)
    return [list(axes), list(axes)]


def _entry(op: str) -> Adapter:
    def adapter(build: Any, x: Any, dim: int = -1, keepdim: bool = False) -> Any:
        return build(op, x, dim=_axis(x, dim), keepdim=keepdim)

    return adapter


def _kth_value(build: Any, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return build.kthvalue(x, k=k, dim=_axis(x, dim), keepdim=keepdim)


def _found() -> list[Sample]:
    return [sample(randn(2, 5, 3), dim=1), sample(randn(2, 5), dim=-1, keepdim=True)]


@operator(rule=_entry_rule, aten={"median.dim": _entry("median")}, samples=_found, scaling=Scaling(powers={"x": 1}))
def median(x: Tensor, *, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return torch.median(x, dim, keepdim)


@operator(rule=_entry_rule, aten={"mode": _entry("mode")}, samples=_found, scaling=Scaling(powers={"x": 1}))
def mode(x: Tensor, *, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return torch.mode(x, dim, keepdim)


@operator(
    rule=_entry_rule,
    aten={"kthvalue": _kth_value},
    samples=lambda: [sample(randn(2, 5, 3), k=2, dim=1), sample(randn(2, 5), k=1, keepdim=True)],
    scaling=Scaling(powers={"x": 1}),
)
def kthvalue(x: Tensor, *, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return torch.kthvalue(x, k, dim, keepdim)


def _running_extreme_rule(call: Call) -> list[Axes]:
    axes = _along(call, "scan")
    return [list(axes), list(axes)]


def _running_extreme(op: str) -> Adapter:
    return lambda build, x, dim: build(op, x, dim=_axis(x, dim))


@operator(
    rule=_running_extreme_rule,
    aten={"cummax": _running_extreme("cummax")},
    samples=_scanned,
    scaling=Scaling(powers={"x": 1}),
)
def cummax(x: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    return torch.cummax(x, dim)


@operator(
    rule=_running_extreme_rule,
    aten={"cummin": _running_extreme("cummin")},
    samples=_scanned,
    scaling=Scaling(powers={"x": 1}),
)
def cummin(x: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    return torch.cummin(x, dim)


# -- sorting -----------------------------------------------------------------------------------------------------------


def _sort_rule(call: Call) -> list[Axes]:
    axes = _along(call, "whole")
    return [list(axes) for _ in call.node.outputs]


def _sort(build: Any, x: Any, *given: Any, **named: Any) -> Any:
    """``sort(x, dim, descending)`` and ``sort.stable(x, *, stable, dim, descending)``."""
    defaults: tuple[Any, ...] = (-1, False)
    dim, descending = given + defaults[len(given) :]
    return build.sort(
        x, dim=_axis(x, named.get("dim", dim)), descending=bool(named.get("descending", descending)),
        stable=bool(named.get("stable", False)),
    )  # fmt: skip


def _argsort(build: Any, x: Any, *given: Any, **named: Any) -> Any:
    return _sort(build, x, *given, **named)[1]


def _msort(build: Any, x: Any) -> Any:
    return build.sort(x, dim=0)[0]


def _spell_sort(onnx: Any, node: Node) -> Any:
    """All entries are the largest, or smallest, so many of them; of equal ones TopK gives the first first."""
    axis = _axis(node.outputs[0], node.attributes["dim"])
    size, descending = node.outputs[0].shape[axis], node.attributes["descending"]
    return _top(onnx, size, axis, descending)


def _spell_topk(onnx: Any, node: Node) -> Any:
    given = node.attributes
    return _top(onnx, given["k"], _axis(node.outputs[0], given["dim"]), given["largest"], given["sorted"])


def _top(onnx: Any, k: Size, axis: int, largest: bool, in_order: bool = True) -> Any:
    """TopK, which tells the largest from the smallest since opset 11."""
    if onnx.opset < 10:
        raise onnx.refusal(f"the number of entries is an attribute in opset {onnx.opset}: convert it to 10 or newer")
    options = {"largest": None if largest else 0, "sorted": None if in_order else 0}
    return onnx.TopK(onnx.operand(0), onnx.sizes([k]), outputs=2, axis=axis, **options)


@operator(
    rule=_sort_rule,
    aten={"sort": _sort, "argsort": _argsort, "msort": _msort},
    spell=_spell_sort,
    spelled_for_torch=True,
    samples=lambda: [
        sample(randn(2, 5, 3), dim=1),
        sample(randn(2, 5), dim=-1, descending=True, stable=True),
        sample(randn(4), dim=0),
        sample(torch.tensor([2, 0, 2, 1, 0, 2]), dim=0, stable=True),
    ],
    zeroed_by=(),
    scaling=Scaling(powers={"x": 1}),
)
def sort(x: Tensor, *, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Tensor, Tensor]:
    return torch.sort(x, dim=dim, descending=descending, stable=stable)


def _topk_rule(call: Call) -> list[Axes]:
    axes: list[Extent] = _along(call, "whole")
    if not axes:
        return [[], []]
    taken = call.fresh(call["k"])
    call.role("whole", taken)
    axes[call.normal(call["dim"], len(axes))] = taken
    return [list(axes), list(axes)]


def _topk(build: Any, x: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return build.topk(x, k=k, dim=_axis(x, dim), largest=largest, sorted=sorted)


def _onnx_topk(build: Any, call: Any) -> Any:
    """The number of entries is an attribute up to opset 9 and an input from 10 on.

    Of equal entries ONNX gives those that stand first, and torch any: where positions are read, all are sorted.
    """
    k = call.attribute("k") if call.opset < 10 else call.number(1)
    if k is None:
        raise OperatorError("the number of entries of TopK is computed when it runs: the node is kept as it is")
    largest, ordered = bool(call.attribute("largest", 1)), bool(call.attribute("sorted", 1))
    x, axis = call.operand(0), call.attribute("axis", -1)
    if not call.wanted(1) or not x.rank:
        return _topk(build, x, k, axis, largest, ordered)
    axis = _axis(x, axis)
    ranked = build.sort(x, dim=axis, descending=largest, stable=True)
    whole = same(k, x.shape[axis])
    return ranked if whole else tuple(build.slice(part, dim=axis, start=0, end=k) for part in ranked)


@operator(
    rule=_topk_rule,
    aten={"topk": _topk},
    onnx={"TopK": _onnx_topk},
    spell=_spell_topk,
    samples=lambda: [
        sample(randn(2, 5, 3), k=2, dim=1),
        sample(randn(2, 5), k=3, dim=-1, largest=False),
        sample(randn(4), k=1, dim=0),
    ],
    zeroed_by=(),
    scaling=Scaling(powers={"x": 1}),
)
def topk(x: Tensor, *, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    return torch.topk(x, k, dim, largest, sorted)


# -- counting and placing ----------------------------------------------------------------------------------------------


def _whole_into(call: Call, size: Any) -> list[Axes]:
    for extent in call.operand(0):
        call.role("whole", extent)
    result = call.fresh(size)
    call.role("whole", result)
    return [[result]]


@operator(
    rule=lambda call: _whole_into(call, call["bins"]),
    aten={"histc": None},
    samples=lambda: [sample(randn(2, 5), bins=4, min=-2, max=2), sample(randn(7), bins=3)],
)
def histc(x: Tensor, *, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    return torch.histc(x, bins, min, max)


def _bucket_rule(call: Call) -> list[Axes]:
    for extent in call.operand(1):
        call.role("whole", extent)
    return [call.operand(0)]


@operator(
    rule=_bucket_rule,
    aten={
        "bucketize": lambda build, x, boundaries, *, out_int32=False, right=False: as_dtype(
            build, build.bucketize(x, boundaries, right=right), torch.int32 if out_int32 else None
        )
    },
    samples=lambda: [
        sample(randn(2, 5), torch.tensor([-1.0, 0.0, 1.0])),
        sample(randn(3), torch.arange(3.0), right=True),
    ],
)
def bucketize(x: Tensor, boundaries: Tensor, *, right: bool = False) -> Tensor:
    return torch.bucketize(x, boundaries, right=right)
