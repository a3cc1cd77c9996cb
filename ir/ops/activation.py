"""Activations: pointwise functions that sit between layers, and the gated and parametric ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Call
from regauge.ir.dims.extents import size_of
from regauge.ir.errors import AxisError, OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import Adapter, OnnxForm, Speller, Symmetry, operator, sample
from regauge.ir.ops import spell_activation as spelling
from regauge.ir.ops.elementwise import Function, pointwise
from regauge.ir.scalars import Element
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import divide, same


def activation(
    layer: str | Callable[[Node], str],
    *variants: Mapping[str, Any],
    onnx: Mapping[str, Adapter | OnnxForm | None] | Sequence[str] = (),
    aten: Mapping[str, Adapter | None] | None = None,
    symmetry: Symmetry | Callable[[Node], Symmetry] = Symmetry.POINTWISE,
    spell: Speller | None = None,
    scaling: Scaling | Callable[[Node], Scaling] | None = None,
    element: Element | None = None,
) -> Callable[[Function], Function]:
    """Register an activation; ``layer`` is its module in ``torch.nn`` with attributes in braces, ``variants`` are
    the attributes of its samples."""

    def text(node: Node) -> str:
        if not isinstance(layer, str):
            return layer(node)
        return "nn." + layer.format(**{k: repr(v) for k, v in node.attributes.items()})

    def register(evaluate: Function) -> Function:
        return pointwise(
            aten={evaluate.__name__: None, **(aten or {})},
            onnx=onnx,
            samples=lambda: [sample(randn(2, 3, 4) * 2, **attributes) for attributes in variants or ({},)],
            symmetry=symmetry,
            layer=text,
            spell=spell,
            scaling=scaling,
            element=element,
        )(evaluate)

    return register


def _renamed(op: str, **names: tuple[str, float]) -> Adapter:
    """The reader of an ONNX activation: each attribute is an ONNX attribute under another name, with its default."""

    def reader(build: Any, call: Any) -> Any:
        return build(op, call.operand(0), **{k: call.attribute(n, default) for k, (n, default) in names.items()})

    return reader


def _with(op_type: str, **names: str) -> Speller:
    """The spelling as one ONNX activation: its attributes, each with the record's name for it."""
    return lambda onnx, node: onnx(op_type, onnx.operand(0), **{k: node.attributes[n] for k, n in names.items()})


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


# -- rectifiers --------------------------------------------------------------------------------------------------------


@activation("ReLU()", onnx=["Relu"], symmetry=Symmetry.HOMOGENEOUS, element=scalars.relu)
def relu(x: Tensor) -> Tensor:
    return F.relu(x)


@activation(
    "LeakyReLU({negative_slope})",
    {},
    {"negative_slope": 0.2},
    onnx={"LeakyRelu": _renamed("leaky_relu", negative_slope=("alpha", 0.01))},
    aten={
        # In evaluation the random slope is its mean.
        "rrelu": lambda build, x, lower=1 / 8, upper=1 / 3, training=False, generator=None: _still(
            build, x, lower, upper, training
        )
    },
    symmetry=Symmetry.HOMOGENEOUS,
    spell=_with("LeakyRelu", alpha="negative_slope"),
    element=lambda x, negative_slope: scalars.where(x > 0, x, x * negative_slope),
)
def leaky_relu(x: Tensor, *, negative_slope: float = 0.01) -> Tensor:
    return F.leaky_relu(x, negative_slope)


def _still(build: Any, x: Any, lower: float, upper: float, training: bool) -> Any:
    if training:
        raise OperatorError("rrelu draws a random slope in training: capture the model in evaluation mode")
    return build.leaky_relu(x, negative_slope=(lower + upper) / 2)


def _prelu_rule(call: Call) -> str:
    """One slope for all, or one for each index of axis 1 (of no axis where x has fewer than two)."""
    return "s..., 1 -> s..." if same(size_of(call.operand(1)[0]), 1) else "n c s..., c -> n c s..."


