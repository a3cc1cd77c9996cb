"""Elementary functions of one value: signs, powers, exponentials, trigonometry, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, rand, randn

from regauge.ir import scalars
from regauge.ir.operator import Adapter, Speller, Symmetry, sample
from regauge.ir.ops import spell_arithmetic as spelling
from regauge.ir.ops.elementwise import Function, pointwise, positive
from regauge.ir.scalars import Element
from regauge.ir.scales.scaling import Scaling

Draw = Callable[..., Tensor]


def elementary(
    *,
    onnx: Mapping[str, Any] | Sequence[str] = (),
    draw: Draw = randn,
    aliases: Sequence[str] = (),
    aten: Mapping[str, Adapter | None] | None = None,
    symmetry: Symmetry = Symmetry.POINTWISE,
    spell: Speller | None = None,
    scaling: Scaling | None = None,
    element: Element | None = None,
) -> Callable[[Function], Function]:
    """Register a function of one tensor; ATen calls it by the same name and by ``aliases``."""

    def register(evaluate: Function) -> Function:
        names = {name: None for name in (evaluate.__name__.rstrip("_"), *aliases)}
        return pointwise(
            aten={**names, **(aten or {})},
            onnx=onnx,
            samples=lambda: [sample(draw(2, 3, 4)), sample(draw(5)), sample(draw(1))],
            symmetry=symmetry,
            spell=spell,
            scaling=scaling,
            element=element,
        )(evaluate)

    return register


def _of(write: Callable[[Any, Any], Any]) -> Speller:
    """A spelling in terms of the only operand, as a floating-point number."""
    return lambda onnx, node: write(onnx, onnx.operand(0, onnx.common_type))


def _within_one(*shape: int) -> Tensor:
    return rand(*shape) * 1.8 - 0.9


def _above_one(*shape: int) -> Tensor:
    return rand(*shape) + 1.1


# -- signs -------------------------------------------------------------------------------------------------------------


@elementary(onnx=["Neg"], aliases=["negative"], symmetry=Symmetry.LINEAR, element=lambda x: -x)
def neg(x: Tensor) -> Tensor:
    return -x


@elementary(onnx=["Abs"], aliases=["absolute"], symmetry=Symmetry.HOMOGENEOUS, element=scalars.abs_)
def abs_(x: Tensor) -> Tensor:
    return torch.abs(x)


@elementary(onnx=["Sign"], aliases=["sgn"], symmetry=Symmetry.ODD, scaling=Scaling(powers={"x": 0}, within=(-1, 1)))
def sign(x: Tensor) -> Tensor:
    return torch.sgn(x)


# -- powers and exponentials -------------------------------------------------------------------------------------------


@elementary(onnx=["Exp"], element=scalars.exp)
def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


@elementary(spell=_of(lambda onnx, x: onnx.Pow(2.0, x)), element=scalars.exp2)
def exp2(x: Tensor) -> Tensor:
    return torch.exp2(x)


@elementary(spell=spelling.expm1, element=scalars.expm1)
def expm1(x: Tensor) -> Tensor:
    return torch.expm1(x)


@elementary(onnx=["Log"], draw=positive, element=scalars.log)
def log(x: Tensor) -> Tensor:
    return torch.log(x)


@elementary(draw=positive, spell=_of(lambda onnx, x: onnx.Div(onnx.Log(x), math.log(2))), element=scalars.log2)
def log2(x: Tensor) -> Tensor:
    return torch.log2(x)


@elementary(draw=positive, spell=_of(lambda onnx, x: onnx.Div(onnx.Log(x), math.log(10))))
def log10(x: Tensor) -> Tensor:
    return torch.log10(x)


@elementary(draw=positive, spell=spelling.log1p, element=scalars.log1p)
def log1p(x: Tensor) -> Tensor:
    return torch.log1p(x)


@elementary(onnx=["Sqrt"], draw=positive, scaling=Scaling(powers={"x": 0.5}), element=scalars.sqrt)
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@elementary(
    draw=positive,
    spell=_of(lambda onnx, x: onnx.Reciprocal(onnx.Sqrt(x))),
    scaling=Scaling(powers={"x": -0.5}),
    element=scalars.rsqrt,
)
def rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x)


@elementary(onnx=["Reciprocal"], draw=positive, scaling=Scaling(powers={"x": -1}), element=lambda x: 1.0 / x)
def reciprocal(x: Tensor) -> Tensor:
    return torch.reciprocal(x)


@elementary(
    onnx=["Erf"], aliases=["special_erf"], symmetry=Symmetry.ODD, scaling=Scaling(within=(-1, 1)), element=scalars.erf
)
def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


@elementary(aliases=["special_erfc"], scaling=Scaling(within=(0, 2)))
def erfc(x: Tensor) -> Tensor:
    return torch.erfc(x)


@elementary(draw=_within_one, aliases=["special_erfinv"], symmetry=Symmetry.ODD)
def erfinv(x: Tensor) -> Tensor:
    return torch.erfinv(x)


# -- trigonometry ------------------------------------------------------------------------------------------------------


@elementary(onnx=["Sin"], symmetry=Symmetry.ODD, scaling=Scaling(within=(-1, 1)), element=scalars.sin)
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@elementary(onnx=["Cos"], scaling=Scaling(within=(-1, 1)), element=scalars.cos)
def cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@elementary(onnx=["Tan"], symmetry=Symmetry.ODD)
def tan(x: Tensor) -> Tensor:
    return torch.tan(x)


@elementary(onnx=["Asin"], draw=_within_one, aliases=["arcsin"], symmetry=Symmetry.ODD)
def asin(x: Tensor) -> Tensor:
    return torch.asin(x)


@elementary(onnx=["Acos"], draw=_within_one, aliases=["arccos"])
def acos(x: Tensor) -> Tensor:
    return torch.acos(x)


@elementary(onnx=["Atan"], aliases=["arctan"], symmetry=Symmetry.ODD)
def atan(x: Tensor) -> Tensor:
    return torch.atan(x)


@elementary(onnx=["Sinh"], symmetry=Symmetry.ODD)
def sinh(x: Tensor) -> Tensor:
    return torch.sinh(x)


@elementary(onnx=["Cosh"])
def cosh(x: Tensor) -> Tensor:
    return torch.cosh(x)


@elementary(onnx=["Asinh"], aliases=["arcsinh"], symmetry=Symmetry.ODD)
def asinh(x: Tensor) -> Tensor:
    return torch.asinh(x)


@elementary(onnx=["Acosh"], draw=_above_one, aliases=["arccosh"])
def acosh(x: Tensor) -> Tensor:
    return torch.acosh(x)


@elementary(onnx=["Atanh"], draw=_within_one, aliases=["arctanh"], symmetry=Symmetry.ODD)
def atanh(x: Tensor) -> Tensor:
    return torch.atanh(x)


# -- rounding ----------------------------------------------------------------------------------------------------------


@elementary(onnx=["Floor"], element=scalars.floor)
def floor(x: Tensor) -> Tensor:
    return torch.floor(x)


@elementary(onnx=["Ceil"], element=scalars.ceil)
def ceil(x: Tensor) -> Tensor:
    return torch.ceil(x)


@elementary(aliases=["fix"], symmetry=Symmetry.ODD, spell=_of(spelling.truncated))
def trunc(x: Tensor) -> Tensor:
    return torch.trunc(x)


@elementary(symmetry=Symmetry.ODD, spell=_of(lambda onnx, x: onnx.Sub(x, spelling.truncated(onnx, x))))
def frac(x: Tensor) -> Tensor:
    return torch.frac(x)


@pointwise(
    aten=["round"],
    onnx=["Round"],
    samples=lambda: [sample(randn(2, 3)), sample(randn(2, 3), decimals=1)],
    symmetry=Symmetry.ODD,
)
def round_(x: Tensor, *, decimals: int = 0) -> Tensor:
    return torch.round(x, decimals=decimals)


@pointwise(
    aten=["nan_to_num"],
    samples=lambda: [sample(randn(2, 3) / 0), sample(randn(3).log(), nan=1.0, posinf=2.0, neginf=3.0)],
)
def nan_to_num(
    x: Tensor, *, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Tensor:
    return torch.nan_to_num(x, nan, posinf, neginf)
