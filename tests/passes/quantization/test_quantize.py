"""``quantize`` on small networks: errors in decibels, sizes, and kernels that onnxruntime runs."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import regauge
from regauge.backends.onnx_model.audit import INTEGER_KERNELS, kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.storage.quantized_layers import quantized_layers

WIDTH, LENGTH = 32, 6


class Encoder(nn.Module):
    """One block of attention behind a norm, and one of two layers, on token ids of 50 kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        heads = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x))))


class Residual(nn.Module):
    """Convolutions with norms, a shortcut, pooling and a depthwise convolution, to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.three = nn.Conv2d(16, 16, 1)
        self.depth, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.bn(self.stem(x)).relu(), 2)
        x = (x + self.two(self.one(x).relu())).relu()
        return self.head(self.depth(self.three(x)).relu().mean((2, 3)))


def encoder(*, dynamic: bool = False) -> tuple[Graph, list[tuple[torch.Tensor]]]:
    """Norms of which one channel is far greater than the others, as in trained encoders."""
    model = Encoder().eval()
    with torch.no_grad():
        model.ln1.weight[3] = model.ln2.weight[5] = 20.0
    batches = [(torch.randint(0, 50, (8, LENGTH)),) for _ in range(4)]
    return regauge.capture(model, batches[0], dynamic={0: {0: "batch"}} if dynamic else None), batches


def residual() -> tuple[Graph, list[tuple[torch.Tensor]]]:
    model = Residual()
    batches = [(torch.randn(8, 3, 16, 16),) for _ in range(4)]
    model(torch.cat([x for (x,) in batches]))
    return regauge.capture(model.eval(), batches[0]), batches


def decibels(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (a,), (b,) = graph.run((x,)), other.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


def bytes_of(graph: Graph) -> int:
    return int(figures(graph).bytes)


def test_a_transformer_in_eight_bits(tmp_path: Path) -> None:
    """All four layers multiply integers in onnxruntime, static sizes or not; scales are smoothed into the norms."""
    for dynamic, kernel in ((False, "QGemm"), (True, "MatMulIntegerToFloat")):
        graph, batches = encoder(dynamic=dynamic)
        small = regauge.optimize(graph, "quantize", data=batches)
        fresh = torch.randint(0, 50, (8, LENGTH))
        assert decibels(graph, small, fresh) > 26
        assert bytes_of(small) < 0.37 * bytes_of(graph)
        small.to_onnx(tmp_path / "small.onnx")
        kernels, stray = kernels_of(tmp_path / "small.onnx")
        assert kernels[kernel] == 4 and not stray
        with torch.no_grad():
            apart = (small.to_torch()(fresh) - small.run((fresh,))[0]).abs().amax((1, 2))
        assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.01  # of one sequence a number may be a tie


def test_smoothing_gains_where_a_channel_sticks_out() -> None:
    graph, batches = encoder()
    fresh = torch.randint(0, 50, (64, LENGTH))[:8]
    found = {s: regauge.optimize(graph, f"quantize{{{s}}}", data=batches) for s in ("smoothing=0", "")}
    assert decibels(graph, found[""], fresh) > decibels(graph, found["smoothing=0"], fresh) + 3


def test_a_convolutional_network_stays_in_integers(tmp_path: Path) -> None:
    """Convolutions, their sum, and the pooling between them hand integers on; the depthwise one is left in float."""
    graph, batches = residual()
    small = regauge.optimize(graph, "quantize", data=batches)
    assert decibels(graph, small, torch.randn(8, 3, 16, 16)) > 25
    assert dict(small.report.passes[0].left) == {"depthwise convolutions are slower with integers": 1}
    small.to_onnx(tmp_path / "small.onnx")
    kernels, _ = kernels_of(tmp_path / "small.onnx")
    assert kernels["QLinearConv"] == 4 and kernels["QLinearAdd"] == 1 and kernels["QGemm"] == 1
    assert kernels["QuantizeLinear"] == 2  # of the image, and in front of the head


def test_an_onnx_file_keeps_what_is_not_quantized(tmp_path: Path) -> None:
    graph, batches = residual()
    source = graph.to_onnx(tmp_path / "source.onnx")
    small = regauge.optimize(regauge.load(source), "quantize", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    before, after = onnx.load(source), onnx.load(tmp_path / "small.onnx")
    assert after.opset_import == before.opset_import
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    kernels, _ = kernels_of(tmp_path / "small.onnx")
    assert sum(kernels[name] for name in INTEGER_KERNELS) == 5


@pytest.mark.parametrize(("bits", "least"), [(8, 44), (4, 23), (3, 17), (2, 9)])
def test_weights_alone(bits: int, least: float) -> None:
    graph, batches = encoder()
    fresh = torch.randint(0, 50, (8, LENGTH))
    small = regauge.optimize(graph, f"quantize{{scheme=w{bits},embeddings=false}}", data=batches)
    nearest = regauge.optimize(graph, f"quantize{{scheme=w{bits},embeddings=false,method=nearest}}")
    assert decibels(graph, small, fresh) > max(least, decibels(graph, nearest, fresh))


def test_kernels_in_groups_of_channels(tmp_path: Path) -> None:
    """Scales of four channels each by nine places gain where channels differ; the file has blocks, and is verified."""
    model, x = nn.Conv2d(16, 8, 3), torch.randn(8, 16, 9, 9)
    with torch.no_grad():
        model.weight *= torch.logspace(-1, 1, 16).reshape(1, 16, 1, 1)
    graph = regauge.capture(model, (x,))
    whole, small = (regauge.optimize(graph, f"quantize{{scheme=w4,target=reference{o}}}") for o in ("", ",group=36"))
    assert decibels(graph, small, x) > decibels(graph, whole, x) + 3
    assert {node.inputs[1].shape for node in small.nodes if node.op == "dequantize"} == {(8, 4)}
    small.to_onnx(tmp_path / "small.onnx")
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert kinds["weight_quantized"] == onnx.TensorProto.UINT4
    assert len(quantized_layers(small)) == 1


def test_four_bits_are_two_to_a_byte_in_a_file(tmp_path: Path) -> None:
    """They are read by the kernel for blocks, from a graph of torch and from a file of opset 21."""
    graph, batches = encoder(dynamic=True)
    small = regauge.optimize(graph, "quantize{scheme=w4}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    model = onnx.load(tmp_path / "small.onnx")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds["up.weight_quantized"] == onnx.TensorProto.UINT4
    assert kernels_of(tmp_path / "small.onnx")[0]["MatMulNBits"] == 4
    again = regauge.load(tmp_path / "small.onnx")
    assert [node.attributes["bits"] for node in again.nodes if node.op == "dequantize"][-4:] == [4] * 4
    x = torch.randint(0, 50, (3, LENGTH))
    assert float((again.run((x,))[0] - small.run((x,))[0]).abs().max()) < 1e-3


@pytest.mark.parametrize(("scheme", "graph_says", "kernels_give"), [("w8", 45.6, 39.9), ("w4", 21.2, 21.16)])
def test_kernels_of_blocks_round_what_they_read_too(
    tmp_path: Path, scheme: str, graph_says: float, kernels_give: float
) -> None:
    """To 8 bits, unless a session says otherwise: most of the error with weights of 8 bits, nothing beside 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    graph = regauge.capture(model, (torch.randn(3, 64),), dynamic={0: {0: "batch"}})
    x = torch.randn(256, 64)
    small = regauge.optimize(graph, f"quantize{{scheme={scheme}}}")
    assert any("session.qdq_matmulnbits_accuracy_level" in note for note in small.report.passes[0].notes)
    path = small.to_onnx(tmp_path / "small.onnx")
    (wanted,), (stored,) = graph.run((x,)), small.run((x,))
    exact = Session(path, settings={"session.qdq_matmulnbits_accuracy_level": "0"}).run((x,))[0]
    torch.testing.assert_close(exact, stored, rtol=1e-5, atol=1e-6)
    found = [
        float(-20 * torch.log10((one - wanted).norm() / wanted.norm())) for one in (exact, Session(path).run((x,))[0])
    ]
    assert found == pytest.approx([graph_says, kernels_give], abs=0.3)