def _slope_symmetry(node: Node) -> Symmetry:
    """Slopes that are weights stay while x is scaled; computed ones, one per index, would be scaled too."""
    slope = node.inputs[1]
    kept = isinstance(slope, Parameter) or (isinstance(slope, Value) and same(slope.shape[0], 1))
    return Symmetry.HOMOGENEOUS if kept else Symmetry.POINTWISE


def _onnx_prelu(build: Any, call: Any) -> Any:
    """The slope of ONNX is broadcast to x; where only axis 1 of it has a size it is one slope per channel."""
    x, slope = call.operand(0), call.operand(1)
    aligned = (1,) * (x.rank - slope.rank) + tuple(slope.shape)
    singles = [axis for axis in range(slope.rank) if same(slope.shape[axis], 1)]
    if slope.rank and all(same(size, 1) for axis, size in enumerate(aligned) if axis != 1):
        kept = max(slope.rank - x.rank + 1, 0)  # the channels, or any axis where there is one slope for all
        dims = tuple(axis for axis in singles if axis != kept)
        return build.prelu(x, build.squeeze(slope, dims=dims) if dims else slope)
    return build.where(build.lt(x, 0), build.mul(x, slope), x)


@operator(
    rule=_prelu_rule,
    aten={"prelu": None, "_prelu_kernel": None},
    onnx={"PRelu": _onnx_prelu},
    spell=spelling.prelu,
    samples=lambda: [
        sample(randn(2, 3, 4), randn(3)),
        sample(randn(2, 3), randn(3)),
        sample(randn(2, 3, 4), randn(1)),
        sample(randn(4), randn(1)),
    ],
    symmetry=_slope_symmetry,
    zeroed_by=("x",),
    layer=lambda node: f"nn.PReLU({node.inputs[1].shape[0]})",
    scaling=Scaling(powers={"x": 1}),
    element=lambda x, weight: scalars.where(x > 0, x, x * weight),
)
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


@activation(
    "Threshold({threshold}, {value})",
    {"threshold": 0.1, "value": 0.2},
    spell=spelling.threshold,
    element=lambda x, threshold, value: scalars.where(x <= threshold, value, x),
)
def threshold(x: Tensor, *, threshold: float, value: float) -> Tensor:
    return F.threshold(x, threshold, value)


# -- exponential families ----------------------------------------------------------------------------------------------


def _elu(build: Any, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if input_scale != 1:
        raise OperatorError("elu with an input scale is no elu: the node is kept as it is")
    result = build.elu(x, alpha=alpha)
    return result if scale == 1 else build.mul(result, scale)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017; fixed in torch


def _onnx_selu(build: Any, call: Any) -> Any:
    alpha, gamma = call.attribute("alpha", SELU_ALPHA), call.attribute("gamma", SELU_SCALE)
    if _close(alpha, SELU_ALPHA) and _close(gamma, SELU_SCALE):
        return build.selu(call.operand(0))
    return build.mul(build.elu(call.operand(0), alpha=alpha), gamma)


@activation(
    "ELU({alpha})",
    {},
    {"alpha": 0.5},
    aten={"elu": _elu},
    onnx={"Elu": _renamed("elu", alpha=("alpha", 1.0))},
    spell=_with("Elu", alpha="alpha"),
    element=lambda x, alpha: scalars.where(x > 0, x, alpha * scalars.expm1(x)),
)
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@activation(
    "SELU()",
    onnx={"Selu": _onnx_selu},
    spell=_with("Selu"),
    element=lambda x: SELU_SCALE * scalars.where(x > 0, x, SELU_ALPHA * scalars.expm1(x)),
)
def selu(x: Tensor) -> Tensor:
    return F.selu(x)


@activation(
    "CELU({alpha})",
    {},
    {"alpha": 0.5},
    onnx={"Celu": _renamed("celu", alpha=("alpha", 1.0))},
    spell=_with("Celu", alpha="alpha"),
    element=lambda x, alpha: scalars.where(x > 0, x, alpha * scalars.expm1(x / alpha)),
)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@activation(
    "Softplus({beta}, {threshold})",
    {},
    {"beta": 2.0, "threshold": 1.0},
    onnx=["Softplus"],
    spell=spelling.softplus,
    element=lambda x, beta, threshold: scalars.where(x * beta > threshold, x, scalars.softplus(x * beta) / beta),
)
def softplus(x: Tensor, *, beta: float = 1, threshold: float = 20) -> Tensor:
    return F.softplus(x, beta, threshold)


@activation("Mish()", onnx=["Mish"], spell=spelling.mish, element=lambda x: x * scalars.tanh(scalars.softplus(x)))
def mish(x: Tensor) -> Tensor:
    return F.mish(x)


@activation(
    "LogSigmoid()",
    aten={
        # The second result is a buffer for the backward pass.
        "log_sigmoid_forward": lambda build, x: (build.log_sigmoid(x), None),
    },
    spell=spelling.log_sigmoid,
    element=lambda x: -scalars.softplus(-x),
)
def log_sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x)


