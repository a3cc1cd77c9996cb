"""``dequantize``: floats in the place of what was quantized, for passes that choose and solve for weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.graph import Graph, Kind, Node, Operand, Parameter, Value
from regauge.ir.storage.quantized_layers import PLANNED_FOR
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.quantization.preparation import prepared

_LOOKUPS = ("embedding", "gather", "index_select")
_MOVED = ("reshape", "permute")


@dataclass(frozen=True, kw_only=True)
class Dequantize(Pass):
    """Make weights that are stored as integers floats again, of the same numbers, and round activations no more.

    before  y = linear(back(quantize(x)), back(w'), b')  w': i8[64,128], a scale for each output
    after   y = linear(x, w, b)                          w: f32[64,128]

    For passes that read and solve for float weights, of a file that was quantized: quantize again behind them. Where
    activations were not rounded, the function stays the same; else it is that without their rounding.
    """

    name: ClassVar[str] = "dequantize"
    contract: ClassVar[Contract] = "approximate"

    def call(self, graph: Graph, context: Context) -> Graph:
        result, count = with_floats(graph, by=self.name)
        if result is not graph:
            context.note(f"{count} weights are floats again")
        return result


def with_floats(graph: Graph, *, by: str) -> tuple[Graph, int]:
    """The graph with float weights and layers that add their biases, and how many were codes; itself where none were.

    Codes in regions (branches, bodies of loops) stay.
    """
    result = graph.copy()
    build = Builder(result, by=by)
    pairs = sum(_without_rounding(build, node) for node in result.nodes)
    count = _weights(build) + sum(_table(build, node) for node in result.nodes)
    if not pairs and not count:
        return graph, 0
    remove_dead(result)
    _biases(build)
    remove_dead(result)
    result.metadata = {key: value for key, value in result.metadata.items() if key != PLANNED_FOR}
    return prepared(result), count


def _without_rounding(build: Builder, node: Node) -> bool:
    """Let who reads a value that was quantized and back read the value itself."""
    if node.op == "dequantize":
        q = node.inputs[0]
    elif node.op == "mul" and all(isinstance(operand, Value) for operand in node.inputs):  # rows, by their own scales
        cast = node.inputs[0].producer  # type: ignore[union-attr]
        q = cast.inputs[0] if cast is not None and cast.op == "cast" else None
        rows = q.producer if isinstance(q, Value) else None
        if rows is None or rows.op != "quantize_rows" or node.inputs[1] is not rows.outputs[1]:
            return False
    else:
        return False
    moves: list[Node] = []
    while isinstance(q, Value) and q.producer is not None and q.producer.op in _MOVED:
        moves.append(q.producer)
        q = q.producer.inputs[0]
    rounded = q.producer if isinstance(q, Value) else None
    if rounded is None or rounded.op not in ("quantize", "quantize_dynamic", "quantize_rows"):
        return False
    x = rounded.inputs[0]
    with build.at(node):
        for move in reversed(moves):
            x = build(move.op, x, *move.inputs[1:], **move.attributes)
    replace_uses(build.graph, node.output, x)
    return True


def _weights(build: Builder) -> int:
    """Fold what decodes constants into float weights; returns how many.

    What is computed from constants alone beside that, as the scale of a bias is from those of input and weight, is
    folded where codes are decoded by it.
    """
    constant: dict[Value, Node] = {}
    decoded: dict[Value, Parameter] = {}  # what is computed from codes, and the first of these
    for node in build.graph.nodes:
        sources = [operand for operand in node.inputs if isinstance(operand, Value)]
        known = all(isinstance(source, Parameter) or source in constant for source in sources)
        if node.regions or len(node.outputs) != 1 or not sources or not known:
            continue
        constant[node.output] = node
        half = node.op == "cast" and isinstance(sources[0], Parameter) and sources[0].dtype == torch.float16
        if half or node.operator.coding or any(source in decoded for source in sources):
            root = sources[0]
            while root not in decoded and not isinstance(root, Parameter):  # of codes that are moved or shifted before
                root = next(operand for operand in constant[root].inputs if isinstance(operand, Value))
            decoded[node.output] = decoded.get(root, root)  # type: ignore[arg-type]
    found: dict[Value, torch.Tensor] = {}
    count = 0
    for value, codes in decoded.items():
        if any(decoded.keys().isdisjoint(user.outputs) for user, _ in value.uses) and is_real(value.dtype):
            tensor = _number(value, constant, found)
            count += tensor.dim() > 1
            replace_uses(build.graph, value, _float(build, codes, tensor))
    return count


def _number(operand: Operand, constant: dict[Value, Node], found: dict[Value, torch.Tensor]) -> Any:
    """The data of an operand, if it is computed from constants."""
    if isinstance(operand, Parameter):
        return operand.tensor.detach()
    if not isinstance(operand, Value):
        return operand
    if operand not in found:
        node = constant[operand]
        with torch.no_grad():
            operands = [_number(own, constant, found) for own in node.inputs]
            found[operand] = node.operator.evaluate(*operands, **node.attributes)
    return found[operand]


def _float(build: Builder, codes: Parameter, tensor: torch.Tensor) -> Parameter:
    """A weight with the name that it had before it was stored as codes; the same one for equal numbers."""
    name = codes.name
    for suffix in ("_quantized", "_packed", "_half"):
        name = name.removesuffix(suffix)
    had = build.graph.parameters.get(name)
    if had is not None and had.shape == tensor.shape and torch.equal(had.tensor, tensor):
        return had
    kind: Kind = "parameter"
    return build.parameter(build.unique(name), tensor.contiguous(), kind)


def table_of_codes(node: Node) -> tuple[Node, Parameter, Parameter] | None:
    """Where a node scales vectors that are looked up as integers, what looks them up, these, and a scale for each."""
    if node.op != "mul" or not all(isinstance(operand, Value) for operand in node.inputs):
        return None
    cast, scales = (operand.producer for operand in node.inputs)  # type: ignore[union-attr]
    looked_up = cast.inputs[0].producer if cast is not None and cast.op == "cast" else None  # type: ignore[union-attr]
    if looked_up is None or scales is None or looked_up.op not in _LOOKUPS or scales.op != looked_up.op:
        return None
    codes, spread = looked_up.inputs[0], scales.inputs[0]
    column = spread.producer if isinstance(spread, Value) else None
    scale = column.inputs[0] if column is not None and column.op == "unsqueeze" else None
    known = isinstance(codes, Parameter) and isinstance(scale, Parameter)
    if not known or looked_up.inputs[1:] != scales.inputs[1:]:
        return None
    assert isinstance(codes, Parameter) and isinstance(scale, Parameter)
    return looked_up, codes, scale


def _table(build: Builder, node: Node) -> bool:
    """Let vectors be looked up as floats, and not as integers and their scales."""
    found = table_of_codes(node)
    if found is None:
        return False
    looked_up, codes, scale = found
    table = codes.tensor.detach().to(scale.tensor.dtype) * scale.tensor.detach()[:, None]
    with build.at(node):
        weight = _float(build, codes, table)
        vectors = build(looked_up.op, weight, *looked_up.inputs[1:], **looked_up.attributes)
    replace_uses(build.graph, node.output, vectors)
    return True


def _biases(build: Builder) -> None:
    """Let vectors that are taken away from products, so that runtimes keep these apart, be added again."""
    for node in build.graph.nodes:
        product, vector = node.inputs if node.op == "sub" and len(node.inputs) == 2 else (None, None)
        if not isinstance(product, Value) or product.producer is None or product.producer.op != "matmul":
            continue
        if isinstance(vector, Parameter) and vector.kind == "buffer" and vector.rank == 1:
            name = build.unique(vector.name.removesuffix("_negative").replace(".weight_nothing", ".bias"))
            with build.at(node):
                bias = build.parameter(name, -vector.tensor.detach())
                replace_uses(build.graph, node.output, build.add(product, bias))
