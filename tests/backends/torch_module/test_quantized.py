"""Layers on integers in emitted modules: exact sums, packed codes, and what can be done with such a module."""

import copy
import io
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from regauge.backends.torch_module import quantized as layers
from regauge.backends.torch_module.packing import pack
from regauge.ir.cost import figures

torch.manual_seed(0)


class Net(nn.Module):
    """Two convolutions, one of them without a bias, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, (1, 3), bias=False)
        self.fc = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.fc2(self.fc(self.conv2(x).relu().mean((2, 3))).relu())


def quantized(options: str):
    data = [(torch.randn(16, 3, 12, 12),)]
    graph = regauge.capture(Net().eval(), data[0], dynamic={0: {0: "batch"}})
    return regauge.optimize(graph, f"quantize{{{options}}}", data=data)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 16, 33])
def test_codes_come_out_as_they_were_packed(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, layers.packed_size(count, bits))
    assert packed.shape[1] <= count * bits / 8 + bits.bit_count()
    assert torch.equal(layers.unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 5, 7), (3, 384, 16), (40, 130, 33), (0, 8, 8), (16, 1, 32)]
)
def test_sums_are_exact(rows: int, inputs: int, outputs: int) -> None:
    """The kernel gives what NumPy does, to the last bit, and so does the reference; -128 in every place included."""
    q = torch.randint(-128, 128, (2, rows, inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    q[:, :1], weight[:2] = -128, -128
    wanted = torch.from_numpy(q.numpy().astype(np.int32) @ weight.numpy().astype(np.int32).T)
    for matmul in (layers.int_matmul, layers.plain_matmul):
        assert matmul(q, weight).dtype == torch.int32
        assert torch.equal(matmul(q, weight), wanted)


def filled(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(
                torch.randint(-128, 128, tensor.shape) if tensor.dtype == torch.int8 else torch.rand(tensor.shape)
            )
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.QLinear(24, 10), (3, 5, 24)),
        (layers.QLinear(24, 10, bias=False), (24,)),
        (layers.QLinearDynamic(24, 10), (3, 24)),
        (layers.QConv2d(3, 8, (3, 2), (2, 1), (1, 0)), (2, 3, 9, 8)),
        (layers.QConv2d(3, 8, (1, 1), bias=False), (2, 3, 9, 8)),
    ],
)
def test_a_layer_is_its_reference_to_the_last_bit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = 40 * torch.randn(shape)
    assert torch.equal(filled(layer)(x), layer.reference(x))


def test_rows_of_zeros_are_zeros() -> None:
    layer = filled(layers.QLinearDynamic(24, 10))
    assert torch.equal(layer(torch.zeros(2, 24)), layer.bias.expand(2, 10))


@pytest.mark.parametrize("options", ["w8a8", "w8", "w4", "w3", "w2", "w4,symmetric=true", "w4,group=8"])
@pytest.mark.parametrize("target", ["reference", "torch-cpu"])
def test_a_module_computes_what_its_graph_does(options: str, target: str) -> None:
    graph = quantized(f"scheme={options},target={target}")
    module, x = graph.to_torch(), torch.randn(5, 3, 12, 12)
    names = [type(child).__name__ for child in module.children()]
    in_groups = options.endswith("group=8")  # a kernel in groups is a matrix that is reshaped, which no layer holds
    assert sum(name.startswith("Q") for name in names) == (3 if in_groups else 4)
    assert ("QLinearWeightFast" in names) == (target == "torch-cpu" and options != "w8a8")
    with torch.no_grad():
        found, wanted = module(x), graph.run((x,))[0]
    least = 1e-5 if target == "reference" or options == "w8a8" else 0.02  # the kernels are those of bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < least


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_floats_of_8_bits_are_multiplied_for_a_gpu(activations: str) -> None:
    """Layers of sizes that its kernel takes; there is none for convolutions."""
    graph = quantized(f"scheme=fp8,target=torch-cuda,activations={activations}")
    left = graph.report.passes[-1].left
    if activations == "static":
        assert left["torch-cuda has no convolution of floats of 8 bits"] == 2
    assert left["its sizes are no multiples of 16: torch-cuda has no product of floats of 8 bits for them"] == 1
    module, x = graph.to_torch(), torch.randn(5, 3, 12, 12)
    kind = {"static": "QLinearFloat8", "dynamic": "QLinearFloat8Dynamic"}[activations]
    assert type(module.fc).__name__ == kind and module.fc.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        torch.testing.assert_close(module(x), graph.run((x,))[0])
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.testing.assert_close(exported.module()(x), module(x))
    plain = quantized("scheme=fp8,target=reference").to_torch()
    assert not any(type(child).__name__.startswith("Q") for child in plain.children())


def test_products_of_floats_of_8_bits_are_those_of_the_kernel() -> None:
    q, weight = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((5, 32), (48, 32)))
    of_kernel = torch._scaled_mm(q, weight.t(), torch.ones(()), torch.ones(()), out_dtype=torch.float32)
    torch.testing.assert_close(layers.float8_matmul(q, weight), of_kernel)


@pytest.mark.parametrize("options", ["w8a8", "w3"])
def test_a_module_can_be_saved_copied_and_exported(options: str) -> None:
    graph = quantized(f"scheme={options},target=torch-cpu")
    module, x = graph.to_torch(), torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(copy.deepcopy(module)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), wanted)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = graph.to_torch()
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert not torch.equal(other(x), wanted)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), wanted)  # what was laid out for a kernel is laid out anew
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.testing.assert_close(exported.module()(x), wanted, rtol=0.02, atol=0.02)
        compiled = torch.compile(module, backend="eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=0.02, atol=0.02)
        torch.testing.assert_close(module.double().to("cpu").float()(x), wanted)


@pytest.mark.parametrize("options", ["w8a8", "w3"])
def test_a_module_can_be_exported_to_onnx(options: str, tmp_path) -> None:
    module, x = quantized(f"scheme={options},target=torch-cpu").to_torch(), torch.randn(5, 3, 12, 12)
    torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, module(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", ["w8", "w4", "w3", "w2"])
def test_a_module_is_as_small_as_is_said(options: str, tmp_path) -> None:
    """Codes and zero points are packed; only the last byte of each of the 122 rows of both may be partly empty."""
    graph = quantized(f"scheme={options},target=reference")
    said = figures(graph).bytes
    found = sum(t.numel() * t.element_size() for t in graph.to_torch().state_dict().values())
    assert said <= found <= said + 2 * 122
    written = graph.write(tmp_path / "model") / "model.safetensors"
    assert written.stat().st_size < found + 4096


def test_factors_of_smoothing_are_scales_of_inputs() -> None:
    """No multiplication is left in front of a layer that rounds what it reads."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 60
    x = torch.randn(64, 16)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "quantize{smoothing=0.5,target=torch-cpu}", data=[(x,)])
    assert sum(node.op == "mul" for node in small.nodes) >= 1
    module = small.to_torch()
    assert [type(child).__name__ for child in module.children()] == ["QLinear", "GELU", "QLinear"]
    assert module[2].input_scale.shape == (32,)
    with torch.no_grad():
        torch.testing.assert_close(module(x), small.run((x,))[0])


