"""Whether the links of a layer take less time than it does, measured in the runtime, one example at a time.

Small products can be slower than the layer that they replace, though they have fewer multiplications: each starts a
kernel, writes what the next reads, and fills blocks of the processor only in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from regauge.ir.cost import smallest_sizes
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.graph import Graph, Value
from regauge.ir.storage.quantized_layers import PLANNED_FOR
from regauge.ir.timing import Measure
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link, write_chain
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.problems import Problem

Gate: TypeAlias = Literal["off", "warn", "refuse"]

_SURE = 3  # standard errors of the difference of two medians


@dataclass
class CostGate:
    """Measures layers of a graph beside their links; what was measured for layers of the same sizes is kept."""

    graph: Graph
    measure: Measure
    _measured: dict[object, str] = field(default_factory=dict)

    def slow(self, layers: Mapping[str, Layer], picked: Mapping[str, Choice]) -> dict[str, str]:
        """Of the layers, by the names of their weights, those whose links are no faster, with both times."""
        found = {}
        for name, layer in layers.items():
            choice = picked.get(name)
            if choice is None or layer.node.op == "grouped_mm":  # whose time is that of the rows each expert gets
                continue
            sizes = (self._size(layer), layer.weight.shape, layer.bias is None)
            key = (layer.node.op, str(layer.node.attributes), sizes, choice.form, choice.numbers)
            if key not in self._measured:
                self._measured[key] = self._slow(layer, choice)
            if self._measured[key]:
                found[name] = self._measured[key]
        return found

    def _size(self, layer: Layer) -> tuple[int, ...]:
        x = layer.node.inputs[0]
        assert isinstance(x, Value)
        bound = smallest_sizes(self.graph)
        return tuple(bound(size) for size in x.shape)

    def _slow(self, layer: Layer, choice: Choice) -> str:
        """Both times where the links take no less; nothing where they do."""
        zeros = torch.zeros(layer.outputs, layer.columns, dtype=torch.float64)  # of which every factor is found at once
        links, _ = links_of(FORMS[choice.form], [Problem(layer, zeros)] * layer.blocks, choice.numbers)
        old, new = self.measure([self._alone(layer, None), self._alone(layer, links)], None)
        if new.milliseconds < old.milliseconds * (1 - _SURE * (old.noise**2 + new.noise**2) ** 0.5):
            return ""
        return f"{new.milliseconds:.3g} ms for {old.milliseconds:.3g} ms"

    def _alone(self, layer: Layer, links: Sequence[Link] | None) -> Graph:
        """A graph of the layer, or of its links, on one example."""
        node, found = layer.node, Graph("alone")
        if "onnx" in self.graph.metadata or PLANNED_FOR in self.graph.metadata:
            found.metadata[PLANNED_FOR] = "ort"
        build = Builder(found)
        operands: list[Value] = [build.input("x", self._size(layer), node.inputs[0].dtype)]  # type: ignore[union-attr]
        for operand in (layer.weight, layer.bias):
            if operand is not None:
                drawn = torch.randn_like(operand.tensor.detach())
                operands.append(build.parameter(operand.names[0], drawn))
        found.outputs = [build(node.op, *operands, name="y", **node.attributes)]
        if links is not None:
            own = layer_of(found.nodes[0], blocks=True)
            assert own is not None
            write_chain(found, own, links, by="factorize")
            remove_dead(found)
        return found
