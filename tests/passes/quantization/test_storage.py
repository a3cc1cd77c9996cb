"""Weights that no kernel reads as integers: small in the file, floats when it is loaded, in branches too."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import regauge
from onnx_models import model_of
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures
from regauge.ir.graph import Graph

CHANNELS, LENGTH = 32, 20


def branch(name: str, seed: int) -> onnx.GraphProto:
    """A convolution, and an LSTM over what it gives; all weights are constants of the branch."""
    random = np.random.default_rng(seed)
    shapes = {"w": (CHANNELS, CHANNELS, 3), "i": (1, 4 * CHANNELS, CHANNELS), "r": (1, 4 * CHANNELS, CHANNELS)}
    weights = {name: (random.standard_normal(shape) / 10).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Constant", [], [name + key], value=numpy_helper.from_array(value))
        for key, value in weights.items()
    ]
    nodes += [
        helper.make_node("Conv", ["x", name + "w"], [name + "a"], pads=[1, 1]),
        helper.make_node("Transpose", [name + "a"], [name + "b"], perm=[2, 0, 1]),
        helper.make_node("LSTM", [name + "b", name + "i", name + "r"], ["", name + "h"], hidden_size=CHANNELS),
    ]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name + "h", TensorProto.FLOAT, None)])


def two_branches(path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, CHANNELS, LENGTH])
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, CHANNELS])
    node = helper.make_node("If", ["which"], ["y"], then_branch=branch("one", 0), else_branch=branch("two", 1))
    graph = helper.make_graph([node], "voice", [x, which], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, path)
    return path


def test_layers_in_branches_are_stored_in_eight_bits(tmp_path: Path) -> None:
    """Their weights are constants inside an If; onnxruntime makes them floats when it loads the file."""
    source, target = two_branches(tmp_path / "float.onnx"), tmp_path / "small.onnx"
    small = regauge.optimize(regauge.load(source), "quantize{scheme=w8}")
    assert not small.report.passes[0].left
    small.to_onnx(target)
    assert source.stat().st_size > 3.35 * target.stat().st_size
    kernels, stray = kernels_of(target)
    assert kernels["LSTM"] == kernels["Conv"] == 2 and not stray
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)
    before, after = Session(source), Session(target)
    for which in (True, False):
        inputs = {"x": torch.randn(2, CHANNELS, LENGTH), "which": torch.tensor(which)}
        (a,), (b,), (c,) = before.run(inputs), after.run(inputs), small.run(inputs)
        assert float((a - b).abs().max()) < 0.005 and float((b - c).abs().max()) < 1e-5


def test_weights_of_float_layers_are_stored_beside_integers(tmp_path: Path) -> None:
    """A depthwise convolution stays in float among convolutions of integers, and a vector in half precision."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.depth = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
            self.two, self.gain = nn.Conv2d(64, 64, 1), nn.Parameter(torch.rand(400))
            self.head = nn.Linear(64, 400)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.two(self.depth(self.one(x)).tanh()).mean((2, 3))).tanh() * self.gain

    batches = [(torch.randn(8, 3, 10, 10),) for _ in range(2)]
    graph = regauge.capture(Mixed().eval(), batches[0])
    small = regauge.optimize(graph, "quantize{storage=true}", data=batches)
    assert small.parameters["depth.weight_half"].shape == (64, 1, 3, 3)  # of 576 entries eight bits save nothing
    assert small.parameters["gain_half"].dtype == torch.float16
    small.to_onnx(tmp_path / "small.onnx")
    kernels, stray = kernels_of(tmp_path / "small.onnx")
    assert not stray and not kernels["Cast"]
    whole = regauge.optimize(graph, "quantize", data=batches)
    assert "depth.weight" in whole.parameters and "gain_half" in whole.parameters
    floats = regauge.optimize(graph, "quantize{storage=false}", data=batches)
    assert "gain" in floats.parameters


