"""Importance by data: how much the outputs change when an index goes and the layers behind it make up for it.

For every layer that contracts a Dim, with H = X'X of its inputs, removing the columns P of an index costs

    dE = tr( W_P ([H^-1]_PP)^-1 W_P' )      after   W -= W_P ([H^-1]_PP)^-1 [H^-1]_P:,   the optimal brain surgeon

(Hassibi and Stork 1993; in blocks Kurtic et al. 2023, ZipLM). The cost of an index is the sum over all layers that
contract it; the index that costs least goes, its layers are updated, and the rest is judged anew. Rows of W are scaled
by how much the graph's outputs move with the layer's (:mod:`regauge.passes.calibration.gradients`), so that costs in
different layers are squared errors of the outputs, and all Dims can be ranked together.

An index of a Dim that no such layer contracts (the head size of queries and keys) costs the squared change of the
outputs to first order when its entries become zero, E[(g' a)^2] with g the gradient of a value that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from regauge.ir.extents import Dim, leaves
from regauge.ir.graph import Graph, Value
from regauge.ir.groups import Group
from regauge.ir.interpret import run
from regauge.ir.lockstep import Lockstep
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Moments, ridge
from regauge.passes.pruning.scores import Scores, accumulate

RIDGE = 1e-2  # share of the mean square of a column
MEMORY = 2 << 30  # bytes of Gram matrices that are held at a time
_STEPS = 96  # a Dim is taken apart in about so many steps: long ones lose several indices at a time


def distortion_scores(graph: Graph, groups: Sequence[Group], batches: Sequence[Any], seed: int = 0) -> Scores:
    """One score per index of each group's Dim: the squared change of the outputs that its removal adds, per example.

    Within a Dim scores rise in the order in which indices go. Memory: what one batch needs with gradients, and
    :data:`MEMORY` for Gram matrices; the graph runs once per so many of them.
    """
    readers = _readers(graph, [group.dim for group in groups])
    sensitivity, first_order = _gradients(graph, readers, batches, seed)
    found: Scores = {}
    probe = _Probe(graph, batches)
    for part in _parts([dim for dim in readers if readers[dim]], readers):
        moments = _moments(graph, {layer for dim in part for layer in readers[dim]}, batches)
        for dim in part:
            shares = [_Share(graph, dim, layer, moments[layer], sensitivity[layer]) for layer in readers[dim]]
            found[dim] = _taken_apart(shares, int(dim.size), probe.change)
    for dim in readers:
        if not readers[dim]:
            found[dim] = first_order.get(dim, np.zeros(int(dim.size)))
    return found


def _readers(graph: Graph, dims: Sequence[Dim]) -> dict[Dim, list[Layer]]:
    """The layers that contract each Dim, every index of it in columns of its own."""
    found: dict[Dim, list[Layer]] = {dim: [] for dim in dims}
    for node in graph.nodes:
        layer = layer_of(node)
        contracted = leaves(graph.axes.of[layer.weight][layer.contracted]) if layer is not None else []
        for dim in contracted:
            if layer is not None and dim in found and contracted.count(dim) == 1:
                found[dim].append(layer)
    return found


def _parts(dims: Sequence[Dim], readers: dict[Dim, list[Layer]]) -> Iterator[list[Dim]]:
    """Dims whose layers' Gram matrices fit into memory together."""
    part: list[Dim] = []
    held: dict[Layer, int] = {}
    for dim in dims:
        new = {layer: 8 * (layer.columns + 1) ** 2 for layer in readers[dim]}
        if part and sum({**held, **new}.values()) > MEMORY:
            yield part
            part, held = [], {}
        part.append(dim)
        held |= new
    if part:
        yield part


