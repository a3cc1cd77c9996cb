"""Rows drawn from a layer's inputs are rows of the whole, with the outputs that belong to them."""

from typing import Any

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.row_samples import add_sample


def layer(op: str, *shape: int, **attributes: Any) -> Layer:
    graph = Graph("layer")
    build = Builder(graph)
    x = build.input("x", (3, 4, 9, 8) if op == "conv" else (3, 7, 4), torch.float32)
    found = layer_of(build(op, x, build.parameter("weight", torch.randn(shape)), **attributes).producer)
    assert found is not None
    return found


LAYERS = {
    "linear": lambda: layer("linear", 5, 4),
    "matmul": lambda: layer("matmul", 4, 5),
    "conv": lambda: layer("conv", 5, 4, 3, 2, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "pointwise": lambda: layer("conv", 5, 4, 1, 1),
}


def batches(one: Layer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = [int(size) for size in one.node.inputs[0].shape]  # type: ignore[union-attr]
    inputs = [torch.randn(shape) for _ in range(2)]
    evaluate = one.node.operator.evaluate
    rest = [None] * (len(one.node.inputs) - 2)
    return inputs, [evaluate(x, one.weight.tensor, *rest, **one.node.attributes) for x in inputs]


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_fit_their_rows(name: str) -> None:
    """y = x W' holds row by row, so it holds for the sums over any sample."""
    one = LAYERS[name]()
    found = Moments(one.columns, one.outputs)
    add_sample(found, one, *batches(one), rows=20)
    wanted = one.matrix(one.weight.tensor).double() @ found.gram[:-1]
    torch.testing.assert_close(found.cross, wanted, rtol=1e-4, atol=1e-4)
    assert 20 <= found.rows <= 22


@pytest.mark.parametrize("name", LAYERS)
def test_all_rows_are_taken_where_there_are_no_more(name: str) -> None:
    one = LAYERS[name]()
    inputs, outputs = batches(one)
    some, all_rows = Moments(one.columns, one.outputs), Moments(one.columns, one.outputs)
    add_sample(some, one, inputs, outputs, rows=10_000)
    for x, y in zip(inputs, outputs, strict=True):
        all_rows.add(one.rows_of_input(x), one.rows_of_output(y))
    assert torch.equal(some.gram, all_rows.gram) and torch.equal(some.cross, all_rows.cross)
