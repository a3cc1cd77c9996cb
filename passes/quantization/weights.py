"""Weights stored one layer after the other on data, each with the inputs that the stored layers before it give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import change_of_output, least_error
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.on_floats import SPARSE
from regauge.passes.quantization.formats import Format, Method, Stored
from regauge.passes.quantization.grid import Form

RIDGE = 1e-2  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, weights would be fitted to it rather than kept


def stored_on_data(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    formats: Mapping[str, Format],
    method: Method | None,
    *,
    free: bool = True,
    by: str,
) -> dict[str, Stored]:
    """What is stored of ``layers``, which are those of ``changed``, a copy of ``original``, by the names of their
    weights, as are their formats. Without a method that of the format is taken.

    What it stands for is written into ``changed``, and biases that make up for it where these are ``free``. Layers of
    several blocks are rounded to the nearest, and their biases corrected by the mean error. Zeros that ``sparsify`` set
    stay.
    """
    sparse = changed.metadata.get(SPARSE, {}).keys()
    by_node, found = {layer.node: layer for layer in layers}, dict[str, Stored]()
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        name = layer.weight.name
        if layer.blocks > 1:
            stored = formats[name].rounded(rows_of(layer))
            if free:
                _correct_bias(run, layer, was, stored, changed, by)
        else:
            form = with_zeros(formats[name], layer, sparse)
            stored = _solved(run, layer, was, form, method, changed, free, by)
        values = stored.values.reshape(layer.blocks, layer.outputs, layer.columns)
        set_weight(changed, layer.weight, layer.from_matrices(values), by=by)
        found[name] = stored
    return found


def with_zeros(form: Format, layer: Layer, sparse: Set[str]) -> Format:
    """A format that leaves zeros where the weight has them, if it was sparsified and is stored as numbers of a grid."""
    if not isinstance(form, Form) or sparse.isdisjoint(layer.weight.names):
        return form
    return replace(form, zeros=layer.matrix(layer.weight.tensor.detach()) == 0)


def _correct_bias(run: SideBySide, layer: Layer, was: Node, stored: Stored, changed: Graph, by: str) -> None:
    """Take the mean of what a grouped convolution gives amiss, of each channel, out of its bias."""
    if layer.bias is None or layer.node.op != "conv":
        return
    weight = layer.from_matrices(stored.values.reshape(layer.blocks, layer.outputs, layer.columns))
    bias, total, count = layer.bias.tensor.detach(), torch.zeros(len(layer.bias.tensor)).double(), 0
    for x, y in zip(run.inputs(layer), run.targets(layer, was), strict=True):
        error = (y - layer.node.operator.evaluate(x, weight, bias, **layer.node.attributes)).double()
        total += error.movedim(1, 0).flatten(1).sum(1)
        count += error.numel() // len(total)
    set_weight(changed, layer.bias, (bias + total / max(count, 1)).to(bias.dtype), by=by)


def rows_of(layer: Layer) -> torch.Tensor:
    """The weight as [outputs of all blocks, columns]."""
    return layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1)


def _solved(
    run: SideBySide, layer: Layer, was: Node, form: Format, method: Method | None, changed: Graph, free: bool, by: str
) -> Stored:
    weight = layer.matrix(layer.weight.tensor.detach()).double()
    bias = layer.bias.tensor.detach().double() if layer.bias is not None else torch.zeros(len(weight)).double()
    moments = Moments(layer.columns, layer.outputs)
    for x, y in zip(run.inputs(layer), run.targets(layer, was), strict=True):
        moments.add(layer.rows_of_input(x), layer.rows_of_output(y))
    moments.check(layer.node.label)
    free = free and layer.bias is not None
    if run.as_it_was(layer) or moments.rows < ENOUGH_ROWS * layer.columns:
        problem = change_of_output(moments, weight, bias, RIDGE, free=free)
    else:
        problem = least_error(moments, weight, bias, RIDGE, free=free)
    stored = form.rounded(weight) if method == "nearest" else form.fitted(problem, method)
    shifted = layer.shifted(problem.bias(stored.values) - bias) if free else None
    if shifted is not None:
        set_weight(changed, *shifted, by=by)
    return stored


def group_of(layer: Layer, wanted: int | None, of_kernels: int | None = None) -> int:
    """Columns that share a scale: a whole row where the group does not divide it.

    Of a convolution as many whole channels as go into ``of_kernels``; a row where none does.
    """
    if layer.node.op == "conv":
        channels = layer.columns // layer.taps
        most = min(channels, (of_kernels or 0) // layer.taps)
        found = max((count for count in range(1, most + 1) if channels % count == 0), default=channels)
        return found * layer.taps
    return layer.columns if wanted is None or layer.columns % wanted else wanted
