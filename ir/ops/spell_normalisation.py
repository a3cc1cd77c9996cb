"""How new nodes of norms are spelled in ONNX: as the operator of the opset where there is one, else composed."""

from __future__ import annotations

from typing import Any

import torch

from regauge.ir.dtypes import epsilon_of
from regauge.ir.graph import Node, Value
from regauge.ir.sizes.expressions import Size

LAYER_NORM_OPSET, GROUP_NORM_OPSET, RMS_NORM_OPSET = 17, 21, 23  # GroupNormalization-18 has gains per group


def _filled(onnx: Any, number: float, shape: tuple[Size, ...]) -> Any:
    """A constant that stands for a gain or a shift that is not given."""
    if not all(isinstance(size, int) for size in shape):
        raise onnx.refusal(f"a norm without gains over the dynamic sizes {shape}")
    return onnx.constant(torch.full([int(size) for size in shape], number), onnx.dtype)


def _tensor(node: Node) -> Value:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return x


def batch_norm(onnx: Any, node: Node) -> Any:
    x, weight, bias, mean, var = onnx.operands(5)
    if node.attributes["training"] or mean is None or var is None:
        raise onnx.refusal("a batch norm over the statistics of the batch has no operator there that agrees with it")
    channels = _tensor(node).shape[1:2]
    weight = _filled(onnx, 1, channels) if weight is None else weight
    bias = _filled(onnx, 0, channels) if bias is None else bias
    return onnx.BatchNormalization(x, weight, bias, mean, var, epsilon=node.attributes["eps"])


def _last_axes(node: Node) -> tuple[int, ...]:
    rank = _tensor(node).rank
    return tuple(range(rank - len(node.attributes["normalized_shape"]), rank))


def layer_norm(onnx: Any, node: Node) -> Any:
    x, weight, bias = onnx.operands(3)
    axes, eps = _last_axes(node), node.attributes["eps"]
    if onnx.opset >= LAYER_NORM_OPSET:
        weight = _filled(onnx, 1, node.attributes["normalized_shape"]) if weight is None else weight
        return onnx.LayerNormalization(x, weight, bias, axis=axes[0], epsilon=eps)
    centred = onnx.Sub(x, _mean(onnx, x, axes))
    return _affine(onnx, _scaled(onnx, centred, axes, eps), weight, bias)


def rms_norm(onnx: Any, node: Node) -> Any:
    x, weight = onnx.operands(2)
    axes, eps = _last_axes(node), node.attributes["eps"]
    eps = epsilon_of(onnx.dtype) if eps is None else eps
    if onnx.opset >= RMS_NORM_OPSET:
        weight = _filled(onnx, 1, node.attributes["normalized_shape"]) if weight is None else weight
        return onnx.RMSNormalization(x, weight, axis=axes[0], epsilon=eps)
    return _affine(onnx, _scaled(onnx, x, axes, eps), weight, None)


def _mean(onnx: Any, x: Any, axes: tuple[int, ...]) -> Any:
    return onnx.on_axes("ReduceMean", x, axes, since=18, keepdims=1)


def _scaled(onnx: Any, x: Any, axes: tuple[int, ...], eps: float) -> Any:
    """``x`` divided by the root of its mean square."""
    return onnx.Div(x, onnx.Sqrt(onnx.Add(_mean(onnx, onnx.Mul(x, x), axes), float(eps))))


def _affine(onnx: Any, x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else onnx.Mul(x, weight)
    return x if bias is None else onnx.Add(x, bias)


def group_norm(onnx: Any, node: Node) -> Any:
    """Before opset 21 an instance norm over the groups, as axes of their own, and the gains after it."""
    value, groups, eps = _tensor(node), node.attributes["num_groups"], node.attributes["eps"]
    x, weight, bias = onnx.operands(3)
    if onnx.opset >= GROUP_NORM_OPSET and value.rank > 2:
        weight = _filled(onnx, 1, value.shape[1:2]) if weight is None else weight
        bias = _filled(onnx, 0, value.shape[1:2]) if bias is None else bias
        return onnx.GroupNormalization(x, weight, bias, num_groups=groups, epsilon=eps)
    apart = onnx.Reshape(x, onnx.sizes([0, groups, -1]))
    one, zero = _filled(onnx, 1, (groups,)), _filled(onnx, 0, (groups,))
    normalised = onnx.InstanceNormalization(apart, one, zero, epsilon=eps)
    y = onnx.Reshape(normalised, onnx.target(value.shape, value.shape[:1]))
    behind = range(1, value.rank - 1)
    weight = None if weight is None else onnx.unsqueeze(weight, *behind)
    return _affine(onnx, y, weight, None if bias is None else onnx.unsqueeze(bias, *behind))


def instance_norm(onnx: Any, node: Node) -> Any:
    x, weight, bias = onnx.operands(3)
    channels = _tensor(node).shape[1:2]
    weight = _filled(onnx, 1, channels) if weight is None else weight
    bias = _filled(onnx, 0, channels) if bias is None else bias
    return onnx.InstanceNormalization(x, weight, bias, epsilon=node.attributes["eps"])


def local_response_norm(onnx: Any, node: Node) -> Any:
    size, alpha, beta, k = (node.attributes[name] for name in ("size", "alpha", "beta", "k"))
    if size % 2 == 0:
        raise onnx.refusal(f"LRN over {size} channels is centred unlike torch's")
    missing = range(_tensor(node).rank, 4)  # runtimes take images only
    x = onnx.unsqueeze(onnx.operand(0), *missing)
    return onnx.squeeze(onnx.LRN(x, size=size, alpha=float(alpha), beta=float(beta), bias=float(k)), *missing)


def weight_norm(onnx: Any, node: Node) -> Any:
    """``v`` divided by its lengths and multiplied by the wanted ones."""
    v, g = onnx.operands(2)
    dim, rank = node.attributes["dim"], _tensor(node).rank
    axes = [axis for axis in range(rank) if dim == -1 or axis != dim % rank]
    lengths = onnx.on_axes("ReduceL2", v, axes, since=18, keepdims=1)
    return onnx.Mul(v, onnx.Div(g, lengths))
