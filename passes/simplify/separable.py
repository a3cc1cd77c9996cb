"""Structure in the kernels of convolutions that makes them cheaper: off by default, because it reads values.

    depthwise conv 7x7 whose kernels are u v'    conv 7x1, then conv 1x7
    conv 5x5 with a border of zeros              conv 3x3 with less padding

Both are decided by the weights as they are now, so a network that is to be trained on should keep its kernels. Without
the zeros of a border an infinity under it makes no NaN any more; the results for finite inputs are the same.
``simplify{also=separable}`` applies these rules beside all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.rewriting.rewrite import RuleSet, refuse, rule
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import combined, itself, new_weight, successor
from regauge.passes.simplify.kernels import Geometry, geometry, kernel_size
from regauge.passes.simplify.linear_map import X, bias_of, must_fit, must_pay, own_weight

CLOSE = 4  # units of rounding by which a kernel of rank one may miss the product of its factors


def _pattern(op: Any, x: Any, w: Any, b: Any = None) -> Any:
    return op.conv(x, w, b, name="map", attributes=...)


# -- kernels of rank one -----------------------------------------------------------------------------------------------


def _column(weight: torch.Tensor) -> torch.Tensor:
    """``c 1 i j`` -> ``c 1 i 1``: the column of the largest entry of each kernel."""
    flat = weight.flatten(1)
    place = flat.abs().argmax(1) % weight.shape[3]
    return weight.gather(3, place[:, None, None, None].expand(-1, 1, weight.shape[2], 1))


def _row(weight: torch.Tensor) -> torch.Tensor:
    """``c 1 i j`` -> ``c 1 1 j``: the row of the largest entry of each kernel, over that entry."""
    flat = weight.flatten(1)
    place = flat.abs().argmax(1, keepdim=True)
    largest = flat.gather(1, place)[:, :, None, None]
    row = weight.gather(2, (place // weight.shape[3])[:, :, None, None].expand(-1, 1, 1, weight.shape[3]))
    return row / torch.where(largest == 0, 1.0, largest)


def _separable_samples() -> Iterator[dict[str, Any]]:
    walk = {"stride": (2, 1), "padding": (2, 3), "dilation": (1, 2), "groups": 4}
    kernels = randn(4, 1, 5, 1).double() * randn(4, 1, 1, 3).double()
    yield weights({"x": randn(2, 4, 9, 9), "w": kernels, "b": randn(4), "map.attributes": walk})
    yield weights({"x": randn(4, 9, 9), "w": kernels, "map.attributes": {"groups": 4}})


@rule(_pattern, name="kernels-of-rank-one", samples=_separable_samples)
def split_kernels(build: Builder, map: Node) -> Value:
    """A depthwise convolution whose kernels are products of a column and a row is two, if they cost less."""
    weight = own_weight(build, map)
    size = kernel_size(map)
    count, inputs = weight.weight.shape[:2]
    if len(size) != 2 or min(size) == 1 or inputs != 1 or map.attributes["groups"] != count:
        return refuse("it is no depthwise convolution over two axes")
    tensor = weight.tensor.double()
    error = (tensor - _column(tensor) * _row(tensor)).abs().amax((1, 2, 3))
    assert isinstance(weight.dtype, torch.dtype)
    if not bool((error <= CLOSE * torch.finfo(weight.dtype).eps * tensor.abs().amax((1, 2, 3))).all()):
        return refuse("its kernels are no products of a column and a row")
    across, along = (_one_axis(geometry(map), axis) for axis in (0, 1))
    stem = weight.name.removesuffix("weight").removesuffix(".") or "conv"
    columns = new_weight(
        build, f"{stem}_columns.weight", weight, combined(_column, itself(weight)), (count, 1, size[0], 1)
    )
    rows = successor(build, weight, combined(_row, itself(weight)), (count, 1, 1, size[1]))
    with build.at(map):
        middle = build.conv(map.inputs[X], columns, None, **across.attributes())
        result = must_fit(build.conv(middle, rows, bias_of(map), name=map.name, **along.attributes()), map.output)
    must_pay(build, [map])
    return result


def _one_axis(walk: Geometry, axis: int) -> Geometry:
    """The geometry of the factor along one of two axes, which stays in step with the other one."""

    def kept(numbers: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(number if place == axis else neutral for place, number in enumerate(numbers))

    return Geometry(kept(walk.stride, 1), kept(walk.padding, 0), kept(walk.dilation, 1), walk.groups)


# -- borders of zeros --------------------------------------------------------------------------------------------------


def _border_samples() -> Iterator[dict[str, Any]]:
    kernels = torch.zeros(4, 2, 7, 5)
    kernels[:, :, 2:6, 1:4] = randn(4, 2, 4, 3)  # two rows above, one below; one column on each side
    walk = {"stride": (2, 1), "padding": (3, 2), "dilation": (1, 2), "groups": 2}
    yield weights({"x": randn(2, 4, 9, 9), "w": kernels, "b": randn(4), "map.attributes": walk})


@rule(_pattern, name="borders-of-zeros", samples=_border_samples)
def trim_kernels(build: Builder, map: Node) -> Value:
    """A convolution whose kernels have a border of zeros has smaller ones and less padding."""
    weight, walk = own_weight(build, map), geometry(map)
    tensor = weight.tensor
    cuts = [_border(tensor, 2 + axis) for axis in range(tensor.dim() - 2)]
    cuts = [min(cut, p // d) for cut, p, d in zip(cuts, walk.padding, walk.dilation, strict=True)]
    if not any(cuts):
        return refuse("its kernels have no border of zeros that its padding covers")
    keep = (
        slice(None),
        slice(None),
        *(slice(cut, size - cut) for cut, size in zip(cuts, tensor.shape[2:], strict=True)),
    )
    shape = [*tensor.shape[:2], *(size - 2 * cut for cut, size in zip(cuts, tensor.shape[2:], strict=True))]
    padding = tuple(p - d * cut for cut, p, d in zip(cuts, walk.padding, walk.dilation, strict=True))
    new = successor(build, weight, combined(lambda t: t[keep].clone(), itself(weight)), shape)
    with build.at(map):
        return must_fit(
            build.conv(map.inputs[X], new, bias_of(map), name=map.name, **replace(walk, padding=padding).attributes()),
            map.output,
        )


def _border(tensor: torch.Tensor, axis: int) -> int:
    """How many slices at both ends of an axis are zero; one slice at least is left."""
    used = (tensor != 0).transpose(0, axis).flatten(1).any(1).nonzero().flatten()
    size = tensor.shape[axis]
    return min(int(used[0]), size - 1 - int(used[-1])) if len(used) else (size - 1) // 2


RULES = RuleSet([trim_kernels, split_kernels])
