"""What nodes cost where libraries compute them: a roofline, and what share of it their convolutions reach.

A product of matrices is taken to reach the device's figures; of others a :class:`Library` says what share they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regauge.ir.cost import item_size, node_macs, smallest_sizes
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.roofline import VIEWS, Device, local_seconds
from regauge.ir.sizes.expressions import Size, product
from regauge.passes.deriving.layouts import is_weight
from regauge.passes.deriving.libraries import Library

_COPIED = frozenset({"permute", "slice"})
"""What a roofline takes for a view of its operand, and what is read by products and sums is a copy of."""

_LINE = 64  # bytes

_CONVOLUTIONS = frozenset({"conv", "conv_transpose"})


@dataclass(frozen=True)
class Call:
    """What decides how fast a convolution is: MACs, output and input channels of a group, its last axis, its kind."""

    macs: float
    columns: int
    channels: int
    pixels: int
    volume: bool = False
    grouped: bool = False
    depthwise: bool = False
    spread: bool = False


@dataclass(frozen=True)
class Costs:
    """Seconds of nodes and of calls on a device, by a library; ``bound`` gives each size as a number."""

    device: Device
    library: Library
    bound: Callable[[Size], int]

    @property
    def start(self) -> float:
        """Seconds until a node runs."""
        return self.device.overhead * self.library.starts

    def convolution(self, call: Call, moved: float) -> float:
        """Seconds of a convolution that moves so many bytes."""
        library, macs = self.library, call.macs
        if not call.depthwise and not (call.spread and library.spread_by_columns):
            macs *= _padded(call.columns, self.device.multiple) * _padded(call.pixels, library.pixels)
            if call.channels > library.colours and not call.volume:
                macs *= _padded(call.channels, self.device.multiple)
        share = 1.0
        for holds, one in ((call.volume, library.volume), (call.spread, library.spread)):
            share *= one if holds else 1.0
        share *= library.grouped if call.grouped and not call.depthwise else 1.0
        return self.start + max(2 * macs / self.device.flops / share, moved / self.device.bandwidth)

    def moved(self, read: float, written: float) -> float:
        """Seconds of an operator that reads and writes so many bytes."""
        return self.start + (read + written) / self.device.bandwidth

    def nodes(self, nodes: Iterable[Node], graph: Graph, at: Mapping[Any, int] | None) -> float:
        """Seconds of nodes of a graph, one after the other."""
        return sum(self._node(node, graph, at) for node in nodes)

    def _node(self, node: Node, graph: Graph, at: Mapping[Any, int] | None) -> float:
        if node.op in _COPIED:
            if is_weight(node.inputs[0]):
                return self.start  # computed early, or a view that a kernel reads once
            written = self._bytes(node.output)
            return self.moved(written, written / (self.library.permuted if self._scattered(node) else 1.0))
        if node.op not in _CONVOLUTIONS:
            return local_seconds([node], graph, self.device, at) + self.start - self.device.overhead
        moved = sum(self._bytes(value) for _, value in node.operands()) + self._bytes(node.output)
        return self.convolution(self._call(node, at, graph), moved)

    def _scattered(self, node: Node) -> bool:
        """Whether a permute moves less than a line of a cache at a time: axes at the end that stay are moved whole."""
        if node.op != "permute":
            return False
        run, dims = item_size(node.output.dtype), node.attributes["dims"]
        for place in reversed(range(len(dims))):
            if dims[place] % len(dims) != place:
                break
            run *= self.bound(node.output.shape[place])
        return run < _LINE

    def _call(self, node: Node, at: Mapping[Any, int] | None, graph: Graph) -> Call:
        x, weight = node.inputs[:2]
        assert isinstance(x, Value) and isinstance(weight, Value)
        groups, spread = node.attributes["groups"], node.op == "conv_transpose"
        axis = x.rank - weight.rank + 1  # there may be no batch
        channels, inputs = self.bound(node.output.shape[axis]), self.bound(x.shape[axis]) // groups
        return Call(
            macs=float(node_macs(node, smallest_sizes(graph, at))),
            columns=channels // groups,
            channels=inputs,
            pixels=self.bound((x if spread else node.output).shape[-1]),
            volume=weight.rank == 5,
            grouped=groups > 1,
            depthwise=groups > 1 and inputs == 1,
            spread=spread and any(size > 1 for size in map(self.bound, weight.shape[2:])),
        )

    def bytes_of(self, node: Node) -> int:
        """Bytes that a node reads and writes."""
        values = dict.fromkeys([*(value for _, value in node.operands()), *node.outputs])
        return 0 if node.op in VIEWS - _COPIED else int(sum(map(self._bytes, values)))

    def _bytes(self, value: Value) -> float:
        return item_size(value.dtype) * float(product(self.bound(size) for size in value.shape))


def _padded(size: int, block: int) -> float:
    """How much more is computed where indices are computed in blocks."""
    return -(-size // block) * block / max(size, 1)