def test_a_tied_table_gets_one_scale_for_each_row() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(60, 16), nn.Linear(16, 60, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens))

    tokens = torch.arange(60)[None]
    graph = regauge.capture(Tied().eval(), (tokens,))
    small = regauge.optimize(graph, "quantize{scheme=w8}")
    (codes,) = [p for p in small.parameters.values() if p.dtype == torch.int8]
    (scale,) = [p for p in small.parameters.values() if p.dtype == torch.float32]
    assert codes.shape == (60, 16) and scale.shape == (60,)
    (a,), (b,) = graph.run((tokens,)), small.run((tokens,))
    assert float(10 * torch.log10(a.square().sum() / (a - b).square().sum())) > 35


def test_weights_in_branches_are_rounded_for_the_data(tmp_path: Path) -> None:
    """Of a convolution and of both weights of an LSTM within an If, on inputs whose channels go together; the branch
    that no batch takes is rounded as without data."""
    graph = regauge.load(two_branches(tmp_path / "float.onnx"))
    torch.manual_seed(0)
    mix = torch.randn(CHANNELS, 4) @ torch.randn(4, CHANNELS) + 0.1 * torch.randn(CHANNELS, CHANNELS)

    def inputs(which: bool) -> dict[str, torch.Tensor]:
        return {"x": torch.einsum("ck,bkt->bct", mix, torch.randn(2, CHANNELS, LENGTH)), "which": torch.tensor(which)}

    blind = regauge.optimize(graph, "quantize{scheme=w8}")
    small = regauge.optimize(graph, "quantize{scheme=w8}", data=[inputs(True) for _ in range(16)])
    held_out = {which: [inputs(which) for _ in range(8)] for which in (True, False)}

    def error(found: Graph, which: bool) -> float:
        pairs = [(graph.run(batch)[0], found.run(batch)[0]) for batch in held_out[which]]
        return float(sum((a - b).square().sum() for a, b in pairs))

    assert error(small, True) < 0.35 * error(blind, True)
    assert error(small, False) == error(blind, False)


def test_kernels_of_one_channel_are_stored_in_half_precision() -> None:
    """Rows of 5 entries and a scale take as many bytes, and of 9 half as many."""
    model = nn.Sequential(nn.Conv1d(64, 64, 5, groups=64), nn.ReLU(), nn.Conv1d(64, 64, 9, groups=64)).eval()
    graph = regauge.capture(model, (torch.randn(2, 64, 30),))
    small = regauge.optimize(graph, "quantize{scheme=w8}")
    kinds = {name.partition("_")[0]: p.dtype for name, p in small.parameters.items() if name.startswith(("0.", "2."))}
    assert kinds["0.weight"] == torch.float16 and small.parameters["0.weight_half"].shape == (64, 1, 5)
    assert small.parameters["2.weight_quantized"].dtype == torch.int8


def test_what_reads_as_it_did_keeps_a_weight_that_a_table_holds() -> None:
    """A Fourier basis, of few different numbers, on signals that are nearly slow: a fit to what it gave, from sums in
    single precision, would move each of them, which shows where a logarithm follows. Impulses tell the weight."""
    place = torch.arange(128.0)
    model = nn.Sequential(nn.Conv1d(1, 128, 128, bias=False), nn.ReLU()).eval()
    model[0].weight.data = ((place[:, None] * place % 128) / 128 * 2 * torch.pi).cos().mul(64).round().div(64)[:, None]
    torch.manual_seed(0)
    times = torch.arange(1400) / 1400
    signals = [torch.stack([(20 * (t + 1) * times + t).sin() for t in torch.rand(4)])[:, None] for _ in range(4)]
    data = [x + 1e-3 * torch.randn_like(x) for x in signals]
    graph = regauge.capture(model, (data[0],), dynamic={0: {0: "batch", 2: "time"}})
    small = regauge.optimize(graph, "quantize{scheme=w8}", data=data)
    assert small.parameters["0.weight_quantized"].dtype == torch.uint8
    impulse = nn.functional.pad(torch.ones(1, 1, 1), (127, 127))
    (a,), (b,) = (found.run((impulse,)) for found in (graph, small))
    assert float((a - b).abs().max()) < 1e-6


