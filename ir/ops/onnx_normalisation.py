"""How the ONNX layer, RMS and group norms, and the fused ones of onnxruntime, are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Adapter, OnnxForm
from regauge.ir.ops.layout import axis_number, holds_no_sizes
from regauge.ir.sizes.expressions import divide, same

_FLOAT = 1  # TensorProto.FLOAT


def _normalised(build: Any, op: str, x: Value, axis: int, weight: Value | None, bias: Value | None, eps: float) -> Any:
    """A norm over the axes from ``axis`` on. Gains of another shape are applied after it, as ONNX broadcasts them."""
    shape = x.shape[axis_number(axis, x.rank) :]
    if all(_has_shape(operand, shape) for operand in (weight, bias)):
        operands = (weight,) if op == "rms_norm" and bias is None else (weight, bias)
        if op == "layer_norm" or bias is None:
            return build(op, x, *operands, normalized_shape=shape, eps=eps)
    y = build(op, x, normalized_shape=shape, eps=eps)
    y = y if weight is None else build.mul(y, weight)
    return y if bias is None else build.add(y, bias)


def _has_shape(operand: Value | None, shape: Sequence[Any]) -> bool:
    if operand is None:
        return True
    return operand.rank == len(shape) and all(same(a, b) for a, b in zip(operand.shape, shape, strict=True))


def _statistics(build: Any, call: Any, x: Value, axis: int, eps: float) -> tuple[Any, Any]:
    """The mean and the inverse deviation that LayerNormalization may also return."""
    dims = tuple(range(axis_number(axis, x.rank), x.rank))
    mean = build.mean(x, dims=dims, keepdim=True) if call.wanted(1) else None
    if not call.wanted(2):
        return mean, None
    return mean, build.rsqrt(build.add(build.var(x, dims=dims, correction=0, keepdim=True), eps))


def _operand(call: Any, index: int) -> Value | None:
    return call.operand(index) if call.has(index) else None


def _layer_norm(build: Any, call: Any) -> Any:
    _check_statistics(call)
    x, axis, eps = call.operand(0), call.attribute("axis", -1), call.attribute("epsilon", 1e-5)
    y = _normalised(build, "layer_norm", x, axis, call.operand(1), _operand(call, 2), eps)
    return (y, *_statistics(build, call, x, axis, eps)) if call.outputs > 1 else y


def _rms_norm(build: Any, call: Any) -> Any:
    """RMSNormalization of opset 23, and SimplifiedLayerNormalization, its older name in onnxruntime."""
    _check_statistics(call)
    x, axis, eps = call.operand(0), call.attribute("axis", -1), call.attribute("epsilon", 1e-5)
    y = _normalised(build, "rms_norm", x, axis, call.operand(1), None, eps)
    if not call.wanted(1):
        return (y, None) if call.outputs > 1 else y
    dims = tuple(range(axis_number(axis, x.rank), x.rank))
    return y, build.rsqrt(build.add(build.mean(build.mul(x, x), dims=dims, keepdim=True), eps))


def _check_statistics(call: Any) -> None:
    """Refuse norms whose means are in another type than single precision, which is the default."""
    if call.attribute("stash_type", _FLOAT) != _FLOAT:
        raise OperatorError(f"statistics of another type (stash_type={call.attribute('stash_type')}) have no rule")


def _skip_norm(op: str, *, bias_at: int) -> Adapter:
    """SkipLayerNormalization and its RMS form: the norm of a sum; the fourth result is the sum itself."""

    def reader(build: Any, call: Any) -> Any:
        total = build.add(call.operand(0), call.operand(1))
        if call.has(bias_at):
            total = build.add(total, call.operand(bias_at))
        eps = call.attribute("epsilon", 1e-12)
        beta = _operand(call, 3) if op == "layer_norm" else None
        y = _normalised(build, op, total, -1, call.operand(2), beta, eps)
        statistics = _statistics(build, call, total, -1, eps) if op == "layer_norm" else (None, None)
        return (y, *statistics, total)[: call.outputs] if call.outputs > 1 else y

    return reader


def _group_norm(build: Any, call: Any) -> Any:
    """GroupNormalization has one gain per group in opset 18 and one per channel from 21 on."""
    x, weight, bias = (call.operand(i) for i in range(3))
    groups, eps = call.attribute("num_groups"), call.attribute("epsilon", 1e-5)
    per_group = divide(x.shape[1], groups)
    if same(weight.shape[0], x.shape[1]) or per_group is None:
        return build.group_norm(x, weight, bias, num_groups=groups, eps=eps)
    weight, bias = (_spread(build, value, groups, per_group) for value in (weight, bias))
    return build.group_norm(x, weight, bias, num_groups=groups, eps=eps)


def _spread(build: Any, value: Value, groups: int, per_group: Any) -> Value:
    """One number per group as one per channel: (g) -> (g c)."""
    columns = build.expand(build.unsqueeze(value, dim=1), shape=(groups, per_group))
    return build.reshape(columns, shape=(groups * per_group,))  # type: ignore[no-any-return]


def _write_group_norm(nodes: Sequence[Node], patch: Any) -> None:
    for node in nodes:
        if node.op == "group_norm":
            patch.attribute("num_groups", node.attributes["num_groups"])


def _mean_variance(build: Any, call: Any) -> Any:
    """MeanVarianceNormalization as the ONNX specification spells it out."""
    x, axes = call.operand(0), tuple(call.attribute("axes", (0, 2, 3)))
    dims = tuple(axis_number(axis, x.rank) for axis in axes)
    centred = build.sub(x, build.mean(x, dims=dims, keepdim=True))
    spread = build.sqrt(build.mean(build.mul(centred, centred), dims=dims, keepdim=True))
    return build.div(centred, build.add(spread, 1e-9))


def _sizeless(reader: Adapter) -> OnnxForm:
    return OnnxForm(read=reader, write=holds_no_sizes)


LAYER_NORM_FORMS = {
    "LayerNormalization": _sizeless(_layer_norm),
    "com.microsoft::LayerNormalization": _sizeless(_layer_norm),
    "com.microsoft::SkipLayerNormalization": _sizeless(_skip_norm("layer_norm", bias_at=4)),
    "MeanVarianceNormalization": _sizeless(_mean_variance),
}
RMS_NORM_FORMS = {
    "RMSNormalization": _sizeless(_rms_norm),
    "SimplifiedLayerNormalization": _sizeless(_rms_norm),
    "com.microsoft::SimplifiedLayerNormalization": _sizeless(_rms_norm),
    "com.microsoft::SkipSimplifiedLayerNormalization": _sizeless(_skip_norm("rms_norm", bias_at=3)),
}
GROUP_NORM_FORMS = {"GroupNormalization": OnnxForm(read=_group_norm, write=_write_group_norm)}