def test_an_old_opset_has_no_blocks(tmp_path: Path) -> None:
    graph, batches = encoder()
    source = graph.to_onnx(tmp_path / "source.onnx")
    small = regauge.optimize(regauge.load(source), "quantize{scheme=w4}", data=batches)
    with pytest.raises(regauge.RegaugeError, match="needs opset 21, and the model has 20"):
        small.to_onnx(tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx").exists()


def test_scales_are_cut_with_their_weights() -> None:
    """Pruning what was quantized: scales and zero points are cut as their weights are."""
    graph, batches = encoder()
    small = regauge.optimize(graph, "quantize", data=batches)
    cut = regauge.optimize(small, "prune{ratio=0.5,compensate=false}")
    for name in ("up.weight_quantized", "up.weight_scale", "up.bias_quantized", "up.bias_scale"):
        assert cut.parameters[name].shape[0] == WIDTH
    assert cut.parameters["down.weight_quantized"].shape == (WIDTH, WIDTH)
    assert cut.run((torch.randint(0, 50, (2, LENGTH)).repeat(4, 1),))[0].isfinite().all()


def test_a_layer_that_reads_a_layer(tmp_path: Path) -> None:
    """What the second one reads is written anew before it is."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    batches = [(torch.randn(16, 5, 8),)]
    for dynamic in (None, {0: {0: "batch"}}):
        graph = regauge.capture(model, batches[0], dynamic=dynamic)
        small = regauge.optimize(graph, "quantize", data=batches)
        assert decibels(graph, small, *batches[0]) > 30
        small.to_onnx(tmp_path / "small.onnx")
        again = regauge.optimize(small, "quantize", data=batches)
        assert decibels(small, again, *batches[0]) > 100  # there is nothing left to quantize


def test_scales_go_through_a_clamp(tmp_path: Path) -> None:
    """A multiplication behind a ReLU would keep it from the kernel in front, which would then be one on floats."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 60
        model[2].weight[:, 3] /= 60
    batches = [(torch.randn(64, 6),)]
    graph = regauge.capture(model, batches[0])
    small = regauge.optimize(graph, "quantize", data=batches)
    assert not [node for node in small.nodes if node.op == "mul" and node.inputs[0].producer is not None]
    assert decibels(graph, small, *batches[0]) > 33
    small.to_onnx(tmp_path / "small.onnx")
    assert kernels_of(tmp_path / "small.onnx")[0]["QGemm"] == 2


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_alone_with_an_activation_behind_them(tmp_path: Path, activation: type[nn.Module], bias: bool) -> None:
    """onnxruntime makes one float Gemm of a product, a bias and an activation, and keeps a ReLU for integers."""
    layers = [nn.Linear(32, 48, bias=bias), activation(), nn.Linear(48, 32, bias=bias), activation()]
    graph = regauge.capture(nn.Sequential(*layers, nn.Linear(32, 4)).eval(), (torch.randn(3, 32),))
    small = regauge.optimize(graph, "quantize{scheme=w4,group=16}")
    small.to_onnx(tmp_path / "small.onnx")
    assert kernels_of(tmp_path / "small.onnx")[0]["MatMulNBits"] == 3


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(16,), (2, 8)])
def test_ranges_found_at_every_run(
    tmp_path: Path, activation: type[nn.Module], bias: bool, lead: tuple[int, ...]
) -> None:
    """Without data; products are one kernel with the search for the range, whatever is behind them."""
    layers = [nn.Linear(32, 48, bias=bias), activation(), nn.Linear(48, 8, bias=bias)]
    graph = regauge.capture(nn.Sequential(*layers).eval(), (torch.randn(*lead, 32),))
    small = regauge.optimize(graph, "quantize{activations=dynamic}")
    x = 9 * torch.randn(*lead, 32)  # no range was fixed before
    assert decibels(graph, small, x) > 34
    small.to_onnx(tmp_path / "small.onnx", inputs=(x,))
    assert kernels_of(tmp_path / "small.onnx")[0]["DynamicQuantizeMatMul"] == 2


