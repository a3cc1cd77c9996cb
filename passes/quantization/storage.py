"""Weights that no kernel reads as integers, stored in 8 bits: what reads them computes in float.

    y, h, c = lstm(x, w, r)     ->    y, h, c = lstm(x, back(w'), back(r'))        w': i8[1,512,128]

A runtime that computes at load what depends on constants alone then holds floats, and runs as fast as before; the
file has a quarter of the bytes. Any weight that is multiplied with and summed over counts, in a branch or the body of a
loop too: what its axes mean is told by the rule of the operator that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from regauge.ir.dims.extents import leaves
from regauge.ir.dims.local_axes import local_axes
from regauge.ir.edit import Builder, set_input, set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.control import captured_values
from regauge.ir.sizes.expressions import product
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.name_patterns import matches
from regauge.passes.quantization.formats import Constants
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.halves import holds
from regauge.passes.quantization.levels import ENOUGH, Leveled
from regauge.passes.quantization.mirrored import Unfolded, table_of

LEAST = 256
"""Entries of a weight: the nodes and names around a smaller one take as much as it saves."""
HALF_BELOW = 768
"""Entries of a weight below which half precision takes no more, since one node makes floats of it."""


@dataclass(frozen=True)
class Plain:
    """A weight of a graph or a region, and the axis whose indices have a scale each."""

    owner: Graph
    weight: Parameter
    axis: int


@dataclass(frozen=True)
class OnData:
    """The error of what is made with a weight, a matrix whose rows lie on ``axis``, and the bias that is added."""

    problem: Quadratic
    axis: int
    bias: Parameter | None


def plain_weights(
    graph: Graph, include: Sequence[str], exclude: Sequence[str], apart: Collection[Value] = ()
) -> list[Plain]:
    """The weights in single precision that are multiplied with and summed over, but for those ``apart``."""
    found = []
    for owner in graph.nested():
        for weight in owner.parameters.values():
            small = weight.kind != "parameter" or weight.dtype != torch.float32 or product(weight.shape) < LEAST
            if small or weight in apart or weight in owner.outputs or include and not matches(weight.names, include):
                continue
            axis = None if matches(weight.names, exclude) else _axis(weight)
            if axis is not None:
                found.append(Plain(owner, weight, axis))
    return found


def plain_vectors(graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> list[tuple[Graph, Parameter]]:
    """The gains and shifts of many channels, read as they are, that half precision hardly changes,
    with the graph or region of each."""
    found = []
    for owner in graph.nested():
        for vector in owner.parameters.values():
            size = product(vector.shape) if vector.dtype == torch.float32 and vector not in owner.outputs else 0
            if size < LEAST or size != max(vector.shape) or not vector.uses:
                continue
            chosen = (not include or matches(vector.names, include)) and not matches(vector.names, exclude)
            plain = not any(node.operator.coding or node.regions or _decodes(node) for node, _ in vector.uses)
            if chosen and plain and holds(vector.tensor.detach()):
                found.append((owner, vector))
    return found


def _decodes(node: Node) -> bool:
    """Whether a node multiplies what codes stand for by their scales."""
    makers = [value.producer for _, value in node.operands()]
    return node.op == "mul" and any(maker is not None and maker.operator.coding for maker in makers)


def _axis(weight: Value) -> int | None:
    """The axis that the first layer among the readers makes results with; None where one of them is no layer."""
    axes = [_told_apart(node, slot, weight) for node, slot in weight.uses if node.op != "embedding"]
    return axes[0] if axes and None not in axes else None


def _axis_inside(node: Node, slot: int) -> int | None:
    """The same of a weight that branches, or the body of a loop, capture: by who reads it there."""
    captured = captured_values(node, slot)
    if not captured or any(value in region.outputs for value, region in zip(captured, node.regions, strict=True)):
        return None
    axes = [axis for value in captured if value.uses and (axis := _axis(value)) is not None]
    return axes[0] if axes and len(axes) == sum(bool(value.uses) for value in captured) else None


def _told_apart(node: Node, slot: int, weight: Value) -> int | None:
    """Of a layer the axis of its outputs, else the longest one over which the reader does not sum, or, where it sums
    over all that are longer than 1, the longest; None where it sums over none."""
    if node.regions:
        return _axis_inside(node, slot)
    layer = layer_of(node, blocks=True) if slot == 1 else None
    if layer is not None:
        return layer.made
    local = local_axes(node)
    if local is None or weight.rank < 2:
        return None
    summed = [any(local.roles.get(dim) == "contract" for dim in leaves(axis)) for axis in local.operands[slot]]
    if all(summed) or not any(summed):
        return None
    return max(range(weight.rank), key=lambda axis: (not summed[axis] and weight.shape[axis] != 1, weight.shape[axis]))


def store(build: Builder, found: Plain, on_data: OnData | None = None) -> None:
    """Put codes of 8 bits and their way back in the place of a weight: a table's where it is large enough for one.

    Of a smaller one half precision where that takes no more, and zero points where most of the error goes with them.
    With ``on_data`` codes are those of the least error there.
    """
    owner, weight, axis = found.owner, found.weight, found.axis if on_data is None else on_data.axis
    inner = _within(build, owner)
    data = weight.tensor.detach().movedim(axis, 0)
    if data.numel() < HALF_BELOW and holds(data):
        halve(build, owner, weight)
        return
    readers, matrix = list(weight.uses), data.flatten(1)
    shape = tuple(int(size) for size in weight.shape)
    many = data.numel() >= ENOUGH
    form = table_of(matrix, shape, axis) if many else nearer(Form(Grid(8), matrix.shape[1]), matrix)
    coded = form.rounded(matrix) if on_data is None else form.fitted(on_data.problem, "descent")
    if on_data is not None and on_data.bias is not None:
        bias = on_data.problem.bias(coded.values).to(on_data.bias.tensor.dtype)
        set_weight(build.graph, on_data.bias, bias, by=build.by)
    with inner.at(readers[0][0]):
        to = Constants(inner, weight.name, at_load=True)
        if isinstance(coded, Leveled | Unfolded):
            back = coded.laid_out(to, shape, axis)
        else:
            back = coded.laid_out(to, coded.codes.reshape(data.shape).movedim(0, axis), axis)
    for node, slot in readers:
        set_input(node, slot, back, owner)


def nearer(form: Form, weight: torch.Tensor) -> Form:
    """The form, or that with zero points, where half of the squared error of a weight [rows, columns] goes by them."""
    other = replace(form, grid=replace(form.grid, symmetric=False))
    error, least = (float((one.rounded(weight).values - weight).square().sum()) for one in (form, other))
    return other if least < error / 2 else form


def halve(build: Builder, owner: Graph, vector: Parameter) -> None:
    """Put half precision, and the way back, in the place of a vector."""
    inner = _within(build, owner)
    readers = list(vector.uses)
    with inner.at(readers[0][0]):
        name = inner.unique(f"{vector.name}_half")
        half = inner.parameter(name, vector.tensor.detach().half(), vector.kind, trainable=False)
        back = inner.cast(half, dtype=torch.float32)
    for node, slot in readers:
        set_input(node, slot, back, owner)


def _within(build: Builder, owner: Graph) -> Builder:
    return build if owner is build.graph else build.region(owner)
