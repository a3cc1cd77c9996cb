"""Writing integers into a graph: pairs of ``quantize`` and ``dequantize``, and weights as constants of integers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from regauge.ir.edit import Builder, replace_uses, set_input
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes import product
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.grid import Coded, Grid, rounded
from regauge.passes.quantization.placement import Placement
from regauge.passes.quantization.ranges import Ends
from regauge.passes.quantization.targets import Target

BIAS_BITS = 32


class Writer:
    """Edits one graph. Whoever reads a value as integers shares one pair; what was a weight stays a parameter."""

    def __init__(self, graph: Graph, target: Target, *, by: str) -> None:
        self.graph, self.target = graph, target
        self.build = Builder(graph, by=by)
        self._scales: dict[Value, tuple[Parameter, Parameter | None]] = {}
        self._quantized: dict[Value, Value] = {}
        self._plain: dict[Value, Value] = {}  # as they were quantized and back
        self._flat: dict[Value, Value] = {}  # the same as matrices
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

    def layer(self, layer: Layer, weight: Coded) -> None:
        """Let a layer multiply integers: its input is one of the quantized values."""
        node, x = layer.node, self._inputs[layer.node]
        with self.build.at(node):
            if layer.node.op == "conv":
                self._in_place(node, x, self._weight(layer, weight), self._integer_bias(layer, x, weight))
            elif is_gemm(x, self.target):
                replace_uses(self.graph, node.output, self._gemm(node, x, layer, weight))
            else:
                self._product(layer, self._plain[x], weight)

    def _product(self, layer: Layer, x: Operand, weight: Coded) -> None:
        """A matmul in place of a layer, its bias in float behind it."""
        y = self.build.matmul(x, self._weight(layer, weight, inputs_first=True))
        y = y if layer.bias is None else self.build.add(y, layer.bias)
        replace_uses(self.graph, layer.node.output, y)

    def _gemm(self, node: Node, x: Value, layer: Layer, weight: Coded) -> Value:
        rows = self._plain[x] if x.rank == 2 else self._as_matrix(x)
        y: Value = self.build.linear(
            rows, self._weight(layer, weight, outputs_first=True), self._integer_bias(layer, x, weight)
        )
        return y if x.rank == 2 else self.build.reshape(y, shape=node.output.shape)

    def _in_place(self, node: Node, x: Value, weight: Value, bias: Value | None) -> None:
        set_input(node, 0, self._plain[x], self.graph)
        set_input(node, 1, weight, self.graph)
        if bias is not None:
            if len(node.inputs) < 3:
                node.inputs = (*node.inputs, None)
            set_input(node, 2, bias, self.graph)

    def weight_alone(self, layer: Layer, weight: Coded) -> None:
        """Store the weight of a layer as integers; it computes in float."""
        with self.build.at(layer.node):
            if self.target.blocks_alone and layer.node.op == "linear":
                self._product(layer, layer.node.inputs[0], weight)
            else:
                set_input(layer.node, 1, self._weight(layer, weight), self.graph)

    def embedding(self, node: Node, table: Parameter) -> None:
        """Store a table of vectors as integers of 8 bits with a scale for each vector, by which those looked up go."""
        coded = rounded(table.tensor.detach(), Grid(8), int(table.shape[1]))
        rest = node.inputs[1:]
        with self.build.at(node):
            q = self._weight_of(f"{table.name}_quantized", coded.codes.to(torch.int8))
            scale = self._weight_of(f"{table.name}_scale", coded.scale.float())
            vectors = self.build.cast(
                self.build(node.op, q, *rest, **node.attributes), dtype=torch.float32, name=f"{node.name}_integers"
            )
            scales = self.build(node.op, scale, *rest, **node.attributes)
            replace_uses(self.graph, node.output, self.build.mul(vectors, scales))

    # -- constants ---------------------------------------------------------------------------------------------------

    def _weight(self, layer: Layer, coded: Coded, *, inputs_first: bool = False, outputs_first: bool = False) -> Value:
        """The weight as integers and back, laid out as the layer stores it or as asked for."""
        stored_by_inputs = layer.node.op == "matmul"
        turned = inputs_first and not stored_by_inputs or outputs_first and stored_by_inputs
        codes = _stored(layer, coded.codes)
        codes = codes.t() if turned else codes
        outputs = int(layer.node.op != "conv" and (stored_by_inputs != turned))
        grid, name = coded.grid, layer.weight.name
        bits = {} if grid.bits == 8 else {"bits": grid.bits}
        q = self._weight_of(f"{name}_quantized", codes.to(grid.dtype).contiguous())
        if coded.scale.shape[1] == 1:
            scale, zero, where = coded.scale[:, 0], coded.zero[:, 0], {"axis": outputs}
        else:
            scale, zero = (part.t() if outputs else part for part in (coded.scale, coded.zero))
            where = {"axis": 1 - outputs, "block_size": coded.group}
        s = self._weight_of(f"{name}_scale", scale.float().contiguous())
        silent = grid.symmetric and not self.target.zeros
        z = None if silent else self._buffer(f"{name}_zero_point", zero.to(grid.dtype).contiguous())
        back: Value = self.build.dequantize(q, s, z, name=f"{name}_dequantized", **where, **bits)
        return back

    def _integer_bias(self, layer: Layer, x: Value, weight: Coded) -> Value | None:
        """The bias in steps of the product, as kernels add it up."""
        if layer.bias is None:
            return None
        scale = (self._scales[x][0].tensor * weight.scale[:, 0].float()).float()
        limit = 2.0 ** (BIAS_BITS - 1)
        q = torch.round(layer.bias.tensor.detach().double() / scale.double()).clamp(-limit, limit - 1).to(torch.int32)
        name = layer.bias.name
        back: Value = self.build.dequantize(
            self._buffer(f"{name}_quantized", q), self._buffer(f"{name}_scale", scale), axis=0
        )
        return back

    def _weight_of(self, name: str, data: torch.Tensor) -> Parameter:
        """A part of a trained weight, which is trained no more."""
        return self.build.parameter(self.build.unique(name), data, trainable=False)

    def _buffer(self, name: str, data: torch.Tensor) -> Parameter:
        return self.build.parameter(self.build.unique(name), data, kind="buffer")


def is_gemm(x: Value, target: Target) -> bool:
    """Whether a linear layer on a quantized value becomes a product of matrices with an integer bias."""
    return target.flat and (x.rank == 2 or all(isinstance(size, int) for size in x.shape[:-1]))


def _stored(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """[outputs, columns] (of all blocks one below the other) in the shape of the layer's weight."""
    matrices = codes.reshape(layer.blocks, layer.outputs, layer.columns).float()
    return layer.from_matrices(matrices)
