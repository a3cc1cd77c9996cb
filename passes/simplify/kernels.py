"""The weights of linear maps as matrices and as convolution kernels with groups, and what can be done with them.

matrix of a map      o i             of linear (o i) and matmul (i o)
blocks of a kernel   g o i k...      of a convolution with g or more groups: each block may be partly zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Value
from regauge.ir.rewriting.rewrite import refuse
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, successor
from regauge.passes.simplify.linear_map import (
    W,
    bias_of,
    channels,
    input_axis,
    must_fit,
    own_weight,
    placed_bias,
    rebuilt,
)

MATRICES = ("linear", "matmul")


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks: one number per spatial axis each, and the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}


def geometry(node: Node) -> Geometry:
    rank = kernel_size(node)
    stride, padding, dilation = (_each(node.attributes[n], len(rank)) for n in ("stride", "padding", "dilation"))
    return Geometry(stride, padding, dilation, node.attributes["groups"])


def kernel_size(node: Node) -> tuple[int, ...]:
    return weight_shape(node)[2:]


def weight_shape(node: Node) -> tuple[int, ...]:
    weight = node.inputs[W]
    assert isinstance(weight, Value)
    return tuple(size if isinstance(size, int) else refuse("its weight has a dynamic size") for size in weight.shape)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def is_pointwise(node: Node) -> bool:
    """Whether a convolution looks at one place for each result, and adds no border; it may skip places."""
    return set(kernel_size(node)) <= {1} and set(geometry(node).padding) <= {0}


def stays_in_step(node: Node) -> bool:
    return set(geometry(node).stride) <= {1}


def kernel(build: Builder, node: Node) -> Fixed:
    """The weight of a linear map, which may be a view and may be read by others; ``(o i)`` where it is a matrix."""
    weight = fixed(build, node.inputs[W])
    if weight is None:
        return refuse("its weight is computed from inputs")
    if node.op == "matmul" and len(weight_shape(node)) != 2:
        return refuse(f"its weight has {len(weight_shape(node))} axes, not two")
    return combined(torch.t, weight) if node.op == "matmul" else weight


def blocks(weight: torch.Tensor, groups: int, fewer: int) -> torch.Tensor:
    """``(groups o) i k...`` as ``fewer (r o) (r i) k...`` where r of the groups make a block with zeros beside them."""
    outputs, inputs, *kernel = weight.shape
    ratio = groups // fewer
    given = weight.reshape(fewer, ratio, outputs // groups, inputs, *kernel)
    result = weight.new_zeros(fewer, ratio, outputs // groups, ratio, inputs, *kernel)
    for place in range(ratio):
        result[:, place, :, place] = given[:, place]
    return result.reshape(fewer, outputs // fewer, ratio * inputs, *kernel)


def from_blocks(weight: torch.Tensor) -> torch.Tensor:
    """``g o i k...`` as ``(g o) i k...``"""
    return weight.reshape(-1, *weight.shape[2:])


@dataclass(frozen=True)
class Branch:
    """A linear function of one value: a matrix, or a kernel with its geometry; and a bias."""

    weight: Fixed
    size: tuple[int, ...] = ()  # of the kernel
    walk: Geometry | None = None
    bias: Fixed | None = None


def branch(build: Builder, node: Node) -> Branch:
    """What one linear map computes; its weights may be views of weights."""
    bias = bias_of(node)
    vector = None if bias is None else fixed(build, bias)
    if bias is not None and vector is None:
        return refuse("its bias is computed from inputs")
    if node.op in MATRICES:
        return Branch(kernel(build, node), bias=vector)
    return Branch(kernel(build, node), kernel_size(node), geometry(node), vector)


def composed(build: Builder, first: Node, second: Node) -> Branch:
    """What two linear maps in a row compute; refuses where that is no linear map of one operator."""
    inner, outer = branch(build, first), branch(build, second)
    if (inner.walk is None) != (outer.walk is None):
        return refuse(f"a {first.op} and a {second.op} are no one map")
    bias = outer.bias
    if inner.bias is not None:
        moved = through(build, second, inner.bias)
        bias = moved if bias is None else combined(torch.add, moved, bias)
    if inner.walk is None or outer.walk is None:
        return Branch(combined(lambda a, b: b @ a, inner.weight, outer.weight), bias=bias)
    narrow = is_pointwise(first) and stays_in_step(first)
    if not narrow and not is_pointwise(second):
        return refuse("neither of the two kernels has one entry")
    if inner.bias is not None and any(outer.walk.padding):
        return refuse("the bias of the first one would be missing in the border of zeros")
    size = outer.size if narrow else inner.size
    weight, groups = _product(inner, inner.walk, outer, outer.walk, size)
    if narrow:
        return Branch(weight, size, replace(outer.walk, groups=groups), bias)
    stride = tuple(a * b for a, b in zip(inner.walk.stride, outer.walk.stride, strict=True))
    return Branch(weight, size, replace(inner.walk, stride=stride, groups=groups), bias)


def _product(inner: Branch, a: Geometry, outer: Branch, b: Geometry, size: tuple[int, ...]) -> tuple[Fixed, int]:
    groups = gcd(a.groups, b.groups)

    def multiply(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        first, second = blocks(first, a.groups, groups), blocks(second, b.groups, groups)
        product = torch.einsum("gmik,gomj->goikj", first.flatten(3), second.flatten(3))
        return from_blocks(product.reshape(*product.shape[:3], *size))

    return combined(multiply, inner.weight, outer.weight), groups


def through(build: Builder, node: Node, bias: Fixed) -> Fixed:
    """What a linear map makes of an input that is one number per channel everywhere; there must be no zero padding."""
    if node.op in MATRICES:
        return combined(lambda w, b: w @ b.expand(w.shape[1]), kernel(build, node), bias)
    groups = geometry(node).groups

    def spread(weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        block = blocks(weight, groups, groups).flatten(3).sum(3)
        return (block @ vector.expand(block.shape[0] * block.shape[2]).reshape(block.shape[0], -1, 1)).reshape(-1)

    return combined(spread, kernel(build, node), bias)


def placed(build: Builder, node: Node, x: Value, found: Branch) -> Value:
    """A linear map that computes a branch of ``x``, in the place of ``node``, whose weights it succeeds."""
    weight = own_weight(build, node)
    inputs = x.shape[input_axis(node)]
    if not isinstance(inputs, int):
        return refuse("its number of input channels is dynamic")
    bias: Operand = bias_of(node) if found.bias is None else placed_bias(build, node, found.bias)
    if found.walk is None:
        turned = combined(torch.t, found.weight) if node.op == "matmul" else found.weight
        shape = (inputs, channels(node)) if node.op == "matmul" else (channels(node), inputs)
        result = rebuilt(build, node, successor(build, weight, turned, shape), bias, x)
    else:
        new = successor(build, weight, found.weight, (channels(node), inputs // found.walk.groups, *found.size))
        with build.at(node):
            result = build.conv(x, new, bias, name=node.name, **found.walk.attributes())
    return must_fit(result, node.output)
