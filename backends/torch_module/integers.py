"""Quantized graphs made ready for torch source: a layer with what it dequantizes becomes one layer on integers.

    q = quantize(x, s, z); y = linear(dequantize(q, s, z), dequantize(w, t), b)     QLinear(in, out), of x
    conv of the same                                                                 QConv2d(in, out, kernel)
    y = matmul(x, dequantize(w, t, z, block_size=32, bits=4)) + b                    QLinearWeight(in, out, bits=4, ...)
    conv of the same                                                                 QConvWeight(in, out, kernel, ...)
    the same of floats of 8 bits, for torch-cuda                                     QLinearFloat8(in, out)
    by rows                                                                          QLinearFloat8Dynamic(in, out)
    q, s = quantize_rows(x); y = matmul(q * s, dequantize(w, t)) + b                 QLinearDynamic(in, out)

On a copy of the graph. The layer is a node ``linear`` or ``conv`` of x and the integers, which says in its metadata
what it is; its other tensors are found by their names, below the path of the layer. See torch_quantized.py for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from regauge.backends.torch_module.homes import Home, Parts, settle
from regauge.backends.torch_module.linear import following_bias
from regauge.backends.torch_module.packing import pack
from regauge.backends.torch_module.quantized import packed_size
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.ops.windows import per_axis
from regauge.ir.storage.quantized_layers import PLANNED_FOR
from regauge.ir.storage.weights import LazyWeight
from regauge.ir.training_notes import LAYER

FLOAT8 = torch.float8_e4m3fn
"""The floats of 8 bits that a GPU multiplies by one another."""


@dataclass(frozen=True)
class Codes:
    """The weight of a layer as it is stored: ``scale`` and ``zero`` are [outputs, groups], [outputs, 1] for rows."""

    parameter: Parameter
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    turned: bool  # stored [inputs, outputs]

    @property
    def floats(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return self.parameter.dtype == FLOAT8

    @property
    def plain(self) -> bool:
        """Signed, of 8 bits, with a scale for each output: what kernels multiply."""
        return self.bits == 8 and self.zero is None and self.scale.shape[1] == 1 and self.parameter.dtype == torch.int8

    def load(self) -> torch.Tensor:
        """[outputs, ...], as stored otherwise."""
        codes = self.parameter.weight.load()
        return codes.t() if self.turned else codes


@dataclass(frozen=True)
class Input:
    """What a layer reads before it is rounded."""

    value: Value
    scale: torch.Tensor | None = None  # None: each row has its own
    zero: torch.Tensor = torch.zeros((), dtype=torch.int32)
    moved: tuple[Node, ...] = ()  # reshapes of the codes, the last one first
    factor: torch.Tensor | None = None  # by which each channel is multiplied before it is rounded
    floats: bool = False  # it is rounded to floats of 8 bits


def as_integer_layers(graph: Graph) -> tuple[Graph, list[Home]]:
    """A graph with the same inputs and results, and its layers; one without such layers comes back as it is."""
    if not any(_codes(node) for node in graph.nodes):
        return graph, []
    result = copy_graph(graph)
    build = Builder(result)
    found = [_lowered(build, node, weight) for node in result.nodes if (weight := _codes(node)) is not None]
    homes = [home for home in found if home is not None]
    remove_dead(result)
    settle(result, homes)
    return result, homes


# -- what there is ---------------------------------------------------------------------------------------------------


def _codes(node: Node) -> Codes | None:
    """The weight of a node that is a layer on stored integers, which nothing else reads."""
    if node.op not in ("linear", "matmul", "conv") or not isinstance(node.inputs[1], Value):
        return None
    source = node.inputs[1].producer
    if source is None or source.op != "dequantize" or len(source.output.uses) != 1:
        return None
    q, scale, zero = (*source.inputs, None)[:3]
    turned = node.op == "matmul"
    if not isinstance(q, Parameter) or len(q.uses) != 1 or (q.rank > 2) != (node.op == "conv") or q.rank < 2:
        return None
    if q.dtype not in (torch.int8, torch.uint8, FLOAT8) or not isinstance(scale, Parameter):
        return None
    axis, block = source.attributes["axis"], source.attributes["block_size"]
    outputs, axis = int(q.shape[int(turned)]), None if axis is None else axis % q.rank
    if axis is not None and axis != (int(turned) if block is None else 1 - int(turned)) or block and q.rank != 2:
        return None

    def spread(part: Operand) -> torch.Tensor | None:
        if not isinstance(part, Parameter):
            return None
        found = part.tensor.detach()
        found = found.t() if block and turned else found
        return found if block else found.reshape(-1, 1).expand(outputs, 1)

    found = spread(zero)
    silent = found is None or not found.any() and q.dtype == torch.int8
    bits = source.attributes["bits"] or 8
    return Codes(q, spread(scale), None if silent else found, bits, turned)  # type: ignore[arg-type]


def _input(node: Node) -> Input | None:
    """The input of a layer, if it is quantized to 8 bits; codes may have been moved since."""
    back = node.inputs[0].producer if isinstance(node.inputs[0], Value) else None
    if back is not None and back.op == "mul" and node.op != "conv":
        return _rows(back)
    if back is None or back.op != "dequantize" or back.attributes["bits"]:
        return None
    moved, codes = [], back.inputs[0]
    while isinstance(codes, Value) and codes.producer is not None and codes.producer.op == "reshape":
        moved.append(codes.producer)
        codes = codes.producer.inputs[0]
    source = codes.producer if isinstance(codes, Value) else None
    if source is None or source.op != "quantize" or source.inputs[1:] != back.inputs[1:]:
        return None
    if back.attributes["axis"] is not None or source.attributes["bits"]:
        return None
    scale, zero = (*back.inputs[1:], None)[:2]
    dtype, x = source.attributes["dtype"], source.inputs[0]
    if dtype not in (torch.int8, torch.uint8, FLOAT8) or not isinstance(scale, Parameter) or not isinstance(x, Value):
        return None
    if zero is not None and not isinstance(zero, Parameter):
        return None
    signed = torch.zeros((), dtype=torch.int32) if zero is None else zero.tensor.detach().to(torch.int32).reshape(())
    signed = signed - (128 if dtype == torch.uint8 else 0)
    factor = None
    if node.op != "conv" and not moved and dtype != FLOAT8:
        x, factor = _unsmoothed(x)
    return Input(x, scale.tensor.detach().reshape(()), signed, tuple(moved), factor, dtype == FLOAT8)


def _unsmoothed(x: Value) -> tuple[Value, torch.Tensor | None]:
    """What a value is without the factor for each of its channels, and these."""
    source = x.producer
    if source is None or source.op != "mul":
        return x, None
    whole, factor = source.inputs[:2]
    if not isinstance(whole, Value) or not isinstance(factor, Parameter) or whole.shape != x.shape:
        return x, None
    positive = factor.shape == x.shape[-1:] and bool((factor.tensor > 0).all())
    return (whole, factor.tensor.detach()) if positive else (x, None)


def _rows(back: Node) -> Input | None:
    """What is rounded row by row, where ``back`` multiplies the codes by their scales."""
    cast, scale = (operand.producer if isinstance(operand, Value) else None for operand in back.inputs)
    codes = cast.inputs[0] if cast is not None and cast.op == "cast" else None
    if scale is None or scale.op != "quantize_rows" or codes is not scale.outputs[0]:
        return None
    x = scale.inputs[0]
    if back.inputs[1] is not scale.outputs[1] or not isinstance(x, Value):
        return None
    return Input(x, floats=scale.attributes["dtype"] == FLOAT8)


def _bias(graph: Graph, node: Node) -> tuple[Parameter | torch.Tensor | None, Node] | None:
    """The bias of a layer and the node that gives its result; None where it is shared or computed."""
    if node.op == "matmul":
        found = following_bias(graph, node, node.output.shape[-1])
        return (None, node) if found is None else (found[1], found[0])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None, node
    if isinstance(bias, Parameter):
        return (bias, node) if len(bias.uses) == 1 else None
    source = bias.producer if isinstance(bias, Value) else None
    if source is None or source.op != "dequantize" or not all(isinstance(v, Parameter) for _, v in source.operands()):
        return None
    operands = [v.tensor.detach() if isinstance(v, Parameter) else v for v in source.inputs]
    return source.operator.evaluate(*operands, **source.attributes), node


# -- what it becomes -------------------------------------------------------------------------------------------------


def _lowered(build: Builder, node: Node, weight: Codes) -> Home | None:
    """Put a layer on integers in the place of a node; None where it stays as it is."""
    read, ends = _input(node), _bias(build.graph, node)
    if ends is None:
        return None
    bias, last = ends
    found = None
    if weight.floats:
        found = _on_floats(build.graph, node, weight, read, bias)
        if found is None:
            return None
    elif read is not None and weight.plain and not read.floats:
        found = _by_rows(weight, bias) if read.scale is None else _on_integers(node, weight, read, bias)
    if found is None:
        read = None
        fast = str(build.graph.metadata.get(PLANNED_FOR, "")).startswith("torch")
        found = _weight_alone(node, weight, bias, fast)
    text, parts = found
    home, old = Home(weight.parameter.name, text), last.output
    with build.at(node):
        x = node.inputs[0] if read is None else _moved(build, read)
        home.add(build, parts)
        results = [(old.shape, old.dtype)]
        if node.op == "conv":
            y = build.conv(x, home.parts["weight"], results=results, **node.attributes)
        else:
            y = build.linear(x, home.parts["weight"], results=results)
    y.producer.metadata[LAYER] = text
    home.node = y.producer
    replace_uses(build.graph, old, y)
    return home


def _moved(build: Builder, read: Input) -> Value:
    x = read.value
    for node in reversed(read.moved):
        x = build.reshape(x, **node.attributes)
    return x


def _by_rows(weight: Codes, bias: Parameter | torch.Tensor | None) -> tuple[str, Parts] | None:
    outputs, inputs = weight.load().shape
    if inputs * 2**14 >= 2**31:  # a sum of products in 32 bits
        return None
    parts: Parts = {
        "weight": (LazyWeight((outputs, inputs), torch.int8, lambda: weight.load().contiguous()), "parameter"),
        "scale": (weight.scale[:, 0].contiguous(), "buffer"),
    }
    return f"QLinearDynamic({inputs}, {outputs}{', bias=False' if bias is None else ''})", parts | _own_bias(bias)


def _on_floats(
    graph: Graph, node: Node, weight: Codes, read: Input | None, bias: Parameter | torch.Tensor | None
) -> tuple[str, Parts] | None:
    """A layer for a GPU: elsewhere products of floats of 8 bits are slower than those of what they stand for."""
    planned = graph.metadata.get(PLANNED_FOR) == "torch-cuda" and node.op != "conv"
    if not planned or read is None or not read.floats or weight.zero is not None or weight.scale.shape[1] != 1:
        return None
    outputs, inputs = weight.load().shape
    scale = weight.scale[:, 0].double() * (1.0 if read.scale is None else read.scale.double())
    parts: Parts = {
        "weight": (LazyWeight((outputs, inputs), FLOAT8, lambda: weight.load().contiguous()), "parameter"),
        "scale": (scale.float(), "buffer"),
    }
    if read.scale is not None:
        parts["input_scale"] = (read.scale, "buffer")
    name = f"QLinearFloat8{'Dynamic' if read.scale is None else ''}"
    return f"{name}({inputs}, {outputs}{', bias=False' if bias is None else ''})", parts | _own_bias(bias)


def _on_integers(
    node: Node, weight: Codes, read: Input, bias: Parameter | torch.Tensor | None
) -> tuple[str, Parts] | None:
    assert read.scale is not None
    codes = weight.load()
    scale = (read.scale.double() * weight.scale[:, 0].double()).float()
    sums = codes.flatten(1).sum(1, dtype=torch.int64)
    if codes[0].numel() * 2**16 >= 2**31:  # a sum of products, and the offset, in 32 bits
        return None
    given = ", bias=False" if bias is None else ""
    given += ", smoothed=True" if read.factor is not None else ""
    text, shape = f"QLinear({codes.shape[1]}, {codes.shape[0]}{given})", codes.shape
    if node.op == "conv":
        axes = codes.dim() - 2
        stride, padding, dilation = (per_axis(node.attributes[n], axes) for n in ("stride", "padding", "dilation"))
        if codes.dim() != 4 or node.attributes["groups"] != 1 or tuple(dilation) != (1, 1):
            return None
        text = f"QConv2d({shape[1]}, {shape[0]}, {tuple(shape[2:])}, {tuple(stride)}, {tuple(padding)}{given})"
        shape = torch.Size((shape[0], *shape[2:], shape[1]))

    def laid_out() -> torch.Tensor:
        found = weight.load()
        return (found.permute(0, 2, 3, 1) if found.dim() == 4 else found).contiguous()

    parts: Parts = {
        "weight": (LazyWeight(tuple(shape), torch.int8, laid_out), "parameter"),
        "offset": ((-read.zero * sums).to(torch.int32), "buffer"),
        "scale": (scale, "buffer"),
        "input_scale": (read.scale if read.factor is None else read.scale / read.factor, "buffer"),
        "input_zero_point": (read.zero.to(torch.int8), "buffer"),
    }
    return text, parts | _own_bias(bias)


def _own_bias(bias: Parameter | torch.Tensor | None) -> Parts:
    if isinstance(bias, Parameter):
        return {"bias": (bias.weight, "trained" if bias.trainable else "parameter")}
    return {} if bias is None else {"bias": (bias, "parameter")}


def _weight_alone(node: Node, weight: Codes, bias: Parameter | torch.Tensor | None, fast: bool) -> tuple[str, Parts]:
    (outputs, groups), bits, shape = weight.scale.shape, weight.bits, weight.parameter.weight.shape
    inputs = math.prod(shape) // outputs
    low = 1 << bits - 1 if weight.parameter.dtype == torch.int8 else 0  # codes are stored from 0 on

    def laid_out() -> torch.Tensor:
        return pack((weight.load().flatten(1).to(torch.int16) + low).to(torch.uint8), bits)

    parts: Parts = {
        "weight": (LazyWeight((outputs, packed_size(inputs, bits)), torch.uint8, laid_out), "parameter"),
        "scale": (weight.scale.contiguous(), "parameter"),
    }
    options = "" if bias is not None else ", bias=False"
    zero = weight.zero if weight.zero is not None or low else torch.zeros(outputs, groups)
    if zero is None:
        options += ", zero_points=False"
    else:
        parts["zero_point"] = (pack((zero.to(torch.int16) + low).to(torch.uint8), bits), "buffer")
    if node.op == "conv":
        ways = [per_axis(node.attributes[name], len(shape) - 2) for name in ("stride", "padding", "dilation")]
        blocks = int(node.attributes["groups"])
        given = ", ".join(map(str, (blocks * shape[1], outputs, tuple(shape[2:]), bits, *ways)))
        text = f"QConvWeight({given}{f', groups={blocks}' if blocks > 1 else ''}{options})"
    else:
        in_groups = f", groups={groups}" if groups > 1 else ""
        text = f"QLinearWeight{'Fast' * fast}({inputs}, {outputs}, bits={bits}{in_groups}{options})"
    return text, parts | _own_bias(bias)
