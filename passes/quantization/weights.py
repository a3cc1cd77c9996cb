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
from regauge.passes.quantization.grid import Coded, Form, Grid, rounded
from regauge.passes.quantization.rounding import by_columns, by_descent

Method: TypeAlias = Literal["nearest", "columns", "descent"]
Solver: TypeAlias = Callable[[Quadratic, Grid, int], Coded]

_SOLVERS: Mapping[Method, Solver] = {"columns": by_columns, "descent": by_descent}

RIDGE = 1e-2  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, weights would be fitted to it rather than kept


def coded_on_data(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    forms: Mapping[str, Form],
    method: Method | None,
    *,
    by: str,
) -> dict[str, Coded]:
    """The codes of ``layers``, which are those of ``changed``, a copy of ``original``, by the names of their weights,
    as are their forms. Without a method that of the form's bits is taken.

    What they stand for is written into ``changed``, and biases that make up for it. Layers of several blocks are
    rounded to the nearest codes.
    """
    by_node, found = {layer.node: layer for layer in layers}, dict[str, Coded]()
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        name = layer.weight.name
        form = forms[name]
        if layer.blocks > 1:
            rows = layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1)
            coded = rounded(rows, form.grid, form.group)
        else:
            coded = _solved(run, layer, was, form, _SOLVERS[method or best_method(form)], changed, by)
        values = coded.values.reshape(layer.blocks, layer.outputs, layer.columns)
        set_weight(changed, layer.weight, layer.from_matrices(values), by=by)
        found[name] = coded
    return found


def best_method(form: Form) -> Method:
    """How weights are rounded on data where nothing is said: rounding to 8 bits loses too little for more."""
    return "columns" if form.grid.bits == 8 else "descent"


def _solved(run: SideBySide, layer: Layer, was: Node, form: Form, solve: Solver, changed: Graph, by: str) -> Coded:
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
    coded = solve(problem, form.grid, form.group)
    shifted = layer.shifted(problem.bias(coded.values) - bias) if layer.bias is not None else None
    if shifted is not None:
        set_weight(changed, *shifted, by=by)
    return coded
