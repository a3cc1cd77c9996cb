"""Folding in the carried ONNX model: what the graph knows of a value is written as a constant, what does nothing goes.

    Shape -> Gather -> Unsqueeze -> Concat -> Reshape       ->   Reshape (x, constant)
    CastLike -> Expand -> Conv                              ->   Conv (x, w, constant)
    Identity, Dropout, Cast to the same type                ->   gone
    a weight that an old exporter listed as an input too    ->   an initializer only

Only for graphs that ask for it: ``graph.metadata["onnx_fold"]`` names the steps of ``simplify`` that the file takes
part in. Bodies of local functions stay as they are, and so does what would make the file grow beyond the budget.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.contents import Contents
from regauge.backends.onnx_model.inlining import nested_graphs
from regauge.backends.onnx_model.sharing import share_equal, share_sizes
from regauge.ir.folding.limits import FILE_ROOM, NODE_BYTES
from regauge.ir.graph import Graph
from regauge.ir.sizes.onnx_contents import Content


def fold_known(graph: Graph, carrier: Carrier, contents: Contents) -> None:
    """Write known values as constants, keep equal ones once, and drop what is left over."""
    steps = graph.metadata.get("onnx_fold", ())
    if "constants" in steps:
        carrier.unlist_weights()
        _write_known(carrier, contents, graph.metadata.get(FILE_ROOM, 0), shared="ties" in steps)
    if "ties" in steps:
        share_equal(carrier)
    if "merging" in steps:
        share_sizes(carrier)
    if "dead-code" in steps:
        remove_unread(carrier)


def skip_aliases(graph: Graph, carrier: Carrier) -> None:
    """Let readers of what does nothing (an Identity, a Dropout at inference) read its input, in the same scope."""
    if "dead-code" not in graph.metadata.get("onnx_fold", ()):
        return
    for alias, original in graph.metadata.get("onnx_aliases", {}).items():
        mine, other = carrier.copy_of(alias), carrier.copy_of(original)
        if mine is None or other is None or mine.is_graph_output() or mine.graph is not other.graph:
            continue
        if mine.graph in carrier.function_graphs or mine.is_graph_input():
            continue
        carrier.redirect(mine, other)


def _write_known(carrier: Carrier, contents: Contents, room: int, *, shared: bool) -> None:
    """Constants for known values that something else reads, as far as the room in bytes goes; where they are
    ``shared``, equal ones are one, and take room once."""
    known: dict[onnx_ir.Node, list[Content]] = {}
    for node, copied in carrier.nodes.items():
        if node.op_type == "Constant" or copied.graph is None or copied.graph in carrier.function_graphs:
            continue
        found = [content for output in node.outputs if (content := contents.of(output)) is not None]
        if len(found) == len(node.outputs) and all(content.static for content in found):
            known[copied] = found
    shared = shared and (carrier.model.ir_version or 0) >= 4
    made: dict[object, onnx_ir.Value] = {}
    for node, found in known.items():
        for output, content in zip(node.outputs, found, strict=True):
            readers = [use for use in output.uses() if use.node not in known]
            if not readers:
                continue
            array = np.array(content.array).astype(content.data_type.numpy())
            key = (content.data_type, array.shape, array.tobytes())
            constant = made.get(key) if shared else None
            if constant is None and array.nbytes - NODE_BYTES > max(room, 0):
                continue
            if constant is None:
                room -= max(array.nbytes - NODE_BYTES, 0)
                constant = made[key] = _constant(carrier, node, output, array)
            for use in readers:
                use.node.replace_input_with(use.idx, constant)


def _constant(carrier: Carrier, node: onnx_ir.Node, output: onnx_ir.Value, array: np.ndarray) -> onnx_ir.Value:
    """An initializer of the main graph, which every scope inside it sees; a Constant node where that is not allowed."""
    base = f"{output.name}_folded"
    if (carrier.model.ir_version or 0) < 4:
        return carrier.insert_constant(node, array, base)
    return carrier.add_initializer(base, onnx_ir.Tensor(array))


def remove_unread(carrier: Carrier) -> None:
    """Drop nodes whose results nobody reads, in every scope but the bodies of functions, and initializers like them."""
    _remove_in(carrier.model.graph, carrier)
    for value in list(carrier.model.graph.initializers.values()):
        carrier.drop_unused([value])


def _remove_in(graph: onnx_ir.Graph, carrier: Carrier) -> None:
    for node in reversed(list(graph)):
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            for inner in nested_graphs(node):
                _remove_in(inner, carrier)
            continue
        carrier.remove(node)
