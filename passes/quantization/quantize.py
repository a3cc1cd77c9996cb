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
from regauge.passes.quantization.gate import Gate, check_latency
from regauge.passes.quantization.grid import Coded, Form, Grid, rounded
from regauge.passes.quantization.placement import Placement, find_tables, misfit_of_blocks, misfit_of_products, place
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.ranges import Calibration, Ends, Histogram, ends_of
from regauge.passes.quantization.schemes import SCHEMES, Scheme
from regauge.passes.quantization.smoothing import Readers, smooth, smoothing_of
from regauge.passes.quantization.targets import TARGETS, Target
from regauge.passes.quantization.weights import Method, coded_on_data
from regauge.passes.simplify.simplify import Simplify


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
    target: Literal["ort-x86", "ort-x86-avx2", "ort-arm", "tensorrt", "reference"] = option(
        "ort-x86", "the runtime that it is written for"
    )
    activations: Literal["static", "dynamic"] = option(
        "static", "ranges of activations from data, or found at every run"
    )
    calibration: Calibration | None = option(None, "how ranges of activations are found; minmax if not given")
    method: Method | None = option(
        None, "how weights are rounded: nearest, or on data by columns (GPTQ) or descent, for 8 bits and for fewer"
    )
    smoothing: float | None = option(
        None, "exponent of SmoothQuant, 0 for none; if not given, for each value the best", at_least=0, at_most=1
    )
    embeddings: bool = option(True, "tables of vectors, too: 8 bits, and a scale for each vector")
    gate: Gate = option("off", "measure it beside the float graph on a batch: warn, or refuse, where it is slower")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def __post_init__(self) -> None:
        super().__post_init__()
        of_weights = [name for name in ("group", "symmetric") if getattr(self, name) is not None]
        of_activations = [name for name in ("calibration", "smoothing") if getattr(self, name) is not None]
        dynamic, known = self.activations == "dynamic", f"scheme={self.scheme}"
        idle = of_weights if self._scheme.activations else [*of_activations, *["activations"][: int(dynamic)]]
        if not idle and dynamic and self.calibration is not None:
            idle, known = ["calibration"], "activations=dynamic"
        if idle:
            raise PassError(f"quantize: {idle[0]} does nothing with {known}: leave it out")
        target = TARGETS[self.target]
        group = self.group or target.block
        if target.blocks_alone and (group < 16 or group & (group - 1)):
            raise PassError(f"quantize: {self.target} reads blocks of 16, 32, 64, ... inputs, not group={self.group}")
        if not self._scheme.activations and self._scheme.bits > target.bits_alone:
            raise PassError(f"quantize: {self.target} has weights alone of {target.bits_alone} bits: scheme=w4")
        if target.centred and self.symmetric is False:
            raise PassError(f"quantize: weights have no zero points for {self.target}: leave symmetric=false out")
        if dynamic and not target.whole:
            raise PassError(f"quantize: {self.target} has no ranges that are found at every run: activations=static")
        if self.gate != "off" and not target.machines:
            raise PassError(f"quantize: {self.target} cannot be run here, so gate={self.gate} has nothing to measure")

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def _block(self) -> int | None:
        """Columns that share a scale where weights are stored alone; None: all of a row."""
        target = TARGETS[self.target]
        return self.group or (target.block if self._scheme.bits < 8 or target.blocks_alone else None)

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None and self.method in ("columns", "descent"):
            raise PassError(
                f"quantize needs data for method={self.method}: give batches, optimize(graph, passes, data=...)"
            )
        original, target = _prepared(graph).copy(), TARGETS[self.target]
        tables = self._tables(original)
        layers = self._layers(original, context.left)
        if not layers and not tables:
            return graph
        if not layers:
            writer = Writer(original.copy(), target, by=self.name)
        elif self._scheme.activations:
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
        inputs = None if context.data is None else next(context.inputs(graph))
        check_latency(graph, result, target, inputs, context, self.gate)
        return result

    def _tables(self, graph: Graph) -> list[tuple[Node, Parameter]]:
        return find_tables(graph, self.include, self.exclude) if self.embeddings else []

    def _layers(self, graph: Graph, left: Counter[str]) -> list[Layer]:
        target = TARGETS[self.target]

        def against(layer: Layer) -> str | None:
            if self._scheme.activations:
                return misfit_of_products(layer, target, dynamic=self.activations == "dynamic")
            return misfit_of_blocks(layer, target, self._block)

        tables = {table for _, table in self._tables(graph)}
        return chosen_layers(graph, self.include, self.exclude, left, against, blocks=True, apart=tables)

    # -- weights alone -----------------------------------------------------------------------------------------------

    def _weights_alone(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        bits = self._scheme.bits
        groups = {layer.weight.name: _group(layer, self._block) for layer in layers}
        whole = sum(size == layer.columns for size, layer in zip(groups.values(), layers, strict=True))
        if self._block is not None and whole:
            context.note(f"{whole} layers have a scale for each output: {self._block} does not divide their inputs")
        grid = Grid(bits, (bits == 8 or target.centred) if self.symmetric is None else self.symmetric)
        forms = {name: Form(grid, group) for name, group in groups.items()}
        result = original.copy()
        own = self._layers(result, Counter())
        coded = self._coded(original, result, own, forms, context)
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
        forms: Mapping[str, Form],
        context: Context,
    ) -> dict[str, Coded]:
        """The codes of each layer's weight, by its name; biases of ``result`` make up for them where there is data."""
        if context.data is None or self.method == "nearest":
            pairs = [(layer, forms[layer.weight.name]) for layer in layers]
            return {layer.weight.name: rounded(_rows(layer), form.grid, form.group) for layer, form in pairs}
        batches = calibration_batches(original, context)
        context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        return coded_on_data(original, result, layers, batches, forms, self.method, by=self.name)

    # -- activations -------------------------------------------------------------------------------------------------

    def _with_activations(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        dynamic = self.activations == "dynamic"
        needless = dynamic and context.data is None and not self.smoothing
        batches = [] if needless else calibration_batches(original, context)
        if self.smoothing != 0 and batches:
            self._smooth(original, layers, target, batches, context)
        result = original.copy()
        own = self._layers(result, Counter())
        placement = place(result, own, target)
        ends = {} if dynamic else self._ends(result, placement, target, batches)
        forms = {layer.weight.name: Form(target.weights, layer.columns) for layer in own}
        coded = self._coded(original, result, own, forms, context)
        writer = Writer(result, target, by=self.name)
        if dynamic:
            writer.at_every_run(placement)
        else:
            writer.activations(placement, ends)
        for layer in own:
            writer.layer(layer, coded[layer.weight.name])
        ranges = "found at every run" if dynamic else f"of {len(ends)} values"
        context.note(f"{len(own)} layers multiply integers; ranges {ranges}")
        return writer

    def _ends(self, graph: Graph, placement: Placement, target: Target, batches: Sequence[Any]) -> dict[Value, Ends]:
        statistics = Statistics(graph)
        histograms = {
            value: statistics.register(value, Histogram(*_importance(value, placement.layers)))
            for value in placement.measured
        }
        statistics.collect(batches)
        way = self.calibration or "minmax"
        return placement.aligned(
            {value: ends_of(found, target.activations, way) for value, found in histograms.items()}
        )

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
