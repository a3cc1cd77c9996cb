"""Factors of one layer after the other on data, each with the inputs that the factorized layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.metrics import Metric, Pair, gradient_metrics, in_metric
from regauge.passes.factorization.problems import Problem, matrices_of

RIDGE = 1e-4  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, factors would be fitted to it rather than to the layer


@dataclass(frozen=True)
class Sensitivity:
    """How much errors of what layers give matter, by the name of the weight: metrics of outputs, in bands where places
    of a convolution meet."""

    metrics: Mapping[str, torch.Tensor]
    bands: Mapping[str, Spectrum] = field(default_factory=dict)
    metric: Metric = "output-aware"
    pairs: Mapping[str, Pair] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: Graph,
        layers: Sequence[Layer],
        batches: Sequence[Any],
        seed: int,
        metric: Metric = "output-aware",
    ) -> Sensitivity:
        """By gradients of the outputs along random directions."""
        bands = output_bands(graph, layers if metric == "output-aware" else [], batches, seed)
        metrics = output_metrics(graph, [layer.weight.name for layer in layers], batches, seed)
        return cls(metrics, bands, metric, gradient_metrics(graph, layers, batches, seed, metric))

    def problems(
        self,
        layer: Layer,
        quadratics: Sequence[Quadratic],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> list[Problem]:
        """Those of the blocks of a layer, with what it is given and gives, for each batch."""
        name = layer.weight.name
        bands: Bands = ()
        if name in self.bands:
            spectrum = Spectrum(layer.columns)
            for x, y in zip(inputs, outputs, strict=True):
                spectrum.add(layer.rows_of_input(x) - quadratics[0].input_mean.to(x.dtype), y.shape[2:])
            bands = metrics_in_bands(spectrum, self.bands[name], RIDGE)
        pairs = zip(quadratics, self.metrics[name], strict=True)
        found = [Problem(layer, own.optimum, own.hessian, metric, bands) for own, metric in pairs]
        pair = self.pairs.get(name)
        return [in_metric(own, self.metric, inputs, block, pair) for block, own in enumerate(found)]


def problems_on_data(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], sensitivity: Sensitivity
) -> Iterator[list[Problem]]:
    """Of the blocks of each layer in the order of the graph, with the inputs that it has there."""
    by_node, run = {layer.node: layer for layer in layers}, Lockstep(graph, batches)
    for node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        inputs, none = run.values(node.inputs[0]), torch.zeros(layer.outputs, dtype=torch.float64)
        found = [
            change_of_output(moments, weight, none, RIDGE, free=_is_free(layer))
            for moments, weight in zip(_moments(layer, inputs), matrices_of(layer), strict=True)
        ]
        run.execute(node)
        yield sensitivity.problems(layer, found, inputs, run.values(node.output))


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
    """The links of ``layers``, which are those of ``changed``, a copy of ``original``: see :func:`refitted`."""
    found = dict[str, list[Link]]()

    def matrices(problems: Sequence[Problem]) -> torch.Tensor:
        name = problems[0].layer.weight.name
        found[name], result = links_of(FORMS[picked[name].form], problems, picked[name].numbers)
        return result

    for layer in refitted(original, changed, layers, matrices, batches, sensitivity, by=by):
        yield layer, found.pop(layer.weight.name)


def refitted(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    matrices_for: Callable[[Sequence[Problem]], torch.Tensor],
    batches: Sequence[Any],
    sensitivity: Sensitivity,
    *,
    by: str,
) -> Iterator[Layer]:
    """Each of ``layers``, which are those of ``changed``, a copy of ``original``, once it has other matrices.

    ``matrices_for`` gives them [blocks, outputs, columns] for what the layer should do with the inputs that it has by
    then, a problem for each block. They are written into ``changed``, and biases that make up for them.
    """
    by_node = {layer.node: layer for layer in layers}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        inputs = run.inputs(layer)
        moments = _moments(layer, inputs, run.targets(layer, was))
        quadratics = [_quadratic(layer, *own) for own in zip(moments, matrices_of(layer), _biases(layer), strict=True)]
        matrices = matrices_for(sensitivity.problems(layer, quadratics, inputs, run.before.values(was.output)))
        if _is_free(layer):
            wanted = torch.cat([own.bias(matrix) for own, matrix in zip(quadratics, matrices, strict=True)])
            shifted = layer.shifted(wanted - _biases(layer).flatten())
            if shifted is not None:
                set_weight(changed, *shifted, by=by)
        set_weight(changed, layer.weight, layer.from_matrices(matrices), by=by)
        yield layer


def _moments(
    layer: Layer, inputs: Sequence[torch.Tensor], targets: Iterable[torch.Tensor] | None = None
) -> list[Moments]:
    """Of each block, over all batches."""
    found = [Moments(layer.columns, 0 if targets is None else layer.outputs) for _ in range(layer.blocks)]
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
    pairs = ((x, None) for x in inputs) if targets is None else zip(inputs, targets, strict=True)
    for x, y in pairs:
        rows = [None] * layer.blocks if y is None else layer.blocks_of_output(y)
        for moments, x_rows, y_rows in zip(found, layer.blocks_of_input(x), rows, strict=True):
            moments.add(x_rows, y_rows)
    for moments in found:
        moments.check(layer.node.label)
    return found


def _quadratic(layer: Layer, moments: Moments, weight: torch.Tensor, bias: torch.Tensor) -> Quadratic:
    enough = moments.rows >= ENOUGH_ROWS * layer.columns
    solve = least_error if enough else change_of_output
    return solve(moments, weight, bias, RIDGE, free=_is_free(layer))


def _biases(layer: Layer) -> torch.Tensor:
    """[blocks, outputs]"""
    if layer.bias is None:
        return torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
    return layer.bias.tensor.detach().double().reshape(layer.blocks, layer.outputs)


def _is_free(layer: Layer) -> bool:
    """Whether a constant can be added to what the layer gives."""
    return layer.bias is not None or layer.norm is not None
