"""Pointwise functions of three operands: a value between bounds, and between two others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, rand, randn

from regauge.ir import scalars
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Symmetry, sample
from regauge.ir.ops import spell_arithmetic as spelling
from regauge.ir.ops.elementwise import pointwise
from regauge.ir.scales.scaling import Scaling


def _clamp(build: Any, x: Any, min: Any = None, max: Any = None) -> Any:
    if isinstance(min, Value) != isinstance(max, Value) and min is not None and max is not None:
        return build.clamp(build.clamp(x, min), None, max)  # torch takes two tensors or two numbers
    return build.clamp(x, min, max)


def _onnx_clip(build: Any, call: Any) -> Any:
    """Clip keeps its bounds in attributes up to opset 6 and in optional inputs from opset 11 on."""
    if call.opset < 11:
        low, high = call.attribute("min"), call.attribute("max")
        lowest, highest = -3.4028234663852886e38, 3.4028234663852886e38  # the defaults of opset 6: no bound at all
        return _clamp(
            build, call.operand(0), None if low in (None, lowest) else low, None if high in (None, highest) else high
        )
    bounds = [call.number(i) if call.has(i) else None for i in (1, 2)]
    low, high = (
        call.operand(i) if call.has(i) and bound is None else bound for i, bound in zip((1, 2), bounds, strict=True)
    )
    return _clamp(build, call.operand(0), low, high)


def _clamp_symmetry(node: Node) -> Symmetry:
    """Cutting off at zero commutes with positive scales, like relu."""
    bounds = node.inputs[1:]
    zero = all(bound is None or (isinstance(bound, int | float) and bound == 0) for bound in bounds)
    return Symmetry.HOMOGENEOUS if zero else Symmetry.POINTWISE


@pointwise(
    aten={
        "clamp": _clamp,
        "clip": _clamp,
        "clamp_min": lambda build, x, min: build.clamp(x, min),
        "clamp_max": lambda build, x, max: build.clamp(x, None, max),
    },
    onnx={"Clip": _onnx_clip},
    spell=spelling.clamp,
    samples=lambda: [
        sample(randn(2, 3), -0.5, 0.5),
        sample(randn(2, 3), 0),
        sample(randn(2, 3), None, 0.3),
        sample(randn(2, 3, 4), randn(3, 1) - 1, randn(4) + 2),
    ],
    symmetry=_clamp_symmetry,
    scaling=Scaling(powers={"x min max": 1}),
    element=lambda x, low=None, high=None: scalars.clamp(x, low, high),
)
def clamp(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    return x if min is None and max is None else torch.clamp(x, min, max)


@pointwise(
    aten={"lerp": None, "lerp.Scalar": lambda build, x, end, weight: build.lerp(x, end, weight)},
    samples=lambda: [sample(randn(2, 3), randn(2, 3), 0.3), sample(randn(2, 3), randn(2, 3), rand(3))],
    spell=spelling.interpolation,
    scaling=Scaling(powers={"x end": 1}),
    element=lambda x, end, weight: x + weight * (end - x),
)
def lerp(x: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(x, end, weight)
