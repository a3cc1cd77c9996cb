"""Graphs with fake quantization where ``quantize`` puts integers, and what was trained there read back as codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.ops.fake_quantization import spread
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.grid import Coded, Form, Grid
from regauge.passes.quantization.placement import Placement
from regauge.passes.quantization.qdq import is_gemm
from regauge.passes.quantization.ranges import Ends
from regauge.passes.quantization.targets import Target
from regauge.passes.training.bound_model import BoundModel

Scales: TypeAlias = Literal["learned", "fixed", "statistics"]


_BIAS_BITS = 32  # in which integers are added up


class FakeQuantizer:
    """Edits one graph, which is then emitted and trained. Nodes are found again by names of weights and values."""

    def __init__(self, graph: Graph, target: Target, scales: Scales, *, by: str) -> None:
        self.graph, self.target, self.scales = graph, target, scales
        self.build = Builder(graph, by=by)
        self.nodes: dict[str, Node] = {}
        self._added: dict[Node, Operand] = {}  # layers whose bias is added up in integers, and the scale of their input

    # -- writing -----------------------------------------------------------------------------------------------------

    def weight(self, layer: Layer, coded: Coded) -> None:
        """Let a layer read its weight rounded to the grid of ``coded``, whose scales are where those here begin."""
        name, grid = layer.weight.name, coded.grid
        where = placed(layer, coded.group)
        limits = {"low": grid.low, "high": grid.high}
        with self.build.at(layer.node):
            if self.scales == "statistics":
                scale = self.build.mean_scale(layer.weight, bits=grid.bits, **where)
                found = self.build.fake_quantize(layer.weight, scale, midrise=True, **limits, **where)
            else:
                scale, zeros = (laid_out(layer, part) for part in (coded.scale, coded.zero))
                scale = self._scale(name, scale)
                zero = None if grid.symmetric else self._buffer(f"{name}_zero_point", zeros.to(grid.dtype))
                found = self.build.fake_quantize(layer.weight, scale, zero, **limits, **where)
            if layer.bias is not None and layer.node in self._added:
                step = self.build.mul(self._added[layer.node], found.producer.inputs[1])
                step = self.build.mul(step, 0.5) if self.scales == "statistics" else step
                limit = 1 << (_BIAS_BITS - 1)
                bias = self.build.fake_quantize(layer.bias, step, axis=0, low=-limit, high=limit - 1)
                set_input(layer.node, 2, bias, self.graph)
        set_input(layer.node, 1, found, self.graph)
        self.nodes[name] = found.producer

    def activations(self, placement: Placement, ends: Mapping[Value, Ends]) -> None:
        """Round values of a placement where kernels on integers read or give them; then come the weights."""
        readers = {layer.node: layer.node.inputs[0] for layer in placement.layers}
        for value in placement.measured:
            chained = value in placement.chained
            uses = [(node, slot) for node, slot in value.uses if chained or node in readers and slot == 0]
            found = self._activation(value, ends[value])
            for node, slot in uses:
                set_input(node, slot, found, self.graph)
            if chained:
                self.graph.outputs = [found if output is value else output for output in self.graph.outputs]
        for node, x in readers.items():
            assert isinstance(x, Value)
            if node.op == "conv" or is_gemm(x, self.target):
                self._added[node] = self.nodes[placement.chained.get(x, x).name].inputs[1]

    def _activation(self, value: Value, ends: Ends) -> Value:
        grid = self.target.activations
        scale, zero = grid.span(*(torch.tensor(end, dtype=torch.float64) for end in ends))
        scopes = value.producer.scope if value.producer is not None else ()
        name = f"{scopes[-1][0]}.{value.name}" if scopes and scopes[-1][0] else value.name
        with self.build.at(value.producer or value.consumers()[0]):
            zeros = None if grid.symmetric else self._buffer(f"{name}_zero_point", zero.to(grid.dtype))
            found: Value = self.build.fake_quantize(
                value, self._scale(name, scale), zeros, low=grid.low, high=grid.high
            )
        assert found.producer is not None
        self.nodes[value.name] = found.producer
        return found

    def _scale(self, name: str, scale: torch.Tensor) -> Operand:
        """A scale that is trained as its logarithm, or stays."""
        scale = scale.float().contiguous()
        if self.scales == "fixed":
            return self._buffer(f"{name}_scale", scale)
        logarithm = self.build.parameter(self.build.unique(f"{name}_log_scale"), scale.log())
        found: Value = self.build.exp(logarithm)
        return found

    def _buffer(self, name: str, data: torch.Tensor) -> Parameter:
        return self.build.parameter(self.build.unique(name), data.contiguous(), kind="buffer")


class TrainedGrids:
    """What the module of a graph of a :class:`FakeQuantizer` holds."""

    def __init__(self, quantizer: FakeQuantizer, bound: BoundModel) -> None:
        self.nodes, self._bound = quantizer.nodes, bound

    def _tensor(self, operand: Operand) -> torch.Tensor:
        """A scale, a zero point or a weight as it is now."""
        if isinstance(operand, Parameter):
            return (self._bound.tensor(operand) if operand in self._bound else operand.tensor).detach()
        assert isinstance(operand, Value) and operand.producer is not None
        node = operand.producer
        found: torch.Tensor = node.operator.evaluate(*map(self._tensor, node.inputs), **node.attributes)
        return found

    def ends(self, name: str) -> Ends:
        """The range that the grid of a value covers, from which it comes to the same scale and zero point."""
        node = self.nodes[name]
        scale = float(self._tensor(node.inputs[1]))
        zero = int(self._tensor(node.inputs[2])) if len(node.inputs) > 2 else 0
        return (node.attributes["low"] - zero) * scale, (node.attributes["high"] - zero) * scale

    def in_steps(self, name: str) -> torch.Tensor:
        """A weight in steps of its grid, counted so that a code is the nearest integer, were there room for all."""
        node = self.nodes[name]
        weight, step = self._tensor(node.inputs[0]), self._tensor(node.inputs[1])
        ratio = weight / spread(step, weight, node.attributes["axis"], node.attributes["block_size"])
        return ratio - 0.5 if node.attributes["midrise"] else ratio

    def rounded(self, name: str) -> torch.Tensor:
        """A weight as layers read it."""
        return self._tensor(self.nodes[name].output)

    def limits(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest code of each entry of a weight, before zero points are added; they broadcast."""
        node = self.nodes[name]
        zero = self._tensor(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(())
        if zero.dim():
            zero = spread(zero, self._tensor(node.inputs[0]), node.attributes["axis"], node.attributes["block_size"])
        return node.attributes["low"] - zero.float(), node.attributes["high"] - zero.float()

    def coded(self, layer: Layer, bits: int | None = None) -> Coded:
        """The weight of a layer on its grid, or on that of more ``bits`` which stands for the same numbers.

        Levels half way between integers are the odd numbers of half steps.
        """
        node = self.nodes[layer.weight.name]
        attributes, midrise = node.attributes, node.attributes["midrise"]
        low, high = self.limits(layer.weight.name)
        codes = torch.minimum(torch.maximum(torch.round(self.in_steps(layer.weight.name)), low), high)
        scale = _by_row(node, self._tensor(node.inputs[1]))
        zero = _by_row(node, self._tensor(node.inputs[2])) if len(node.inputs) > 2 else torch.zeros_like(scale)
        own = (attributes["high"] - attributes["low"] + 1).bit_length() - 1 + midrise
        grid = Grid(bits or own, symmetric=attributes["low"] < 0)
        if midrise:
            codes, scale = 2 * codes + 1, scale / 2
        rows = layer.matrices(codes.cpu()).flatten(0, 1)
        found = Coded(Form(grid, rows.shape[1] // scale.shape[1]), rows, scale.cpu(), zero.cpu().float())
        return found.with_codes(rows + found.spread(found.zero))


def placed(layer: Layer, group: int) -> dict[str, int]:
    """Attributes that say along which axis of the stored weight scales lie, one for each ``group`` of columns."""
    outputs = int(layer.node.op == "matmul")
    return {"axis": outputs} if group == layer.columns else {"axis": 1 - outputs, "block_size": group}


def laid_out(layer: Layer, scale: torch.Tensor) -> torch.Tensor:
    """Scales [rows, groups] as operators take them: [rows] where there is one group, else as the weight is stored."""
    if scale.shape[1] == 1:
        return scale[:, 0]
    return scale.t().contiguous() if layer.node.op == "matmul" else scale


def _by_row(node: Node, scale: torch.Tensor) -> torch.Tensor:
    """[rows, groups], as weights are coded, of scales as the layer lays them out."""
    if node.attributes["block_size"] is None:
        return scale[:, None]
    return scale.t() if node.attributes["axis"] == 0 else scale
