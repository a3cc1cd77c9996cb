"""Random tensors. A draw of another size is another draw, so their axes keep all their entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.operator import operator, sample
from regauge.ir.ops.conversion import as_dtype, onnx_dtype
from regauge.ir.sizes.expressions import Size


def _drawn_rule(call: Call) -> list[Axes]:
    axes = [call.fresh(size) for size in call.node.outputs[0].shape]
    for extent in axes:
        call.pin(extent, "its entries are drawn at random")
        call.role("produce", extent)
    return [axes]


def _draw(name: str) -> Any:
    def adapt(build: Builder, size: Sequence[Size], *_: Any, dtype: Any = None, **_options: Any) -> Any:
        return build(name, shape=tuple(size), dtype=dtype or torch.get_default_dtype())

    return adapt


def _draw_like(name: str) -> Any:
    def adapt(build: Builder, x: Value, *_: Any, dtype: Any = None, **_options: Any) -> Any:
        return build(name, shape=x.shape, dtype=dtype or x.dtype)

    return adapt


def _scaled(build: Builder, x: Value, scale: float, shift: float) -> Any:
    x = x if scale == 1 else build.mul(x, scale)
    return x if shift == 0 else build.add(x, shift)


def _onnx_draw(name: str) -> Any:
    """RandomNormal(mean, scale) and RandomUniform(low, high); ``Like`` takes the shape of its input."""

    def adapt(build: Builder, call: Any) -> Any:
        like = call.operand(0) if call.op_type.endswith("Like") else None
        shape = call.attribute("shape") if like is None else like.shape
        code = call.attribute("dtype")
        dtype = onnx_dtype(code) if code is not None else torch.float32 if like is None else like.dtype
        x = build(name, shape=tuple(shape), dtype=dtype)
        if name == "randn":
            return _scaled(build, x, call.attribute("scale", 1.0), call.attribute("mean", 0.0))
        low, high = call.attribute("low", 0.0), call.attribute("high", 1.0)
        return _scaled(build, x, high - low, low)

    return adapt


def _uniform(build: Builder, x: Value, start: float = 0.0, to: float = 1.0, **_options: Any) -> Any:
    return _scaled(build, build.rand(shape=x.shape, dtype=x.dtype), to - start, start)


def _normal(build: Builder, x: Value, mean: float = 0.0, std: float = 1.0, **_options: Any) -> Any:
    return _scaled(build, build.randn(shape=x.shape, dtype=x.dtype), std, mean)


@operator(
    rule=_drawn_rule,
    aten={"rand": _draw("rand"), "rand_like": _draw_like("rand"), "uniform": _uniform},
    onnx={"RandomUniform": _onnx_draw("rand"), "RandomUniformLike": _onnx_draw("rand")},
    samples=lambda: [sample(shape=(2, 3)), sample(shape=())],
    random=True,
)
def rand(*, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, dtype=dtype)


@operator(
    rule=_drawn_rule,
    aten={"randn": _draw("randn"), "randn_like": _draw_like("randn"), "normal_functional": _normal},
    onnx={"RandomNormal": _onnx_draw("randn"), "RandomNormalLike": _onnx_draw("randn")},
    samples=lambda: [sample(shape=(2, 3)), sample(shape=(4,), dtype=torch.float64)],
    random=True,
)
def randn(*, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def _randint(build: Builder, *arguments: Any, dtype: Any = None, **_options: Any) -> Any:
    """``randint(high, size)`` and ``randint(low, high, size)``."""
    low, high, size = (0, *arguments) if len(arguments) == 2 else arguments
    return build.randint(low=low, high=high, shape=tuple(size), dtype=dtype or torch.int64)


@operator(
    rule=_drawn_rule, aten={"randint": _randint}, samples=lambda: [sample(low=0, high=5, shape=(2, 3))], random=True
)
def randint(*, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype)


def _randperm(build: Builder, n: Size, *, dtype: Any = None, **_options: Any) -> Any:
    return build.randperm(n=n, dtype=dtype or torch.int64)


@operator(rule=_drawn_rule, aten={"randperm": _randperm}, samples=lambda: [sample(n=5)], random=True)
def randperm(*, n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randperm(n, dtype=dtype)


def _bernoulli(build: Builder, x: Value, p: Any = None, **_options: Any) -> Any:
    """With ``p`` the values of ``x`` do not matter, only its shape and type."""
    if p is None:
        return build.bernoulli(x)
    if isinstance(p, Value):
        return build.cast(build.bernoulli(p), dtype=x.dtype)
    draw = build.rand(shape=x.shape, dtype=torch.float32)
    return build.cast(build.lt(draw, p), dtype=x.dtype)


def _onnx_bernoulli(build: Builder, call: Any) -> Any:
    x, code = call.operand(0), call.attribute("dtype")
    return as_dtype(build, build.bernoulli(x), None if code is None else onnx_dtype(code))


def _bernoulli_rule(call: Call) -> list[Axes]:
    for extent in call.operand(0):
        call.pin(extent, "its entries are drawn at random")
        call.role("map", extent)
    return [list(call.operand(0))]


@operator(
    rule=_bernoulli_rule,
    aten={"bernoulli": _bernoulli},
    onnx={"Bernoulli": _onnx_bernoulli},
    samples=lambda: [sample(torch.rand(2, 3))],
    random=True,
)
def bernoulli(x: torch.Tensor) -> torch.Tensor:
    return torch.bernoulli(x)
