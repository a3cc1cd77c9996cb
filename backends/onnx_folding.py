"""Folding in the carried ONNX model: what the graph knows of a value is written as a constant, what does nothing goes.

    Shape -> Gather -> Unsqueeze -> Concat -> Reshape       ->   Reshape (x, constant)
    CastLike -> Expand -> Conv                              ->   Conv (x, w, constant)
    Identity, Dropout, Cast to the same type                ->   gone

Only for graphs that ask for it (``graph.metadata["onnx_fold"]``, set by ``simplify``). Bodies of local functions stay
as they are, and so does what would make the file grow beyond the budget.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir

from regauge.backends.onnx_carrier import Carrier, subgraphs
from regauge.backends.onnx_contents import Contents
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.ir.onnx_sizes import Content

GROWTH = 0.01  # of the bytes of the model's tensors
SPARE_BYTES = 1 << 12  # that any model may grow by


def fold_known(graph: Graph, carrier: Carrier, contents: Contents) -> None:
    """Write known values as constants, and drop what is left over."""
    _write_known(graph, carrier, contents)
    remove_unread(carrier)


def skip_aliases(graph: Graph, carrier: Carrier) -> None:
    """Let readers of what does nothing (an Identity, a Dropout at inference) read its input, in the same scope."""
    for alias, original in graph.metadata.get("onnx_aliases", {}).items():
        mine, other = carrier.copy_of(alias), carrier.copy_of(original)
        if mine is None or other is None or mine.is_graph_output() or mine.graph is not other.graph:
            continue
        if mine.graph in carrier.function_graphs or mine.is_graph_input():
            continue
        _redirect(mine, other)


def _redirect(value: onnx_ir.Value, other: onnx_ir.Value) -> None:
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, other)


def _write_known(graph: Graph, carrier: Carrier, contents: Contents) -> None:
    known: dict[onnx_ir.Node, list[Content]] = {}
    for node, copied in carrier.nodes.items():
        if node.op_type == "Constant" or copied.graph is None or copied.graph in carrier.function_graphs:
            continue
        found = [content for output in node.outputs if (content := contents.of(output)) is not None]
        if len(found) == len(node.outputs) and all(content.static for content in found):
            known[copied] = found
    budget = GROWTH * figures(graph).bytes + SPARE_BYTES
    for node, found in known.items():
        for output, content in zip(node.outputs, found, strict=True):
            readers = [use for use in output.uses() if use.node not in known]
            size = content.array.nbytes
            if not readers or size > budget:
                continue
            budget -= size
            constant = _constant(carrier, node, output, content)
            for use in readers:
                use.node.replace_input_with(use.idx, constant)


def _constant(carrier: Carrier, node: onnx_ir.Node, output: onnx_ir.Value, content: Content) -> onnx_ir.Value:
    """An initializer of the main graph, which every scope inside it sees; a Constant node where that is not allowed."""
    array = np.array(content.array).astype(content.data_type.numpy())
    base = f"{output.name}_folded"
    if (carrier.model.ir_version or 0) < 4:
        return carrier.insert_constant(node, array, base)
    tensor = onnx_ir.Tensor(array)
    value = onnx_ir.Value(
        name=carrier.unique(base),
        shape=onnx_ir.Shape(array.shape),
        type=onnx_ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    carrier.model.graph.register_initializer(value)
    return value


def remove_unread(carrier: Carrier) -> None:
    """Drop nodes whose results nobody reads, in every scope but the bodies of functions, and initializers like them."""
    _remove_in(carrier.model.graph)
    for name, value in list(carrier.model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            carrier.model.graph.initializers.pop(name)


def _remove_in(graph: onnx_ir.Graph) -> None:
    for node in reversed(list(graph)):
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            for inner in _inner(node):
                _remove_in(inner)
            continue
        graph.remove(node, safe=True)


def _inner(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    for attribute in node.attributes.values():
        yield from subgraphs(attribute)
