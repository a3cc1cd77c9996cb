"""Scores from what the network computes on data, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.groups import Group
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.running.interpret import run
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.pruning.scores import MemberScores, on_dim


def activation(graph: Graph, groups: Sequence[Group], batches: Sequence[Any]) -> MemberScores:
    """Means of |a_i| over examples and places, one for each value that a node makes the Dim in; batches count alike."""
    found = _of_values(graph, groups, batches, lambda a, axis: _mean(a.abs(), axis))
    return {dim: [part / max(1, len(batches)) for part in parts] for dim, parts in found.items()}


def activation_norm(graph: Graph, groups: Sequence[Group], batches: Sequence[Any]) -> MemberScores:
    """L2 norms over examples of the means of |a_i| over places (Minitron, Muralidharan et al. 2024, section 2.2)."""

    def squares(a: torch.Tensor, axis: int) -> np.ndarray:
        if axis == 0:
            return _mean(a.abs(), 0) ** 2
        others = [other for other in range(1, a.dim()) if other != axis]
        means = a.abs().double().mean(others) if others else a.abs().double()
        found: np.ndarray = means.square().sum(0).numpy()
        return found

    found = _of_values(graph, groups, batches, squares)
    return {dim: [np.sqrt(part) for part in parts] for dim, parts in found.items()}


def _mean(a: torch.Tensor, axis: int) -> np.ndarray:
    others = [other for other in range(a.dim()) if other != axis]
    found: np.ndarray = (a.double().mean(others) if others else a.double()).numpy()
    return found


def _of_values(graph: Graph, groups: Sequence[Group], batches: Sequence[Any], measure: Any) -> MemberScores:
    """Sums over batches of a measure along the axis of each Dim, for each of its producers' outputs."""
    places = _producers(graph, [group.dim for group in groups])
    wanted: dict[Node, list[tuple[Value, int]]] = {}
    for value, axis in dict.fromkeys(place for found in places.values() for place in found):
        assert value.producer is not None
        wanted.setdefault(value.producer, []).append((value, axis))
    sums: dict[tuple[Value, int], np.ndarray] = {}

    def look(node: Node, results: tuple[Any, ...]) -> None:
        for value, axis in wanted.get(node, ()):
            a = results[value.index]
            if isinstance(a, torch.Tensor) and not a.is_complex():
                sums[value, axis] = sums.get((value, axis), 0) + measure(a.detach(), axis)

    for batch in batches:
        run(graph, batch, hook=look)
    return {
        dim: [on_dim(graph.axes.of[v][axis], dim, sums[v, axis]) for v, axis in found if (v, axis) in sums]
        for dim, found in places.items()
    }


def _producers(graph: Graph, dims: Sequence[Dim]) -> dict[Dim, list[tuple[Value, int]]]:
    """The results in which each Dim comes into being: none of the node's computed operands has it."""
    found: dict[Dim, list[tuple[Value, int]]] = {dim: [] for dim in dims}
    for node in graph.nodes:
        read = {
            dim
            for _, operand in node.operands()
            if operand.producer is not None
            for extent in graph.axes.of[operand]
            for dim in leaves(extent)
        }
        for value in node.outputs:
            for axis, extent in enumerate(graph.axes.of[value]):
                for dim in dict.fromkeys(leaves(extent)):
                    if dim in found and dim not in read and _is_real(value):
                        found[dim].append((value, axis))
    return found


def _is_real(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def wanda(graph: Graph, groups: Sequence[Group], batches: Sequence[Any]) -> MemberScores:
    """sum over rows and columns of W[r, i]^2 E[x_i^2], for each layer that contracts the Dim (Sun et al. 2024).

    Wanda's |W| |x| squared and summed over what goes together. Empty for Dims that no layer contracts.
    """
    layers = [layer for node in graph.nodes if (layer := layer_of(node, turned=True))]
    readers: dict[Dim, list[Layer]] = {group.dim: [] for group in groups}
    for layer in layers:
        for dim in set(leaves(graph.axes.of[layer.weight][layer.contracted])) & set(readers):
            if layer.columns_of(graph, dim).size:
                readers[dim].append(layer)
    by_node = {layer.node: layer for found in readers.values() for layer in found}
    squares: dict[Layer, torch.Tensor] = {}
    rows: dict[Layer, int] = dict.fromkeys(by_node.values(), 0)
    for batch in batches:
        _add_squares(graph, batch, by_node, squares, rows)
    found: MemberScores = {dim: [] for dim in readers}
    for dim, own in readers.items():
        for layer in own:
            weight = layer.matrix(layer.weight.tensor.detach()).double()
            shares = (weight.square().sum(0) * squares[layer] / max(1, rows[layer])).numpy()
            found[dim].append(shares[layer.columns_of(graph, dim)].sum(1))
    return found


def _add_squares(
    graph: Graph, batch: Any, layers: dict[Node, Layer], squares: dict[Layer, torch.Tensor], rows: dict[Layer, int]
) -> None:
    lockstep = Lockstep(graph, [batch])
    for node in lockstep.steps():
        layer = layers.get(node)
        for x in lockstep.values(node.inputs[0]) if layer is not None else ():
            found = layers[node].rows_of_input(x).double()
            squares[layers[node]] = squares.get(layers[node], 0) + found.square().sum(0)
            rows[layers[node]] += len(found)
