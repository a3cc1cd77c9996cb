"""Experts in ONNX files: each multiplies its own rows alone, however many these are; from torch and in loaded files."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import sympy
import torch
from onnx import helper
from torch import Tensor, nn, randn

import regauge
from regauge.backends.to_onnx import to_onnx
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Value
from regauge.ir.ops.experts import grouped_mm


def computed(path: Path, *tensors: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    return torch.from_numpy(np.asarray(found))


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_every_number_of_rows_finds_its_experts(tmp_path: Path) -> None:
    graph = Graph()
    build, rows = Builder(graph), sympy.Symbol("rows", integer=True, positive=True)
    x, expert = build.input("x", (rows, 6), torch.float32), build.input("expert", (rows,), torch.int64)
    weight = build.parameter("weight", randn(4, 6, 5))
    ordered, order = build.sort(expert, dim=0, stable=True)
    numbers = build.constant(torch.arange(1, 5)[:, None], "numbers")
    before = build.cast(build.lt(build.unsqueeze(ordered, dim=0), numbers), dtype=torch.int32)
    ends = build.sum(before, dims=(1,))
    graph.outputs = [build.grouped_mm(build.index_select(x, order, dim=0), weight, ends)]
    path = to_onnx(graph, tmp_path / "experts.onnx")
    assert nodes(path).count("MatMul") == 4 and not onnx.load(path).functions
    assert [entry.domain for entry in onnx.load(path).opset_import] == [""]
    for given in ([3, 0, 0, 2, 3, 1, 0], [2, 2, 2], [1], []):
        chosen = torch.tensor(given, dtype=torch.int64)
        rows_given, ordered_ones = randn(len(given), 6), chosen.sort(stable=True)
        wanted = rows_given[ordered_ones.indices][:, None] @ weight.tensor[ordered_ones.values]
        torch.testing.assert_close(computed(path, rows_given, chosen), wanted[:, 0])


def test_rows_behind_the_last_expert_give_zeros(tmp_path: Path) -> None:
    graph = Graph()
    build = Builder(graph)
    x, ends = build.input("x", (7, 4), torch.float32), build.input("ends", (3,), torch.int32)
    weight = build.parameter("weight", randn(3, 4, 5))
    graph.outputs = [build.grouped_mm(x, weight, ends)]
    path = to_onnx(graph, tmp_path / "experts.onnx")
    for numbers in ([2, 2, 6], [0, 0, 0], [0, 7, 7], [1, 2, 7]):
        tensors = randn(7, 4), torch.tensor(numbers, dtype=torch.int32)
        found = computed(path, *tensors)
        torch.testing.assert_close(found, grouped_mm(tensors[0], weight.tensor, tensors[1]))
        assert not found[numbers[-1] :].any()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("loaded", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_split_experts_is_written(tmp_path: Path, loaded: bool) -> None:
    torch.manual_seed(0)
    model, data = Mlp().eval(), [(randn(3, 20, 8),)]
    graph = capture(model, data[0], dynamic={0: {0: "batch"}})
    if loaded:
        graph = regauge.load(to_onnx(graph, tmp_path / "dense.onnx"))
        graph = regauge.optimize(graph, "simplify{assemble=always}")  # layers of matmul and add
    for active in (1, 4) if loaded else (4,):
        found = regauge.optimize(graph, f"split-experts{{experts=4,active={active}}}", data=data)
        path = to_onnx(found, tmp_path / "experts.onnx")
        assert nodes(path).count("TopK") >= 3
        for batch in (1, 5):
            x = randn(batch, 20, 8)
            torch.testing.assert_close(computed(path, x), found.run((x,))[0], rtol=0, atol=1e-5)
            if active == 4:
                torch.testing.assert_close(computed(path, x), model(x).detach(), rtol=0, atol=1e-5)


def test_a_file_of_an_old_opset_is_told_what_to_do(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [7, 4]) for name in "xy")
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "old", [x], [y])
    graph = regauge.load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)).copy()
    build, relu = Builder(graph, by="test"), graph.outputs[0]
    assert isinstance(relu, Value)
    ends = build.constant(torch.tensor([2, 2, 7]), "ends")
    made = build.grouped_mm(graph.inputs[0], build.parameter("weight", randn(3, 4, 4)), ends)
    replace_uses(graph, relu, made)
    remove_dead(graph)
    with pytest.raises(EmitError, match="convert it to 13 or newer"):
        to_onnx(graph, tmp_path / "experts.onnx")


def test_mixtral_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sys.path.append(str(Path(__file__).resolve().parents[4] / "shared" / "tools"))
    with contextlib.suppress(ImportError):  # transformers imports torchvision where it is installed, beside any torch
        import torchvision_on_cpu  # noqa: F401
    try:
        config_class, model_class = transformers.MixtralConfig, transformers.MixtralForCausalLM
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"transformers does not load here: {reason}")
    torch.manual_seed(0)
    config = config_class(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=31, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * randn(parameter.shape)
    graph = capture(model, (torch.randint(31, (2, 7)),))
    path = to_onnx(graph, tmp_path / "mixtral.onnx")
    for seed in range(3):
        ids = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(computed(path, ids), model(ids).logits.detach(), rtol=1e-4, atol=1e-4)
