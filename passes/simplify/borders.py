"""Kernels of convolutions without what lies in the border of zeros wherever they stand, in ONNX files.

    Conv (x, w; 5x5, padding 2)     Conv (x, w'; 3x3, padding 1)     of images of 2x2

The same numbers with smaller weights. Files whose images have fixed sizes alone: a module that was captured from torch
may still be given others.
"""

from __future__ import annotations

from dataclasses import replace

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.kernels import Geometry, geometry
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import W, X


def crop_borders(graph: Graph, limits: Limits) -> int:
    """Cut what never meets an image off the kernels of a graph that was loaded from ONNX; returns of how many."""
    if "onnx" not in graph.metadata:
        return 0
    return sum(_crop_scope(owner, build) for owner, build in scopes(graph))


def _crop_scope(graph: Graph, build: Builder) -> int:
    held, count = held_values(graph), 0
    build.by = "borders"
    for node in list(graph.nodes):
        weight = node.inputs[W] if node.op == "conv" and node.output not in held else None
        if not isinstance(weight, Parameter) or is_fixed(node) or is_part(node) or not _is_own(weight):
            continue
        rims = idle_rims(node)
        if any(rims):
            _crop(graph, build, node, weight, rims)
            count += 1
    settle_successors(graph, build)
    return count


def _is_own(weight: Parameter) -> bool:
    known = all(isinstance(size, int) for size in weight.shape)
    return known and len(weight.uses) == 1 and weight.stored


def idle_rims(node: Node) -> tuple[int, ...]:
    """For each spatial axis of a convolution, how many entries at either end of its kernel only ever meet zeros."""
    x, walk = node.inputs[X], geometry(node)
    assert isinstance(x, Value)
    weight = node.inputs[W]
    assert isinstance(weight, Value)
    axes = zip(x.shape[2:], node.output.shape[2:], weight.shape[2:], range(len(walk.padding)), strict=True)
    return tuple(_idle(walk, axis, *sizes) for *sizes, axis in axes)


def _idle(walk: Geometry, axis: int, size: object, places: object, width: object) -> int:
    if not isinstance(size, int) or not isinstance(places, int) or not isinstance(width, int):
        return 0
    stride, padding, dilation = walk.stride[axis], walk.padding[axis], walk.dilation[axis]

    def meets(entry: int) -> bool:
        return any(0 <= place * stride + entry * dilation - padding < size for place in range(places))

    rim = 0
    while 2 * rim + 1 < width and (rim + 1) * dilation <= padding and not meets(rim) and not meets(width - 1 - rim):
        rim += 1
    return rim


def _crop(graph: Graph, build: Builder, node: Node, weight: Parameter, rims: tuple[int, ...]) -> None:
    walk, sizes = geometry(node), tuple(int(size) for size in weight.shape)
    inner = tuple(slice(rim, size - rim) for rim, size in zip(rims, sizes[2:], strict=True))
    shape = (*sizes[:2], *(part.stop - part.start for part in inner))
    padding = tuple(p - rim * d for p, rim, d in zip(walk.padding, rims, walk.dilation, strict=True))
    with build.at(node):
        smaller = build.folded(weight, lambda tensor: tensor[(..., *inner)].contiguous(), shape=shape)
        bias = node.inputs[2:]
        made = build.conv(node.inputs[X], smaller, *bias, **replace(walk, padding=padding).attributes())
    made.producer.metadata["regauge.replaces"] = node.metadata.get("regauge.replaces") or node.name
    replace_uses(graph, node.output, made)
    remove_node(graph, node)
    made.name = node.output.name
