"""Splits become slices where what is computed of their pieces can be part of a kernel."""

import torch

from regauge.ir.edit import Builder
from regauge.ir.fusion.splits import slice_splits
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol


def test_pieces_keep_their_names_and_what_nothing_reads_goes() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (2, 9), torch.float32)
    first, _, last = build.split(x, sizes=(4, 3, 2), dim=1)
    names = first.name, last.name
    graph.outputs = [build.neg(first), last]
    tensor = torch.randn(2, 9)
    before = graph.run(tensor)
    assert slice_splits(graph) == 1 and [node.op for node in graph.nodes].count("slice") == 2
    assert (graph.nodes[0].output.name, graph.outputs[1].name) == names  # type: ignore[union-attr]
    assert all(map(torch.equal, graph.run(tensor), before))


def test_splits_of_dynamic_sizes_stay_and_so_do_those_that_no_kernel_reads() -> None:
    graph = Graph("g")
    build = Builder(graph)
    rows = symbol("rows")
    graph.symbols[rows] = (1, None)
    x, y = (build.input(name, (size, 4), torch.float32) for name, size in (("x", 2 * rows), ("y", 6)))
    graph.outputs = [build.neg(build.split(x, sizes=(rows, rows), dim=0)[0]), build.split(y, sizes=(2, 4), dim=0)[1]]
    assert slice_splits(graph) == 0