def test_other_convolutions_keep_their_weights_in_integers() -> None:
    """Of one axis, in groups, with gaps: they compute in float, on weights that are stored as codes."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2, padding=1)).eval()
    x = torch.randn(16, 4, 12)
    small = regauge.optimize(regauge.capture(model, (x,)), "quantize{target=reference}", data=[(x,)])
    module = small.to_torch()
    assert sum(type(child).__name__ == "QConvWeight" for child in module.modules()) == 2
    with torch.no_grad():
        torch.testing.assert_close(module(x), small.run((x,))[0])


def test_rows_are_rounded_by_their_own_ranges() -> None:
    """Without data too; a row that is a hundred times as large as others costs these nothing. Dims can still be cut."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8, bias=False)).eval()
    x = torch.randn(6, 32)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "quantize{activations=dynamic,target=torch-cpu}")
    module = small.to_torch()
    assert [type(child).__name__ for child in module.children()] == ["QLinearDynamic", "GELU", "QLinearDynamic"]
    with torch.no_grad():
        alone = module(x)
        assert torch.equal(module(torch.cat([100 * x[:1], x]))[1:], alone)
        torch.testing.assert_close(alone, small.run((x,))[0])
        assert float((alone - model(x)).norm() / model(x).norm()) < 0.02
    cut = regauge.optimize(small, "prune{ratio=0.5,compensate=false}")
    assert cut.parameters["0.weight_quantized"].shape == (32, 32)
    torch.testing.assert_close(cut.to_torch()(x), cut.run((x,))[0])


def test_a_file_that_was_quantized_dynamically_loads_and_writes(tmp_path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(6, 32)
    regauge.capture(model, (x,)).to_onnx(tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
    with pytest.warns(regauge.RegaugeWarning, match="MatMulInteger"):
        graph = regauge.load(tmp_path / "dynamic.onnx")
    assert sum(node.op == "quantize_dynamic" for node in graph.nodes) == 2
    wanted = onnxruntime.InferenceSession(tmp_path / "dynamic.onnx").run(None, {graph.inputs[0].name: x.numpy()})[0]
    torch.testing.assert_close(graph.run((x,))[0], torch.from_numpy(wanted), rtol=0.01, atol=0.01)
    graph.to_onnx(tmp_path / "again.onnx")
