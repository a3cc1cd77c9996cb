"""What layers take in each form of their weights: measured one by one in the runtime, or by a roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from regauge.ir.cost import local_figures
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.roofline import Device, roofline
from regauge.ir.running.interpret import Interpreter
from regauge.ir.timing import Measure
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.quantization.grid import Form
from regauge.passes.quantization.placement import reads_blocks
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.targets import Target
from regauge.passes.quantization.weights import rows_of

Times: TypeAlias = Mapping[str, Sequence[float]]
"""By the name of a layer's weight the milliseconds in each of its forms, and in float."""

Finish: TypeAlias = Callable[[Writer], Graph]


@dataclass(frozen=True)
class LayerTimes:
    """Times of layers of a graph on one batch of ``inputs``.

    Without ``measure`` they are those of a roofline, in which codes that a kernel reads move so many bytes fewer.
    ``finish`` makes a graph for the target of what was written.
    """

    graph: Graph
    target: Target
    inputs: Any
    device: Device
    measure: Measure | None
    finish: Finish
    by: str

    def of(self, layers: Sequence[Layer], forms: Mapping[str, Sequence[Form]]) -> dict[str, list[float]]:
        """The times of each layer; layers of equal sizes and forms are measured once."""
        shapes, known, found = self._shapes(), dict[object, list[float]](), dict[str, list[float]]()
        for layer in layers:
            name = layer.weight.name
            x = layer.node.inputs[0]
            assert isinstance(x, Value)
            own, read = forms[name], [self._read(layer, form) for form in forms[name]]
            attributes = sorted((key, str(value)) for key, value in layer.node.attributes.items())
            key = (layer.node.op, layer.weight.shape, shapes[x], tuple(attributes), tuple(own), tuple(read))
            if key not in known:
                times = self._measured if self.measure is not None else self._predicted
                known[key] = times(layer, own, read, shapes[x])
            found[name] = known[key]
        return found

    def whole(self) -> float:
        """Milliseconds of the graph in float, by the roofline."""
        return 1e3 * roofline(self.graph, self.device, Interpreter(self.graph).bound(self.inputs)[1]).original

    def _read(self, layer: Layer, form: Form) -> bool:
        """Whether a kernel reads the codes; else what takes no time at load is as in float."""
        return reads_blocks(self.graph, layer, self.target, form.group, form.grid.bits) or not self.target.folds

    def _shapes(self) -> dict[Value, tuple[int, ...]]:
        run = Interpreter(self.graph)
        found = {value: _shape(x) for value, x in run.bound(self.inputs)[0].items()}

        def hook(node: Node, results: tuple[Any, ...]) -> None:
            found.update(zip(node.outputs, map(_shape, results), strict=True))

        Interpreter(self.graph, hook=hook).run(self.inputs)
        return found

    def _measured(
        self, layer: Layer, forms: Sequence[Form], read: Sequence[bool], shape: tuple[int, ...]
    ) -> list[float]:
        assert self.measure is not None
        plain = alone(layer, shape)
        graphs = [self._stored(plain, form) for form, kernel in zip(forms, read, strict=True) if kernel]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=layer.weight.tensor.dtype)
        *own, last = [timing.milliseconds for timing in self.measure([*graphs, plain], (x,))]
        rest = iter(own)
        return [*(next(rest) if kernel else last for kernel in read), last]

    def _stored(self, plain: Graph, form: Form) -> Graph:
        """The one layer of a graph with its weight in a form."""
        writer = Writer(plain.copy(), self.target, by=self.by)
        layer = next(found for node in writer.graph.nodes if (found := layer_of(node, blocks=True)) is not None)
        writer.weight_alone(layer, form.rounded(rows_of(layer)))
        remove_dead(writer.graph)
        return self.finish(writer)

    def _predicted(
        self, layer: Layer, forms: Sequence[Form], read: Sequence[bool], shape: tuple[int, ...]
    ) -> list[float]:
        graph = alone(layer, shape)
        entries = layer.weight.tensor.numel()
        values = sum(int(torch.tensor(value.shape).prod()) for value in (graph.inputs[0], graph.nodes[0].output))
        compute = 2 * local_figures(graph.nodes, graph).macs / self.device.flops

        def milliseconds(bits: float) -> float:
            moved = (4 * values + entries * bits / 8) / self.device.bandwidth
            return 1e3 * (self.device.overhead + max(compute, moved))

        each = [form.grid.bits + 32 / form.group if kernel else 32 for form, kernel in zip(forms, read, strict=True)]
        return [milliseconds(bits) for bits in (*each, 32)]


def alone(layer: Layer, shape: Sequence[int]) -> Graph:
    """A graph of this layer only, on an input of one shape."""
    node, weight, bias = layer.node, layer.weight, layer.bias
    assert isinstance(weight.dtype, torch.dtype)
    graph = Graph(name=node.name)
    build = Builder(graph)
    x = build.input("x", tuple(shape), weight.dtype)
    parts = [build.parameter(one.name, one.tensor.detach(), "parameter") for one in (weight, bias) if one is not None]
    graph.outputs = [build(node.op, x, *parts, **node.attributes)]
    return graph


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))
