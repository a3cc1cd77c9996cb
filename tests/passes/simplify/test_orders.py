"""Rows in another order, positions of all entries, and copies of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn, randn

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed
from onnx_simplified import simplified as simplified_file
from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals
from simplified import simplified as simplified_module
from simplifying import BATCH, made, ops, simplified

RULES = RULE_SETS["orders"]


def table(build: Builder, *shape: int) -> Value:
    return build.parameter("w", randn(*shape).double())


def mapped(build: Builder, x: Value, outputs: int, dims: tuple[int, ...] = (1, 0, 2)) -> Value:
    return build.linear(build.permute(x, dims=dims), table(build, outputs, int(x.shape[-1])))  # type: ignore[no-any-return]


def test_positions_are_put_in_order_before_they_are_looked_up() -> None:
    graph = made(lambda b, x: b.permute(b.embedding(table(b, 7, 4), x), dims=(1, 0, 2)), torch.int64, x=(BATCH, 3))
    assert ops(simplified(graph, RULES)) == ["permute", "embedding"]


def test_a_linear_map_goes_before_the_order_of_its_rows() -> None:
    assert ops(simplified(made(lambda b, x: mapped(b, x, 4), x=(BATCH, 3, 6)), RULES)) == ["linear", "permute"]


def moved_last(build: Builder, x: Value) -> Value:
    return mapped(build, build.concat(x, x, dim=1), 2, (0, 2, 1))


def wider(build: Builder, x: Value) -> Value:
    return mapped(build, x, 7)


def read_twice(build: Builder, x: Value) -> list[Value]:
    turned = build.permute(x, dims=(1, 0, 2))
    return [build.linear(turned, table(build, 2, 6)), build.relu(turned)]


@pytest.mark.parametrize("function", [moved_last, wider, read_twice])
def test_orders_that_stay(function: Callable[..., Any]) -> None:
    refusals(made(function, x=(2, 3, 6)), RULES)


def looked_up(build: Builder, x: Value, at: torch.Tensor) -> Value:
    return build.gather_nd(x, build.constant(at))  # type: ignore[no-any-return]


GRID = torch.tensor([[[0, 0], [0, 1]], [[1, 0], [1, 1]]])


@pytest.mark.parametrize(
    ("at", "left"),
    [(GRID[:, None], ["unsqueeze"]), (GRID.reshape(4, 2), ["reshape"]), (GRID.flip(0), None), (GRID[:1], None)],
    ids=["spread", "joined", "turned", "part"],
)
def test_all_positions_in_order_are_a_reshape(at: torch.Tensor, left: list[str] | None) -> None:
    after = simplified(made(lambda b, x: looked_up(b, x, at), x=(2, 2, 3)), RULES)
    assert ops(after) == (left or ["gather_nd"])


def test_positions_along_a_dynamic_axis_may_not_be_all() -> None:
    graph = made(lambda b, x: looked_up(b, x, torch.zeros(1, 1, dtype=torch.int64)), x=(BATCH, 3))
    refusals(graph, RULES)


def copied(build: Builder, x: Value, shape: tuple[Any, ...], joined: tuple[Any, ...], dim: int = 2) -> Value:
    return build.reshape(build.expand(build.unsqueeze(x, dim=dim), shape=shape), shape=joined)  # type: ignore[no-any-return]


def test_copies_of_heads_are_one_node() -> None:
    graph = made(lambda b, x: copied(b, x, (BATCH, 2, 3, 4, 5), (BATCH, 6, 4, 5)), x=(BATCH, 2, 4, 5))
    assert ops(simplified(graph, RULES)) == ["repeat_interleave"]


@pytest.mark.parametrize(
    ("shape", "joined", "dim"),
    [
        ((2, 2, 3, 4, 5), (2, 2, 12, 5), 2),  # joined with the axis behind them
        ((3, 2, 2, 4, 5), (6, 2, 4, 5), 0),  # the whole, repeated
        ((2, 2, 3, 4, 5), (4, 3, 4, 5), 2),  # an axis of their own
    ],
)
def test_copies_that_stay(shape: tuple[int, ...], joined: tuple[int, ...], dim: int) -> None:
    refusals(made(lambda b, x: copied(b, x, shape, joined, dim), x=(2, 2, 4, 5)), RULES)


class Shared(nn.Module):
    """Two heads of keys for six of queries."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        keys = k[:, :, None].expand(2, 2, 3, 4, 5).reshape(2, 6, 4, 5)
        return q @ keys.transpose(-1, -2)


def test_shared_heads_of_a_module() -> None:
    graph = simplified_module(Shared(), randn(2, 6, 4, 5), randn(2, 2, 4, 5))
    assert ops(graph) == ["repeat_interleave", "permute", "matmul"]


