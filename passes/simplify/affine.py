"""Scales, shifts and batch norms folded into the weights of the linear map before or behind them.

    conv(x, w, b) -> batch_norm          conv(x, w', b')
    linear(x, w, b) -> mul(s)            linear(x, w', b')
    add(x, t) -> linear(w, b)            linear(x, w, b')

Which axes of the weight a vector runs along is read off the operator's axis rule, so that one rule serves linear maps,
grouped and transposed convolutions alike. A shift is never moved through zero padding: the border would miss it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.edit import Builder
from regauge.ir.equivalence import Weight
from regauge.ir.extents import Extent
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.local_axes import LocalAxes, Spread, local_axes
from regauge.ir.rewrite import RuleSet, refuse, rule

MAPS = ("linear", "conv", "conv_transpose")
X, W, BIAS = 0, 1, 2  # the operand slots of a linear map


def axes_of(node: Node) -> LocalAxes:
    axes = local_axes(node)
    return axes if axes is not None else refuse("its axis rule does not fit")


def own_weight(node: Node) -> Parameter:
    """The weight of a linear map that nothing else reads; refuses otherwise."""
    weight = node.inputs[W]
    if not isinstance(weight, Parameter):
        return refuse("its weight is computed")
    if len(weight.uses) > 1:
        return refuse(f"its weight {weight.name} has other readers")
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    if bias is not None and not isinstance(bias, Parameter):
        return refuse("its bias is computed")
    return weight


def channel_axis(node: Node) -> int:
    """The axis of the result that the bias of a linear map runs along."""
    return node.output.rank - 1 if node.op == "linear" else 1


def result_channels(node: Node) -> tuple[Extent, Spread]:
    """The output channels of a linear map, and how a vector over them is laid along its weight."""
    axes = axes_of(node)
    extent = axes.results[0][channel_axis(node)]
    lay = axes.spread(W, extent)
    if lay is None:
        return refuse("its output channels are no axis of its weight")
    return extent, lay


def as_vector(operand: Operand, rank: int, axis: int, size: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a factor that is broadcast against a result of this rank becomes a vector over one of its axes."""
    shape = (1,) * (rank - operand.rank) + operand.shape if isinstance(operand, Value) else (1,) * rank
    if any(s != 1 for a, s in enumerate(shape) if a != axis) or shape[axis] not in (1, size) or len(shape) != rank:
        return refuse(f"{operand} does not run along the channels alone")
    return lambda tensor: tensor.reshape(-1).expand(size)


def rebuilt(build: Builder, node: Node, weight: Parameter, bias: Parameter | None) -> Value:
    """The linear map with other weights, in the place of the old one."""
    with build.at(node):
        result: Value = build(node.op, node.inputs[X], weight, bias, name=node.name, **node.attributes)
    return result


def new_bias(build: Builder, node: Node, function: Callable[..., torch.Tensor], *sources: Parameter) -> Parameter:
    """The bias ``function(old bias or zeros, *sources)`` of a linear map."""
    old = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    size = node.output.shape[channel_axis(node)]
    if isinstance(old, Parameter) and len(old.uses) == 1:
        return build.folded(old, function, *sources)
    weight = node.inputs[W]
    assert isinstance(weight, Parameter) and isinstance(size, int)
    stem = weight.name.removesuffix("weight").removesuffix(".")
    name = f"{stem}.bias" if stem else "bias"
    if isinstance(old, Parameter):
        return build.computed(name, lambda w, b, *rest: function(b, *rest), weight, old, *sources, shape=(size,))
    return build.computed(name, lambda w, *rest: function(w.new_zeros(size), *rest), weight, *sources, shape=(size,))


# -- behind a linear map -----------------------------------------------------------------------------------------------


def _batch_norm_samples() -> Iterable[dict[str, Any]]:
    def sample(x: torch.Tensor, w: torch.Tensor, out: int, **extra: Any) -> dict[str, Any]:
        vectors = {name: Weight(randn(out).double()) for name in ("gain", "shift", "mean")}
        return {"x": x.double(), "w": Weight(w.double()), "var": Weight(rand(out).double() + 0.5), **vectors, **extra}

    conv = {"map.attributes": {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}}
    yield sample(randn(2, 4, 5, 5), randn(6, 2, 3, 3), 6, **{"map.op": "conv", **conv})
    yield sample(randn(2, 4, 5, 5), randn(6, 2, 3, 3), 6, b=Weight(randn(6).double()), **{"map.op": "conv", **conv})
    yield sample(randn(3, 4), randn(6, 4), 6, **{"map.op": "linear"})


@rule(
    lambda op, x, w, gain, shift, mean, var, b=None: op.batch_norm(
        op.any_of(MAPS, x, w, b, name="map", attributes=...), gain, shift, mean, var,
        momentum=..., eps=..., name="norm",
    ),
    samples=_batch_norm_samples,
)  # fmt: skip
def batch_norm_into_weights(build: Builder, map: Node, norm: Node) -> Value:
    """``(w x + b - mean) / sqrt(var + eps) * gain + shift`` is linear in x."""
    weight = own_weight(map)
    parameters = [p for p in norm.inputs[1:] if isinstance(p, Parameter)]
    if len(parameters) < len([p for p in norm.inputs[1:] if p is not None]):
        return refuse("its statistics or gains are computed")
    _, lay = result_channels(map)
    if channel_axis(map) != 1:
        return refuse("its channels are not axis 1")
    eps = norm.attributes["eps"]
    gain, shift, mean, var = norm.inputs[1:5]
    slots = [p for p in (gain, shift, mean, var) if isinstance(p, Parameter)]

    def affine(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        given = dict(zip(map_slots, tensors, strict=True))
        scale = torch.rsqrt(given["var"] + eps) * given.get("gain", 1.0)
        return scale, given.get("shift", 0.0) - given["mean"] * scale

    map_slots = [
        name
        for name, p in zip(("gain", "shift", "mean", "var"), (gain, shift, mean, var), strict=True)
        if p is not None
    ]

    def folded_weight(w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return w * lay(affine(rest)[0])

    def folded_bias(b: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        scale, offset = affine(rest)
        return b * scale + offset

    return rebuilt(build, map, build.folded(weight, folded_weight, *slots), new_bias(build, map, folded_bias, *slots))


RULES = RuleSet([batch_norm_into_weights])
