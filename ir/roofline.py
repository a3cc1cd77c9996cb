"""Predicts the time of one run by a roofline of the device: each node waits for arithmetic or for memory.

    seconds = overhead + max(2 * MACs / FLOP/s, bytes read and written / bytes/s)          for each node

(Williams, Waterman and Patterson 2009, Roofline). Axes that shrink are done in blocks of ``multiple`` indices, so that
arithmetic falls in steps: 33 channels take as long as 40 where the blocks are 8. What a runtime makes a view of
(reshapes) moves no bytes. Nodes of regions count once, fused ones as one node. A real runtime fuses nodes and has
kernels of its own; :class:`Calibrated` brings the model to what was measured, and whoever needs a certain latency
measures the result.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from regauge.ir.cost import (
    CostModel,
    Meter,
    NodeTerm,
    Running,
    SizeOf,
    computed_inside,
    item_size,
    local_figures,
    sized,
    smallest_sizes,
)
from regauge.ir.dims.extents import Dim, Extent, leaves
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.sizes.expressions import product

VIEWS = frozenset({"reshape", "unsqueeze", "squeeze", "identity", "expand", "permute", "select", "slice", "dropout"})


@dataclass(frozen=True)
class Device:
    """What the model knows of a device: a start that measurements correct.

    ``flops`` per second and ``bandwidth`` in bytes per second, as reached on large layers and not as printed on the
    box; ``overhead`` in seconds of starting a node; ``multiple``, the block of indices that is computed at a time;
    ``programs``, how many independent pieces of work it takes to reach the bandwidth.
    """

    flops: float = 5e10
    bandwidth: float = 1e10
    overhead: float = 2e-6
    multiple: int = 8
    programs: int = 1

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value > 0 and not (entry.name == "overhead" and value == 0):
                raise RegaugeError(f"device: {entry.name}={value:g} must be above 0")
        for name in ("multiple", "programs"):
            value = getattr(self, name)
            if value != int(value):
                raise RegaugeError(f"device: {name}={value:g} must be a whole number")
            object.__setattr__(self, name, int(value))


DEVICES: Mapping[str, Device] = {
    "cpu": Device(),  # one core with 8 float lanes
    "gpu": Device(flops=5e13, bandwidth=1e12, overhead=5e-6, multiple=64, programs=128),  # tensor cores
}


class _Step:
    """One node: its MACs, those of what is fused in it included, and for each value that it reads or writes the bytes
    of what stays, and the axes that may go.

    ``fixed`` holds the sizes of axes that no cut changes, by identity: a search asks for them very often.
    """

    def __init__(self, node: NodeTerm, model: CostModel, cut: Container[Dim], fixed: dict[int, int]) -> None:
        self.node = node
        self.inside = [NodeTerm(inner, model) for inner in computed_inside(node.node)]
        self.dims = node.dims.union(*(inner.dims for inner in self.inside))
        for axes in (*node.inputs, *node.outputs):
            for extent in axes if isinstance(axes, list) else ():
                if not any(dim in cut for dim in leaves(extent)):
                    fixed[id(extent)] = int(sized(extent, model.number))
        values = [] if node.node.op in VIEWS else [*node.node.inputs, *node.node.outputs]
        self.moved = []
        for value in dict.fromkeys(value for value in values if isinstance(value, Value)):
            axes = model.axes(value)
            still = product(fixed[id(extent)] for extent in axes if id(extent) in fixed)
            self.moved.append((item_size(value.dtype) * float(still), [e for e in axes if id(e) not in fixed]))


class Roofline(Running[_Step]):
    """Predicted seconds of one run while sizes of Dims change (a :class:`regauge.ir.cost.Meter`)."""

    def __init__(self, model: CostModel, device: Device) -> None:
        self.device = device
        self._fixed: dict[int, int] = {}
        cut = {group.dim for group in model.graph.groups() if group.free}
        fused = {inner for _, node in model.graph.walk() for inner in computed_inside(node)}
        nodes = [node for _, node in model.graph.walk() if node not in fused]
        steps = [_Step(NodeTerm(node, model), model, cut, self._fixed) for node in nodes]
        super().__init__(steps, self._seconds, model.number)

    def _seconds(self, step: _Step, size_of: SizeOf) -> float:
        blocks = self.device.multiple

        def padded(extent: Extent) -> int:
            known = self._fixed.get(id(extent))
            return known if known is not None else -(-int(sized(extent, size_of)) // blocks) * blocks

        moved = sum(still * float(product(sized(e, size_of) for e in axes)) for still, axes in step.moved)
        macs = sum(float(term.macs(padded, size_of)) for term in (step.node, *step.inside))
        compute = 2 * macs / self.device.flops
        return self.device.overhead + max(compute, moved / self.device.bandwidth)


class Calibrated:
    """A meter of milliseconds that gives what was measured where it was measured, and follows another meter between.

    ``points`` are pairs (what the meter says, milliseconds measured). Between two points, and beyond them, the
    milliseconds are linear in what the meter says; where noise has turned two points round, they share their mean.
    """

    def __init__(self, meter: Meter, points: Sequence[tuple[float, float]]) -> None:
        self.meter = meter
        self._said, self._measured = _rising(points)
        self.original = self.milliseconds(meter.original)

    @property
    def total(self) -> float:
        return self.milliseconds(self.meter.total)

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        return self.milliseconds(self.meter.set_sizes(sizes))

    def with_size(self, dim: Dim, size: int) -> float:
        return self.milliseconds(self.meter.with_size(dim, size))

    def milliseconds(self, said: float) -> float:
        """What the meter's figure is in milliseconds."""
        x, y = self._said, self._measured
        if len(x) == 1:
            return float(said * y[0] / x[0])
        place = int(np.clip(np.searchsorted(x, said), 1, len(x) - 1))
        slope = (y[place] - y[place - 1]) / (x[place] - x[place - 1])
        return max(0.0, float(y[place - 1] + slope * (said - x[place - 1])))


def _rising(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The points in order, with milliseconds that do not fall: neighbours that do are pooled (isotonic regression)."""
    pools: list[tuple[list[float], list[float]]] = []
    for x, y in sorted(points):
        xs, ys = [x], [y]
        while pools and (np.mean(ys) <= np.mean(pools[-1][1]) or xs[0] == pools[-1][0][-1]):
            before = pools.pop()
            xs, ys = before[0] + xs, before[1] + ys
        pools.append((xs, ys))
    return np.array([np.mean(xs) for xs, _ in pools]), np.array([np.mean(ys) for _, ys in pools])


def local_seconds(nodes: Iterable[Node], graph: Graph, device: Device, at: Mapping[object, int] | None = None) -> float:
    """The predicted seconds of some nodes of a graph, dynamic sizes as ``at`` gives them or at their least."""
    bound, total = smallest_sizes(graph, at), 0.0
    for node in nodes:
        cost = local_figures([node], graph, at)
        values = dict.fromkeys([*(v for _, v in node.operands() if not isinstance(v, Parameter)), *node.outputs])
        moved = sum(item_size(v.dtype) * float(product(bound(size) for size in v.shape)) for v in values)
        bytes_ = 0.0 if node.op in VIEWS else cost.bytes + moved
        total += device.overhead + max(2 * cost.macs / device.flops, bytes_ / device.bandwidth)
    return total


def roofline(graph: Graph, device: Device, at: Mapping[object, int] | None = None) -> Roofline:
    """The predicted seconds of a graph, with dynamic sizes as ``at`` gives them, or the least they may be."""
    return Roofline(CostModel(graph, at), device)
