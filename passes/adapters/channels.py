"""S2FT: a few channels of a hidden Dim, brought to the front of it, whose columns in the layer behind train.

    before  y = linear(h, w, b)                                            h: hidden channels, or heads
    after   y = linear(h[:, :k], selected) + linear(h[:, k:], w', b)       w' frozen; what writes h is reordered

Channels and heads are selected at random, as S2FT-R does (Yang et al. 2024). They are those of Dims that a single layer
reads: the hidden channels of feed-forward blocks, and the heads in front of output projections, of these as many as
have about so many channels, at least one. Streams, which many layers read, stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.edit import Builder, record, remove_node, replace_uses
from regauge.ir.graph import Graph, Value
from regauge.ir.ops.slicing import slice_axis
from regauge.passes.calibration.layers import Layer, contracting, layer_of

SELECTED = "selected"  # what the weight that trains is called, below its layer


def split_channels(
    graph: Graph, layers: Collection[str], count: int, seed: int, left: Counter[str], *, by: str
) -> tuple[Graph, int]:
    """A copy in which about ``count`` channels that each of these layers (by name of weight) reads have a weight apart.

    Returns how many layers were split as well.
    """
    chosen = _chosen(graph, layers, count, left)
    generator = np.random.default_rng(seed)
    orders = {}
    for dim, _, indices in chosen:
        order = generator.permutation(int(dim.size))
        orders[dim] = [*sorted(order[:indices]), *sorted(order[indices:])]
    columns = {layer.weight.name: _channels(graph, layer, dim, indices) for dim, layer, indices in chosen}
    result = reorder(graph, orders, by=by) if orders else graph.copy()
    for node in list(result.nodes):
        layer = layer_of(node)
        if layer is not None and layer.weight.name in columns:
            _split(result, layer, columns[layer.weight.name], by)
    return result, len(chosen)


def _chosen(graph: Graph, names: Collection[str], count: int, left: Counter[str]) -> list[tuple[Dim, Layer, int]]:
    """Dims with the only layer that reads each, one for a layer, and as how many indices ``count`` channels count."""
    every = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    dims = may_be_reordered(graph, [group.dim for group in graph.groups() if group.free])
    found: dict[str, tuple[Dim, Layer, int]] = {}
    for dim, readers in contracting(graph, dims, every).items():
        layer = readers[0] if len(readers) == 1 else None
        if layer is None or layer.weight.name not in names or layer.node.op == "conv_transpose":
            continue
        indices = max(1, round(count / _channels(graph, layer, dim, 1)))
        if int(dim.size) <= indices:
            continue
        # The slowest Dim of the axis, so that its first indices are the first columns.
        first = leaves(graph.axes.of[layer.weight][layer.contracted])[0]
        if dim is first and _is_front(layer.columns_of(graph, dim)[:indices]):
            found[layer.weight.name] = dim, layer, indices
    left["what it reads is read elsewhere too, not to be reordered, or no more channels than train"] += len(
        names
    ) - len(found)
    return list(found.values())


def _is_front(columns: np.ndarray) -> bool:
    return bool((np.sort(columns.reshape(-1)) == np.arange(columns.size)).all())


def _channels(graph: Graph, layer: Layer, dim: Dim, indices: int) -> int:
    """Input channels of the layer that the first indices of a Dim are."""
    return layer.columns_of(graph, dim)[:indices].size // layer.taps


def _split(graph: Graph, layer: Layer, count: int, by: str) -> None:
    node, build, weight = layer.node, Builder(graph, by=by), layer.weight
    x = node.inputs[0]
    assert isinstance(x, Value)
    axis = x.rank - 1 if node.op in ("linear", "matmul") else x.rank - weight.rank + 1
    tensor = weight.tensor.detach()
    size = int(weight.shape[layer.contracted])
    stem = weight.name.removesuffix("weight") if weight.name.endswith(".weight") else f"{weight.name}_"
    front = build.parameter(build.unique(f"{stem}{SELECTED}.weight"), tensor.narrow(layer.contracted, 0, count).clone())
    rest = tensor.narrow(layer.contracted, count, size - count).clone()
    frozen = build.parameter(build.unique(f"{weight.name}_rest"), rest, trainable=False)
    with build.at(node):
        parts = [slice_axis(build, x, axis, 0, count), slice_axis(build, x, axis, count, size)]
        first = build(node.op, parts[0], front, name=f"{node.name}_{SELECTED}", **node.attributes)
        second = build(node.op, parts[1], frozen, *node.inputs[2:], name=f"{node.name}_rest", **node.attributes)
        total = build.add(second, first)
    replace_uses(graph, node.output, total)
    name = node.name
    remove_node(graph, node)
    total.name = name
    del graph.parameters[weight.name], graph.parameters[frozen.name]
    frozen.name, frozen.aliases = weight.name, weight.aliases
    graph.parameters[frozen.name] = frozen
    record(graph, by, f"{weight.name}: {front.signature} trains")