def test_small_weights_that_lose_most_are_kept_in_half_precision() -> None:
    """Within a fortieth of the bytes; here the first layer, whose rows have one great entry each and matter by the
    small ones, and none of the others. Without data all have 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Conv1d(16, 40, 1), nn.ReLU(), nn.Conv1d(40, 600, 3)
    ).eval()
    model[0].weight.data[:, 0, 0] = 100.0
    data = [(torch.cat([torch.zeros(1, 1, 30), torch.randn(1, 15, 30)], 1),) for _ in range(20)]
    graph = regauge.capture(model, data[0])
    blind, small = (regauge.optimize(graph, "quantize{scheme=w8}", data=given) for given in (None, data))
    assert "0.weight_half" in small.parameters and "2.weight_half" not in small.parameters
    assert not any(name.endswith("weight_half") for name in blind.parameters)
    assert figures(small).bytes < 1.025 * figures(blind).bytes
    wanted, before, after = (found.run(data[0])[0] for found in (graph, blind, small))
    assert float((wanted - after).square().sum()) < 0.02 * float((wanted - before).square().sum())


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
@pytest.mark.parametrize(
    ("beside", "reason"),
    [("(float[n, 64] x, float[64, 96] w) => (float[n, 96] y)", "callers may put another for"),
     ("(float[n, 64] x) => (float[n, 96] y, float[64, 96] w)", "its weight is a result, too")],
)  # fmt: skip
def test_weights_that_are_inputs_or_results_stay_and_the_report_says_why(beside: str, reason: str, scheme: str) -> None:
    """The file of one grew by its integers; of the other nothing was said."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> seen {beside} {{ y = MatMul (x, w) }}'
    graph = regauge.load(model_of(text, {"w": (64, 96)}))
    small = regauge.optimize(graph, f"quantize{{scheme={scheme}}}", data=[torch.randn(8, 64)])
    assert reason in str(small.report) and figures(small).bytes == figures(graph).bytes


CAPTURED = {
    "branches": """
      y = If (c) <
        then_branch = g1 () => (float[n, 64] a) { a = MatMul (x, w) },
        else_branch = g2 () => (float[n, 64] b) { b0 = MatMul (x, w)  b = Tanh (b0) }
      >""",
    "a loop": """
      y = Loop (steps, , x) < body = g1 (int64 i, bool k, float[n, 64] s) => (bool l, float[n, 64] t) {
        l = Identity (k)  m = MatMul (s, w)  t = Tanh (m) } >""",
    "a branch, and in front": """
      h = MatMul (x, w)
      y = If (c) <
        then_branch = g1 () => (float[n, 64] a) { a = MatMul (h, w) },
        else_branch = g2 () => (float[n, 64] b) { b = Tanh (h) }
      >""",
}


@pytest.mark.parametrize("body", CAPTURED)
def test_weights_that_regions_capture_are_stored_in_bytes(body: str, tmp_path: Path) -> None:
    """Weights of the whole file that are read in branches and loops alone stayed in float."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 11]>
    outer (float[n, 64] x, bool c) => (float[n, 64] y) <int64 steps = {{2}}> {{ {CAPTURED[body]} }}
    """
    model = model_of(text, {"w": (64, 64)})
    onnx.save(model, tmp_path / "float.onnx")
    small = regauge.optimize(regauge.load(model), "quantize{scheme=w8}")
    path = small.to_onnx(tmp_path / "small.onnx")
    assert path.stat().st_size < (tmp_path / "float.onnx").stat().st_size / 2.5
    before, after = Session(tmp_path / "float.onnx"), Session(path)
    torch.manual_seed(0)
    for flag in (True, False):
        batch = {"x": torch.randn(8, 64), "c": torch.tensor(flag)}
        wanted, found = before.run(batch)[0], after.run(batch)[0]
        assert (found - wanted).square().sum() < 1e-2 * wanted.square().sum()