def _moments(graph: Graph, layers: set[Layer], batches: Sequence[Any]) -> dict[Layer, Moments]:
    by_node = {layer.node: layer for layer in layers}
    found = {layer: Moments(layer.columns) for layer in layers}
    lockstep = Lockstep(graph, batches)
    for node in lockstep.steps():
        layer = by_node.get(node)
        for x in lockstep.values(node.inputs[0]) if layer is not None else ():
            found[by_node[node]].add(by_node[node].rows_of_input(x))
    for layer, moments in found.items():
        moments.check(layer.node.label)
    return found


# -- gradients ---------------------------------------------------------------------------------------------------------


def _gradients(
    graph: Graph, readers: dict[Dim, list[Layer]], batches: Sequence[Any], seed: int
) -> tuple[dict[Layer, torch.Tensor], Scores]:
    """Mean squares of the gradients at each layer's output rows, per example; first-order costs of the other Dims."""
    by_output = {layer.node.output: layer for found in readers.values() for layer in found}
    holders = _produced(graph, {dim for dim, found in readers.items() if not found})
    squares = {layer: torch.zeros(layer.outputs, dtype=torch.float64) for layer in by_output.values()}
    rows = dict.fromkeys(by_output.values(), 0)
    costs: Scores = {dim: np.zeros(int(dim.size)) for dim in holders}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        layer = by_output.get(value)
        if layer is not None:
            own = layer.rows_of_output(gradient).double().square()
            squares[layer] += own.sum(0)
            rows[layer] += len(own)
        for dim, held in holders.items():
            if held is value:
                costs[dim] += _first_order(graph, value, dim, tensor * gradient)

    values = [*by_output, *dict.fromkeys(holders.values())]
    visit_gradients(graph, batches, values, visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    means = {layer: total / max(1, rows[layer]) / examples for layer, total in squares.items()}
    return means, {dim: cost / examples for dim, cost in costs.items()}


def _produced(graph: Graph, dims: set[Dim]) -> dict[Dim, Value]:
    """The first computed value that has each of these Dims."""
    found: dict[Dim, Value] = {}
    for node in graph.nodes if dims else ():
        for value in node.outputs:
            for extent in graph.axes.of[value]:
                found.update({dim: value for dim in leaves(extent) if dim in dims and dim not in found})
    return found


def _first_order(graph: Graph, value: Value, dim: Dim, product: torch.Tensor) -> np.ndarray:
    """Per index of a Dim the squares, added over examples, of the sum of gradient times value over its entries."""
    axis = next(a for a, extent in enumerate(graph.axes.of[value]) if dim in leaves(extent))
    total = np.zeros(int(dim.size))
    others = [a for a in range(1, product.dim()) if a != axis]
    per_example = product.double().sum(others) if others else product.double()
    for row in per_example.numpy() if axis else [per_example.numpy()]:
        own = {dim: np.zeros(int(dim.size))}
        accumulate(graph.axes.of[value][axis], row, own)
        total += own[dim] ** 2
    return total


# -- the optimal brain surgeon -----------------------------------------------------------------------------------------


@dataclass
class _Share:
    """What one layer has to say about the indices of a Dim: its weight, rows scaled, and its inverse Hessian."""

    graph: Graph
    dim: Dim
    layer: Layer
    moments: Moments
    sensitivity: torch.Tensor
    weight: torch.Tensor = field(init=False)
    inverse: torch.Tensor = field(init=False)
    columns: torch.Tensor = field(init=False)
    scale: torch.Tensor = field(init=False)
    places: torch.Tensor = field(init=False)  # of the columns that are left, in the layer's matrix

    def __post_init__(self) -> None:
        gram = self.moments.gram
        matrix = self.layer.matrix(self.layer.weight.tensor.detach()).double()
        self.scale = self.sensitivity.clamp(min=max(1e-6 * float(self.sensitivity.mean()), 1e-30)).sqrt()[:, None]
        self.weight = torch.cat([matrix, matrix.new_zeros(len(matrix), 1)], 1) * self.scale
        self.inverse = torch.linalg.inv(gram + ridge(gram, RIDGE).diag())
        self.places = torch.arange(len(gram))
        self.columns = torch.from_numpy(self.layer.columns_of(self.graph, self.dim))

    def costs(self, alive: torch.Tensor) -> torch.Tensor:
        """dE of each index that is left, were it to go next."""
        columns = self.columns[alive]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        own = self.weight[:, columns].permute(1, 2, 0)  # index, column, row
        solved: torch.Tensor = torch.linalg.solve(blocks, own)
        return (own * solved).sum((1, 2))

    def remove(self, gone: torch.Tensor) -> None:
        """Take indices out and let the other columns make up for them; what is left gets smaller, and so faster."""
        columns = self.columns[gone].reshape(-1)
        kept = torch.ones(len(self.inverse), dtype=torch.bool)
        kept[columns] = False
        block, across = self.inverse[columns][:, columns], self.inverse[columns][:, kept]
        factor = torch.linalg.solve(block, across)
        self.weight = self.weight[:, kept] - self.weight[:, columns] @ factor
        self.inverse = self.inverse[kept][:, kept] - across.t() @ factor
        self.places = self.places[kept]
        self.columns = (torch.cumsum(kept, 0) - 1)[self.columns]

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters as they are now, by name: what the graph has to be run with."""
        solved = self.weight.new_zeros(len(self.weight), self.layer.columns + 1)
        solved[:, self.places] = self.weight / self.scale
        found = {self.layer.weight.name: self.layer.stored(solved[:, :-1])}
        shifted = self.layer.shifted(solved[:, -1])
        return found if shifted is None else {**found, shifted[0].name: shifted[1]}


def _taken_apart(shares: Sequence[_Share], size: int, change: Callable[[dict[str, torch.Tensor]], float]) -> np.ndarray:
    """Scores of all indices: what each adds when it goes, never less than what went before it.

    ``change`` measures how much the outputs change with other weights. What was added up is brought to that at a
    quarter and at half of the indices: errors at different places of an image may add up or cancel behind the layer.
    """
    alive = torch.arange(size)
    scores = np.zeros(size)
    highest, total = 0.0, 0.0
    many = max(1, size // _STEPS)
    marks, factors = [size - size // 4, size // 2], list[float]()
    while len(alive) > 1:
        costs = sum((share.costs(alive) for share in shares), torch.zeros(len(alive), dtype=torch.float64))
        order = torch.argsort(costs)[: min(many, len(alive) - 1)]
        for place in order.tolist():
            highest = max(highest, float(costs[place]))
            scores[int(alive[place])] = highest
        total += float(costs[order].sum())
        for share in shares:
            share.remove(alive[order])
        left = torch.ones(len(alive), dtype=torch.bool)
        left[order] = False
        alive = alive[left]
        if marks and len(alive) <= marks[0] and total > 0:
            marks.pop(0)
            factors.append(change({k: v for share in shares for k, v in share.weights().items()}) / total)
    costs = sum((share.costs(alive) for share in shares), torch.zeros(1, dtype=torch.float64))
    scores[int(alive[0])] = max(highest, float(costs[0]))
    return scores * float(np.median(factors)) if factors else scores


class _Probe:
    """The outputs of a graph on a few examples, to compare with what it gives with other weights."""

    def __init__(self, graph: Graph, batches: Sequence[Any]) -> None:
        self.graph = graph
        self.batches = batches[:1]
        self.expected = [self._outputs(batch, {}) for batch in self.batches]
        self.examples = max(1, sum(examples_in(batch) for batch in self.batches))

    def _outputs(self, batch: Any, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = run(self.graph, batch, weights=weights)
        return [y.double() for y in found if isinstance(y, torch.Tensor) and y.is_floating_point()]

    def change(self, weights: dict[str, torch.Tensor]) -> float:
        """The squared change of the outputs per example."""
        total = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            for y, before in zip(self._outputs(batch, weights), expected, strict=True):
                total += float((y - before).square().sum())
        return total / self.examples
