"""``quantize``: weights, and activations where the scheme says so, as small integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph, Value
from regauge.ir.quantized import PLANNED_FOR
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Range, Spread, Statistics
from regauge.passes.options import option
from regauge.passes.quantization.grid import Coded, Grid, rounded
from regauge.passes.quantization.placement import Placement, find_layers, find_tables, place
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.ranges import Calibration, Ends, Histogram, ends_of
from regauge.passes.quantization.smoothing import Readers, smooth, smoothing_of
from regauge.passes.quantization.targets import TARGETS, Target
from regauge.passes.quantization.weights import Method, coded_on_data
from regauge.passes.simplify.simplify import Simplify

SCHEMES: Mapping[str, tuple[int, bool]] = {
    "w8a8": (8, True),
    "w8": (8, False),
    "w4": (4, False),
    "w3": (3, False),
    "w2": (2, False),
}
"""Bits of weights, and whether activations have 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as small integers, and multiply integers where activations are quantized too.

    before  y = linear(x, w, b)                          w: f32[64,128]
    w8a8    y = linear(back(quantize(x)), back(w'), b')  w': i8[64,128], a scale for each output
    w4      y = linear(x, back(w'), b)                   w': 4 bits, a scale for each 32 inputs of an output
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "approximate"

    scheme: Literal["w8a8", "w8", "w4", "w3", "w2"] = option("w8a8", "bits of weights, and of activations")
    group: int | None = option(None, "neighbouring inputs that share a scale", at_least=2)
    symmetric: bool | None = option(None, "weights without zero points; if not given, those of 8 bits")
    target: Literal["ort-x86", "reference"] = option("ort-x86", "the runtime that it is written for")
    calibration: Calibration = option("minmax", "how ranges of activations are found")
    method: Method | None = option(
        None, "how weights are rounded: nearest, or on data by columns (GPTQ) or descent, for 8 bits and for fewer"
    )
    smoothing: float | None = option(
        None, "exponent of SmoothQuant, 0 for none; if not given, for each value the best", at_least=0, at_most=1
    )
    embeddings: bool = option(True, "tables of vectors, too: 8 bits, and a scale for each vector")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def call(self, graph: Graph, context: Context) -> Graph:
        bits, activations = SCHEMES[self.scheme]
        target = TARGETS[self.target]
        plain = _prepared(graph)
        original = plain.copy()
        layers = find_layers(original, self.include, self.exclude, context.left, depthwise=target.depthwise)
        tables = find_tables(original, self.include, self.exclude, context.left) if self.embeddings else []
        if not layers and not tables:
            return graph
        if activations:
            writer = self._with_activations(original, layers, target, context)
        else:
            writer = self._weights_alone(original, layers, target, bits, context)
        result = writer.graph
        for node, table in find_tables(result, self.include, self.exclude, Counter()) if tables else ():
            writer.embedding(node, table)
        if tables:
            context.note(f"8 bits: {len(tables)} tables of vectors")
        remove_dead(result)
        result.metadata[PLANNED_FOR] = self.target
        return result

    # -- weights alone -----------------------------------------------------------------------------------------------

    def _weights_alone(
        self, original: Graph, layers: Sequence[Layer], target: Target, bits: int, context: Context
    ) -> Writer:
        symmetric = bits == 8 if self.symmetric is None else self.symmetric
        wanted = self.group or (32 if bits < 8 else target.block)
        groups = {layer.weight.name: _group(layer, wanted) for layer in layers}
        grid = Grid(bits, symmetric)
        result = original.copy()
        own = find_layers(result, self.include, self.exclude, Counter(), depthwise=target.depthwise)
        coded = self._coded(original, result, own, grid, groups, context)
        writer = Writer(result, target, by=self.name)
        for layer in own:
            writer.weight_alone(layer, coded[layer.weight.name])
        context.note(f"{bits} bits: the weights of {len(own)} layers")
        return writer

    def _coded(
        self,
        original: Graph,
        result: Graph,
        layers: Sequence[Layer],
        grid: Grid,
        groups: Mapping[str, int],
        context: Context,
    ) -> dict[str, Coded]:
        """The codes of each layer's weight, by its name; biases of ``result`` make up for them where there is data."""
        method = self.method or ("columns" if grid.bits == 8 else "descent")
        if context.data is None or method == "nearest":
            return {layer.weight.name: rounded(_rows(layer), grid, groups[layer.weight.name]) for layer in layers}
        batches = calibration_batches(original, context)
        context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        return coded_on_data(original, result, layers, batches, grid, groups, method, by=self.name)

    # -- activations -------------------------------------------------------------------------------------------------

    def _with_activations(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        batches = calibration_batches(original, context)
        if self.smoothing != 0:
            self._smooth(original, layers, target, batches, context)
        result = original.copy()
        own = find_layers(result, self.include, self.exclude, Counter(), depthwise=target.depthwise)
        placement = place(result, own, target)
        ends = self._ends(result, placement, target, batches)
        groups = {layer.weight.name: layer.columns for layer in own}
        coded = self._coded(original, result, own, target.weights, groups, context)
        writer = Writer(result, target, by=self.name)
        writer.activations(placement, ends)
        for layer in own:
            bias = None if layer.bias is None else layer.bias.tensor.detach()
            writer.layer(layer, coded[layer.weight.name], bias)
        context.note(f"{len(own)} layers multiply integers; ranges of {len(ends)} values")
        return writer

    def _ends(self, graph: Graph, placement: Placement, target: Target, batches: Sequence[Any]) -> dict[Value, Ends]:
        statistics = Statistics(graph)
        histograms = {
            value: statistics.register(value, Histogram(*_importance(value, placement.layers)))
            for value in placement.measured
        }
        statistics.collect(batches)
        return {value: ends_of(found, target.activations, self.calibration) for value, found in histograms.items()}

    def _smooth(
        self, graph: Graph, layers: Sequence[Layer], target: Target, batches: Sequence[Any], context: Context
    ) -> None:
        read: dict[Value, list[Layer]] = {}
        for layer in layers:
            if layer.node.op != "conv" and isinstance(layer.node.inputs[0], Value):
                read.setdefault(layer.node.inputs[0], []).append(layer)
        statistics = Statistics(graph)
        found = [
            Readers(value, own, statistics.register(value, Range(-1)), statistics.register(value, Spread(-1)))
            for value, own in read.items()
        ]
        if not found:
            return
        statistics.collect(batches)
        count = 0
        for readers in found:
            best = smoothing_of(readers, target.activations, target.weights, self.smoothing)
            count += best.share < 1 and smooth(graph, readers, best, by=self.name)
        context.note(f"{count} of {len(found)} values smoothed")


def _prepared(graph: Graph) -> Graph:
    """With norms folded into layers, and linear layers put together."""
    for step in (Simplify(), Simplify(only=("assemble-linear", "dead-code"))):
        graph = step.call(graph, Context())
    return graph


def _importance(value: Value, layers: Sequence[Layer]) -> tuple[int, torch.Tensor] | tuple[None, None]:
    """The axis of a value that layers contract, and what the error of each of its indices makes in their outputs."""
    own = [layer for layer in layers if layer.node.inputs[0] is value]
    if not own or any(layer.blocks > 1 for layer in own):
        return None, None
    total = torch.zeros(own[0].columns // own[0].taps, dtype=torch.float64)
    for layer in own:
        total += _rows(layer).square().sum(0).reshape(-1, layer.taps).sum(1)
    return (1 if own[0].node.op == "conv" else -1), total


def _rows(layer: Layer) -> torch.Tensor:
    """The weight as [outputs of all blocks, columns]."""
    return layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1)


def _group(layer: Layer, wanted: int | None) -> int:
    """Columns that share a scale: a whole row of a convolution, or where the group does not divide it."""
    whole = wanted is None or layer.node.op == "conv" or layer.columns % wanted
    return layer.columns if whole or wanted is None else wanted
