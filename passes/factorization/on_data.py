"""Factors of one layer after the other on data, each with the inputs that the factorized layers before it give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.ir.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output, least_error
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.factorization.bands import Bands, Spectrum, metrics_in_bands, output_bands
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.problems import Problem, matrix_of

RIDGE = 1e-4  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, factors would be fitted to it rather than to the layer


@dataclass(frozen=True)
class Sensitivity:
    """How much errors of what layers give matter, by the name of the weight: metrics of outputs, in bands where places
    of a convolution meet."""

    metrics: Mapping[str, torch.Tensor]
    bands: Mapping[str, Spectrum]

    @classmethod
    def of(cls, graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], seed: int) -> Sensitivity:
        """By gradients of the outputs along random directions."""
        names = [layer.weight.name for layer in layers]
        return cls(output_metrics(graph, names, batches, seed), output_bands(graph, layers, batches, seed))

    def problem(
        self, layer: Layer, quadratic: Quadratic, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> Problem:
        """A layer with what it is given and gives, for each batch."""
        name = layer.weight.name
        bands: Bands = ()
        if name in self.bands:
            spectrum = Spectrum(layer.columns)
            for x, y in zip(inputs, outputs, strict=True):
                spectrum.add(layer.rows_of_input(x) - quadratic.input_mean.to(x.dtype), y.shape[2:])
            bands = metrics_in_bands(spectrum, self.bands[name], RIDGE)
        return Problem(layer, quadratic.optimum, quadratic.hessian, self.metrics[name], bands)


def problems_on_data(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], sensitivity: Sensitivity
) -> Iterator[Problem]:
    """Of each layer in the order of the graph, with the inputs that it has there."""
    by_node, run = {layer.node: layer for layer in layers}, Lockstep(graph, batches)
    for node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        inputs, moments = run.values(node.inputs[0]), Moments(layer.columns)
        for x in inputs:
            moments.add(layer.rows_of_input(x))
        moments.check(node.label)
        weight = matrix_of(layer)
        found = change_of_output(moments, weight, weight.new_zeros(len(weight)), RIDGE, free=_is_free(layer))
        run.execute(node)
        yield sensitivity.problem(layer, found, inputs, run.values(node.output))


def links_on_data(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    picked: Mapping[str, Choice],
    batches: Sequence[Any],
    sensitivity: Sensitivity,
    *,
    by: str,
) -> Iterator[tuple[Layer, list[Link]]]:
    """The links of ``layers``, which are those of ``changed``, a copy of ``original``.

    What they multiply by is written into ``changed``, and biases that make up for it.
    """
    by_node = {layer.node: layer for layer in layers}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        inputs, targets = run.inputs(layer), run.targets(layer, was)
        moments = Moments(layer.columns, layer.outputs)
        for x, y in zip(inputs, targets, strict=True):
            moments.add(layer.rows_of_input(x), layer.rows_of_output(y))
        moments.check(node.label)
        quadratic = _quadratic(layer, moments)
        problem = sensitivity.problem(layer, quadratic, inputs, targets)
        choice = picked[layer.weight.name]
        links, matrix = FORMS[choice.form].links(problem, choice.ranks)
        if _is_free(layer):
            shifted = layer.shifted(quadratic.bias(matrix) - _bias(layer))
            if shifted is not None:
                set_weight(changed, *shifted, by=by)
        set_weight(changed, layer.weight, layer.stored(matrix), by=by)
        yield layer, links


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