# -- gates -------------------------------------------------------------------------------------------------------------


def _contrib_gelu(build: Any, call: Any) -> Any:
    """FastGelu and BiasGelu of onnxruntime add a bias first."""
    x = build.add(call.operand(0), call.operand(1)) if call.has(1) else call.operand(0)
    return build.gelu(x, approximate="tanh" if call.op_type == "FastGelu" else "none")


def _quick_gelu(build: Any, call: Any) -> Any:
    x, alpha = call.operand(0), call.attribute("alpha", 1.702)
    return build.mul(x, build.sigmoid(build.mul(x, alpha)))


def _swish(build: Any, call: Any) -> Any:
    x, alpha = call.operand(0), call.attribute("alpha", 1.0)
    return build.silu(x) if alpha == 1 else build.mul(x, build.sigmoid(build.mul(x, alpha)))


@activation(
    "GELU(approximate={approximate})",
    {},
    {"approximate": "tanh"},
    onnx={
        "Gelu": None,
        "com.microsoft::Gelu": _contrib_gelu,
        "com.microsoft::FastGelu": _contrib_gelu,
        "com.microsoft::BiasGelu": _contrib_gelu,
        "com.microsoft::QuickGelu": _quick_gelu,
    },
    spell=spelling.gelu,
    element=scalars.gelu,
)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@activation("SiLU()", onnx={"Swish": _swish}, spell=spelling.silu, element=lambda x: x * scalars.sigmoid(x))
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@activation(
    "Sigmoid()", onnx=["Sigmoid"], aten={"special_expit": None}, scaling=Scaling(within=(0, 1)), element=scalars.sigmoid
)
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@activation("Tanh()", onnx=["Tanh"], symmetry=Symmetry.ODD, scaling=Scaling(within=(-1, 1)), element=scalars.tanh)
def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@activation(
    "Hardswish()",
    onnx=["HardSwish"],
    spell=spelling.hard_swish,
    element=lambda x: x * scalars.clamp(x + 3.0, 0.0, 6.0, ties=1) / 6.0,
)
def hardswish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def _onnx_hard_sigmoid(build: Any, call: Any) -> Any:
    """torch has the slope 1/6 and the offset 1/2 only; ONNX defaults to a slope of 0.2."""
    x, alpha, beta = call.operand(0), call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if _close(alpha, 1 / 6) and _close(beta, 0.5):
        return build.hardsigmoid(x)
    return build.clamp(build.add(build.mul(x, alpha), beta), 0.0, 1.0)


@activation(
    "Hardsigmoid()",
    onnx={"HardSigmoid": _onnx_hard_sigmoid},
    spell=spelling.hard_sigmoid,
    scaling=Scaling(within=(0, 1)),
    element=lambda x: scalars.clamp(x + 3.0, 0.0, 6.0, ties=1) / 6.0,
)
def hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


def _clip_layer(node: Node) -> str:
    bounds = node.attributes["min_val"], node.attributes["max_val"]
    return "nn.ReLU6()" if bounds == (0, 6) else f"nn.Hardtanh{bounds}"


