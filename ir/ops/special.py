"""Rarer pointwise functions, and distances between vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, rand, randn

from regauge.ir.operator import Sample, Symmetry, operator, sample
from regauge.ir.ops import spell_arithmetic as spelling
from regauge.ir.ops.elementwise import aten_binary, pointwise, positive, power_scaling
from regauge.ir.scales.scaling import Scaling


def _pairs() -> list[Sample]:
    return [sample(randn(2, 3, 4), randn(3, 1)), sample(randn(2, 1), randn(3))]


# -- functions of one value --------------------------------------------------------------------------------------------


@pointwise(
    aten=["sinc", "special_sinc"],
    samples=lambda: [sample(randn(2, 3)), sample(torch.tensor([0.0, -1e-9, 1e-4]))],
    spell=spelling.sinc,
)
def sinc(x: Tensor) -> Tensor:
    return torch.sinc(x)


@pointwise(
    aten=["logit", "special_logit"],
    samples=lambda: [sample(rand(2, 3) * 0.9 + 0.05), sample(rand(3), eps=0.1)],
    spell=spelling.logit,
)
def logit(x: Tensor, *, eps: float | None = None) -> Tensor:
    return torch.logit(x, eps)


@pointwise(
    aten=["isposinf"],
    samples=lambda: [sample(randn(2, 3) / torch.tensor([0.0, 1.0, 2.0]))],
    scaling=Scaling(powers={"x": 0}),
)
def isposinf(x: Tensor) -> Tensor:
    return torch.isposinf(x)


@pointwise(
    aten=["isneginf"],
    samples=lambda: [sample(randn(2, 3) / torch.tensor([0.0, 1.0, 2.0]))],
    scaling=Scaling(powers={"x": 0}),
)
def isneginf(x: Tensor) -> Tensor:
    return torch.isneginf(x)


@pointwise(aten=["lgamma", "special_gammaln"], samples=lambda: [sample(positive(2, 3))])
def lgamma(x: Tensor) -> Tensor:
    return torch.lgamma(x)


# -- functions of two values -------------------------------------------------------------------------------------------


@pointwise(aten=["fmax"], samples=_pairs, commutative=True, scaling=Scaling(powers={"x y": 1}))
def fmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmax(x, y)


@pointwise(aten=["fmin"], samples=_pairs, commutative=True, scaling=Scaling(powers={"x y": 1}))
def fmin(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmin(x, y)


@pointwise(
    aten=dict.fromkeys(("xlogy", "special_xlogy"), aten_binary("xlogy")),
    samples=lambda: [sample(randn(2, 3), positive(3)), sample(randn(2, 3), 2.0)],
)
def xlogy(x: Tensor, y: Tensor) -> Tensor:
    return torch.xlogy(x, y)


@pointwise(
    aten={"copysign": aten_binary("copysign")},
    samples=lambda: [*_pairs(), sample(randn(2, 3), -1.0)],
    scaling=Scaling(powers={"x": 1, "y": 0}),
)
def copysign(x: Tensor, y: Tensor) -> Tensor:
    return torch.copysign(x, y)


@pointwise(aten=["heaviside"], samples=_pairs, scaling=Scaling(powers={"x": 0}))
def heaviside(x: Tensor, y: Tensor) -> Tensor:
    return torch.heaviside(x, y)


@pointwise(
    aten={"float_power": aten_binary("float_power")},
    samples=lambda: [sample(positive(2, 3), randn(3)), sample(randn(2, 3), 2)],
    scaling=power_scaling,
)
def float_power(x: Tensor, y: Tensor) -> Tensor:
    return torch.float_power(x, y)


# -- distances ---------------------------------------------------------------------------------------------------------


def _pairwise_distance(build: Any, x: Any, y: Any, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """torch adds ``eps`` to the difference itself."""
    difference = build.add(build.sub(x, y), eps)
    return build.vector_norm(difference, ord=p, dims=(difference.rank - 1,), keepdim=keepdim)


@operator(
    rule="... p m, ... r m -> ... p r ; reduce m",
    aten={
        "cdist": lambda build, x, y, p=2.0, compute_mode=None: build.cdist(x, y, p=p),
        "pairwise_distance": _pairwise_distance,
    },
    samples=lambda: [sample(randn(2, 3, 4), randn(2, 5, 4)), sample(randn(3, 4), randn(2, 5, 4), p=1.0)],
    symmetry=Symmetry.POINTWISE,
    scaling=Scaling(powers={"x y": 1}),
)
def cdist(x: Tensor, y: Tensor, *, p: float = 2.0) -> Tensor:
    return torch.cdist(x, y, p)
