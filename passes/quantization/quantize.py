"""``quantize``: weights, and activations where the scheme says so, as small integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.quantized_layers import PLANNED_FOR
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Range, Spread, Statistics
from regauge.passes.options import option
from regauge.passes.quantization.grid import Coded, Grid, rounded
from regauge.passes.quantization.placement import Placement, find_tables, misfit, misfit_of_blocks, place
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
BLOCK = 32  # columns that share a scale, where none is said: most kernels' choice


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as small integers, and multiply integers where activations are quantized too.

    before  y = linear(x, w, b)                          w: f32[64,128]
    w8a8    y = linear(back(quantize(x)), back(w'), b')  w': i8[64,128], a scale for each output
    w4      y = linear(x, back(w'), b)                   w': 4 bits, a scale for each 32 inputs of an output

    The graph is simplified first, so that norms are part of layers. In an ONNX file weights of 3 bits take 4, and so do
    those of 2 below opset 25; weights alone need opset 21 there. In torch each takes a byte.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "approximate"

    scheme: Literal["w8a8", "w8", "w4", "w3", "w2"] = option("w8a8", "bits of weights, and of activations")
    group: int | None = option(None, "neighbouring inputs that share a scale", at_least=2)
    symmetric: bool | None = option(None, "weights without zero points; if not given, those of 8 bits")
    target: Literal["ort-x86", "reference"] = option("ort-x86", "the runtime that it is written for")
    calibration: Calibration | None = option(None, "how ranges of activations are found; minmax if not given")
    method: Method | None = option(
        None, "how weights are rounded: nearest, or on data by columns (GPTQ) or descent, for 8 bits and for fewer"
    )
    smoothing: float | None = option(
        None, "exponent of SmoothQuant, 0 for none; if not given, for each value the best", at_least=0, at_most=1
    )
    embeddings: bool = option(True, "tables of vectors, too: 8 bits, and a scale for each vector")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def __post_init__(self) -> None:
        super().__post_init__()
        of_weights = [name for name in ("group", "symmetric") if getattr(self, name) is not None]
        of_activations = [name for name in ("calibration", "smoothing") if getattr(self, name) is not None]
        idle = of_weights if self._activations else of_activations
        if idle:
            raise PassError(f"quantize: {idle[0]} does nothing with scheme={self.scheme}: leave it out")
        group = self.group or BLOCK
        if TARGETS[self.target].blocks_alone and (group < 16 or group & (group - 1)):
            raise PassError(f"quantize: {self.target} reads blocks of 16, 32, 64, ... inputs, not group={self.group}")

    @property
    def _activations(self) -> bool:
        return SCHEMES[self.scheme][1]

    @property
    def block(self) -> int | None:
        """Columns that share a scale where weights are stored alone; None: all of a row."""
        bits, _ = SCHEMES[self.scheme]
        return self.group or (BLOCK if bits < 8 or TARGETS[self.target].blocks_alone else None)

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None and self.method in ("columns", "descent"):
            raise PassError(
                f"quantize needs data for method={self.method}: give batches, optimize(graph, passes, data=...)"
            )
        original, target = prepared(graph).copy(), TARGETS[self.target]
        tables = self._tables(original)
        layers = self.layers_of(original, context.left)
        if not layers and not tables:
            return graph
        if not layers:
            writer = Writer(original.copy(), target, by=self.name)
        elif self._activations:
            writer = self._with_activations(original, layers, target, context)
        else:
            writer = self._weights_alone(original, layers, target, context)
        result = writer.graph
        for node, table in self._tables(result):
            writer.embedding(node, table)
        if tables:
            context.note(f"8 bits: {len(tables)} tables of vectors")
        remove_dead(result)
        result.metadata[PLANNED_FOR] = self.target
        return result

    def _tables(self, graph: Graph) -> list[tuple[Node, Parameter]]:
        return find_tables(graph, self.include, self.exclude) if self.embeddings else []

    def layers_of(self, graph: Graph, left: Counter[str]) -> list[Layer]:
        """The layers that are quantized, of a graph as :func:`prepared`; ``left`` counts the others by reason."""
        target = TARGETS[self.target]

        def against(layer: Layer) -> str | None:
            return misfit(layer, target) if self._activations else misfit_of_blocks(layer, target, self.block)

        tables = {table for _, table in self._tables(graph)}
        return chosen_layers(graph, self.include, self.exclude, left, against, blocks=True, apart=tables)

    # -- weights alone -----------------------------------------------------------------------------------------------

    def _weights_alone(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        bits, _ = SCHEMES[self.scheme]
        groups = {layer.weight.name: group_of(layer, self.block) for layer in layers}
        whole = sum(size == layer.columns for size, layer in zip(groups.values(), layers, strict=True))
        if self.block is not None and whole:
            context.note(f"{whole} layers have a scale for each output: {self.block} does not divide their inputs")
        grid = Grid(bits, bits == 8 if self.symmetric is None else self.symmetric)
        result = original.copy()
        own = self.layers_of(result, Counter())
        coded = self.coded(original, result, own, grid, groups, context)
        writer = Writer(result, target, by=self.name)
        for layer in own:
            writer.weight_alone(layer, coded[layer.weight.name])
        context.note(f"{bits} bits: the weights of {len(own)} layers")
        return writer

    def coded(
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
            return {layer.weight.name: rounded(rows_of(layer), grid, groups[layer.weight.name]) for layer in layers}
        batches = calibration_batches(original, context)
        context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        return coded_on_data(original, result, layers, batches, grid, groups, method, by=self.name)

    # -- activations -------------------------------------------------------------------------------------------------

    def _with_activations(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        batches = calibration_batches(original, context)
        if self.smoothing != 0:
            self.smooth_values(original, layers, target, batches, context)
        result = original.copy()
        own = self.layers_of(result, Counter())
        placement = place(result, own, target)
        ends = self.ends_of_values(result, placement, target, batches)
        groups = {layer.weight.name: layer.columns for layer in own}
        coded = self.coded(original, result, own, target.weights, groups, context)
        writer = Writer(result, target, by=self.name)
        writer.activations(placement, ends)
        for layer in own:
            writer.layer(layer, coded[layer.weight.name])
        context.note(f"{len(own)} layers multiply integers; ranges of {len(ends)} values")
        return writer

    def ends_of_values(
        self, graph: Graph, placement: Placement, target: Target, batches: Sequence[Any]
    ) -> dict[Value, Ends]:
        """The ranges of the values that a placement needs, on batches of inputs."""
        statistics = Statistics(graph)
        histograms = {
            value: statistics.register(value, Histogram(*_importance(value, placement.layers)))
            for value in placement.measured
        }
        statistics.collect(batches)
        way = self.calibration or "minmax"
        return {value: ends_of(found, target.activations, way) for value, found in histograms.items()}

    def smooth_values(
        self, graph: Graph, layers: Sequence[Layer], target: Target, batches: Sequence[Any], context: Context
    ) -> None:
        """Move range from what linear layers read into their weights."""
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


def prepared(graph: Graph) -> Graph:
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
        total += rows_of(layer).square().sum(0).reshape(-1, layer.taps).sum(1)
    return (1 if own[0].node.op == "conv" else -1), total


def rows_of(layer: Layer) -> torch.Tensor:
    """The weight as [outputs of all blocks, columns]."""
    return layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1)


def group_of(layer: Layer, wanted: int | None) -> int:
    """Columns that share a scale: a whole row of a convolution, or where the group does not divide it."""
    whole = wanted is None or layer.node.op == "conv" or layer.columns % wanted
    return layer.columns if whole or wanted is None else wanted