def _clip_symmetry(node: Node) -> Symmetry:
    low, high = node.attributes["min_val"], node.attributes["max_val"]
    return Symmetry.ODD if low == -high else Symmetry.POINTWISE


@activation(
    _clip_layer,
    {},
    {"min_val": 0.0, "max_val": 6.0},
    aten={"relu6": lambda build, x: build.hardtanh(x, min_val=0.0, max_val=6.0)},
    symmetry=_clip_symmetry,
    spell=spelling.hard_tanh,
    scaling=lambda node: Scaling(within=(node.attributes["min_val"], node.attributes["max_val"])),
    element=lambda x, min_val, max_val: scalars.clamp(x, min_val, max_val, ties=1),
)
def hardtanh(x: Tensor, *, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return F.hardtanh(x, min_val, max_val)


@pointwise(  # torch computes it by other operators, so it has no name in ATen
    onnx=["Softsign"],
    samples=lambda: [sample(randn(2, 3, 4) * 2)],
    symmetry=Symmetry.ODD,
    layer=lambda node: "nn.Softsign()",
    scaling=Scaling(within=(-1, 1)),
    element=lambda x: x / (1.0 + scalars.abs_(x)),
)
def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


# -- shrinkage ---------------------------------------------------------------------------------------------------------


def _onnx_shrink(build: Any, call: Any) -> Any:
    """Shrink is torch's hard form without a bias and its soft form where the bias is the bound."""
    x, bound, bias = call.operand(0), call.attribute("lambd", 0.5), call.attribute("bias", 0.0)
    if bias == 0:
        return build.hardshrink(x, lambd=bound)
    if bias == bound:
        return build.softshrink(x, lambd=bound)
    below = build.where(build.lt(x, -bound), build.add(x, bias), 0.0)
    return build.where(build.gt(x, bound), build.sub(x, bias), below)


@activation(
    "Hardshrink({lambd})",
    {},
    {"lambd": 1.0},
    onnx={"Shrink": _onnx_shrink},
    symmetry=Symmetry.ODD,
    spell=_with("Shrink", lambd="lambd"),
    element=lambda x, lambd: scalars.where(scalars.abs_(x) <= lambd, 0.0, x),
)
def hardshrink(x: Tensor, *, lambd: float = 0.5) -> Tensor:
    return F.hardshrink(x, lambd)


@activation(
    "Softshrink({lambd})",
    {},
    {"lambd": 1.0},
    symmetry=Symmetry.ODD,
    spell=_with("Shrink", lambd="lambd", bias="lambd"),
    element=lambda x, lambd: x - scalars.clamp(x, -lambd, lambd),
)
def softshrink(x: Tensor, *, lambd: float = 0.5) -> Tensor:
    return F.softshrink(x, lambd)


# -- gated linear unit -------------------------------------------------------------------------------------------------


def _glu_rule(call: Call) -> list[list[Any]]:
    """The axis is twice the same Dim, end to end: values first, then their gates."""
    rank = call.rank(0)
    axis = call.normal(call["dim"], rank)
    half = divide(size_of(call.operand(0)[axis]), 2)
    if half is None:
        raise AxisError(f"{call.where}: axis {axis} cannot be halved: its size is {size_of(call.operand(0)[axis])}")
    names = [f"a{i}" for i in range(rank)]
    before = " ".join("(h + h)" if i == axis else name for i, name in enumerate(names))
    after = " ".join("h" if i == axis else name for i, name in enumerate(names))
    return call.apply(f"{before} -> {after}", h=half)


@operator(
    rule=_glu_rule,
    aten={"glu": lambda build, x, dim=-1: build.glu(x, dim=dim)},
    samples=lambda: [sample(randn(2, 6, 3), dim=1), sample(randn(2, 8), dim=-1), sample(randn(4, 3), dim=0)],
    layer=lambda node: f"nn.GLU({node.attributes['dim']})",
    zeroed_by=(),
    spell=spelling.glu,
)
def glu(x: Tensor, *, dim: int = -1) -> Tensor:
    return F.glu(x, dim)
