"""Torch source of ONNX files: layers of torch's own under the names their weights have, however they were exported."""

from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import regauge
from regauge.backends.to_torch import emit, to_torch
from regauge.ir.errors import EmitError, RegaugeWarning
from regauge.ir.graph import Graph

EXPORTS = {"default": {"dynamo": True}, "raw": {"dynamo": True, "optimize": False}, "torchscript": {"dynamo": False}}


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        short = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.down = short if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, 2)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(11, 16)
        self.pos = nn.Parameter(torch.randn(6, 16))
        self.blocks = nn.ModuleList([Layer(16), Layer(16)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def _model(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = {"resnet": ResNet, "mlp": _mlp, "transformer": Transformer}[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    inputs = {
        "resnet": torch.randn(2, 3, 8, 8),
        "mlp": torch.randn(2, 6),
        "transformer": torch.randint(0, 11, (2, 6)),
    }
    return model.eval(), inputs[name]


def _exported(name: str, export: str, folder: Path) -> tuple[nn.Module, torch.Tensor, Path]:
    model, x = _model(name)
    path = folder / f"{name}.onnx"
    options = dict(EXPORTS[export])
    if options["dynamo"]:
        options.update(external_data=False, verbose=False)
    torch.onnx.export(model, (x,), path, **options)
    return model, x, path


def _layers(module: nn.Module) -> dict[str, type]:
    """The layers with weights, by path, those folded into others left out."""
    kinds = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.Embedding)
    return {path: type(layer) for path, layer in module.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("name", ["resnet", "mlp", "transformer"])
def test_exported_models_come_back_with_their_layers(name: str, export: str, tmp_path: Path) -> None:
    model, x, path = _exported(name, export, tmp_path)
    graph = regauge.load(path)
    module = to_torch(graph)
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    assert _layers(module) == _layers(model)
    source = emit(graph).source
    assert "F.conv2d" not in source and "F.linear" not in source and "F.layer_norm" not in source
    arguments = [line for line in source.splitlines() if "def forward" in line]
    assert all(line.count(",") == 1 and line.endswith("):") for line in arguments)  # one tensor each
    keys, initializers = set(module.state_dict()), {i.name for i in onnx.load(path).graph.initializer}
    known = {key for key in initializers if key in model.state_dict()}  # the others are named by the exporter
    assert known <= keys
    if export == "raw":
        assert keys == set(model.state_dict())  # every tensor under its own name, and nothing else
    folded = {f"{path}.bias" for path, kind in _layers(model).items() if kind is nn.Conv2d}
    assert keys - set(model.state_dict()) - folded <= {"slice_1", "Add"}  # the table of positions, cut by the exporter


def test_batch_norm_that_stays_is_a_layer(tmp_path: Path) -> None:
    model, _, path = _exported("resnet", "raw", tmp_path)
    module = to_torch(regauge.load(path))
    norms = [path for path, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [path for path, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.mark.parametrize("export", EXPORTS)
def test_a_cut_file_comes_back_smaller(export: str, tmp_path: Path) -> None:
    _, x, path = _exported("resnet", export, tmp_path)
    small = regauge.optimize(regauge.load(path), "prune{ratio=0.5,compensate=false}")
    module = to_torch(small)
    widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert len(widths) == 10 and sorted(set(widths)) == [4, 8]
    small.to_onnx(tmp_path / "small.onnx")
    assert regauge.compare(module, tmp_path / "small.onnx", x).equal(1e-5)


def test_regauges_own_files_keep_the_hierarchy(tmp_path: Path) -> None:
    model, x = _model("resnet")
    regauge.capture(model, (x,)).to_onnx(tmp_path / "own.onnx")
    graph = regauge.load(tmp_path / "own.onnx")
    assert not any(path.startswith("module") for node in graph.nodes for path, _ in node.scope)
    assert {node.scope[-1][0] for node in graph.nodes if node.op == "conv"} == set(_layers(model)) - {"fc"}
    convolutions = {name for name in graph.parameters if not name.startswith("fc")}
    assert convolutions == {f"{path}.{leaf}" for path in set(_layers(model)) - {"fc"} for leaf in ("weight", "bias")}
    module = to_torch(graph)
    assert type(module).__name__ == "ResNet" and _layers(module) == _layers(model)


def _plain_file() -> Graph:
    """A file of no exporter in particular: nothing but the names of its weights says what belongs together."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])
    random = torch.Generator().manual_seed(0)
    shapes = {"body.conv.weight": (4, 3, 3, 3), "body.conv.bias": (4,), "fc.weight": (5, 4), "fc.bias": (5,)}
    weights = [
        numpy_helper.from_array(torch.randn(shape, generator=random).numpy(), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "body.conv.weight", "body.conv.bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "plain", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    return regauge.load(model)


def test_weight_names_give_the_hierarchy_where_nothing_else_does() -> None:
    graph = _plain_file()
    module = to_torch(graph)
    assert _layers(module) == {"body.conv": nn.Conv2d, "fc": nn.Linear}
    assert set(module.state_dict()) == {"body.conv.weight", "body.conv.bias", "fc.weight", "fc.bias"}
    assert graph.nodes[0].scope[-1] == ("body.conv", "Conv2d")
    shown = [line.strip() for line in str(graph).splitlines() if line.strip().startswith("#")]
    assert shown == ["# body.conv: Conv2d", "# root", "# fc: Linear"]


def test_branches_that_give_weights_and_views_are_apart() -> None:
    """torch.cond takes no result that lies in the memory of what a branch reads."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    choice (bool flag, float[2, 3] x) => (float[3, 2] y, float[3, 2] z) {
      y, z = If (flag) <
        then_branch = first () => (float[3, 2] a, float[3, 2] b) { a = Transpose (x) b = Identity (a) },
        else_branch = second () => (float[3, 2] c, float[3, 2] d) { c = Identity (w) d = Neg (c) }
      >
    }
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(torch.arange(6.0).reshape(3, 2).numpy(), "w"))
    graph = regauge.load(model)
    module, x = graph.to_torch(), torch.randn(2, 3)
    for flag in (torch.tensor(True), torch.tensor(False)):
        for found, wanted in zip(module(flag, x), graph.run([flag, x]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_integers_that_torch_lacks_are_told() -> None:
    small = helper.make_tensor("w", TensorProto.INT4, [2], [1, -1])
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["f"], to=1), helper.make_node("Add", ["x", "f"], ["y"])],
        "few_bits",
        [helper.make_tensor_value_info("x", 1, [2])],
        [helper.make_tensor_value_info("y", 1, [2])],
        [small],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.warns(RegaugeWarning), pytest.raises(EmitError, match="without a torch form"):
        regauge.load(model).to_torch()
