"""Scores parts by what it costs to do without them.

    distortion   squared change of the outputs, as a share of their squares (LAPTOP-Diff: the outputs' mean squared
                 error, which is nearly additive over parts); where layers are refitted afterwards, measured after that
    macro        1 - cosine between the outputs with and without (macro influence of FuseGPT, which compares the last
                 hidden states; here it is whatever the graph gives)
    similarity   1 - cosine between what a part reads and what it gives (block influence of ShortGPT, eq. 1)

Cosines are taken of vectors along the axes that layers contract, and averaged over all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.layers import layer_of
from regauge.passes.depth.healing import heal
from regauge.passes.depth.parts import Part
from regauge.passes.depth.removal import without

Criterion: TypeAlias = Literal["distortion", "macro", "similarity"]

EXAMPLES = 128  # that removals are judged on: every part costs a run of them
_ROWS = 16  # per column of a layer that is refitted to judge a removal; the errors are near those of many more


class Judge:
    """The loss of removing parts from a graph, measured on batches.

    Looked at are the first batches that hold :data:`EXAMPLES`. ``healed``: layers are refitted first, on these, and
    what is measured on is the last batch, which is none of them unless there is only one.
    """

    def __init__(self, graph: Graph, batches: Sequence[Any], criterion: Criterion, *, healed: bool, by: str) -> None:
        self.graph, self.criterion, self.by = graph, criterion, by
        self.healed = healed and criterion == "distortion"
        self.seen = _first_examples(batches[:-1] or batches)
        self.measured = list(batches[-1:]) if self.healed else _first_examples(batches)
        self.expected = [_outputs(graph.run(batch)) for batch in self.measured]
        self.features = _contracted(graph)
        if not any(self.expected):
            raise PassError(f"{by} finds no real numbers among the outputs: there is nothing to measure")
        if not all(bool(y.isfinite().all()) for outputs in self.expected for y in outputs):
            raise PassError(f"{by} cannot measure losses: outputs are not finite on the data; give other data")

    def losses(self, removed: Sequence[Part], candidates: Sequence[Part]) -> list[float]:
        """The loss without ``removed`` and each of the candidates."""
        if self.criterion == "similarity":
            return self._influences(removed, candidates)
        return [self.loss([*removed, part]) for part in candidates]

    def loss(self, removed: Sequence[Part]) -> float:
        """The loss without these parts; layers are refitted where that is asked for."""
        reduced, moved = without(self.graph, removed, by=self.by)
        if self.healed:
            heal(self.graph, reduced, moved, self.seen, by=self.by, rows_per_column=_ROWS)
        if self.criterion == "macro":
            return _mean([1 - torch.cosine_similarity(a, b, dim=-1) for a, b in self._pairs(reduced)])
        return self.error(reduced)

    def _pairs(self, reduced: Graph) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The outputs of the original, and those of another graph."""
        found = [_outputs(reduced.run(batch)) for batch in self.measured]
        return [pair for a, b in zip(self.expected, found, strict=True) for pair in zip(a, b, strict=True)]

    def error(self, reduced: Graph) -> float:
        """The squared change of the outputs, as a share of their squares."""
        pairs = self._pairs(reduced)
        change = sum(float((a - b).square().sum()) for a, b in pairs)
        return change / max(1e-30, sum(float(a.square().sum()) for a, _ in pairs))

    def _influences(self, removed: Sequence[Part], candidates: Sequence[Part]) -> list[float]:
        """Block influences in the graph as it is without ``removed``; they count as additive."""
        reduced, moved = without(self.graph, removed, by=self.by)
        ending: dict[Value, list[Part]] = {}  # parallel branches end in the same sum
        for part in candidates:
            ending.setdefault(moved[part.result], []).append(part)
        run, found = Lockstep(reduced, self.measured), dict[Part, float]()
        held: dict[Value, Sequence[Any]] = {}
        sources = {moved[part.source] for part in candidates}
        held.update({value: run.values(value) for value in sources if value.producer is None})
        for node in run.steps():
            run.execute(node)
            for value in node.outputs:
                for part in ending.get(value, ()):
                    pairs = zip(held[moved[part.source]], run.values(value), strict=True)
                    found[part] = self._influence(part, list(pairs))
                if value in sources:
                    held[value] = run.values(value)
        return [found[part] for part in candidates]

    def _influence(self, part: Part, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        axes = [a for a, e in enumerate(self.graph.axes.of[part.result]) if self.features & set(leaves(e))]
        axes = axes or list(range(1, part.result.rank)) or [0]
        return _mean([1 - torch.cosine_similarity(_rows(a, axes), _rows(b, axes), dim=-1) for a, b in pairs])


def _first_examples(batches: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    while len(found) < len(batches) and sum(map(examples_in, found)) < EXAMPLES:
        found.append(batches[len(found)])
    return found


def _outputs(found: Sequence[Any]) -> list[torch.Tensor]:
    return [y.double() for y in found if isinstance(y, torch.Tensor) and y.is_floating_point() and y.dim()]


def _rows(tensor: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """A tensor with these axes as one, behind all others."""
    return tensor.double().movedim(list(axes), list(range(-len(axes), 0))).flatten(-len(axes))


def _mean(parts: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([part.reshape(-1) for part in parts]).mean())


def _contracted(graph: Graph) -> set[Dim]:
    """Dims that some layer contracts with a weight: of what flows between layers, the features."""
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    return {dim for layer in layers for dim in leaves(graph.axes.of[layer.weight][layer.contracted])}