def test_values_that_several_layers_read_are_quantized_once_at_every_run(tmp_path: Path) -> None:
    graph, batches = encoder(dynamic=True)
    x = torch.randint(0, 50, (8, LENGTH))  # before export, which draws numbers only the first time in a process
    source = graph.to_onnx(tmp_path / "source.onnx")
    small = regauge.optimize(regauge.load(source), "quantize{activations=dynamic}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    assert onnx.load(tmp_path / "small.onnx").opset_import == onnx.load(source).opset_import
    assert kernels_of(tmp_path / "small.onnx")[0]["DynamicQuantizeMatMul"] == 4
    assert decibels(graph, small, x) > 26


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


@pytest.mark.parametrize("options", ["activations=dynamic", "scheme=w4", "scheme=w8a8"])
@pytest.mark.parametrize("lead", [(16,), (2, 8)])
def test_what_is_added_to_a_product_is_no_bias(tmp_path: Path, options: str, lead: tuple[int, ...]) -> None:
    """onnxruntime would make a float Gemm of both."""
    graph, batches = regauge.capture(Sum().eval(), (torch.randn(*lead, 32),)), [torch.randn(*lead, 32)]
    small = regauge.optimize(graph, f"quantize{{{options}}}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    kernels, _ = kernels_of(tmp_path / "small.onnx")
    assert sum(kernels[name] for name in INTEGER_KERNELS) == 2


def test_convolutions_have_no_ranges_at_every_run() -> None:
    graph, batches = residual()
    small = regauge.optimize(graph, "quantize{activations=dynamic}", data=batches)
    assert sum("convolutions by ranges found at every run" in reason for reason in small.report.passes[0].left) == 1


def test_weights_alone_that_no_kernel_reads_are_made_floats_at_load(tmp_path: Path) -> None:
    """onnxruntime has kernels for blocks along the inputs of a product, and none for convolutions."""
    graph, batches = residual()
    small = regauge.optimize(graph, "quantize{scheme=w8}", data=batches)
    assert not small.report.passes[0].left
    assert small.parameters["stem.weight_quantized"].dtype == torch.int8
    assert small.parameters["head.weight_scale"].shape == (10,)  # 16 inputs are no block
    assert bytes_of(small) < 0.35 * bytes_of(graph) and decibels(graph, small, *batches[0]) > 40
    small.to_onnx(tmp_path / "small.onnx")
    kernels, stray = kernels_of(tmp_path / "small.onnx")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert stored["stem.weight_quantized"] == onnx.TensorProto.INT8  # which torch's exporter left as it is
    assert not stray and not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)
    plain = regauge.optimize(graph, "quantize{scheme=w8,target=reference}", data=batches)
    assert decibels(plain, small, *batches[0]) > 120


@pytest.mark.parametrize("options", ["scheme=w4", "scheme=w2", "scheme=w4,symmetric=true", "scheme=ternary"])
@pytest.mark.parametrize("read", [False, True])
def test_weights_of_few_bits_are_made_floats_at_load(tmp_path: Path, options: str, read: bool) -> None:
    """Of convolutions, with zero points too; by torch's exporter and into a file that was read."""
    graph, batches = residual()
    graph = regauge.load(graph.to_onnx(tmp_path / "float.onnx"), opset=21) if read else graph
    small = regauge.optimize(graph, f"quantize{{{options}}}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    kernels, stray = kernels_of(tmp_path / "small.onnx")
    assert not stray and not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert stored["stem.weight_quantized"] in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("group=32", "group does nothing with scheme=w8a8"),
        ("scheme=w4,smoothing=0.5", "smoothing does nothing with scheme=w4"),
        ("scheme=w8,calibration=mse", "calibration does nothing with scheme=w8"),
        ("symmetric=false", "symmetric does nothing with scheme=w8a8"),
        ("scheme=w4,smoothing=0", "smoothing does nothing with scheme=w4"),
        ("scheme=bitstack,target=reference,method=columns", "method does nothing with scheme=bitstack"),
        ("scheme=codebook,target=reference,per=group", "say group=N"),
        ("scheme=w4,per=row,group=32", "group=32 is not for per=row"),
        ("scheme=w4,packed=true", "not packed=true"),
        ("scheme=w4,group=24", "blocks of 16, 32, 64"),
        ("scheme=w4,activations=dynamic,target=torch-cpu", "activations does nothing with scheme=w4"),
        ("activations=dynamic,calibration=mse,target=torch-cpu", "calibration does nothing with activations=dynamic"),
        ("activations=dynamic,target=tensorrt", "no ranges that are found at every run"),
        ("scheme=w4,method=descent", "needs data for method=descent"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: str, reason: str) -> None:
    graph, _ = encoder()
    with pytest.raises(PassError, match=reason):
        regauge.optimize(graph, f"quantize{{{options}}}")


def test_what_is_left_is_counted() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=4)).eval()
    batches = [(torch.randn(8, 4, 12),)]
    small = regauge.optimize(regauge.capture(model, batches[0]), "quantize", data=batches)
    assert dict(small.report.passes[0].left) == {
        "conv_transpose has no quantized form yet": 1,
        "depthwise convolutions are slower with integers": 1,
    }


