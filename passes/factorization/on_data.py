"""Factors of one layer after the other on data, each with the inputs that the factorized layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.graph import Graph
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layer_errors import RIDGE, errors_of, set_matrices
from regauge.passes.calibration.layer_moments import moments_of
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.factorization.bands import Bands, Spectrum, metrics_in_bands, output_bands
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.metrics import Metric, Pair, gradient_metrics, in_metric
from regauge.passes.factorization.problems import Problem


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
        few: Gram | None = None
        if name in self.bands:
            spectrum = _spectrum(layer, quadratics[0], inputs, outputs)
            bands = metrics_in_bands(spectrum, self.bands[name], RIDGE)
            if spectrum.few:
                rows = torch.cat([part for _, own in sorted(spectrum.rows.items()) for part in own])
                few = Gram.of_rows(rows, quadratics[0].ridge)
        pairs = zip(quadratics, self.metrics[name], strict=True)
        found = [Problem(layer, own.optimum, own.hessian, metric, bands, few) for own, metric in pairs]
        pair = self.pairs.get(name)
        return [in_metric(own, self.metric, inputs, block, pair) for block, own in enumerate(found)]


def _spectrum(
    layer: Layer, quadratic: Quadratic, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> Spectrum:
    """That of what a convolution is given, by rows as long as they are fewer than half of its columns."""
    most, count = layer.columns // 2, sum(y.numel() // y.shape[1] for y in outputs)
    spectrum = Spectrum(layer.columns, quadratic.hessian, most, few=count <= most)
    if not spectrum.few:
        spectrum.total = quadratic.hessian.clone()
        spectrum.total.diagonal().sub_(quadratic.ridge)
    for x, y in zip(inputs, outputs, strict=True):
        spectrum.add(layer.rows_of_input(x) - quadratic.input_mean.to(x.dtype), y.shape[2:])
    return spectrum


def problems_on_data(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], sensitivity: Sensitivity
) -> Iterator[list[Problem]]:
    """Of the blocks of each layer in the order of the graph, with the inputs that it has there."""
    by_node, run = {layer.node: layer for layer in layers}, Lockstep(graph, batches)
    for node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        inputs = run.values(node.inputs[0])
        errors = errors_of(layer, moments_of(layer, inputs, ends=_ends(layer, run)))
        run.execute(node)
        yield sensitivity.problems(layer, errors, inputs, run.values(node.output))


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
        ends = _ends(layer, run.now)  # rows may be sorted otherwise than they were: there are no targets for them
        targets = run.targets(layer, was) if ends is None else None
        errors = errors_of(layer, moments_of(layer, inputs, targets, ends))
        matrices = matrices_for(sensitivity.problems(layer, errors, inputs, run.before.values(was.output)))
        set_matrices(changed, layer, matrices, errors, by=by)
        yield layer


def _ends(layer: Layer, run: Lockstep) -> Sequence[torch.Tensor] | None:
    """Of experts where the rows of each end, for each batch."""
    return run.values(layer.node.inputs[2]) if layer.node.op == "grouped_mm" else None
