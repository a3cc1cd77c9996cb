"""Steps over whole graphs: folding within a budget, weights that take in, merging, ties, branches, dead code."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn, randn

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed, simplified
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.passes.base import Context
from regauge.passes.simplify.limits import total_bytes
from regauge.passes.simplify.simplify import Simplify
from simplifying import BATCH, made, ops, same_function


def simplify(graph: Graph, **options: Any) -> Graph:
    """After ``simplify``, once and for all: a second run finds nothing to do."""
    run = Simplify(**options)
    after = regauge.optimize(graph, [run])
    same_function(graph, after)
    assert str(regauge.optimize(after, [run])) == str(after)
    return after


# -- constants ---------------------------------------------------------------------------------------------------------


def test_what_depends_on_constants_is_computed_and_its_operands_go() -> None:
    def table(build: Builder, x: Value) -> Any:
        grid = build.mul(build.constant(torch.arange(4).double()), 2)
        return build.add(x, build.sqrt(build.add(grid, build.full(shape=(4,), value=1.0, dtype=torch.float64))))

    after = simplify(made(table, x=(BATCH, 4)))
    assert ops(after) == ["add"] and [p.shape for p in after.parameters.values()] == [(4,)]


def test_the_budget_counts_what_is_freed() -> None:
    """A table that would make the model larger is made when it runs, unless others that go make room."""

    def tables(build: Builder, x: Value, rows: int) -> Any:
        seed = build.exp(build.constant(torch.arange(128).double()))
        wide = build.mul(build.unsqueeze(seed, dim=0), build.unsqueeze(seed, dim=1))
        large = build.constant(randn(rows, 128).double())
        return [build.matmul(x, wide), build.mul(x, build.mean(large, dims=(0,), keepdim=False))]

    for rows, left in ((200, []), (100, ["mul"])):
        graph = made(lambda b, x, n=rows: tables(b, x, n), x=(BATCH, 128))
        after = simplify(graph, only=("dead-code", "constants"), growth=0.0)
        assert ops(after) == [*left, "matmul", "mul"]
        assert total_bytes(after) <= total_bytes(graph) == 128 * 8 * (1 + rows)
    small = made(lambda b, x: b.matmul(x, b.expand(b.constant(randn(1, 1).double()), shape=(128, 128))), x=(2, 128))
    assert total_bytes(small) == 8
    assert ops(simplify(small)) == ["expand", "matmul"]  # 128 KiB more
    assert ops(simplify(small, growth=20000.0)) == ["matmul"]


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x: b.add(x, b.rand(shape=(4,), dtype=torch.float64)),
        lambda b, x: b.add(x, b.dropout(b.constant(torch.ones(4).double()), p=0.5, training=True)),
        lambda b, x: b.add(x, b.full(shape=(BATCH, 4), value=1.0, dtype=torch.float64)),
        lambda b, x: b.add(x, b.mul(b.parameter("p", randn(1, 4).double()), b.parameter("q", randn(4).double()))),
    ],
)  # fmt: skip
def test_what_is_drawn_sized_or_trained_is_not_folded(call: Any) -> None:
    graph = made(call, x=(BATCH, 4))
    assert ops(regauge.optimize(graph, "simplify")) == ops(graph)


def test_an_output_that_is_computed_from_constants_stays_computed() -> None:
    graph = made(lambda b, x: [b.tanh(x), b.mul(b.constant(torch.ones(3).double()), 2)], x=(2, 3))
    assert ops(simplify(graph)) == ["tanh", "mul"]


# -- weights -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A weight that is stored transposed and scaled, one that two things read, one that is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shared = nn.Parameter(randn(3, 4, 2)), nn.Parameter(randn(4))
        self.cut = nn.Parameter(randn(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bi,kio->bko", x, (self.weight * 0.5 + 1).permute(0, 1, 2))
        y = y * torch.exp(self.shared)[:2] + (self.shared * 2)[2:]
        return y + self.cut[:, 1:3].t()[0]


def test_weights_take_in_what_is_linear_and_theirs_alone() -> None:
    model = Scaled().eval()
    x = randn(5, 4)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    after = regauge.optimize(graph, "simplify")
    assert {name: tuple(p.shape) for name, p in after.parameters.items()} == {
        "weight": (3, 4, 2), "shared": (4,), "cut": (2,)
    }  # fmt: skip
    assert ops(after).count("mul") == 2 and "permute" not in ops(after)
    module = after.to_torch()
    assert sorted(module.state_dict()) == sorted(model.state_dict())
    torch.testing.assert_close(module(x), model(x))
    assert all(p.requires_grad for p in module.parameters())


def test_a_weight_keeps_its_type_and_is_not_made_larger() -> None:
    def cast(build: Builder, x: Value) -> Any:
        half = build.cast(build.parameter("w", randn(4).double()), dtype=torch.float32)
        return build.add(build.add(x, build.expand(build.parameter("v", randn(1).double()), shape=(4,))), half)

    graph = made(cast, x=(2, 4))
    assert ops(regauge.optimize(graph, "simplify")) == ops(graph)


# -- merging and ties --------------------------------------------------------------------------------------------------


def test_equal_nodes_are_computed_once() -> None:
    def twice(build: Builder, x: Value, y: Value) -> Any:
        one = build.tanh(build.add(x, y))
        other = build.tanh(build.add(y, x))
        return build.matmul(one, build.softmax(other, dim=0))

    assert ops(simplify(made(twice, x=(3, 3), y=(3, 3)))) == ["add", "tanh", "softmax", "matmul"]


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda b, x: [b.tanh(x), b.tanh(x)], 2),  # two outputs
        (lambda b, x: b.sub(b.rand(shape=(3,)), b.rand(shape=(3,))), 3),
        (lambda b, x: b.sub(b.dropout(x, training=True), b.dropout(x, training=True)), 3),
        (lambda b, x: b.sub(b.softmax(x, dim=0), b.softmax(x, dim=1)), 3),
        (lambda b, x: b.div(b.mul(x, 1.5), b.mul(x, 2.5)), 3),
        (lambda b, x: b.concat(b.mul(x, 2), b.mul(x, 2.0000001), dim=0), 3),
        (lambda b, x: b.concat(b.mul(x, 0.0), b.mul(x, -0.0), dim=0), 3),
        (lambda b, x: b.concat(b.sub(x, 2), b.sub(2, x), dim=0), 3),
    ],
)
def test_unequal_nodes_random_ones_and_outputs_stay_two(call: Any, count: int) -> None:
    assert len(regauge.optimize(made(call, x=(3, 3)), "simplify{only=merging}")) == count


def test_an_output_keeps_its_name_when_it_is_merged() -> None:
    def output(build: Builder, x: Value) -> Any:
        first = build.tanh(x, name="inner")
        return [build.tanh(x, name="wanted"), build.relu(first)]

    after = simplify(made(output, x=(3, 3)))
    assert ops(after) == ["tanh", "relu"] and after.outputs[0].name == "wanted"  # type: ignore[union-attr]


def test_equal_constants_are_kept_once_and_trained_weights_only_on_demand() -> None:
    def equal(build: Builder, x: Value) -> Any:
        a, b = torch.arange(9.0).reshape(3, 3).double(), torch.arange(9.0).reshape(3, 3).double()
        y = build.matmul(build.matmul(x, build.constant(a)), build.tanh(build.add(x, build.constant(b))))
        y = build.linear(y, build.parameter("first", a))
        return build.linear(build.relu(y), build.parameter("second", b))

    graph = made(equal, x=(3, 3))
    after = simplify(graph)
    assert [p.name for p in after.parameters.values() if p.kind == "parameter"] == ["first", "second"]
    assert len(after.parameters) == 3
    tied = simplify(graph, tie=True)
    assert tied.parameters["first"].aliases == ("second",) and len(tied.parameters) == 2
    keys = tied.to_torch().state_dict()
    assert {"first", "second"} <= set(keys) and torch.equal(keys["first"], keys["second"])


def test_constants_that_differ_in_one_bit_shape_or_type_stay() -> None:
    tables = [torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])]

    def near(build: Builder, x: Value) -> Any:
        return [build.atan2(x, build.constant(table)) for table in tables]

    after = regauge.optimize(made(near, torch.float32, x=(3, 2)), "simplify")
    assert len(after.parameters) == 4


def test_a_single_entry_of_any_stride_can_be_compared() -> None:
    """torch calls a tensor of one entry contiguous whatever its stride is; found on a random graph."""
    entries = [torch.arange(4.0).double()[3:4:2][None], torch.full((1, 1), 3.0).double()]

    def strided(build: Builder, x: Value) -> Any:
        return [build.atan2(x, build.constant(entry)) for entry in (*entries, entries[1] + 1)]

    after = simplify(made(strided, x=(2, 3)), only=("ties",))
    assert len(after.parameters) == 2


def test_vectors_that_happen_to_be_equal_are_not_cut_together() -> None:
    def zeros(build: Builder, x: Value) -> Any:
        for name in ("a", "b"):
            x = build.add(
                build.linear(x, build.parameter(name, randn(3, 3).double())), build.constant(torch.ones(3).double())
            )
        return x

    graph = made(zeros, x=(2, 3))
    parameters = [len(simplify(graph, tie=tie, only=("ties",)).parameters) for tie in (False, True)]
    assert parameters == [4, 3]


# -- branches ----------------------------------------------------------------------------------------------------------


def choice(build: Builder, x: Value, predicate: Any, depth: int = 0) -> Any:
    """cond(predicate, x, weight): 2x + constant, or x + weight; ``depth`` more of the kind inside."""
    regions = []
    for branch in range(2):
        inner = build.region(Graph(f"branch_{branch}"))
        a, w = inner.input("x", x.shape, x.dtype), inner.input("w", (4,), torch.float64)
        if branch == 0:
            y = inner.add(inner.mul(a, 2.0), inner.constant(torch.arange(4).double(), "shift"))
            y = choice(inner, y, predicate, depth - 1) if depth else y
        else:
            y = inner.add(a, w)
        inner.graph.outputs = [y]
        regions.append(inner.graph)
    weight = build.parameter(build.unique("w"), randn(4).double())
    return build("cond", predicate, x, weight, regions=regions, results=[(x.shape, x.dtype)])


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("taken", [True, False])
def test_a_decided_choice_is_inlined_with_its_constants(depth: int, taken: bool) -> None:
    predicate = torch.tensor(taken)

    def nested(build: Builder, x: Value) -> Any:
        return build.tanh(choice(build, x, taken if depth else build.constant(predicate), depth))

    graph = made(nested, x=(BATCH, 4))
    after = simplify(graph)
    assert ops(after) == (["mul", "add"] * (depth + 1) if taken else ["add"]) + ["tanh"]
    names = [value.name for value in after.values()]
    assert len(names) == len(set(names))


def test_an_undecided_choice_stays() -> None:
    graph = made(lambda b, x: choice(b, x, b.any(b.gt(x, 0), dims=None)), x=(BATCH, 4))
    assert ops(simplify(graph)) == ["gt", "any", "cond"]


def test_equal_branches_are_one() -> None:
    def equal(build: Builder, x: Value) -> Any:
        regions = []
        for name in ("then", "else"):
            inner = build.region(Graph(name))
            a = inner.input("x", x.shape, x.dtype)
            inner.graph.outputs = [inner.add(inner.tanh(a), inner.constant(torch.ones(4).double()))]
            regions.append(inner.graph)
        predicate = build.any(build.gt(x, 0), dims=None)
        return build("cond", predicate, x, regions=regions, results=[(x.shape, x.dtype)])

    assert ops(simplify(made(equal, x=(BATCH, 4)))) == ["tanh", "add"]


def test_loops_of_no_and_of_one_iteration() -> None:
    def loop(build: Builder, x: Value, trips: int) -> Any:
        inner = build.region(Graph("body"))
        step, going = inner.input("i", (), torch.int64), inner.input("going", (), torch.bool)
        a = inner.input("a", x.shape, x.dtype)
        inner.graph.outputs = [going, inner.add(inner.tanh(a), inner.cos(inner.cast(step, dtype=torch.float64)))]
        return build("loop", trips, None, x, carried=1, regions=[inner.graph], results=[(x.shape, x.dtype)])

    for trips, left in ((0, ["relu"]), (1, ["relu", "tanh", "add"]), (2, ["relu", "loop"])):
        graph = made(lambda b, x, n=trips: loop(b, b.relu(x), n), x=(BATCH, 4))
        assert [op for op in ops(simplify(graph)) if op != "identity"] == left


def test_dead_code_in_regions_and_what_only_it_read() -> None:
    def unread(build: Builder, x: Value) -> Any:
        regions = []
        for name, op in (("then", "tanh"), ("else", "relu")):
            inner = build.region(Graph(name))
            a, b = inner.input("a", x.shape, x.dtype), inner.input("b", x.shape, x.dtype)
            inner.mul(b, inner.constant(torch.ones(4).double()))
            inner.graph.outputs = [inner(op, a)]
            regions.append(inner.graph)
        predicate = build.any(build.gt(x, 0), dims=None)
        return build("cond", predicate, x, build.exp(x), regions=regions, results=[(x.shape, x.dtype)])

    after = simplify(made(unread, x=(BATCH, 4)))
    assert ops(after) == ["gt", "any", "cond"]
    node = after.nodes[-1]
    assert len(node.inputs) == 2 and all(len(r.inputs) == 1 and not r.parameters for r in node.regions)


def test_a_long_chain_needs_no_deep_recursion() -> None:
    def chain(build: Builder, x: Value) -> Any:
        for step in range(3000):
            x = build.permute(x, dims=(1, 0)) if step % 3 == 1 else build.tanh(build.add(x, 0.0))
        return x

    after = Simplify().call(made(chain, x=(2, 3)), Context())
    assert ops(after) == ["tanh"] * 2000


def test_arithmetic_on_sizes_is_done_when_a_file_is_read(tmp_path: Any) -> None:
    """Shape, Gather, Mul, Concat never become nodes: a reshape holds the sizes, dynamic ones too."""
    nodes = [
        ("Shape", ["x"], ["s"]), ("Gather", ["s", "zero"], ["b"]), ("Gather", ["s", "one"], ["n"]),
        ("Mul", ["b", "n"], ["bn"]), ("Unsqueeze", ["bn", "axes"], ["bn1"]), ("Concat", ["bn1", "four"], ["target"]),
        ("Reshape", ["x", "target"], ["y"]),
    ]  # fmt: skip
    made_nodes = [helper.make_node(op, a, b, **({"axis": 0} if op == "Concat" else {})) for op, a, b in nodes]
    numbers = {"zero": ([], [0]), "one": ([], [1]), "axes": ([1], [0]), "four": ([1], [4])}
    constants = [helper.make_tensor(name, TensorProto.INT64, *given) for name, given in numbers.items()]
    x, y = (helper.make_tensor_value_info(*a) for a in (("x", 1, ["b", "n", 4]), ("y", 1, [None, 4])))
    model = helper.make_model(helper.make_graph(made_nodes, "g", [x], [y], constants),
                              opset_imports=[helper.make_opsetid("", 17)])  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    graph = regauge.load(tmp_path / "m.onnx")
    assert ops(regauge.optimize(graph, "simplify")) == ["reshape"]


# -- slices that share out an axis -------------------------------------------------------------------------------------


def test_slices_that_share_out_an_axis_are_one_split() -> None:
    def thirds(build: Builder, x: Value) -> Any:
        a, b, c = (build.slice(x, dim=-1, start=at, end=at + 2) for at in (4, 0, 2))
        return build.add(build.mul(a, b), c)

    after = simplify(made(thirds, x=(BATCH, 6)))
    assert ops(after) == ["split", "mul", "add"] and after.nodes[0].attributes["sizes"] == (2, 2, 2)
    assert [value.name for value in after.nodes[0].outputs] == ["slice_1", "slice_2", "slice"]
    assert ops(simplify(made(thirds, x=(BATCH, 6)), skip=("partitions",))) == ["slice", "slice", "slice", "mul", "add"]


@pytest.mark.parametrize(
    "bounds", [((0, 2, 1), (3, 6, 1)), ((0, 3, 1), (2, 6, 1)), ((0, 6, 2), (1, 6, 2)), ((0, 3, 1), (3, 5, 1))]
)
def test_slices_that_do_not_reach_from_end_to_end_stay(bounds: tuple[tuple[int, int, int], ...]) -> None:
    def some(build: Builder, x: Value) -> Any:
        parts = [build.slice(x, dim=1, start=start, end=end, step=step) for start, end, step in bounds]
        return build.concat(*[build.tanh(part) for part in parts], dim=1)

    assert ops(simplify(made(some, x=(BATCH, 6))))[:2] == ["slice", "slice"]


def test_slices_that_are_outputs_or_of_dynamic_size_stay() -> None:
    def halves(build: Builder, x: Value, axis: int, half: Any, end: Any) -> list[Value]:
        return [build.slice(x, dim=axis, start=0, end=half), build.tanh(build.slice(x, dim=axis, start=half, end=end))]

    assert ops(simplify(made(lambda b, x: halves(b, x, 1, 3, 6), x=(BATCH, 6)))) == ["slice", "slice", "tanh"]
    rest = made(lambda b, x: b.concat(*map(b.tanh, halves(b, x, 0, 1, BATCH)[::-1]), dim=0), x=(BATCH, 6))
    assert ops(simplify(rest)).count("slice") == 2


def test_halves_of_halves_are_one_split() -> None:
    def quarters(build: Builder, x: Value) -> Any:
        low, high = (build.slice(x, dim=1, start=at, end=at + 4) for at in (0, 4))
        first, second = (build.slice(low, dim=1, start=at, end=at + 2) for at in (0, 2))
        return build.concat(build.mul(first, second), high, dim=1)

    graph = made(quarters, x=(BATCH, 8))
    after = regauge.optimize(graph, [Simplify(only=("partitions",))])
    same_function(graph, after)
    assert ops(after) == ["split", "mul", "concat"] and after.nodes[0].attributes["sizes"] == (2, 2, 4)


@pytest.mark.parametrize("reading", ["parts", "others", "axis", "output"])
def test_a_split_of_a_part_is_one_with_the_split_where_nothing_else_reads_the_part(reading: str) -> None:
    def split(build: Builder, x: Value) -> Any:
        low, high = build.split(x, sizes=(2, 4), dim=1)
        first, second = build.split(high, sizes=(2, 2), dim=2 if reading == "axis" else -2)
        result = build.mul(build.tanh(first), second)
        return [result, low, *{"others": [build.tanh(high)], "output": [high]}.get(reading, [])]

    after = simplify(made(split, x=(2, 6, 4)))
    assert ops(after).count("split") == (1 if reading == "parts" else 2)


def test_the_buffers_of_a_module_go_with_it_and_those_of_a_module_that_is_left_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.gain = nn.Parameter(torch.rand(4, 1, 1))
            self.register_buffer("version", torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.norm(self.conv(x)) * self.gain)

    graph = regauge.capture(Scaled().eval(), (randn(2, 3, 5, 5),))
    assert set(graph.parameters) >= {"version", "gain", "norm.num_batches_tracked"}
    after = regauge.optimize(graph, "simplify")
    assert set(after.parameters) == {"conv.weight", "conv.bias", "version"}


POOLED = """
<ir_version: 8, opset_import: ["" : 17]>
gate (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y, float[n, 4, 1, 1] z) {
  h = Conv (x, k)
  r = Relu (h)
  s = Sigmoid (r)
  u = Mul (r, s)
  m = ReduceMean <axes = [MEAN], keepdims = 1> (u)
  g = Sigmoid (m)
  y = Mul (u, g)
  z = Neg (m)
}
"""


@pytest.mark.parametrize(
    ("axes", "pools"),
    [("2, 3", 1), ("-1, -2", 1), ("1, 2, 3", 0), ("2", 0)],
    ids=["both", "from-the-end", "all", "one"],
)
def test_a_mean_over_the_axes_of_images_is_a_global_pool(axes: str, pools: int, tmp_path: Path) -> None:
    model = parsed(POOLED.replace("MEAN", axes).replace("float[n, 4, 1, 1] z", "float z"), k=normal(4, 3, 1, 1))
    del model.graph.output[1].type.tensor_type.shape.dim[:]
    model.graph.output[1].type.tensor_type.ClearField("shape")
    small = simplified(model, tmp_path)
    found = [node.op_type for node in small.graph.node]
    assert found.count("GlobalAveragePool") == pools and found.count("ReduceMean") == 1 - pools
    assert len(found) == 8
    assert_equal_runs(model, small, {"x": normal(2, 3, 8, 8)})


def test_a_mean_that_is_no_image_or_was_captured_from_torch_stays() -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.max_pool2d(x, 2).mean((2, 3), keepdim=True).relu()

    graph = regauge.capture(Gate(), (torch.randn(2, 3, 8, 8),))
    assert "mean" in [node.op for node in regauge.optimize(graph, "simplify").nodes]
