"""Batch norm, by statistics that it has stored or by those of the batch.

What it averages over has the role ``normalise``: it may be cut, and the norm is then one of what is left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, rand, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Call
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Symmetry, operator, sample
from regauge.ir.ops import spell_normalisation as spelling
from regauge.ir.ops.normalisation import given, instance_norm_layer
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.training_notes import TRACKED


def _batch_norm_rule(call: Call) -> str:
    """In training the statistics are those of the batch, and the running ones come out changed."""
    operands = "n c s..., c?, c?, c?, c?"
    if not call["training"]:
        return f"{operands} -> n c s..."
    statistics = ", c, c" if len(call.node.outputs) == 3 else ""
    return f"{operands} -> n c s...{statistics} ; normalise n s"


def _batch_norm(
    build: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """``batch_norm`` itself writes its running statistics in place, so a functional call never sees them change."""
    result = build.batch_norm(x, weight, bias, mean, var, training=training, momentum=momentum, eps=eps)
    return result[0] if isinstance(result, tuple) else result


def _batch_norm_functional(build: Any, x: Any, *arguments: Any) -> Any:
    """Results: y, saved mean and inverse deviation (for the backward pass only), new running mean and variance."""
    weight, bias, mean, var, training, momentum, eps = arguments
    result = build.batch_norm(x, weight, bias, mean, var, training=training, momentum=momentum, eps=eps)
    if isinstance(result, tuple):
        return result[0], None, None, result[1], result[2]
    return result, None, None, mean, var


def _batch_norm_with_update(build: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    y, _, _, new_mean, new_var = _batch_norm_functional(build, x, weight, bias, mean, var, True, *rest)
    return y, None, None, None, new_mean, new_var


def _batch_norm_inference(build: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    momentum, eps = rest
    y = build.batch_norm(x, weight, bias, mean, var, training=False, momentum=momentum, eps=eps)
    return y, None, None


def _batch_norm_saving(build: Any, *arguments: Any) -> Any:
    """The forms that also return what the backward pass saves."""
    return _batch_norm(build, *arguments), None, None, None


def _batch_norm_without_statistics(build: Any, x: Any, weight: Any, bias: Any, training: bool, *rest: Any) -> Any:
    return _batch_norm(build, x, weight, bias, None, None, training, *rest), None, None


def _onnx_batch_norm(build: Any, call: Any) -> Any:
    """ONNX keeps the population variance while training, torch the sample variance: only y agrees then."""
    training = bool(call.attribute("training_mode", 0)) or (call.opset < 7 and not call.attribute("is_test", 0))
    if call.attribute("spatial", 1) == 0 or (training and (call.wanted(1) or call.wanted(2))):
        raise OperatorError("this form of BatchNormalization has no counterpart in torch: the node is kept as it is")
    x, weight, bias, mean, var = (call.operand(i) for i in range(5))
    if training:
        mean = var = None
    eps, momentum = call.attribute("epsilon", 1e-5), round(1 - call.attribute("momentum", 0.9), 7)  # stored in float32
    return build.batch_norm(x, weight, bias, mean, var, training=training, momentum=momentum, eps=eps)


def _batch_norm_by_parts(
    x: Tensor, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None, *, eps: float = 1e-5, **_: Any
) -> Any:
    """``(x - mean) * weight / sqrt(var + eps) + bias`` where gradients go to statistics that the graph computes, as it
    does in layer norms of TensorFlow: torch has no such derivative of its batch norm.
    """
    if mean is None or var is None or not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _batch_norm_layer(node: Node) -> str | None:
    """BatchNorm1d takes ranks 2 and 3, BatchNorm2d rank 4, BatchNorm3d rank 5; weight and bias come together."""
    if TRACKED in node.metadata:  # this is how an instance norm evaluates
        return instance_norm_layer(node)
    x = node.inputs[0]
    if not isinstance(x, Value) or not 2 <= x.rank <= 5 or not isinstance(x.shape[1], int):
        return None
    weight, bias, mean, var = given(node, 5)
    if (weight is None) != (bias is None) or (mean is None) != (var is None):
        return None
    options = f"eps={node.attributes['eps']}, momentum={node.attributes['momentum']}"
    options += ", affine=False" if weight is None else ""
    options += ", track_running_stats=False" if mean is None else ""
    return f"nn.BatchNorm{max(x.rank - 2, 1)}d({x.shape[1]}, {options})"


def _batch_norm_shape(x: Value, *parts: Value | None, training: bool = False, **_: Any) -> Any:
    fits = x.rank > 1 and not training and all(part is None or part.shape == x.shape[1:2] for part in parts)
    return x.shape if fits else None


def _batch_norm_scaling(node: Node) -> Scaling | None:
    """Of inference, where it is a gain and a shift; ``eps`` tells the scale of a variance."""
    return None if node.attributes["training"] else Scaling(powers={"x mean": 1, "weight": 1})


def _batch_norm_element(
    x: Scalar,
    weight: Scalar | None = None,
    bias: Scalar | None = None,
    mean: Scalar | None = None,
    var: Scalar | None = None,
    *,
    training: bool,
    eps: float,
    **_: Any,
) -> Scalar | None:
    if training or mean is None or var is None:
        return None
    return scalars.affine((x - mean) * scalars.rsqrt(var + eps), weight, bias)


@operator(
    rule=_batch_norm_rule,
    shape=_batch_norm_shape,
    aten={
        "batch_norm": _batch_norm,
        "_native_batch_norm_legit_functional": _batch_norm_functional,
        "_native_batch_norm_legit_no_training": _batch_norm_inference,
        "_native_batch_norm_legit": _batch_norm_saving,
        "_native_batch_norm_legit.no_stats": _batch_norm_without_statistics,
        "_batch_norm_with_update_functional": _batch_norm_with_update,
        "_batch_norm_no_update": lambda build, x, *rest: (*_batch_norm_inference(build, x, *rest), None),
        "native_batch_norm": _batch_norm_saving,
        "cudnn_batch_norm": _batch_norm_saving,
        "miopen_batch_norm": _batch_norm_saving,
    },
    onnx={"BatchNormalization": _onnx_batch_norm},
    samples=lambda: [
        sample(randn(2, 3, 4, 4), randn(3), randn(3), randn(3), rand(3) + 0.5),
        sample(randn(2, 3), None, None, randn(3), rand(3) + 0.5, eps=1e-3),
        sample(randn(2, 3, 4), randn(3), randn(3), randn(3), rand(3) + 0.5, training=True),
        sample(randn(2, 3, 4, 4), randn(3), None, training=True),
    ],
    symmetry=lambda node: Symmetry.POINTWISE if node.attributes["training"] else Symmetry.AFFINE,
    layer=_batch_norm_layer,
    spell=spelling.batch_norm,
    zeroed_by=("weight",),
    with_gradients=_batch_norm_by_parts,
    scaling=_batch_norm_scaling,
    element=_batch_norm_element,
)
def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    momentum = 1.0 if momentum is None else momentum  # the average of all batches: of the first, so far
    if not training or mean is None:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    results = torch.ops.aten._native_batch_norm_legit_functional(x, weight, bias, mean, var, True, momentum, eps)
    return results[0], results[3], results[4]
