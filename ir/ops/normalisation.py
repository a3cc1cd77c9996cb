"""Normalisation: layer, RMS, group, instance and local response norms, and weight normalisation.

What a norm averages over has the role ``normalise``: it may be cut, and the norm is then one of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import operator, sample
from regauge.ir.ops import spell_normalisation as spelling
from regauge.ir.ops.layout import axis_number
from regauge.ir.ops.onnx_normalisation import GROUP_NORM_FORMS, LAYER_NORM_FORMS, RMS_NORM_FORMS
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import Size, product
from regauge.ir.training_notes import TRACKED

# -- what norms share --------------------------------------------------------------------------------------------------


def given(node: Node, count: int) -> list[Any]:
    """Operands 1 to ``count - 1``, None where one is absent."""
    return [node.inputs[i] if i < len(node.inputs) else None for i in range(1, count)]


def norm_shape(x: Value, parts: Sequence[Value | None], elements: Size) -> Any:
    """The shape of what is normalised over so many elements, of which torch wants more than one."""
    fixed = all(isinstance(size, int) for size in x.shape)
    fits = fixed and elements > 1 and all(part is None or part.shape == x.shape[1:2] for part in parts)
    return x.shape if fits else None


def _group_norm_shape(x: Value, *parts: Value | None, num_groups: int, **_: Any) -> Any:
    if x.rank < 2 or not isinstance(x.shape[1], int) or x.shape[1] % num_groups:
        return None
    return norm_shape(x, parts, product((x.shape[0], x.shape[1] // num_groups, *x.shape[2:])))


def _instance_norm_shape(x: Value, *parts: Value | None, **_: Any) -> Any:
    return norm_shape(x, parts, product(x.shape[2:]))


# -- layer and RMS norm ------------------------------------------------------------------------------------------------


def _saving(operation: Any, count: int) -> Any:
    """The adapter of a form that also returns ``count`` results for the backward pass."""
    return lambda build, *arguments: (operation(build, *arguments), *(None,) * count)


def _layer_norm(
    build: Any,
    x: Any,
    normalized_shape: Sequence[Size],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    return build.layer_norm(x, weight, bias, normalized_shape=normalized_shape, eps=eps)


def _rms_norm(
    build: Any, x: Any, normalized_shape: Sequence[Size], weight: Any = None, eps: float | None = None
) -> Any:
    return build.rms_norm(x, weight, normalized_shape=normalized_shape, eps=eps)


def _layer_norm_layer(node: Node) -> str | None:
    weight, bias = given(node, 3)
    shape = node.attributes["normalized_shape"]
    if not all(isinstance(size, int) for size in shape) or (weight is None and bias is not None):
        return None
    options = ", elementwise_affine=False" if weight is None else ", bias=False" if bias is None else ""
    return f"nn.LayerNorm({_one_or_many(shape)}, eps={node.attributes['eps']}{options})"


def _rms_norm_layer(node: Node) -> str | None:
    shape = node.attributes["normalized_shape"]
    if not all(isinstance(size, int) for size in shape):
        return None
    options = ", elementwise_affine=False" if given(node, 2) == [None] else ""
    return f"nn.RMSNorm({_one_or_many(shape)}, eps={node.attributes['eps']}{options})"


def _one_or_many(shape: Sequence[Size]) -> Any:
    return shape[0] if len(shape) == 1 else tuple(shape)


def _layer_norm_shape(x: Value, *parts: Value | None, normalized_shape: Sequence[Size], **_: Any) -> Any:
    own = tuple(normalized_shape)
    fits = own and x.shape[-len(own) :] == own and all(part is None or part.shape == own for part in parts)
    return x.shape if fits else None


@operator(
    rule="... c..., c...?, c...? -> ... c... ; normalise c ; normalized_shape = c",
    shape=_layer_norm_shape,
    aten={"layer_norm": _layer_norm, "native_layer_norm": _saving(_layer_norm, 2)},
    onnx=LAYER_NORM_FORMS,
    samples=lambda: [
        sample(randn(2, 3, 4), randn(4), randn(4), normalized_shape=(4,)),
        sample(randn(2, 3, 4), randn(3, 4), None, normalized_shape=(3, 4), eps=1e-3),
        sample(randn(2, 5), normalized_shape=(5,)),
        sample(randn(5), None, randn(5), normalized_shape=(5,)),
    ],
    layer=_layer_norm_layer,
    spell=spelling.layer_norm,
    zeroed_by=("weight",),
    scaling=Scaling(powers={"weight": 1}),
    element=lambda x, weight=None, bias=None, *, eps, **_: scalars.normalised(x, weight, bias, eps),
)
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalized_shape: tuple[int, ...],
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def _rms_norm_element(x: Scalar, weight: Scalar | None = None, *, eps: float | None, **_: Any) -> Scalar:
    small = scalars.epsilon() if eps is None else eps
    return scalars.affine(x * scalars.rsqrt(scalars.mean(x * x) + small), weight, None)


@operator(
    rule="... c..., c...? -> ... c... ; normalise c ; normalized_shape = c",
    shape=_layer_norm_shape,
    aten={"rms_norm": _rms_norm, "_fused_rms_norm": _saving(_rms_norm, 1)},
    onnx=RMS_NORM_FORMS,
    samples=lambda: [
        sample(randn(2, 3, 4), randn(4), normalized_shape=(4,), eps=1e-6),
        sample(randn(2, 3, 4), normalized_shape=(3, 4)),
    ],
    layer=_rms_norm_layer,
    spell=spelling.rms_norm,
    zeroed_by=("weight",),
    scaling=Scaling(powers={"weight": 1}),
    element=_rms_norm_element,
)
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, normalized_shape: tuple[int, ...], eps: float | None = None
) -> Tensor:
    return F.rms_norm(x, normalized_shape, weight, eps)


# -- group and instance norm -------------------------------------------------------------------------------------------


def _group_norm(
    build: Any, x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return build.group_norm(x, weight, bias, num_groups=num_groups, eps=eps)


def _native_group_norm(build: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    num_groups, eps = rest[-2:]  # the sizes N, C and HxW before them are those of x
    return build.group_norm(x, weight, bias, num_groups=num_groups, eps=eps), None, None


def _group_norm_layer(node: Node) -> str | None:
    weight, bias = given(node, 3)
    channels, groups = getattr(node.inputs[0], "shape", (0, None))[1], node.attributes["num_groups"]
    if (weight is None) != (bias is None) or not isinstance(channels, int):
        return None
    return f"nn.GroupNorm({groups}, {channels}, eps={node.attributes['eps']}, affine={weight is not None})"


@operator(
    rule="n (g c) s..., (g c)?, (g c)? -> n (g c) s... ; normalise c s ; num_groups = g",
    shape=_group_norm_shape,
    aten={"group_norm": _group_norm, "native_group_norm": _native_group_norm},
    onnx=GROUP_NORM_FORMS,
    samples=lambda: [
        sample(randn(2, 6, 4), randn(6), randn(6), num_groups=2),
        sample(randn(2, 6), None, None, num_groups=3),
        sample(randn(2, 4, 3, 3), randn(4), None, num_groups=1),
        sample(randn(2, 4, 3), randn(4), randn(4), num_groups=4, eps=1e-3),
    ],
    layer=_group_norm_layer,
    spell=spelling.group_norm,
    zeroed_by=("weight",),
    scaling=Scaling(powers={"weight": 1}),
    element=lambda x, weight=None, bias=None, *, eps, **_: scalars.normalised(x, weight, bias, eps),
)
def group_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, num_groups: int, eps: float = 1e-5
) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, eps)


def _instance_norm(
    build: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, *rest: Any
) -> Any:
    """With running statistics in use it is a batch norm in evaluation."""
    momentum, eps = rest[:2]
    if not use_input_stats and mean is not None:
        return build.batch_norm(x, weight, bias, mean, var, training=False, momentum=momentum, eps=eps)
    return build.instance_norm(x, weight, bias, eps=eps)


def instance_norm_layer(node: Node) -> str | None:
    weight, bias = given(node, 3)
    x = node.inputs[0]
    if not isinstance(x, Value) or not 3 <= x.rank <= 5 or not isinstance(x.shape[1], int):
        return None
    if (weight is None) != (bias is None):
        return None
    options = ", affine=True" if weight is not None else ""
    if TRACKED in node.metadata:
        options += f", momentum={node.metadata[TRACKED]}, track_running_stats=True"
    return f"nn.InstanceNorm{x.rank - 2}d({x.shape[1]}, eps={node.attributes['eps']}{options})"


@operator(
    rule="n c s..., c?, c? -> n c s... ; normalise s",
    shape=_instance_norm_shape,
    aten={"instance_norm": _instance_norm},
    onnx={
        "InstanceNormalization": lambda build, call: build.instance_norm(
            *(call.operand(i) for i in range(3)), eps=call.attribute("epsilon", 1e-5)
        )
    },
    samples=lambda: [sample(randn(2, 3, 5), randn(3), randn(3)), sample(randn(2, 3, 4, 4), eps=1e-3)],
    layer=instance_norm_layer,
    spell=spelling.instance_norm,
    zeroed_by=("weight",),
    scaling=Scaling(powers={"weight": 1}),
    element=lambda x, weight=None, bias=None, *, eps: scalars.normalised(x, weight, bias, eps),
)
def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, True, 0.1, eps)


# -- local response and weight norm ------------------------------------------------------------------------------------


def _local_response(build: Any, call: Any) -> Any:
    size = call.attribute("size")
    if size % 2 == 0:
        raise OperatorError(f"LRN over {size} channels is centred unlike torch's: the node is kept as it is")
    named = {"alpha": ("alpha", 1e-4), "beta": ("beta", 0.75), "k": ("bias", 1.0)}
    attributes = {ours: call.attribute(theirs, default) for ours, (theirs, default) in named.items()}
    return build.local_response_norm(call.operand(0), size=size, **attributes)


@operator(
    rule="n c s... -> n c s... ; window c",
    onnx={"LRN": _local_response},
    samples=lambda: [sample(randn(2, 5, 3), size=3), sample(randn(2, 4, 3, 3), size=2, alpha=0.1, k=2.0)],
    spell=spelling.local_response_norm,
    layer=lambda node: "nn.LocalResponseNorm({size}, alpha={alpha}, beta={beta}, k={k})".format(**node.attributes),
    zeroed_by=(),
)
def local_response_norm(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _weight_norm_rule(call: Call) -> list[Axes]:
    """``v`` is scaled to the lengths ``g``, one per index of axis ``dim``; -1 means one length for all of ``v``."""
    v, g = call.operand(0), call.operand(1)
    kept = None if call["dim"] == -1 else call.normal(call["dim"], len(v))
    for axis, extent in enumerate(v):
        if axis == kept:
            call.unify(extent, g[axis])
            call.role("map", extent)
        else:
            call.role("normalise", extent)
    return [v]


def _weight_norm(build: Any, v: Any, g: Any, dim: int = 0) -> Any:
    return build.weight_norm(v, g, dim=-1 if dim == -1 else axis_number(dim, v.rank))


@operator(
    rule=_weight_norm_rule,
    aten={"_weight_norm": _weight_norm, "_weight_norm_interface": _saving(_weight_norm, 1)},
    samples=lambda: [
        sample(randn(4, 3), randn(4, 1), dim=0),
        sample(randn(4, 3, 2), randn(1, 3, 1), dim=1),
        sample(randn(4, 3), randn(()), dim=-1),
    ],
    zeroed_by=("g",),
    spell=spelling.weight_norm,
)
def weight_norm(v: Tensor, g: Tensor, *, dim: int = 0) -> Tensor:
    return torch._weight_norm(v, g, dim)