COPIES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[2, 3, 4] x) => (float[2, 6, 4] y) {
  m = MatMul (x, w)
  u = Unsqueeze (m, axis)
  e = Expand (u, shape)
  r = Reshape (e, joined)
  y = Relu (r)
}"""


def test_copies_in_a_file_are_a_gather_that_follows_a_cut(tmp_path: Path) -> None:
    before = parsed(COPIES, w=normal(4, 4))
    for name, numbers in {"axis": (2,), "shape": (2, 3, 2, 4), "joined": (2, 6, 4)}.items():
        before.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(numbers)], numbers))
    small = simplified_file(before, tmp_path)
    assert [node.op_type for node in small.graph.node] == ["MatMul", "Gather", "Relu"]
    assert_equal_runs(before, small, {"x": normal(2, 3, 4)})
    graph = regauge.load(tmp_path / "small.onnx")
    assert ops(graph) == ["matmul", "repeat_interleave", "relu"]  # the axes are known as before
    assert ops(regauge.optimize(graph, "simplify")) == ops(graph)


HEADS = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[2, 5] x) => (float[2, 4] y) {
  h = MatMul (x, w)
  r = Gather <axis = 1> (h, twice)
  y = MatMul (r, v)
}"""


def test_copies_are_cut_with_what_they_copy(tmp_path: Path) -> None:
    model = parsed(HEADS, w=normal(5, 6), v=normal(12, 4))
    table = [entry for entry in range(6) for _ in range(2)]
    model.graph.initializer.append(onnx.helper.make_tensor("twice", onnx.TensorProto.INT64, [12], table))
    onnx.save(model, tmp_path / "heads.onnx")
    graph = regauge.optimize(regauge.load(tmp_path / "heads.onnx"), "prune{ratio=0.5}")
    shapes = {name: p.shape for name, p in graph.parameters.items() if name in "wv"}
    assert shapes == {"w": (5, 3), "v": (3, 4)} and graph.nodes[1].attributes["repeats"] == 1
    graph.to_onnx(tmp_path / "cut.onnx")  # compared with the graph in onnxruntime
    (indices,) = [t for t in onnx.load(tmp_path / "cut.onnx").graph.initializer if t.dims == [3]]
    assert onnx.numpy_helper.to_array(indices).tolist() == [0, 1, 2]


def shuffled(build: Builder, x: Value, apart: Any = (BATCH, 2, 3, 4), dims: Any = (0, 2, 1, 3)) -> Value:
    turned = build.permute(build.reshape(x, shape=apart), dims=dims)
    return build.reshape(turned, shape=x.shape)  # type: ignore[no-any-return]


def test_channels_that_are_shuffled_are_one_node() -> None:
    assert ops(simplified(made(shuffled, x=(BATCH, 6, 4)), RULES)) == ["shuffle"]


@pytest.mark.parametrize(
    ("apart", "dims"),
    [
        ((2, 6, 2, 2), (0, 2, 1, 3)), ((2, 2, 3, 4), (0, 3, 2, 1)), ((4, 3, 4), (1, 0, 2)),
        ((2, 2, 3, 2, 2), (0, 2, 1, 4, 3)),
    ],
    ids=["two-axes", "not-neighbours", "with-the-batch", "more"],
)  # fmt: skip
def test_entries_that_move_otherwise_stay(apart: tuple[int, ...], dims: tuple[int, ...]) -> None:
    refusals(made(lambda b, x: shuffled(b, x, apart, dims), x=(2, 6, 4)), RULES)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        n, c, *size = h.shape
        h = h.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)
        return self.second(torch.relu(h))


def test_a_shuffle_in_a_module_and_in_a_file(tmp_path: Path) -> None:
    module, x = Shuffled().eval(), randn(2, 3, 4, 5)
    assert ops(simplified_module(Shuffled(), x)) == ["conv", "shuffle", "relu", "conv"]
    torch.onnx.export(module, (x,), str(tmp_path / "raw.onnx"), dynamo=True, verbose=False, optimize=False)
    graph = regauge.optimize(regauge.load(tmp_path / "raw.onnx"), "simplify")
    graph.to_onnx(tmp_path / "small.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert kinds == ["Conv", "Gather", "Relu", "Conv"]
    again = regauge.load(tmp_path / "small.onnx")
    assert ops(again) == ["conv", "shuffle", "relu", "conv"]
    sizes = [sorted(group.size for group in g.groups() if group.free) for g in (regauge.capture(module, (x,)), again)]
    assert sizes[0] == sizes[1] == [2, 3]
    cut = regauge.optimize(again, "prune{ratio=0.34}")
    assert cut.nodes[1].output.shape == (2, 2, 4, 5)  # of 3 places 2, of 2 groups 1
    cut.to_onnx(tmp_path / "cut.onnx")  # compared with the graph in onnxruntime
