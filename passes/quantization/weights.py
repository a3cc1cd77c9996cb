"""Weights coded one layer after the other on data, each with the inputs that the coded layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output, least_error
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.quantization.grid import Coded, Grid, rounded
from regauge.passes.quantization.rounding import by_columns, by_descent

Method: TypeAlias = Literal["nearest", "columns", "descent"]
Solver: TypeAlias = Callable[[Quadratic, Grid, int], Coded]

RIDGE = 1e-2  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, weights would be fitted to it rather than kept


def coded_on_data(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    grid: Grid,
    groups: Mapping[str, int],
    method: Method,
    *,
    by: str,
) -> dict[str, Coded]:
    """The codes of ``layers``, which are those of ``changed``, a copy of ``original``, by the names of their weights.

    What they stand for is written into ``changed``, and biases that make up for it. Layers of several blocks are
    rounded to the nearest codes, and their biases corrected by the mean error.
    """
    solve: Solver = {"columns": by_columns, "descent": by_descent}[method]
    by_node, found = {layer.node: layer for layer in layers}, dict[str, Coded]()
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        name = layer.weight.name
        if layer.blocks > 1:
            rows = layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1)
            coded = rounded(rows, grid, groups[name])
            _correct_bias(run, layer, was, coded, changed, by)
        else:
            coded = _solved(run, layer, was, solve, grid, groups[name], changed, by)
        values = coded.values.reshape(layer.blocks, layer.outputs, layer.columns)
        set_weight(changed, layer.weight, layer.from_matrices(values), by=by)
        found[name] = coded
    return found


def _correct_bias(run: SideBySide, layer: Layer, was: Node, coded: Coded, changed: Graph, by: str) -> None:
    """Take the mean of what a grouped convolution gives amiss, of each channel, out of its bias."""
    if layer.bias is None or layer.node.op != "conv":
        return
    weight = layer.from_matrices(coded.values.reshape(layer.blocks, layer.outputs, layer.columns))
    bias, total, count = layer.bias.tensor.detach(), torch.zeros(len(layer.bias.tensor)).double(), 0
    for x, y in zip(run.inputs(layer), run.targets(layer, was), strict=True):
        error = (y - layer.node.operator.evaluate(x, weight, bias, **layer.node.attributes)).double()
        total += error.movedim(1, 0).flatten(1).sum(1)
        count += error.numel() // len(total)
    set_weight(changed, layer.bias, (bias + total / max(count, 1)).to(bias.dtype), by=by)


def _solved(
    run: SideBySide, layer: Layer, was: Node, solve: Solver, grid: Grid, group: int, changed: Graph, by: str
) -> Coded:
    weight = layer.matrix(layer.weight.tensor.detach()).double()
    bias = layer.bias.tensor.detach().double() if layer.bias is not None else torch.zeros(len(weight)).double()
    moments = Moments(layer.columns, layer.outputs)
    for x, y in zip(run.inputs(layer), run.targets(layer, was), strict=True):
        moments.add(layer.rows_of_input(x), layer.rows_of_output(y))
    moments.check(layer.node.label)
    free = layer.bias is not None
    if moments.rows < ENOUGH_ROWS * layer.columns:
        problem = change_of_output(moments, weight, bias, RIDGE, free=free)
    else:
        problem = least_error(moments, weight, bias, RIDGE, free=free)
    coded = solve(problem, grid, group)
    shifted = layer.shifted(problem.bias(coded.values) - bias) if layer.bias is not None else None
    if shifted is not None:
        set_weight(changed, *shifted, by=by)
    return coded
