"""Rotations that follow the error of the rounded network (Liu et al. 2024, SpinQuant).

Weights are rounded with a scale for each row, what layers read with one scale and zero for all; gradients pass rounding
as if it were not there. The loss is the squared error of the outputs, as a share of their squares (the paper trains
the language model's own loss, for which labels would be needed). Steps stay among orthogonal matrices (Li et al. 2020,
Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform):

    A = G R' - R G'        R <- (1 + t A / 2)^-1 (1 - t A / 2) R
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from regauge.ir.gauge.frames import Frame
from regauge.ir.gauge.insertion import fibres, mixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.weight_gradients import Differentiable
from regauge.passes.quantization.grid import Form, Grid

_REACH = 1.0  # the norm of t A at the start, which falls to nothing


def learned(
    graph: Graph,
    start: Mapping[Frame, torch.Tensor],
    batches: Sequence[Any],
    bits: int,
    activation_bits: int,
    steps: int,
) -> tuple[dict[Frame, torch.Tensor], float, float]:
    """The best matrices that were met, and the loss on all batches with those at the start and with these."""
    network = _Rounded(graph, list(start), batches, Grid(bits), Grid(activation_bits, symmetric=False))
    matrices = [matrix.clone() for matrix in start.values()]
    best, first = matrices, network.whole(matrices)
    least = first
    for step, place in enumerate(islice(cycle(range(len(batches))), steps)):
        given = [matrix.clone().requires_grad_(True) for matrix in matrices]
        gradients = torch.autograd.grad(network.loss(given, place), given, allow_unused=True)
        reach = _REACH * (1 - step / steps)
        matrices = [r if g is None else _cayley(r, g, reach) for r, g in zip(matrices, gradients, strict=True)]
        if (step + 1) % max(1, steps // 6) == 0:
            loss = network.whole(matrices)
            if loss < least:
                best, least = matrices, loss
    return dict(zip(start, best, strict=True)), first, least


def _cayley(matrix: torch.Tensor, gradient: torch.Tensor, reach: float) -> torch.Tensor:
    """A step against the gradient, so long that the generator t A has the norm ``reach``."""
    skew = gradient @ matrix.T - matrix @ gradient.T
    norm = float(torch.linalg.matrix_norm(skew))
    if norm == 0:
        return matrix
    skew = skew * (reach / norm)
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    found: torch.Tensor = torch.linalg.solve(eye + skew / 2, (eye - skew / 2) @ matrix)
    return found


class _Rounded:
    """The graph with weights that matrices rotate, rounded where layers read them."""

    def __init__(
        self, graph: Graph, frames: Sequence[Frame], batches: Sequence[Any], weights: Grid, read: Grid
    ) -> None:
        self.batches, self.weights, self.read = batches, weights, read
        self.targets = [graph.run(batch) for batch in batches]
        self.layers = {n: layer for n in graph.nodes if (layer := layer_of(n)) is not None and n.op != "conv"}
        self.network = Differentiable(graph, [], replace=self._rounded)
        self.steps: dict[Parameter, list[tuple[int, int, torch.Tensor, bool]]] = {}
        for place, frame in enumerate(frames):
            for sides, written in ((frame.writers, True), (frame.readers, False)):
                for side in sides:
                    lines = torch.from_numpy(fibres(graph.axes.of[side.parameter][side.axis], side.number))
                    self.steps.setdefault(side.parameter, []).append((place, side.axis, lines, written))
        self.own: dict[Parameter, torch.Tensor] = {p: p.tensor.detach().double() for p in self.steps}

    def loss(self, matrices: Sequence[torch.Tensor], place: int) -> torch.Tensor:
        by_weight = {layer.weight: layer for layer in self.layers.values()}
        given = {}
        for parameter, steps in self.steps.items():
            tensor = self.own[parameter]
            for which, axis, lines, _ in steps:
                tensor = mixed(axis, lines, matrices[which])(tensor)  # the inverse transpose is the matrix itself
            assert isinstance(parameter.dtype, torch.dtype)
            given[parameter.name] = self._rows(by_weight.get(parameter), tensor).to(parameter.dtype)
        outputs = self.network.run(self.batches[place], given)
        pairs = [(a, b) for a, b in zip(outputs, self.targets[place], strict=True) if b.is_floating_point()]
        return torch.stack([(a - b).double().square().sum() / b.double().square().sum() for a, b in pairs]).mean()

    def whole(self, matrices: Sequence[torch.Tensor]) -> float:
        with torch.no_grad():
            return sum(float(self.loss(matrices, place)) for place in range(len(self.batches))) / len(self.batches)

    def _rows(self, layer: Layer | None, tensor: torch.Tensor) -> torch.Tensor:
        if layer is None:
            return tensor
        rows = layer.matrix(tensor.detach())
        given = layer.matrices_as_stored(Form(self.weights, rows.shape[1]).rounded(rows).values[None])
        return tensor + (given - tensor.detach())

    def _rounded(self, node: Node, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        if node not in self.layers or node.inputs[0] is not value or isinstance(value, Parameter):
            return tensor
        x = tensor.detach()
        scale, zero = self.read.span(x.amin(), x.amax())
        return tensor + ((self.read.codes(x, scale, zero) - zero) * scale - x)
