"""Factors of one layer after the other on data, each with the inputs that the factorized layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output, least_error
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.problems import Problem, matrix_of

RIDGE = 1e-4  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, factors would be fitted to it rather than to the layer


def problems_on_data(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], metrics: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """Of each layer in the order of the graph, with the inputs that it has there; ``metrics`` are those of outputs."""
    for layer, moments in visit_moments(graph, layers, batches):
        weight = matrix_of(layer)
        found = change_of_output(moments, weight, weight.new_zeros(len(weight)), RIDGE, free=_is_free(layer))
        yield Problem(layer, weight, found.hessian, metrics[layer.weight.name])


def links_on_data(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    picked: Mapping[str, Choice],
    batches: Sequence[Any],
    metrics: Mapping[str, torch.Tensor],
    *,
    by: str,
) -> Iterator[tuple[Layer, list[Link]]]:
    """The links of ``layers``, which are those of ``changed``, a copy of ``original``: see :func:`refitted`."""
    found = dict[str, list[Link]]()

    def matrix(problem: Problem) -> torch.Tensor:
        name = problem.layer.weight.name
        found[name], result = FORMS[picked[name].form].links(problem, picked[name].numbers)
        return result

    for layer in refitted(original, changed, layers, matrix, batches, metrics, by=by):
        yield layer, found.pop(layer.weight.name)


def refitted(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    matrix_for: Callable[[Problem], torch.Tensor],
    batches: Sequence[Any],
    metrics: Mapping[str, torch.Tensor],
    *,
    by: str,
) -> Iterator[Layer]:
    """Each of ``layers``, which are those of ``changed``, a copy of ``original``, once it has another matrix.

    ``matrix_for`` gives it for what the layer should do with the inputs that it has by then. It is written into
    ``changed``, and biases that make up for it.
    """
    by_node = {layer.node: layer for layer in layers}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        moments = Moments(layer.columns, layer.outputs)
        for x, y in zip(run.inputs(layer), run.targets(layer, was), strict=True):
            moments.add(layer.rows_of_input(x), layer.rows_of_output(y))
        moments.check(node.label)
        quadratic = _quadratic(layer, moments)
        problem = Problem(layer, quadratic.optimum, quadratic.hessian, metrics[layer.weight.name])
        matrix = matrix_for(problem)
        if _is_free(layer):
            shifted = layer.shifted(quadratic.bias(matrix) - _bias(layer))
            if shifted is not None:
                set_weight(changed, *shifted, by=by)
        set_weight(changed, layer.weight, layer.stored(matrix), by=by)
        yield layer


def _quadratic(layer: Layer, moments: Moments) -> Quadratic:
    enough = moments.rows >= ENOUGH_ROWS * layer.columns
    solve = least_error if enough else change_of_output
    return solve(moments, matrix_of(layer), _bias(layer), RIDGE, free=_is_free(layer))


def _bias(layer: Layer) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros(layer.outputs, dtype=torch.float64)
    return layer.bias.tensor.detach().double()


def _is_free(layer: Layer) -> bool:
    """Whether a constant can be added to what the layer gives."""
    return layer.bias is not None or layer.norm is not None
