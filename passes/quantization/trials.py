"""What each layer alone would be in each of several forms: what mixed precision chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from regauge.ir.graph import Graph
from regauge.ir.memory.mapped import mapped
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output
from regauge.passes.quantization.formats import Format
from regauge.passes.quantization.weights import RIDGE


class Trial(NamedTuple):
    """A layer in one form.

    ``data`` are the numbers that its codes stand for, in a temporary file, and a bias that makes up for them, by the
    names of the parameters; ``off`` is |Q(W) - W|^2.
    """

    data: Mapping[str, torch.Tensor]
    off: float


Trials: TypeAlias = Mapping[str, Sequence[Trial]]
"""By the name of a layer's weight one for each of its forms."""


def trials(
    graph: Graph, layers: Sequence[Layer], forms: Mapping[str, Sequence[Format]], batches: Sequence[Any] | None
) -> Trials:
    """Each layer in each of its ``forms``, all others as they are: coded by columns on data (GPTQ), else rounded."""
    if batches is None:
        return {layer.weight.name: _tried(layer, forms[layer.weight.name], None) for layer in layers}
    by_node, run, found = {layer.node: layer for layer in layers}, Lockstep(graph, batches), dict[str, list[Trial]]()
    for node in run.steps():
        if node in by_node:
            layer = by_node[node]
            problem = _problem(layer, run.values(node.inputs[0])) if layer.blocks == 1 else None
            found[layer.weight.name] = _tried(layer, forms[layer.weight.name], problem)
    return found


def _problem(layer: Layer, inputs: Sequence[torch.Tensor]) -> Quadratic:
    """The change of the layer's output as a function of its weight."""
    moments = Moments(layer.columns)
    for x in inputs:
        moments.add(layer.rows_of_input(x))
    moments.check(layer.node.label)
    weight = layer.matrix(layer.weight.tensor.detach()).double()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.tensor.detach().double()
    return change_of_output(moments, weight, bias, RIDGE, free=layer.bias is not None)


def _tried(layer: Layer, forms: Sequence[Format], problem: Quadratic | None) -> list[Trial]:
    weight = layer.matrices(layer.weight.tensor.detach()).double()
    rows, found = weight.flatten(0, 1), list[Trial]()
    for form in forms:
        coded = form.rounded(rows) if problem is None else form.fitted(problem, "columns")
        data = {layer.weight.name: mapped(layer.from_matrices(coded.values.reshape(weight.shape)))}
        if problem is not None and layer.bias is not None:
            bias = layer.bias.tensor.detach()
            data[layer.bias.name] = problem.bias(coded.values).to(bias.dtype)
        found.append(Trial(data, float((coded.values - rows).square().sum())))
    return found
