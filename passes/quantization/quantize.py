"""``quantize``: weights, and activations where the scheme says so, as small integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from regauge.ir.cost import figures
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.storage.quantized_layers import PLANNED_FOR
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.expected_inputs import ExpectedInputs
from regauge.passes.calibration.layers import Layer
from regauge.passes.options import option
from regauge.passes.quantization.activations import ends_of_values, smooth_values
from regauge.passes.quantization.bitstack import Terms
from regauge.passes.quantization.chosen import Chosen
from regauge.passes.quantization.float_grids import beyond_exponent
from regauge.passes.quantization.formats import Format, Method, Stored
from regauge.passes.quantization.gate import Gate, check_latency
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.inner_layers import problems_of
from regauge.passes.quantization.learned_codes import Learned
from regauge.passes.quantization.learned_rounding import STEPS, learned
from regauge.passes.quantization.mixed_choice import chosen_forms
from regauge.passes.quantization.neuron_groups import with_like_rows_together
from regauge.passes.quantization.option_checks import check_options
from regauge.passes.quantization.placement import place
from regauge.passes.quantization.preparation import prepared, with_biases_apart
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.ranges import Calibration
from regauge.passes.quantization.schemes import SCHEMES, Per, Scheme, SchemeName, Statistic, integers
from regauge.passes.quantization.sensitive import kept_in_half
from regauge.passes.quantization.sensitivity import Sensitivity
from regauge.passes.quantization.storage import Plain, plain_vectors, plain_weights
from regauge.passes.quantization.subspaces import least_bits
from regauge.passes.quantization.targets import TARGETS, Target
from regauge.passes.quantization.universal_stack import bytes_of, stack_at
from regauge.passes.quantization.weight_formats import WeightFormats
from regauge.passes.quantization.weights import rows_of, stored_on_data
from regauge.passes.quantization.without_data import WithoutData, stored_without_data


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Store weights as small integers, and multiply integers where activations are quantized too.

    before  y = linear(x, w, b)                          w: f32[64,128]
    w8a8    y = linear(back(quantize(x)), back(w'), b')  w': i8[64,128], a scale for each output
    w8      y = lstm(x, table[w'] * s)                   w': u8[1,512,128], where no kernel reads integers
    w4      y = linear(x, back(w'), b)                   w': 4 bits, a scale for each 32 inputs of an output
    mixed   y = linear(x, back(w'), b)                   w': of each layer the bits that are best, or float
    onebit  y = linear(x * v, signs(w')) * u + b         w': u8[64,16], eight signs to a byte

    Ranges of activations are found on data, or with activations=dynamic at every run, in torch for each row (a token).
    The graph is simplified first, so that norms are part of layers. In an ONNX file weights of 3 bits take 4, and so do
    those of 2 below opset 25; weights alone need opset 21 there. In a torch module they are packed.
    Of activations in floats of 8 bits onnxruntime makes what it does not run unless its optimisations are off.

    With scheme=mixed each layer gets the bits that lose least within ``bytes`` of the whole graph's weights (3 bits
    count as 3) or a ``latency``, measured where the target runs, or the fewest that keep an ``accuracy``; the report
    says what each layer would lose with how many bits.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "approximate"

    scheme: SchemeName = option("w8a8", "bits of weights, and of activations; or another format: fp8 of both")
    bits: tuple[Literal[2, 3, 4, 5, 6, 7, 8], ...] = option(
        (),
        "of pow2, bfp and codebook, 4 if not given; what mixed chooses from beside float: 2,3,4,8, in onnxruntime 4,8",
    )
    bytes: float | str | None = option(
        None, "of mixed and bitstack: bytes of all that is stored, a share or a number (5MB)"
    )
    accuracy: float | None = option(
        None,
        "of mixed: share of the data's rows of the first output that keep their class",
        above=0,
        at_most=1,
    )
    latency: float | str | None = option(None, "of mixed: time of one run: a share or a time (5ms)")
    sensitivity: Sensitivity | None = option(
        None, "of mixed: what bits cost: loss, gradient, hessian, lim, entropy or zd; loss, without data zd"
    )
    per: Per | None = option(None, "what shares a scale: the tensor, each row (output), or groups of its inputs")
    group: int | None = option(
        None,
        "neighbouring inputs that share a scale; 32 in linear layers, all of an output in convolutions, where an input "
        "counts as often as the kernel has places; of codebooks, neighbouring outputs that share one",
        at_least=2,
    )
    permute: bool = option(False, "first reorder outputs, exactly, so that those which share a codebook are alike")
    symmetric: bool | None = option(None, "weights without zero points; if not given, those of 8 bits")
    rule: Literal["amax", "cscale"] | None = option(
        None, "exponents of float8: by the greatest entry, or one for all; amax if not given"
    )
    margin: int | None = option(None, "powers of two that amax leaves above the greatest entry", at_least=0)
    bias: int | None = option(None, "the exponent of cscale; 0 if not given")
    statistic: Statistic | None = option(
        None, "scale of ternary weights: that of least error, or the mean or median of magnitudes"
    )
    stack: str | None = option(None, "of bitstack: the file its terms are read from, or written to where there is none")
    rank: int | None = option(None, "of bitstack's magnitudes, at most 16 by size if not given", at_least=1)
    packed: bool = option(False, "codes share bytes in torch too, ternary ones five a byte; unpacked at every run")
    target: Literal["ort-x86", "ort-x86-avx2", "ort-arm", "tensorrt", "torch-cpu", "torch-cuda", "reference"] = option(
        "ort-x86", "the runtime that it is written for"
    )
    activations: Literal["static", "dynamic"] = option(
        "static", "ranges of activations from data, or found at every run"
    )
    calibration: Calibration | None = option(None, "how ranges of activations are found; minmax if not given")
    method: Method | Learned | WithoutData | None = option(
        None,
        "how weights are rounded: nearest, or on data by columns (GPTQ), descent, or gradients through blocks "
        "of layers (adaround, flexround); columns for 8 bits, descent for fewer; udfc: nearest, and layers behind make "
        "up for it by weights alone",
    )
    correct: bool | None = option(
        None,
        "biases make up for the mean of what rounding changes, on data, or without it by what batch norms hold; if not "
        "given, but with method=nearest",
    )
    steps: int | None = option(None, f"of adaround and flexround: steps for each block; {STEPS}", at_least=1)
    smoothing: float | None = option(
        None, "exponent of SmoothQuant, 0 for none; if not given, for each value the best", at_least=0, at_most=1
    )
    embeddings: bool = option(True, "tables of vectors, too, with a scale for each vector")
    table_bits: int = option(8, "bits of numbers in tables of vectors", at_least=2, at_most=8)
    storage: bool | None = option(
        None,
        "weights that are read in float, too: 8 bits, made floats when the file is loaded; if not given, where weights "
        "alone are integers, in onnxruntime, and beside integer activations vectors alone, in half precision",
    )
    gate: Gate = option("off", "measure it beside the float graph on a batch: warn, or refuse, where it is slower")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)

    @property
    def full_scheme(self) -> Scheme:
        """The scheme, with what options say of exponents."""
        bias = (self.bias or 0) if self.rule == "cscale" else None
        return SCHEMES[self.scheme].with_exponents(self.margin, bias)

    @property
    def block(self) -> int | None:
        """Columns that share a scale where weights are stored alone; None: all of a row."""
        if self.per in ("tensor", "row") or self.full_scheme.kind == "codebooks":
            return None
        target = TARGETS[self.target]
        few = self.full_scheme.bits < 8 and self.full_scheme.grouped or self.per == "group"
        return self.group or (target.block if few or target.blocks_alone else None)

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None and self.method not in (None, "nearest", "udfc"):
            raise PassError(f"quantize needs data for method={self.method}: {GIVE_DATA}")
        original = with_biases_apart(prepared(graph), by=self.name)
        target = self.full_scheme.on(TARGETS[self.target])
        plain = self._chosen.plain(original)
        self._chosen.count_inputs(graph, context.left)
        tables = self._chosen.tables(original, context.left, plain)
        layers = self.layers_of(original, context.left, plain)
        if not layers and not tables and not plain:
            return graph
        if not layers and not self._chosen.tied(original):
            writer = Writer(original.copy(), target, by=self.name)
        elif self.full_scheme.kind == "stacks":
            writer = self._from_stack(original, layers, target, context)
        elif self.full_scheme.activations:
            writer = self._with_activations(original, layers, target, context, self._expected(graph))
        else:
            writer = self._weights_alone(original, layers, target, context, self._expected(graph))
        if tables:
            context.note(f"{self.table_bits} bits: {len(tables)} tables of vectors")
        context.note(f"8 bits: {len(plain)} weights that are read in float") if plain else None
        result = self._finished(writer, context)
        inputs = None if context.data is None else next(context.inputs(graph))
        check_latency(graph, result, target, inputs, context, self.gate)
        return result

    def _finished(self, writer: Writer, context: Context | None = None) -> Graph:
        result = writer.graph
        for table in self._chosen.tables(result, Counter()):
            writer.table(table, self.table_bits)
        remove_dead(result)  # weights that were replaced
        if self._chosen.stores:
            plain = plain_weights(result, self.include, self.exclude)
            known = context if context is not None and context.data is not None and self.method != "nearest" else None
            batches, free = calibration_batches(result, known) if known else [], self.correct is not False
            writer.stored(plain, problems_of(result, plain, batches, free=free))
        if self._chosen.halves:
            writer.halved(plain_vectors(result, self.include, self.exclude))
        remove_dead(result)
        result.metadata[PLANNED_FOR] = self.target
        return result

    @property
    def _chosen(self) -> Chosen:
        return Chosen(self)

    def layers_of(self, graph: Graph, left: Counter[str], plain: Sequence[Plain] = ()) -> list[Layer]:
        """The layers that are quantized (:meth:`.chosen.Chosen.layers`)."""
        return self._chosen.layers(graph, left, plain)

    # -- weights alone -----------------------------------------------------------------------------------------------

    def _expected(self, graph: Graph) -> ExpectedInputs | None:
        """What layers are given on average, where biases are corrected by it; channels must stay in their order."""
        corrects = self.method != "nearest" if self.correct is None else self.correct
        return ExpectedInputs(graph) if corrects and not self.permute else None

    def _weights_alone(
        self, original: Graph, layers: list[Layer], target: Target, context: Context, expected: ExpectedInputs | None
    ) -> Writer:
        if self.permute and self.group:
            original, count = with_like_rows_together(original, layers, self.group, by=self.name)
            layers = self.layers_of(original, Counter())
            context.note(f"{count} Dims reordered, so that groups of {self.group} outputs are alike")
        linear = [layer for layer in layers if layer.node.op != "conv"]
        bits = self.bits[0] if self.bits else self.full_scheme.bits
        forms = WeightFormats(self, original)
        whole = sum(forms.group(layer, bits) != self.block for layer in linear)
        if self.block is not None and whole:
            context.note(f"{whole} layers have a scale for each output: no kernel reads blocks of {self.block} of them")
        alone = sum(layer.outputs * layer.blocks % (self.group or 1) > 0 for layer in layers)
        if self.full_scheme.kind == "codebooks" and alone:
            context.note(f"{alone} layers have one codebook: {self.group} does not divide their outputs")
        formats: dict[str, Format]
        if self.full_scheme.mixed:
            formats = dict(self._mixed(original, layers, target, context))
        else:
            least = least_bits(original) if self.full_scheme.make is integers else {}
            sizes = [(layer.weight.name, layer, max(bits, least.get(layer.weight.name, 0))) for layer in layers]
            formats = {name: forms.of(layer, size) for name, layer, size in sizes}
            free = [layer for layer in layers if forms.free(layer)]
            if free and context.data is not None and self.method not in ("nearest", "udfc"):
                formats |= kept_in_half(original, free, formats, calibration_batches(original, context))
        result = original.copy()
        own = [layer for layer in self.layers_of(result, Counter()) if layer.weight.name in formats]
        stored = self.stored(original, result, own, formats, context, expected)
        context.notes += beyond_exponent(original, stored) if self.rule == "cscale" else []
        writer = Writer(result, target, by=self.name, packed=self.packed)
        for layer in own:
            writer.weight_alone(layer, stored[layer.weight.name])
        if own:
            each = sum(found.bits for found in stored.values()) / sum(layer.entries for layer in own)
            context.note(f"the weights of {len(own)} layers, {each:.2f} bits each with scales")
        if self.block is not None and whole < len(linear) and target.of_blocks:
            context.note(target.of_blocks)
        return writer

    def _from_stack(self, original: Graph, layers: Sequence[Layer], target: Target, context: Context) -> Writer:
        stack = stack_at(self.stack, original, layers, self.rank, context, by=self.name)
        found = dict(stack.weights)
        if self.bytes is not None:
            most = parse_amount(self.bytes, "bytes", "bytes").of(figures(original).bytes)
            least = {name: terms.first(1) for name, terms in found.items()}
            needed = figures(self._finished(self._of_terms(original, least, target))).bytes
            if most < needed:
                raise PassError(
                    f"quantize: bytes={self.bytes} is less than one term of each weight and all else take: {needed}"
                )
            found = stack.within(int(most - needed) + bytes_of(least))
        each = 8 * bytes_of(found) / sum(layer.entries for layer in layers)
        context.note(
            f"{sum(terms.count for terms in found.values())} of {len(stack.order)} terms, {each:.2f} bits each"
        )
        return self._of_terms(original, found, target)

    def _of_terms(self, original: Graph, found: Mapping[str, Terms], target: Target) -> Writer:
        result = original.copy()
        writer = Writer(result, target, by=self.name)
        for layer in self.layers_of(result, Counter()):
            writer.weight_alone(layer, found[layer.weight.name])
        return writer

    def _mixed(self, graph: Graph, layers: list[Layer], target: Target, context: Context) -> Mapping[str, Format]:
        """The forms of the layers that do not stay in float."""
        bits = sorted(self.bits or ((4, 8) if target.blocks_alone else (2, 3, 4, 8)))
        bits = [size for size in bits if size <= target.bits_alone]
        wanted = WeightFormats(self, graph).wanted
        forms = {layer.weight.name: [integers(wanted(layer, size)) for size in bits] for layer in layers}
        saved = sum(table.saved(self.table_bits) for table in self._chosen.tables(graph, Counter()))

        def written(found: Mapping[str, Form]) -> Graph:
            writer = Writer(graph.copy(), target, by=self.name)
            for layer in self.layers_of(writer.graph, Counter()):
                if layer.weight.name in found:
                    writer.weight_alone(layer, found[layer.weight.name].rounded(rows_of(layer)))
            return self._finished(writer)

        return chosen_forms(self, graph, layers, forms, target, saved, self._finished, written, context)

    def stored(
        self,
        original: Graph,
        result: Graph,
        layers: Sequence[Layer],
        formats: Mapping[str, Format],
        context: Context,
        expected: ExpectedInputs | None = None,
    ) -> dict[str, Stored]:
        """What is stored of each layer's weight, by its name; biases of ``result`` make up for it where means are known
        from data or ``expected``."""
        alone = context.data is None or self.method == "udfc" or self.method == "nearest" and not self.correct
        if alone:
            udfc = self.method == "udfc"
            found, count = stored_without_data(result, layers, formats, expected, udfc=udfc, by=self.name)
            if count:
                context.note(f"{count} of {len(layers)} biases corrected by what batch norms hold")
            return found
        batches = calibration_batches(original, context)
        context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        if self.method in get_args(Learned):
            forms = {name: form for name, form in formats.items() if isinstance(form, Form)}
            way, steps = cast(Learned, self.method), self.steps or STEPS
            return dict(learned(original, result, layers, batches, forms, way, steps, by=self.name))
        method, free = cast(Method | None, self.method), self.correct is not False
        return stored_on_data(original, result, layers, batches, formats, method, free=free, by=self.name)

    # -- activations -------------------------------------------------------------------------------------------------

    def _with_activations(
        self, original: Graph, layers: list[Layer], target: Target, context: Context, expected: ExpectedInputs | None
    ) -> Writer:
        dynamic = self.activations == "dynamic"
        needless = context.data is None and (dynamic and not self.smoothing or target.activations.fixed)
        batches = [] if needless else calibration_batches(original, context)
        if self.smoothing != 0 and self.full_scheme.numbers is None and batches:
            apart = {layer.node.inputs[0] for layer in self._chosen.tied(original)}
            free = [layer for layer in layers if layer.node.inputs[0] not in apart]
            moved, all_values = smooth_values(original, free, target, self.smoothing, batches, by=self.name)
            context.note(f"{moved} of {all_values} values smoothed")
        result = original.copy()
        own, tied = self.layers_of(result, Counter()), self._chosen.tied(result)
        placement = place(result, [*own, *tied], target)
        ends = {} if dynamic else ends_of_values(result, placement, target, self.calibration, batches)
        formats = {layer.weight.name: self.full_scheme.form(target.weights, layer.columns) for layer in own}
        stored = self.stored(original, result, own, formats, context, expected)
        context.notes += beyond_exponent(original, stored) if self.rule == "cscale" else []
        writer = Writer(result, target, by=self.name)
        if dynamic:
            writer.at_every_run(placement)
        else:
            writer.activations(placement, ends)
        for layer in own:
            writer.layer(layer, stored[layer.weight.name])
        for layer in tied:
            writer.layer(layer, Form(Grid(self.table_bits), layer.columns).rounded(rows_of(layer)))
        ranges = "ranges found at every run" if dynamic else f"ranges of {len(ends)} values"
        context.note(f"{len(own) + len(tied)} layers multiply integers; {ranges}")
        return writer
