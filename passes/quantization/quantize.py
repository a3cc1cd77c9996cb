"""``quantize``: weights, and activations where the scheme says so, as small integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch

from regauge.ir.cost import figures
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.quantized_layers import PLANNED_FOR
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, check_examples, examples_in
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import labelled
from regauge.passes.calibration.statistics import Range, Spread, Statistics
from regauge.passes.options import option
from regauge.passes.quantization.grid import Coded, Form, Grid, rounded
from regauge.passes.quantization.learned_codes import Learned
from regauge.passes.quantization.learned_rounding import STEPS, learned
from regauge.passes.quantization.mixed import Mixed
from regauge.passes.quantization.placement import Placement, find_tables, misfit, misfit_of_blocks, place
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.ranges import Calibration, Ends, Histogram, ends_of
from regauge.passes.quantization.schemes import SCHEMES, Scheme
from regauge.passes.quantization.sensitivity import WITHOUT_DATA, Sensitivity
from regauge.passes.quantization.smoothing import Readers, smooth, smoothing_of
from regauge.passes.quantization.targets import TARGETS, Target
from regauge.passes.quantization.weights import Method, coded_on_data
from regauge.passes.simplify.simplify import Simplify

BLOCK = 32  # columns that share a scale, where none is said: most kernels' choice


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as small integers, and multiply integers where activations are quantized too.

    before  y = linear(x, w, b)                          w: f32[64,128]
    w8a8    y = linear(back(quantize(x)), back(w'), b')  w': i8[64,128], a scale for each output
    w4      y = linear(x, back(w'), b)                   w': 4 bits, a scale for each 32 inputs of an output
    mixed   y = linear(x, back(w'), b)                   w': of each layer the bits that are best, or float

    The graph is simplified first, so that norms are part of layers. In an ONNX file weights of 3 bits take 4, and so do
    those of 2 below opset 25; weights alone need opset 21 there. In torch each takes a byte.

    With scheme=mixed each layer gets the bits that lose least within ``bytes`` of the whole graph's weights (3 bits
    count as 3), or the fewest that keep an ``accuracy``; the report says what each layer would lose with how many bits.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "approximate"

    scheme: Literal["w8a8", "w8", "w4", "w3", "w2", "mixed"] = option("w8a8", "bits of weights, and of activations")
    bytes: float | str | None = option(None, "of scheme=mixed: bytes of weights kept, a share or a number (5MB)")
    accuracy: float | None = option(
        None,
        "of scheme=mixed: share of the data's rows of the first output that keep their class",
        above=0,
        at_most=1,
    )
    bits: tuple[Literal[2, 3, 4, 8], ...] = option(
        (), "of scheme=mixed: what it chooses from beside float; 2,3,4,8, in onnxruntime 4,8"
    )
    sensitivity: Sensitivity | None = option(
        None, "of scheme=mixed: what bits cost: loss, gradient, hessian, lim or zd; loss, without data zd"
    )
    group: int | None = option(
        None,
        "neighbouring inputs that share a scale; 32 in linear layers, all of an output in convolutions, where an input "
        "counts as often as the kernel has places",
        at_least=2,
    )
    symmetric: bool | None = option(None, "weights without zero points; if not given, those of 8 bits")
    target: Literal["ort-x86", "reference"] = option("ort-x86", "the runtime that it is written for")
    calibration: Calibration | None = option(None, "how ranges of activations are found; minmax if not given")
    method: Method | Learned | None = option(
        None,
        "how weights are rounded: nearest, or on data by columns (GPTQ), descent, or gradients through blocks "
        "of layers (adaround, flexround); columns for 8 bits, descent for fewer",
    )
    steps: int | None = option(None, f"of adaround and flexround: steps for each block; {STEPS}", at_least=1)
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
        idle = of_weights if self._scheme.activations else of_activations
        if idle:
            raise PassError(f"quantize: {idle[0]} does nothing with scheme={self.scheme}: leave it out")
        if self.steps is not None and self.method not in get_args(Learned):
            raise PassError("quantize: steps are of method=adaround or flexround: leave them out")
        self._check_mixed()
        group = self.group or BLOCK
        if TARGETS[self.target].blocks_alone and (group < 16 or group & (group - 1)):
            raise PassError(f"quantize: {self.target} reads blocks of 16, 32, 64, ... inputs, not group={self.group}")

    def _check_mixed(self) -> None:
        bounds = [name for name in ("bytes", "accuracy") if getattr(self, name) is not None]
        given = bounds + [name for name in ("bits", "sensitivity") if getattr(self, name)]
        if self.scheme != "mixed" and given:
            raise PassError(f"quantize: {given[0]} is of scheme=mixed: leave it out")
        if self.scheme == "mixed" and len(bounds) != 1:
            raise PassError("quantize: scheme=mixed takes bytes or accuracy: write quantize{scheme=mixed,bytes=0.2}")
        if self.bytes is not None:
            parse_amount(self.bytes, "bytes", "bytes")

    @property
    def _scheme(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def _block(self) -> int | None:
        """Columns that share a scale where weights are stored alone; None: all of a row."""
        return self.group or (BLOCK if self._scheme.bits != 8 or TARGETS[self.target].blocks_alone else None)

    def _form(self, bits: int, layer: Layer) -> Form:
        return Form(
            Grid(bits, bits == 8 if self.symmetric is None else self.symmetric), _group(layer, self._block, self.group)
        )

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None and self.method not in (None, "nearest"):
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
        return result

    def _tables(self, graph: Graph) -> list[tuple[Node, Parameter]]:
        return find_tables(graph, self.include, self.exclude) if self.embeddings else []

    def _layers(self, graph: Graph, left: Counter[str]) -> list[Layer]:
        target = TARGETS[self.target]

        def against(layer: Layer) -> str | None:
            return misfit(layer, target) if self._scheme.activations else misfit_of_blocks(layer, target, self._block)

        tables = {table for _, table in self._tables(graph)}
        return chosen_layers(graph, self.include, self.exclude, left, against, blocks=True, apart=tables)

    # -- weights alone -----------------------------------------------------------------------------------------------

    def _weights_alone(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        bits = self._scheme.bits
        if bits is None:
            forms = self._mixed(original, layers, target, context)
        else:
            forms = {layer.weight.name: self._form(bits, layer) for layer in layers}
        linear = [layer for layer in layers if layer.node.op != "conv" and layer.weight.name in forms]
        whole = sum(forms[layer.weight.name].group != self._block for layer in linear)
        if self._block is not None and whole:
            context.note(f"{whole} layers have a scale for each output: {self._block} does not divide their inputs")
        result = original.copy()
        own = [layer for layer in self._layers(result, Counter()) if layer.weight.name in forms]
        coded = self._coded(original, result, own, forms, context)
        writer = Writer(result, target, by=self.name)
        for layer in own:
            writer.weight_alone(layer, coded[layer.weight.name])
        counts = Counter(form.grid.bits for form in forms.values())
        for size, count in sorted(counts.items()):
            context.note(f"{size} bits: the weights of {count} layers")
        return writer

    def _mixed(self, graph: Graph, layers: list[Layer], target: Target, context: Context) -> dict[str, Form]:
        """The forms of the layers that do not stay in float."""
        way = self.sensitivity or ("zd" if context.data is None else "loss")
        if context.data is None and (self.accuracy is not None or way not in WITHOUT_DATA):
            asked = f"sensitivity={way}" if self.accuracy is None else "accuracy"
            raise PassError(f"quantize needs data for {asked}: give batches, optimize(graph, passes, data=...)")
        bits = sorted(self.bits or ((4, 8) if target.blocks_alone else (2, 3, 4, 8)))
        forms = {layer.weight.name: [self._form(size, layer) for size in bits] for layer in layers}
        batches = None if context.data is None else [labelled(graph, batch) for batch in context.batches()]
        if batches is not None:
            check_examples([batch.inputs for batch in batches])
        mixed = Mixed(graph, layers, forms, way, batches, target.zeros)
        if self.accuracy is not None:
            picked = mixed.accurate(self.accuracy)
        else:
            assert self.bytes is not None
            whole = figures(graph).bytes
            own = sum(sizes[-1] for sizes in mixed.sizes.values())
            saved = sum(_saved(table) for _, table in self._tables(graph))
            picked = mixed.within(parse_amount(self.bytes, "bytes", "bytes").of(whole) - (whole - own - saved))
        for name, place_of_form in picked.items():
            context.note(mixed.why(name, place_of_form))
        return {name: forms[name][at] for name, at in picked.items() if at < len(forms[name])}

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
        if self.method in get_args(Learned):
            steps = self.steps or STEPS
            return learned(original, result, layers, batches, forms, cast(Learned, self.method), steps, by=self.name)
        return coded_on_data(original, result, layers, batches, forms, cast(Method | None, self.method), by=self.name)

    # -- activations -------------------------------------------------------------------------------------------------

    def _with_activations(self, original: Graph, layers: list[Layer], target: Target, context: Context) -> Writer:
        batches = calibration_batches(original, context)
        if self.smoothing != 0:
            self._smooth(original, layers, target, batches, context)
        result = original.copy()
        own = self._layers(result, Counter())
        placement = place(result, own, target)
        ends = self._ends(result, placement, target, batches)
        forms = {layer.weight.name: Form(target.weights, layer.columns) for layer in own}
        coded = self._coded(original, result, own, forms, context)
        writer = Writer(result, target, by=self.name)
        writer.activations(placement, ends)
        for layer in own:
            writer.layer(layer, coded[layer.weight.name])
        context.note(f"{len(own)} layers multiply integers; ranges of {len(ends)} values")
        return writer

    def _ends(self, graph: Graph, placement: Placement, target: Target, batches: Sequence[Any]) -> dict[Value, Ends]:
        statistics = Statistics(graph)
        histograms = {
            value: statistics.register(value, Histogram(*_importance(value, placement.layers)))
            for value in placement.measured
        }
        statistics.collect(batches)
        way = self.calibration or "minmax"
        return {value: ends_of(found, target.activations, way) for value, found in histograms.items()}

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


def _saved(table: Parameter) -> int:
    """Bytes that a table of vectors loses in 8 bits: it has a scale for each vector."""
    return int(table.tensor.detach().nbytes - table.tensor.numel() - 4 * len(table.tensor))


def _group(layer: Layer, wanted: int | None, of_kernels: int | None) -> int:
    """Columns that share a scale: a whole row where the group does not divide it.

    Of a convolution as many whole channels as go into ``of_kernels``; a row where none does.
    """
    if layer.node.op == "conv":
        channels = layer.columns // layer.taps
        most = min(channels, (of_kernels or 0) // layer.taps)
        found = max((count for count in range(1, most + 1) if channels % count == 0), default=channels)
        return found * layer.taps
    return layer.columns if wanted is None or layer.columns % wanted else wanted
