"""Writing integers into a graph: pairs of ``quantize`` and ``dequantize``, and weights as constants of integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch

from regauge.ir.edit import Builder, replace_uses, set_input
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import product
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.formats import Constants, Stored, digits_in_a_byte, packed_digits
from regauge.passes.quantization.grid import Coded, Form, Grid
from regauge.passes.quantization.halves import InHalf
from regauge.passes.quantization.levels import Leveled
from regauge.passes.quantization.mirrored import Unfolded
from regauge.passes.quantization.placement import Placement, Table, reads_blocks
from regauge.passes.quantization.ranges import Ends
from regauge.passes.quantization.storage import OnData, Plain, halve, store
from regauge.passes.quantization.targets import Target

_ACTIVATIONS = {"relu", "leaky_relu", "sigmoid", "tanh", "softplus", "softsign", "elu", "hardsigmoid"}
_WORTH_A_PRODUCT = 128  # scales that take more bytes than the multiplication, computed at load, that gives them
GREATEST = 2.0**30  # of a bias in steps, and of a sum of products: both together stay within 32 bits


class Writer:
    """Edits one graph. Whoever reads a value as integers shares one pair; what was a weight stays a parameter."""

    def __init__(self, graph: Graph, target: Target, *, by: str, packed: bool = False) -> None:
        self.graph, self.target, self.packed = graph, target, packed
        self.build = Builder(graph, by=by)
        self._scales: dict[Value, tuple[Parameter, Parameter | None]] = {}
        self._quantized: dict[Value, Value] = {}
        self._plain: dict[Value, Value] = {}  # as they were quantized and back
        self._flat: dict[Value, Value] = {}  # the same as matrices
        self._stored: dict[str, Constants] = {}
        self._inputs: dict[Node, Value] = {}  # what layers read: a layer in front may have been written anew since

    # -- activations -------------------------------------------------------------------------------------------------

    def activations(self, placement: Placement, ends: Mapping[Value, Ends]) -> None:
        """Quantize the values of a placement; layers are pointed at them by :meth:`layer`."""
        for value in placement.measured:
            self._scales[value] = self._scale(value, ends[value])
        self._inputs = {layer.node: x for layer in placement.layers if isinstance(x := layer.node.inputs[0], Value)}
        for value, source in placement.chained.items():
            self._scales[value] = self._scales[source]
            back = self._pair(value)
            readers = [use for use in value.uses if use[0] is not self._quantized[value].producer]
            for node, slot in readers:
                set_input(node, slot, back, self.graph)
            self.graph.outputs = [back if output is value else output for output in self.graph.outputs]
            self._plain[back] = back
            self._quantized[back] = self._quantized[value]
            self._scales[back] = self._scales[value]
        for value in placement.fed:
            self._pair(value)
        for node, slot in placement.addends:
            addend = node.inputs[slot]
            assert isinstance(addend, Value)
            set_input(node, slot, self._plain[addend], self.graph)

    def at_every_run(self, placement: Placement) -> None:
        """Quantize what layers read by ranges found when it runs; layers are pointed at them by :meth:`layer`."""
        self._inputs = {layer.node: x for layer in placement.layers if isinstance(x := layer.node.inputs[0], Value)}
        for value in placement.fed:
            with self._behind(value):
                if self.target.at_run == "rows":
                    kind = self.target.activations.dtype
                    kind = kind if kind.is_floating_point else torch.int8
                    q, scale = self.build.quantize_rows(value, dtype=kind, name=f"{value.name}_quantized")
                    self._plain[value] = self.build.mul(self.build.cast(q, dtype=value.dtype), scale)
                else:
                    q, scale, zero = self.build.quantize_dynamic(value, name=f"{value.name}_quantized")
                    self._plain[value] = self.build.dequantize(q, scale, zero, name=f"{value.name}_dequantized")

    def _scale(self, value: Value, ends: Ends) -> tuple[Parameter, Parameter | None]:
        grid = self.target.activations
        scale, zero = grid.span(*(torch.tensor(end, dtype=torch.float64) for end in ends))
        scopes = value.producer.scope if value.producer is not None else ()
        name = f"{scopes[-1][0]}.{value.name}" if scopes and scopes[-1][0] else value.name
        return (
            self._buffer(f"{name}_scale", scale.float()),
            None if grid.symmetric else self._buffer(f"{name}_zero_point", zero.to(grid.dtype)),
        )

    def _pair(self, value: Value) -> Value:
        """The value, rounded."""
        with self._behind(value):
            scale, zero = self._scales[value]
            q = self.build.quantize(
                value, scale, zero, dtype=self.target.activations.dtype, name=f"{value.name}_quantized"
            )
            back: Value = self.build.dequantize(q, scale, zero, name=f"{value.name}_dequantized")
        self._quantized[value], self._plain[value] = q, back
        return back

    def _as_matrix(self, value: Value) -> Value:
        """[rows, channels] of a value with more axes; it is moved while it is integers."""
        if value not in self._flat:
            with self._behind(value):
                scale, zero = self._scales[value]
                rows = product(value.shape[:-1])
                q = self.build.reshape(self._quantized[value], shape=(rows, value.shape[-1]))
                self._flat[value] = self.build.dequantize(q, scale, zero, name=f"{value.name}_rows")
        return self._flat[value]

    def _behind(self, value: Value) -> AbstractContextManager[Builder]:
        return self.build.at(value.producer) if value.producer is not None else self.build.at(value.consumers()[0])

    # -- layers ------------------------------------------------------------------------------------------------------

    def layer(self, layer: Layer, weight: Stored) -> None:
        """Let a layer multiply integers: its input is one of the quantized values."""
        assert isinstance(weight, Coded)
        node, x = layer.node, self._inputs[layer.node]
        if x not in self._scales:
            with self.build.at(node):
                self._product(layer, self._plain[x], weight, apart=self.target.apart and _is_matrix(x))
            return
        if not weight.grid.dtype.is_floating_point:
            weight = _within_32_bits(layer, weight, float(self._scales[x][0].tensor), self.target.activations)
        with self.build.at(node):
            if layer.node.op == "conv":
                stored = self._weight(layer, weight)
                bias = self._integer_bias(layer, x, weight) if self.target.integer_bias else layer.bias
                self._in_place(node, x, stored, bias)
            elif is_gemm(x, self.target):
                replace_uses(self.graph, node.output, self._gemm(node, x, layer, weight))
            else:
                self._product(layer, self._plain[x], weight)

    def _product(self, layer: Layer, x: Operand, weight: Stored, *, apart: bool = False) -> None:
        """A matmul in place of a layer, its bias in float behind it: ``apart`` in a form that is not taken for one."""
        if layer.node.op == "linear" and len(layer.weight.uses) > 1:  # a table, whose rows are vectors: no other layout
            stored = self._weight(layer, weight, outputs_first=True)
            replace_uses(self.graph, layer.node.output, self.build.linear(x, stored, layer.bias))
            return
        if self.target.apart and layer.bias is None:
            self._part_clamp(layer.node)
        y = self.build.matmul(x, self._weight(layer, weight, inputs_first=True))
        if layer.bias is not None and not apart:
            y = self.build.add(y, layer.bias)
        elif layer.bias is not None:
            negative = -layer.bias.tensor.detach()
            y = self.build.sub(y, self._buffer(f"{layer.bias.name}_negative", negative))
        elif self.target.apart and (_is_summed(layer.node) or _is_clamped(layer.node)):
            y = self._less_nothing(layer, y)
        replace_uses(self.graph, layer.node.output, y)

    def _less_nothing(self, layer: Layer, y: Value) -> Value:
        """The product, kept apart from what follows."""
        nothing = torch.zeros(layer.outputs, dtype=layer.weight.tensor.dtype)
        found: Value = self.build.sub(y, self._buffer(f"{layer.weight.name}_nothing", nothing))
        return found

    def _gemm(self, node: Node, x: Value, layer: Layer, weight: Coded) -> Value:
        rows = self._plain[x] if x.rank == 2 else self._as_matrix(x)
        stored = self._weight(layer, weight, outputs_first=True)
        y: Value = self.build.linear(rows, stored, self._integer_bias(layer, x, weight))
        if self.target.apart:
            self._part_clamp(node)
            y = self._less_nothing(layer, y) if _is_clamped(node) or _has_a_computed_bias(layer) else y
        return y if x.rank == 2 else self.build.reshape(y, shape=node.output.shape)

    def _in_place(self, node: Node, x: Value, weight: Value, bias: Value | None) -> None:
        set_input(node, 0, self._plain[x], self.graph)
        set_input(node, 1, weight, self.graph)
        if bias is not None:
            if len(node.inputs) < 3:
                node.inputs = (*node.inputs, None)
            set_input(node, 2, bias, self.graph)

    def weight_alone(self, layer: Layer, weight: Stored) -> None:
        """Store the weight of a layer alone; it computes in float, or with a kernel that reads blocks."""
        node, x = layer.node, layer.node.inputs[0]
        assert isinstance(x, Value)
        coded = weight if isinstance(weight, Coded) else None
        read = coded is not None and reads_blocks(self.graph, layer, self.target, coded.group, coded.grid.bits)
        to = self._constants(layer.weight.name, at_load=self.target.folds and not read)
        with self.build.at(node):
            product = weight.product(to, x) if node.op in ("linear", "matmul") else None
            if product is not None:
                y = product if layer.bias is None else self.build.add(product, layer.bias)
                replace_uses(self.graph, node.output, y)
            elif read and node.op == "linear":
                self._product(layer, x, weight, apart=self.target.apart and _in_a_gemm(node))
            else:
                set_input(node, 1, self._weight(layer, weight), self.graph)

    def stored(self, weights: Iterable[Plain], on_data: Mapping[Parameter, OnData]) -> None:
        """Store weights that no kernel reads in 8 bits, of which floats are made at load."""
        for found in weights:
            store(self.build, found, on_data.get(found.weight))

    def halved(self, vectors: Iterable[tuple[Graph, Parameter]]) -> None:
        """Store vectors in half precision, of which floats are made at load."""
        for owner, vector in vectors:
            halve(self.build, owner, vector)

    def _constants(self, name: str, *, packed: bool = False, zeros: bool = True, at_load: bool = False) -> Constants:
        """What is stored of a weight, once for all who read it; the options are those of who asks first."""
        if name not in self._stored:
            packed, zeros = packed or self.packed, zeros and self.target.zeros
            self._stored[name] = Constants(self.build, name, packed=packed, zeros=zeros, at_load=at_load)
        return self._stored[name]

    def _part_clamp(self, node: Node) -> None:
        """Let a ReLU right behind a product be a leaky one that does not leak, but where it is rounded to integers."""
        for reader in node.output.consumers():
            if reader.op == "relu" and all(further.op != "quantize" for further in reader.output.consumers()):
                with self.build.at(reader):
                    replace_uses(self.graph, reader.output, self.build.leaky_relu(node.output, negative_slope=0.0))

    def table(self, table: Table, bits: int) -> None:
        """Store a table of vectors as integers with a scale for each vector, by which those looked up go.

        Layers whose weight it is as well read the same integers, if they do not multiply them already.
        """
        weight = table.parameter
        coded = Form(Grid(bits), int(weight.shape[1])).rounded(weight.tensor.detach())
        to = self._constants(weight.name, packed=bits < 8)
        for node in table.lookups:
            with self.build.at(node):
                replace_uses(self.graph, node.output, self._looked_up(node, coded, to))
        for layer in table.layers:
            if layer.node.inputs[1] is weight:
                with self.build.at(layer.node):
                    set_input(layer.node, 1, coded.write(to), self.graph)

    def _looked_up(self, node: Node, coded: Coded, to: Constants) -> Value:
        def rows(stored: Operand) -> Value:
            found: Value = self.build(node.op, stored, *node.inputs[1:], **node.attributes)
            return found

        grid = coded.grid
        if to.packed:
            digits, base = grid.digits(coded.codes)
            count = digits_in_a_byte(base)
            vectors = self.build.unpack(rows(to.weight("packed", packed_digits(digits, base))), base=base, count=count)
            if vectors.shape[-1] != coded.codes.shape[1]:
                vectors = self.build.slice(vectors, dim=vectors.rank - 1, start=0, end=coded.codes.shape[1])
            vectors = self.build.add(self.build.cast(vectors, dtype=torch.float32), float(grid.low))
        else:
            integers = rows(to.weight("quantized", coded.codes.to(grid.dtype)))
            vectors = self.build.cast(integers, dtype=torch.float32, name=f"{node.name}_integers")
        scale = self.build.unsqueeze(to.weight("scale", coded.scale[:, 0].float()), dim=1)
        found: Value = self.build.mul(vectors, rows(scale))
        return found

    # -- constants ---------------------------------------------------------------------------------------------------

    def _weight(
        self, layer: Layer, stored: Stored, *, inputs_first: bool = False, outputs_first: bool = False
    ) -> Value:
        """The weight as it is stored and back, laid out as the layer has it or as asked for."""
        stored_by_inputs = layer.node.op == "matmul"
        turned = inputs_first and not stored_by_inputs or outputs_first and stored_by_inputs
        to = self._constants(layer.weight.name, zeros=layer.node.op != "conv")
        by_inputs = layer.node.op != "conv" and stored_by_inputs != turned
        if isinstance(stored, Coded) and stored.grid.table is None and not self.packed:
            if layer.node.op != "conv" or stored.scale.shape[1] == 1:
                codes = _stored(layer, stored.codes)
                return stored.laid_out(to, codes.t() if turned else codes, int(by_inputs))
        if isinstance(stored, Leveled | Unfolded | InHalf):
            return stored.laid_out(to, tuple(int(size) for size in layer.weight.shape), int(stored_by_inputs))
        matrix: Value = stored.write(to)
        if layer.node.op == "conv":
            matrix = self.build.reshape(matrix, shape=layer.weight.shape)
        elif by_inputs:
            matrix = self.build.permute(matrix, dims=(1, 0))
        return matrix

    def _integer_bias(self, layer: Layer, x: Value, weight: Coded) -> Value | None:
        """The bias in steps of the product, as kernels add it up; None where there is none, or products are floats."""
        if layer.bias is None or weight.grid.dtype.is_floating_point:
            return None
        of_input = self._scales[x][0]
        scale = (of_input.tensor * weight.scale[:, 0].float()).float()
        q = torch.round(layer.bias.tensor.detach().double() / scale.double()).to(torch.int32)
        name = layer.bias.name
        if self.target.folds and len(scale) >= _WORTH_A_PRODUCT:
            of_weight = self._constants(layer.weight.name).weight("scale", weight.scale[:, 0].float())
            product_of_scales = self.build.mul(of_input, of_weight)
        else:
            product_of_scales = self._buffer(f"{name}_scale", scale)
        back: Value = self.build.dequantize(self._buffer(f"{name}_quantized", q), product_of_scales, axis=0)
        return back

    def _buffer(self, name: str, data: torch.Tensor) -> Parameter:
        return self.build.parameter(self.build.unique(name), data, kind="buffer")


def _in_a_gemm(node: Node) -> bool:
    """Whether onnxruntime would compute a layer and an activation behind it as one float Gemm."""
    return _is_matrix(node.inputs[0]) and any(reader.op in _ACTIVATIONS for reader in node.output.consumers())


def _is_summed(node: Node) -> bool:
    """Whether onnxruntime would take what is added to a product without a bias for its bias, in one float Gemm."""
    return _is_matrix(node.inputs[0]) and any(reader.op == "add" for reader in node.output.consumers())


def _has_a_computed_bias(layer: Layer) -> bool:
    """Whether onnxruntime would take a vector that is computed from constants for the bias of a product, in float."""
    adds = [reader for reader in layer.node.output.consumers() if reader.op == "add" and layer.bias is None]
    return any(isinstance(value, Value) and value.rank == 1 for add in adds for value in add.inputs)


def _is_clamped(node: Node) -> bool:
    """Whether a clamp follows at once, which onnxruntime takes for the range of integers though none come behind it."""
    further = [clamp.output.consumers() for clamp in node.output.consumers() if clamp.op == "clamp"]
    return any(not readers or any(reader.op != "quantize" for reader in readers) for readers in further)


def _is_matrix(x: Operand) -> bool:
    """Whether a product with it may become a Gemm: its rows are one axis, or known."""
    return isinstance(x, Value) and (x.rank == 2 or all(isinstance(size, int) for size in x.shape[:-1]))


def _within_32_bits(layer: Layer, weight: Coded, input_scale: float, activations: Grid) -> Coded:
    """The weight on coarser scales in rows whose bias or sums would overflow: those of a channel that is all but dead
    have a bias of far more steps than there are integers, and thousands of columns may add up to more."""
    steps = weight.codes.abs().sum(1) * max(-activations.low, activations.high)
    if layer.bias is not None:
        bias = layer.bias.tensor.detach().double().abs()
        steps = torch.maximum(steps, bias / (input_scale * weight.scale[:, 0].double()))
    return weight.coarser((steps / GREATEST).clamp(min=1)) if bool((steps > GREATEST).any()) else weight


def is_gemm(x: Value, target: Target) -> bool:
    """Whether a linear layer on a quantized value becomes a product of matrices with an integer bias."""
    return target.flat and _is_matrix(x)


def _stored(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """[outputs, columns] (of all blocks one below the other) in the shape of the layer's weight."""
    matrices = codes.reshape(layer.blocks, layer.outputs, layer.columns).float()
    return layer.from_matrices(matrices)
