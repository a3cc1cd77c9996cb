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

from regauge.ir.graph import Node, Parameter
from regauge.passes.simplify.fixed_values import Fixed, combined, itself
from regauge.passes.simplify.linear_map import W

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
    assert isinstance(weight, Parameter)
    return tuple(weight.weight.shape)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def is_pointwise(node: Node) -> bool:
    """Whether a convolution looks at one place for each result, and adds no border; it may skip places."""
    return set(kernel_size(node)) <= {1} and set(geometry(node).padding) <= {0}


def stays_in_step(node: Node) -> bool:
    return set(geometry(node).stride) <= {1}


def matrix(node: Node) -> Fixed:
    """The weight of a linear map as ``(o i)``."""
    weight = node.inputs[W]
    assert isinstance(weight, Parameter)
    return combined(torch.t, itself(weight)) if node.op == "matmul" else itself(weight)


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


def composed(first: Node, second: Node) -> tuple[Fixed, Geometry]:
    """The kernel and the geometry of two convolutions in a row, of which one is pointwise."""
    a, b = geometry(first), geometry(second)
    groups = gcd(a.groups, b.groups)

    def multiply(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
        inner, outer = blocks(inner, a.groups, groups), blocks(outer, b.groups, groups)
        kernel = outer.shape[3:] if is_pointwise(first) and stays_in_step(first) else inner.shape[3:]
        product = torch.einsum("gmik,gomj->goikj", inner.flatten(3), outer.flatten(3))
        return from_blocks(product.reshape(*product.shape[:3], *kernel))

    weight = combined(multiply, _kernel(first), _kernel(second))
    if is_pointwise(first) and stays_in_step(first):
        return weight, replace(b, groups=groups)
    stride = tuple(x * y for x, y in zip(a.stride, b.stride, strict=True))
    return weight, replace(a, stride=stride, groups=groups)


def _kernel(node: Node) -> Fixed:
    weight = node.inputs[W]
    assert isinstance(weight, Parameter)
    return itself(weight)


def through(node: Node, bias: Fixed) -> Fixed:
    """What a linear map makes of an input that is one number per channel everywhere; there must be no zero padding."""
    if node.op in MATRICES:
        return combined(lambda w, b: w @ b.expand(w.shape[1]), matrix(node), bias)
    groups = geometry(node).groups

    def spread(weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        block = blocks(weight, groups, groups).flatten(3).sum(3)
        return (block @ vector.expand(block.shape[0] * block.shape[2]).reshape(block.shape[0], -1, 1)).reshape(-1)

    return combined(spread, _kernel(node), bias)