def test_what_torch_has_no_product_of_integers_for_stays_in_float() -> None:
    convolutions = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Unflatten(1, (4, 1)), nn.Conv2d(4, 8, (1, 3), dilation=2))
    model = nn.Sequential(convolutions, nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 16)).eval()
    batches = [(torch.randn(8, 4, 12),)]
    graph = regauge.capture(model, batches[0])

    def left(options: str) -> list[str]:
        report = regauge.optimize(graph, f"quantize{{{options}}}", data=batches).report
        return [reason for reason, count in dict(report.passes[0].left).items() for _ in range(count)]

    assert left("target=torch-cpu") == ["torch-cpu has no such convolution of integers"] * 2
    found = left("target=torch-cuda")
    assert sum("no multiples of 8" in reason for reason in found) == 2 and len(found) == 4
    assert sum("found at every run" in reason for reason in left("target=torch-cpu,activations=dynamic")) == 2


def test_activations_need_data() -> None:
    graph, _ = encoder()
    with pytest.raises(PassError, match="data"):
        regauge.optimize(graph, "quantize")


def test_a_layer_that_the_runtime_would_convert_is_an_error(tmp_path: Path) -> None:
    """Weights of 8 bits with a scale for each output run in float behind a conversion at every run."""
    graph, batches = encoder()
    slow = regauge.optimize(graph, "quantize{target=reference,smoothing=0}", data=batches)
    slow.to_onnx(tmp_path / "slow.onnx")  # who asks for no runtime gets the plain form
    slow.metadata["quantized_for"] = "ort-x86"
    with pytest.raises(regauge.RegaugeError, match="onnxruntime (would convert|runs)"):
        slow.to_onnx(tmp_path / "refused.onnx")
    assert not (tmp_path / "refused.onnx").exists()


def test_layers_that_share_a_bias_are_quantized_each_with_its_own(tmp_path: Path) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.other.bias = self.one.bias
            self.gain = torch.nn.Linear(64, 64)
            self.gain.bias = self.one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.gain(torch.tanh(self.other(torch.tanh(self.one(x)))))) + self.one.bias

    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(64, 64)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    wanted, data = model(x), [(part,) for part in x.split(16)]
    for step, decibels in (("quantize", 38), ("quantize{scheme=w8}", 48), ("quantize{scheme=w4}", 25)):
        small = regauge.optimize(graph, step, data=data)
        found = small.run((x,))[0]
        assert 10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()) > decibels
        assert "left alone" not in str(small.report) and "3 layers" in str(small.report)
    assert len(graph.parameters) == 4  # the graph itself has one bias still
    written = Session(small.to_onnx(tmp_path / "pair.onnx")).run((x,))[0]
    assert (written - wanted).square().sum() < 1e-2 * wanted.square().sum()
