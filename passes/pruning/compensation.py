"""Repairing what a cut did: every layer behind it is refitted to give what it gave before.

For each layer in the order of the graph, with the inputs X that the layers before it give now and the outputs Y that it
gave in the original, W minimises |Y - X W'|^2 + r |W - W0|^2 (the optimal brain surgeon's update for a set of columns,
with the drift of earlier layers in it: OBC, Frantar and Alistarh 2022, eq. 5-6; OBSPA takes X from the pruned prefix).
A constant column takes the mean of what went into the bias, or into the running mean of a batch norm behind the layer.

Where the output is added to another branch, the layer takes over what that branch has lost: its target is the original
sum minus the other addend (He et al. 2017, Channel Pruning for Accelerating Very Deep Networks, section 3.3).

Layers that share a weight, and experts, whose rows are sorted otherwise once the router has drifted, are refitted to
the original's own inputs, before all others: X is what the cut leaves of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.dims.kept import Keep, touches
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.memory.mapped import mapped, on_disk
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Halves
from regauge.passes.calibration.side_by_side import SideBySide, inside
from regauge.passes.pruning.recurrent_refit import STATES, refitted_stack
from regauge.passes.pruning.refit import refitted

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What a layer gets now, what it should give, and the offsets of its experts, where it has some."""


@dataclass
class Repaired:
    """How many layers were refitted, and how many stayed since no refit lowered their error on the data.

    ``nodes`` are the original's of both.
    """

    refitted: int = 0
    stayed: int = 0
    nodes: set[Node] = field(default_factory=set)


def compensate(original: Graph, pruned: Graph, keep: Keep, batches: Sequence[Any], *, by: str) -> Repaired:
    """Refit the layers of ``pruned`` that read something else than in ``original``.

    ``pruned`` is ``original`` resized to ``keep``, and is changed. Both run once on the batches, side by side; new
    weights of a model on disk go into temporary files, so that memory holds one layer's at a time.
    """
    run = _Compensation(original, pruned, keep, batches, by)
    run.run()
    return run.done


