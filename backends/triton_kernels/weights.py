"""Graphs made ready for kernels that read weights of few bits: what has fewer bits than a byte shares bytes.

    dequantize(q: i8[n, k], s: [n, k / 128], bits=4)     ->     dequantize(digits of u8[n, k / 128, 64], s)

Of a group of k that has one scale, or of a row, the first half of the codes lies in the lower bits of its bytes and the
other in the upper ones (a quarter in each of 2 bits), so that a kernel reads neighbours of the other factor for each.
Signed codes are stored with the lowest one as 0, and that is their zero point. Axes that are contracted are known by
the operator that reads the weight; all is on a graph that the caller owns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from regauge.backends.torch_module.packing import pack
from regauge.backends.triton_kernels.footprint import footprint
from regauge.backends.triton_kernels.sparsity import leave_dense, pack_zeros
from regauge.ir.edit import Builder, remove_dead, replace_uses, set_input
from regauge.ir.fusion.causal import mark_causal
from regauge.ir.fusion.fuse import fuse_graph
from regauge.ir.fusion.fused import Rounding, fused_nodes
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.splits import slice_splits
from regauge.ir.graph import Graph, Node, Parameter, Value


def for_kernels(graph: Graph, *, rounding: Rounding = "fused") -> Graph:
    """A graph with fused nodes as it is, else a copy where all regions that gain on a GPU are such, of weights with
    zeros that are multiplied in these the rest is stored (:mod:`kernel_sparsity`), and codes of few bits share bytes.
    Splits become slices, which regions may have, and masks of the order of positions an attribute of attention.
    """
    if fused_nodes(graph):
        return graph
    result = graph.copy()
    with_row_codes(result)
    with_own_numbers(result)
    slice_splits(result)
    mark_causal(result)
    sparse = pack_zeros(result)
    regions = plan_fusion(result, contractions=False, footprints=footprint).regions
    inside = [node for region in regions if region.contractions for node in region.nodes]
    leave_dense(result, sparse, inside)
    pack_weights(result, inside)
    fuse_graph(result, rounding=rounding, footprints=footprint)
    return result


def with_row_codes(graph: Graph) -> None:
    """Rows that are rounded by their own ranges, as scales and codes: what gives them may be in one kernel with both,
    for a row is whole there."""
    build = Builder(graph, by="kernels")
    for node in [node for node in graph.nodes if node.op == "quantize_rows"]:
        dtype = node.attributes["dtype"]
        with build.at(node):
            scales = build.row_scales(node.inputs[0], dtype=dtype)
            codes = build.row_codes(node.inputs[0], scales, dtype=dtype)
        for old, new in zip(node.outputs, (codes, scales), strict=True):
            replace_uses(graph, old, new)
    remove_dead(graph)


def with_own_numbers(graph: Graph) -> None:
    """Give each product that reads activations made of codes a dequantize of its own, to be part of its kernel."""
    build = Builder(graph, by="kernels")
    for node in list(graph.nodes):
        if node.op != "dequantize" or isinstance(node.inputs[0], Parameter):
            continue
        products = [(user, slot) for user, slot in node.output.uses if user.op in ("linear", "matmul")]
        for user, slot in products[1:]:
            with build.at(user):
                own = build.dequantize(*node.inputs, **node.attributes)
            set_input(user, slot, own, graph)


def pack_weights(graph: Graph, nodes: Iterable[Node]) -> int:
    """Let the codes of weights that a dequantize among ``nodes`` reads share bytes where they have so few bits;
    returns how many do."""
    build = Builder(graph, by="kernels")
    found = [(node, codes) for node in nodes if node.op == "dequantize" and (codes := _codes(node)) is not None]
    for node, codes in found:
        with build.at(node):
            replace_uses(graph, node.output, _packed(build, node, *codes))
    if found:
        remove_dead(graph)
    return len(found)


def _codes(node: Node) -> tuple[Parameter, bool, int] | None:
    """The codes of a weight with fewer bits than a byte, whether they are stored [inputs, outputs], and how many inputs
    share a scale; None of others."""
    q, bits = node.inputs[0], node.attributes["bits"]
    readers = {(user.op, slot) for user, slot in node.output.uses}
    if (
        not isinstance(q, Parameter)
        or q.rank != 2
        or len(q.uses) > 1
        or readers not in ({("linear", 1)}, {("matmul", 1)})
    ):
        return None
    turned = readers == {("matmul", 1)}
    inputs = 0 if turned else 1
    group = node.attributes["block_size"] or int(q.shape[inputs])
    axis = node.attributes["axis"]
    along = axis is not None and axis % 2 == inputs
    fits = bits is not None and bits <= 4 and group % (8 // _width(bits)) == 0
    fits = fits and along == (node.attributes["block_size"] is not None)
    return (q, turned, group) if fits else None


def _width(bits: int) -> int:
    """Bits that a code takes in a byte."""
    return 2 if bits <= 2 else 4


def _packed(build: Builder, node: Node, q: Parameter, turned: bool, group: int) -> Value:
    """The same numbers, of codes that share bytes."""
    bits: int = node.attributes["bits"]
    codes, zero = q.tensor.detach(), node.inputs[2] if len(node.inputs) > 2 else None
    lowest = 0 if q.dtype == torch.uint8 else -(2 ** (bits - 1))
    codes = (codes.t() if turned else codes).to(torch.int16) - lowest
    outputs, inputs = codes.shape
    width = _width(bits)
    count = 8 // width
    shape = (outputs, inputs // group, count, group // count)
    # as ``unpack`` reads them: neighbours in a byte
    neighbours = codes.to(torch.uint8).reshape(shape).transpose(2, 3).reshape(-1, inputs)
    stored = pack(neighbours, width).reshape(outputs, inputs // group, group // count)
    parameter = build.parameter(build.unique(f"{q.name}_packed"), stored, trainable=False)
    found = build.unpack(parameter, base=2**width, count=count)
    found = build.permute(build.reshape(found, shape=(*shape[:2], shape[3], count)), dims=(0, 1, 3, 2))
    found = build.reshape(found, shape=(outputs, inputs))
    found = build.permute(found, dims=(1, 0)) if turned else found
    if lowest:
        scale = node.inputs[1]
        assert isinstance(scale, Value)
        before = zero.tensor.detach() if isinstance(zero, Parameter) else torch.zeros(tuple(map(int, scale.shape)))
        moved = (before.to(torch.int16) - lowest).to(torch.uint8)
        zero = build.parameter(build.unique(f"{q.name}_zero_point"), moved, "buffer")
    attributes = {**node.attributes, "bits": None}
    result: Value = build.dequantize(found, node.inputs[1], zero, **attributes)
    return result
