"""In what factors are the best: the metrics of inputs (A) and of outputs (B) that a layer's error is told in.

output-aware   A second moments of inputs, B outer products of gradients; of convolutions by bands of frequencies
whitened       A second moments of inputs alone (SVD-LLM, Wang et al. 2024)
asvd           A the mean size of each input to a power (ASVD, Yuan et al. 2023, section 3.2)
fwsvd          A and B diagonal: what the squared gradients of the weight sum up to by inputs and by outputs. FWSVD (Hsu
               et al. 2022) takes one side alone, and which axis that is hangs on how a weight is stored
gfwsvd         A and B full: the Kronecker product nearest to the second moments of the weight's gradients (Chekalina et
               al. 2025), by two turns of the power method (Van Loan and Pitsianis 1993)
plain          none: singular values of the weight
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import labelled
from regauge.passes.calibration.weight_gradients import example_gradients
from regauge.passes.factorization.problems import Problem

Metric: TypeAlias = Literal["output-aware", "whitened", "asvd", "fwsvd", "gfwsvd", "plain"]

_POWER = 0.5  # of the mean size of inputs
_TURNS = 2
_SMALL = 1e-6  # share of the mean of a diagonal, by which all metrics of gradients are positive definite

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Metrics of inputs [blocks, columns, columns] and of outputs [blocks, outputs, outputs]."""


def gradient_metrics(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], seed: int, metric: Metric
) -> dict[str, Pair]:
    """Those that take gradients of weights, by the name of the weight; for the other metrics nothing."""
    if metric == "fwsvd":
        squares = squared_gradients(graph, layers, batches, seed)
        return {name: _marginals(own) for name, own in squares.items()}
    return _nearest_products(graph, layers, batches, seed) if metric == "gfwsvd" else {}


def squared_gradients(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], seed: int
) -> dict[str, torch.Tensor]:
    """The mean over examples of squared gradients, [blocks, outputs, columns], by the name of the weight."""
    sums, count = dict[str, torch.Tensor](), 0
    for found in _gradients(graph, layers, batches, seed):
        count += 1
        for name, own in found.items():
            sums[name] = sums.get(name, torch.zeros_like(own)) + own.square()
    return {name: total / max(1, count) for name, total in sums.items()}


def in_metric(
    problem: Problem, metric: Metric, inputs: Sequence[torch.Tensor], block: int, pair: Pair | None
) -> Problem:
    """The problem of one block of a layer, which is output-aware as given, in another metric."""
    if metric == "output-aware":
        return problem
    if metric == "whitened":
        return replace(problem, outputs=None, bands=())
    if metric == "asvd":
        return replace(problem, inputs=_sizes(problem.layer, inputs, block), outputs=None, bands=(), few=None)
    if pair is not None:
        return replace(problem, inputs=pair[0][block], outputs=pair[1][block], bands=(), few=None)
    return replace(problem, inputs=None, outputs=None, bands=(), few=None)


def _sizes(layer: Layer, inputs: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    """diag(mean |x|^(2 power)) [columns, columns]"""
    total, count = torch.zeros(layer.columns, dtype=torch.float64), 0
    for x in inputs:
        rows = x if layer.node.op == "grouped_mm" else list(layer.blocks_of_input(x))[block]  # of all experts
        total += rows.abs().sum(0, dtype=torch.float64)
        count += len(rows)
    mean = total / max(1, count)
    return (mean.clamp(min=_SMALL * float(mean.mean()) + 1e-30) ** (2 * _POWER)).diag()


def _marginals(squares: torch.Tensor) -> Pair:
    by_input, by_output = squares.sum(1), squares.sum(2)
    whole = squares.sum((1, 2), keepdim=True).clamp(min=1e-300)
    return _positive(by_input.diag_embed() / whole), _positive(by_output.diag_embed())


def _nearest_products(graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], seed: int) -> dict[str, Pair]:
    pairs = dict[str, Pair]()
    for _ in range(_TURNS):
        sums = dict[str, Pair]()
        for found in _gradients(graph, layers, batches, seed):
            for name, own in found.items():
                inputs, outputs = pairs.get(name, (None, None))
                right = own if inputs is None else own @ inputs / inputs.square().sum()
                left = own if outputs is None else outputs @ own / outputs.square().sum()
                before = sums.get(name, (torch.zeros(()), torch.zeros(())))
                sums[name] = (before[0] + own.mT @ left, before[1] + right @ own.mT)
        pairs = sums
    return {name: (_positive(inputs), _positive(outputs)) for name, (inputs, outputs) in pairs.items()}


def _positive(metric: torch.Tensor) -> torch.Tensor:
    diagonal = metric.diagonal(dim1=1, dim2=2)
    diagonal.add_((diagonal.mean(1, keepdim=True) * _SMALL).clamp(min=1e-30))
    return metric


def _gradients(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], seed: int
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Of each example, as matrices in double precision."""
    own = {layer.weight: layer for layer in layers}
    given = [labelled(graph, batch) for batch in batches]
    for found in example_gradients(graph, list(own), given, None, seed):
        yield {parameter.name: own[parameter].matrices(gradient).double() for parameter, gradient in found.items()}