class _Compensation:
    def __init__(self, original: Graph, pruned: Graph, keep: Keep, batches: Sequence[Any], by: str) -> None:
        self.original, self.pruned, self.keep, self.by = original, pruned, keep, by
        self.batches = batches
        self.both = SideBySide(original, pruned, batches, keep)
        self.parameters = {parameter.name: parameter for parameter in original.all_parameters()}
        self.done = Repaired()

    def run(self) -> None:
        self._refit_by_original()
        for was, node in self.both.steps():
            layer = layer_of(node, blocks=True, turned=True)
            if layer is not None and node.inputs[0] in self.both.drifted and node.op != "grouped_mm":
                pairs = zip(self.both.inputs(layer), self.both.targets(layer, was), strict=True)
                self._refit([was], layer, gathered(layer, ((x, y, None) for x, y in pairs)))
            elif node.regions:
                self._refit_inside(was, node)
            elif node.op in STATES and self.both.reads_other(node, was):
                self._refit_stack(was, node)

    # -- one layer ---------------------------------------------------------------------------------------------------

    def _refit(self, were: Iterable[Node], layer: Layer, moments: Sequence[Halves]) -> None:
        """Refit a layer, which these nodes of the original were."""
        self.done.nodes.update(were)
        found = refitted(layer, moments)
        if found is None:
            self.done.stayed += 1
            return
        self.done.refitted += 1
        weight, shift = found
        to_disk = on_disk(self.parameters[layer.weight.name].weight)
        set_weight(self.pruned, layer.weight, mapped(weight) if to_disk else weight, by=self.by)
        shifted = layer.shifted(shift)
        if shifted is not None:
            set_weight(self.pruned, *shifted, by=self.by)
        if layer.turned is not None:
            self.both.now.rerun(layer.turned)

    def _refit_stack(self, was: Node, node: Node) -> None:
        """Refit a stack of recurrent layers."""
        self.done.nodes.add(was)
        before, now = (
            list(zip(*(run.values(operand) for operand in one.inputs), strict=True))
            for run, one in ((self.both.before, was), (self.both.now, node))
        )
        found = refitted_stack(self.original, self.keep, was, node, before, now)
        if found is None:
            self.done.stayed += 1
            return
        self.done.refitted += 1
        for parameter, tensor in found.items():
            set_weight(self.pruned, parameter, tensor, by=self.by)

    # -- layers inside regions ---------------------------------------------------------------------------------------

    def _refit_inside(self, was: Node, node: Node) -> None:
        """Refit the layers in the regions of a node, in order; each on what it reads every time that it runs."""
        if not self.both.reads_other(node, was):
            return
        twins = dict(zip(inside(node), inside(was), strict=True))
        for inner, twin in twins.items():
            layer = layer_of(inner, blocks=True, turned=True)
            if layer is None or inner.op == "grouped_mm" or not _own_region(node, layer.weight):
                continue
            now, before = self.both.now.calls(node, inner), self.both.before.calls(was, twin)
            calls = [zip(*both, strict=False) for both in zip(now, before, strict=True) if len(both[0]) == len(both[1])]
            read = twin.inputs[0]
            assert isinstance(read, Value)
            pairs = [
                (now_operands[0], self.both.kept(results[0], twin.output), None)
                for batch in calls
                for (now_operands, _), (_, results) in batch
            ]
            if pairs and any(not _same(x, self.both.kept(y[0], read)) for x, y in _inputs(now, before)):
                self._refit([twin], layer, gathered(layer, pairs))

    # -- layers that are refitted to what the original reads ---------------------------------------------------------

    def _refit_by_original(self) -> None:
        """Refit layers that share their weights, and experts, whose columns were cut."""
        wanted: dict[Node, Layer] = {}
        for was, node in zip(self.original.nodes, self.pruned.nodes, strict=True):
            layer = layer_of(node, blocks=True, shared=True, turned=True)
            if layer is None or (len(layer.weight.uses) == 1 and node.op != "grouped_mm"):
                continue
            if touches(self.original.axes.of[self.parameters[layer.weight.name]][layer.contracted], self.keep):
                wanted[was] = layer
        if not wanted:
            return
        found: dict[Parameter, tuple[Layer, list[Halves]]] = {}
        run = Lockstep(self.original, self.batches)
        for was in run.steps():
            layer = wanted.get(was)
            if layer is None:
                continue
            run.execute(was)
            x, y = was.inputs[0], was.output
            assert isinstance(x, Value)
            ends = run.values(was.inputs[2]) if was.op == "grouped_mm" else [None] * len(run)
            inputs, outputs = (
                [self.both.kept(tensor, value, end) for tensor, end in zip(run.values(value), ends, strict=True)]
                for value in (x, y)
            )
            _, moments = found.get(layer.weight, (layer, None))
            pairs = zip(inputs, outputs, ends, strict=True)
            found[layer.weight] = (layer, gathered(layer, pairs, moments))
        for layer, moments in found.values():
            self._refit([was for was, own in wanted.items() if own.weight is layer.weight], layer, moments)


def gathered(layer: Layer, pairs: Iterable[Pair], moments: list[Halves] | None = None) -> list[Halves]:
    """The moments of each block of a layer, added to those that are given."""
    found = moments or [Halves(layer.columns, layer.outputs) for _ in range(layer.blocks)]
    for x, y, ends in pairs:
        parts = zip(layer.blocks_of_input(x, ends), layer.blocks_of_output(y, ends), strict=True)
        for own, (rows, wanted) in zip(found, parts, strict=True):
            own.add(rows, wanted)
    for own in found:
        own.check(layer.node.label)
    return found


def _own_region(node: Node, weight: Parameter) -> bool:
    """Whether only nodes inside a node read a weight."""
    inner = set(inside(node))
    return all(user in inner for user, _ in weight.uses)


def _inputs(now: Any, before: Any) -> Iterator[tuple[torch.Tensor, list[Any]]]:
    for ours, theirs in zip(now, before, strict=True):
        for (operands, _), (old, _) in zip(ours, theirs, strict=False):
            yield operands[0], old


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and bool(torch.equal(x, y))
