"""Importance by data: how much the outputs change when an index goes and the layers behind it make up for it.

For every layer that contracts a Dim, with H = X'X of its inputs, removing the columns P of an index costs

    dE = tr( W_P ([H^-1]_PP)^-1 W_P' )      after   W -= W_P ([H^-1]_PP)^-1 [H^-1]_P:,   the optimal brain surgeon

(Hassibi and Stork 1993; in blocks Kurtic et al. 2023, ZipLM). The cost of an index is the sum over all layers that
contract it; the index that costs least goes, its layers are updated, and the rest is judged anew
(:mod:`regauge.passes.pruning.surgeon`). Rows of W are scaled by how much the graph's outputs move with the layer's
(:mod:`regauge.passes.calibration.gradients`), so that costs in different layers are squared errors of the outputs, and
all Dims can be ranked together.

An index of a Dim that no such layer contracts (the head size of queries and keys) costs the squared change of the
outputs to first order when its entries become zero, E[(g' a)^2] with g the gradient of a value that has it. Where
queries and keys share a Dim with values, which a layer does contract, it costs both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from regauge.ir.cost import figures
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.groups import Group
from regauge.ir.dims.kept import numbered
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.lockstep import HELD, Lockstep
from regauge.passes.allocation.choices import Counts
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer, contracting, layer_of
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.probe import Probe
from regauge.passes.pruning.scores import Scores, profile, summed
from regauge.passes.pruning.surgeon import MEMORY, Share, taken_apart, weights_without
from regauge.passes.pruning.weight_scores import magnitudes

_READ = 4 << 30  # bytes of weights that are read to measure the Dims of a kind: of a large model only a few are


def distortion_scores(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Any], seed: int = 0, counts: Counts | None = None
) -> Scores:
    """One score per index of each group's Dim: the squared change of the outputs that its removal adds, per example.

    Of a group with majors for each index in each index of these, [*sizes of the majors, size]. Within a Dim, in each
    of its majors, scores rise in the order in which indices go. The graph runs once on all batches side by side, and a
    Dim is taken apart as soon as the last layer that contracts it has been fed. Memory: what one batch needs with
    gradients, the moments of the layers that are still needed (in temporary files where they are many), and
    :data:`regauge.passes.pruning.surgeon.MEMORY` for the Dim that is taken apart.

    Where it is known how many indices each Dim keeps, ``counts``, scores say which these are, and nothing else.
    """
    layers = [layer for _, node in graph.walk() if (layer := layer_of(node, blocks=True, shared=True, turned=True))]
    readers = contracting(graph, [group.dim for group in groups], layers)
    groups = _told_apart(graph, groups, readers)
    sensitivity, first_order = _gradients(graph, groups, readers, batches, seed)
    found = _Ordering(graph, groups, readers, sensitivity, first_order, batches, counts).run()
    unseen = [group for group in groups if group.dim not in found]
    if unseen:  # what data says nothing about goes by its weights, at the scale of the others
        typical = float(np.mean([profile(scores).mean() for scores in found.values()])) if found else 1.0
        for dim, members in magnitudes(graph, unseen, 2).items():
            scores = np.sqrt(np.sum(members, 0))
            found[dim] = scores / max(float(profile(scores).mean()), 1e-30) * typical
    return found


class _Ordering:
    """One run of the graph that gathers moments, and takes each Dim apart when all that read it have been fed."""

    def __init__(
        self,
        graph: Graph,
        groups: Sequence[Group],
        readers: dict[Dim, list[Layer]],
        sensitivity: dict[Layer, torch.Tensor],
        first_order: Scores,
        batches: Sequence[Any],
        counts: Counts | None = None,
    ) -> None:
        self.graph, self.readers, self.sensitivity, self.first_order = graph, readers, sensitivity, first_order
        self.groups = {group.dim: group for group in groups}
        self.batches, self.counts = batches, counts
        self.probe = Probe(graph, batches[:1])
        self.measured = self._measured() if counts is None else set()  # which go within a Dim no factor says
        self.moments: dict[Hashable, list[Moments]] = {}
        self.wanted = Counter(layer.source for layers in readers.values() for layer in layers)
        self.waiting = {dim: {layer.node for layer in layers} for dim, layers in readers.items() if layers}
        self.by_node: dict[Node, Layer] = {layer.node: layer for layers in readers.values() for layer in layers}
        self.feeders: dict[Hashable, Node] = {}  # in regions: of layers that read the same rows, the one that counts
        self.found: Scores = {}
        self.factors: dict[Dim, float] = {}

    def run(self) -> Scores:
        lockstep = Lockstep(self.graph, self.batches)
        own = set(self.graph.nodes)
        lockstep.watch({node: self._watch for node in self.by_node if node not in own})
        for node in lockstep.steps():
            layer = self.by_node.get(node)
            if layer is not None and (layer.source not in self.moments or layer.source is layer.weight):
                ends = lockstep.values(node.inputs[2]) if node.op == "grouped_mm" else [None] * len(lockstep)
                for x, end in zip(lockstep.values(node.inputs[0]), ends, strict=True):
                    self._add(layer, x, end)
            if node.regions:
                lockstep.execute(node)
            self._seen({node, *(inside for region in node.regions for _, inside in region.walk())})
        for dim in self.first_order.keys() - self.found.keys():
            self._add_first_order(dim, [])
        return {dim: scores * self._factor(dim) for dim, scores in self.found.items()}

    def _watch(self, node: Node, operands: list[Any], _: tuple[Any, ...]) -> None:
        layer = self.by_node[node]
        if self.feeders.setdefault(layer.source, node) is node or layer.source is layer.weight:
            self._add(layer, operands[0], operands[2] if node.op == "grouped_mm" else None)

    def _add(self, layer: Layer, x: torch.Tensor, ends: torch.Tensor | None) -> None:
        moments = self.moments.setdefault(layer.source, [Moments(layer.columns) for _ in range(layer.blocks)])
        for own, rows in zip(moments, layer.blocks_of_input(x, ends), strict=True):
            own.add(rows)

    def _seen(self, nodes: set[Node]) -> None:
        """Nodes have been fed: Dims that waited for the last of them are taken apart, and what nothing needs goes."""
        for node in nodes & self.by_node.keys():
            for moments in self.moments.get(self.by_node[node].source, ()):
                moments.check(node.label)
                if self._held() > HELD:
                    moments.set_aside()
        for dim, waits in list(self.waiting.items()):
            if not waits & nodes:
                continue
            waits -= nodes
            if not waits:
                del self.waiting[dim]
                self._take_apart(dim)

    def _held(self) -> int:
        return sum(one.nbytes for moments in self.moments.values() for one in moments)

    def _take_apart(self, dim: Dim) -> None:
        layers = [layer for layer in self.readers[dim] if layer.source in self.moments]
        majors, choices = self.groups[dim].majors, self.groups[dim].choices
        shares = [
            Share.of(self.graph, dim, same, self.sensitivity, block, moments, majors)
            for source, same in _by_source(layers).items()
            for block, moments in enumerate(self.moments[source])
            if moments.rows
        ]
        if shares:
            change = self.probe.change if dim in self.measured and dim not in self.first_order else None
            known = self.counts is not None and dim not in self.first_order  # else more is added to the scores
            enough = choices[-1] - self.counts[dim] if self.counts is not None and known else None
            scores, self.factors[dim] = taken_apart(shares, choices[-1], change, int(np.prod(choices[:-1])), enough)
            self.found[dim] = scores.reshape(choices)
            if dim in self.first_order:
                self._add_first_order(dim, shares)
        for layer in layers:
            self.wanted[layer.source] -= 1
            if not self.wanted[layer.source]:
                del self.moments[layer.source]

    def _add_first_order(self, dim: Dim, shares: Sequence[Share]) -> None:
        """Add to the scores of a Dim what it costs where two computed values contract it.

        What that comes to is measured at a quarter and at half of the indices: layers have made up for them, and the
        other weights that have them are zero.
        """
        scores = self.found[dim] = self.first_order[dim] + self.found.get(dim, 0.0)
        self.factors.pop(dim, None)
        factors, size = [], scores.shape[-1]
        for count in {size // 4, size // 2} - {0} if dim in self.measured else ():
            goes = np.zeros(scores.shape, dtype=bool)
            np.put_along_axis(goes, np.argsort(scores, -1)[..., :count], True, -1)
            without = weights_without(shares, torch.from_numpy(np.flatnonzero(goes)))
            change = self.probe.change({**self._silenced(dim, goes), **without})
            factors.append(change / max(float(scores[goes].sum()), 1e-30))
        if factors:
            self.factors[dim] = float(np.median(factors))

    def _silenced(self, dim: Dim, goes: np.ndarray) -> dict[str, torch.Tensor]:
        """The trained parameters that have a Dim, zero at some of its indices."""
        found: dict[str, torch.Tensor] = {}
        for parameter, axis in self.groups[dim].members:
            if parameter.kind == "parameter":
                places = numbered(self.graph.axes.of[parameter], axis, (*self.groups[dim].majors, dim))
                gone = torch.from_numpy((places >= 0) & goes.reshape(-1)[places])
                found[parameter.name] = found.get(parameter.name, parameter.tensor.detach()).masked_fill(gone, 0)
        return found

    # -- bringing sums to what the outputs say -----------------------------------------------------------------------

    def _kind(self, dim: Dim) -> Hashable:
        layers = self.readers[dim]
        return (
            dim.size,
            dim in self.first_order,
            tuple(sorted(Counter((layer.node.op, layer.columns) for layer in layers).items())),
        )

    def _measured(self) -> set[Dim]:
        """Dims whose removal is measured at the outputs: all of a small model, some of each kind of a large one.

        Never one that is read by so much that what all its layers would be could not be held.
        """
        kinds: dict[Hashable, list[Dim]] = {}
        for dim, layers in self.readers.items():
            if (layers or dim in self.first_order) and sum(layer.weight.tensor.nbytes for layer in layers) <= MEMORY:
                kinds.setdefault(self._kind(dim), []).append(dim)
        many = max(2, int(_READ / max(1, figures(self.graph).bytes)))
        found: set[Dim] = set()
        for dims in kinds.values():
            places = np.linspace(0, len(dims) - 1, min(many, len(dims)) + 2).round().astype(int)
            found.update(dims[place] for place in (places if len(dims) <= many else places[1:-1]))
        return found

    def _factor(self, dim: Dim) -> float:
        """The factor that was measured for a Dim, or lies between those of its kind; else the middle one of all."""
        known = {other: self.factors[other] for other in self.readers if other in self.measured & self.factors.keys()}
        if dim in known or not known:
            return known.get(dim, 1.0)
        order = {other: place for place, other in enumerate(self.readers)}
        near = {order[other]: factor for other, factor in known.items() if self._kind(other) == self._kind(dim)}
        if not near:
            return float(np.median(list(known.values())))
        logarithms = np.log(np.maximum(list(near.values()), 1e-30))
        return float(np.exp(np.interp(order[dim], list(near), logarithms)))


def _by_source(layers: Sequence[Layer]) -> dict[Hashable, list[Layer]]:
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.source, []).append(layer)
    return found


# -- gradients ---------------------------------------------------------------------------------------------------------


def _gradients(
    graph: Graph, groups: Sequence[Group], readers: dict[Dim, list[Layer]], batches: Sequence[Any], seed: int
) -> tuple[dict[Layer, torch.Tensor], Scores]:
    """Mean squares of the gradients at each layer's output rows, per example; first-order costs of the other Dims."""
    by_output = {layer.node.output: layer for found in readers.values() for layer in found}
    holders = _holders(graph, readers)
    layers = by_output.values()
    squares = {layer: torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64) for layer in layers}
    rows = {layer: torch.zeros(layer.blocks, 1, dtype=torch.float64) for layer in layers}
    by_dim = {group.dim: group for group in groups}
    costs: Scores = {dim: np.zeros(by_dim[dim].choices) for dim in holders}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        layer = by_output.get(value)
        if layer is not None:
            every = layer.node.op == "grouped_mm"  # which rows an expert has is not known here
            parts = [gradient] * layer.blocks if every else layer.blocks_of_output(gradient)
            for block, own in enumerate(parts):
                squares[layer][block] += own.double().square().sum(0)
                rows[layer][block] += len(own)
        for dim, held in holders.items():
            if value in held:
                costs[dim] += _first_order(graph, value, by_dim[dim], tensor * gradient)

    values = [*by_output, *dict.fromkeys(value for held in holders.values() for value in held)]
    visit_gradients(graph, batches, values, visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    means = {layer: total / rows[layer].clamp(min=1) / examples for layer, total in squares.items()}
    return means, {dim: cost / examples for dim, cost in costs.items()}


def _holders(graph: Graph, readers: dict[Dim, list[Layer]]) -> dict[Dim, list[Value]]:
    """The values at which it is measured what Dims cost apart from the layers that contract them."""
    found = _produced(graph, {dim for dim, layers in readers.items() if not layers})
    return {**found, **_multiplied(graph, readers)}


def _produced(graph: Graph, dims: set[Dim]) -> dict[Dim, list[Value]]:
    """The first computed value that has each of these Dims."""
    found: dict[Dim, list[Value]] = {}
    for node in graph.nodes if dims else ():
        for value in node.outputs:
            for extent in graph.axes.of[value]:
                found.update({dim: [value] for dim in leaves(extent) if dim in dims and dim not in found})
    return found


def _multiplied(graph: Graph, readers: dict[Dim, list[Layer]]) -> dict[Dim, list[Value]]:
    """Of Dims that layers contract, the first factor wherever two computed values contract them too."""
    found: dict[Dim, list[Value]] = {}
    for node, role, dims in graph.axes.ends:
        for dim in dims if role == "contract" else ():
            having = [v for _, v in node.operands() if any(dim in leaves(extent) for extent in graph.axes.of[v])]
            if any(layer.node is node for layer in readers.get(dim, ())):
                continue  # also where its weight is turned, and so computed
            if readers.get(dim) and having and not any(isinstance(value, Parameter) for value in having):
                found.setdefault(dim, []).append(having[0])
    return found


def _told_apart(graph: Graph, groups: Sequence[Group], readers: dict[Dim, list[Layer]]) -> list[Group]:
    """The groups, without majors where a value that they are measured at has none, as rows sorted by expert do."""
    holders = _holders(graph, readers)

    def told(group: Group) -> bool:
        having = [{dim for extent in graph.axes.of[v] for dim in leaves(extent)} for v in holders.get(group.dim, ())]
        return all(set(group.majors) <= own for own in having)

    return [group if told(group) else replace(group, majors=()) for group in groups]


def _first_order(graph: Graph, value: Value, group: Group, product: torch.Tensor) -> np.ndarray:
    """Per index of a Dim the squares, added over examples, of the sum of gradient times value over its entries."""
    axes = graph.axes.of[value]
    axis = next(a for a, extent in enumerate(axes) if group.dim in leaves(extent))
    dims = (*group.majors, group.dim)
    if axis == 0 or any(major in leaves(axes[0]) for major in group.majors):
        return summed(axes, axis, dims, product) ** 2
    total = np.zeros(group.choices)
    for row in product:
        total += summed(axes[1:], axis - 1, dims, row) ** 2
    return total
