"""Products by transposed weights are linear layers to the passes that work on layers."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.passes.linear_layers import linear_layers


class Hidden(torch.nn.Module):
    """x + b relu(a x), twice, written as some models write linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.ParameterList(torch.randn(32, 16) / 4 for _ in range(2))
        self.down = torch.nn.ParameterList(torch.randn(16, 32) / 6 for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + torch.relu(x @ up.t()) @ down.t()
        return x


def captured() -> regauge.Graph:
    return regauge.capture(Hidden().double(), (torch.randn(2, 16).double(),), dynamic={0: {0: "batch"}})


DATA = [torch.randn(64, 16).double() for _ in range(2)]


@pytest.mark.parametrize(
    "text",
    [
        "factorize{params=0.6}",
        "sparsify",
        "share{blocks=1,rank=2}",
        "adapt{form=lora,rank=2}",
        "split-experts{experts=4,active=4}",
        "fuse-blocks{blocks=1}",
    ],
)
def test_passes_on_layers_find_them(text: str) -> None:
    graph = captured()
    found = regauge.optimize(graph, text, data=DATA)
    (entry,) = found.report.passes
    assert entry.changed and not any("permute" in reason for reason in entry.left)
    assert {node.op for node in graph.nodes} >= {"permute", "matmul"}  # the graph that was given is as it was


def test_refits_reach_the_layers_that_are_left() -> None:
    notes = regauge.optimize(captured(), "depth{blocks=1}", data=DATA).report.passes[0].notes
    assert any("layers refitted on 128 examples: 1" in note for note in notes), notes


def test_where_nothing_else_changes_products_stay_products() -> None:
    graph = captured()
    found = regauge.optimize(graph, "split-projections")
    assert not found.report.passes[0].changed
    assert [node.op for node in found.nodes] == [node.op for node in graph.nodes]


def test_layers_read_the_weights_that_products_read() -> None:
    graph = captured()
    own = linear_layers(graph)
    assert [node.op for node in own.nodes if node.op in ("linear", "permute", "matmul")] == ["linear"] * 4
    assert all(own.parameters[name].weight is weight.weight for name, weight in graph.parameters.items())
    torch.testing.assert_close(own.run((DATA[0],)), graph.run((DATA[0],)))
    assert linear_layers(own) is own


def test_raw_files_are_factorized(tmp_path: Path) -> None:
    """As torch writes linear layers that nothing has optimised yet: a Transpose of the weight, and a MatMul."""
    weight = numpy_helper.from_array((torch.randn(24, 4) @ torch.randn(4, 16)).numpy(), "w")
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])
    model = helper.make_model(
        helper.make_graph(nodes, "raw", [given], [result], [weight]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 18)],
    )
    onnx.save(model, tmp_path / "raw.onnx")
    small = regauge.optimize(regauge.load(tmp_path / "raw.onnx"), "factorize{params=0.5}")
    small.to_onnx(tmp_path / "small.onnx")
    assert regauge.compare(tmp_path / "raw.onnx", tmp_path / "small.onnx").relative < 1e-5  # of rank 4, and 4 is kept
    sizes = [len(numpy_helper.to_array(w).reshape(-1)) for w in onnx.load(tmp_path / "small.onnx").graph.initializer]
    assert sum(sizes) == 4 * (24 + 16)
