"""Integers of written files, in onnxruntime with its optimisations on and off, against NumPy; see the reference."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import regauge
from integer_reference import Findings, IntegerReference, exposed
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.passes.quantization.targets import TARGETS

EXECUTED = [name for name in TARGETS if name.startswith("ort")] + ["reference"]


class Network:
    """A model in ONNX that grows node by node, with weights of a seed."""

    def __init__(self, shape: list[int | str], seed: int = 0) -> None:
        self.draw = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shape = shape

    def weight(self, *shape: int, by: float = 1.0) -> str:
        name = f"w{len(self.weights)}"
        data = (by * self.draw.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)
        self.weights.append(numpy_helper.from_array(data, name))
        return name

    def __call__(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def model(self, output: str, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def quantized(model: onnx.ModelProto, options: str, folder: Path, shape: list[int]) -> onnx.ModelProto:
    """The model quantized on random data, as it is written for a target."""
    onnx.save(model, folder / "source.onnx")
    torch.manual_seed(0)
    batches = [(torch.randn(shape),) for _ in range(2)]
    small = regauge.optimize(regauge.load(folder / "source.onnx"), f"quantize{{{options}}}", data=batches)
    small.to_onnx(folder / "small.onnx")
    return onnx.load(folder / "small.onnx")


def check(model: onnx.ModelProto, x: np.ndarray, *, fused: bool) -> tuple[Findings, Findings]:
    """Integers as the graph is written, and as onnxruntime computes it, by kernels on integers if ``fused``."""
    found = []
    for optimisation in ("off", "all"):
        session = Session(exposed(model), optimisation=optimisation, threads=1)
        results = dict(zip(session.outputs, [value.numpy() for value in session.run([x])], strict=True))
        optimised = optimisation == "all"
        reference = IntegerReference(model, fused=fused and optimised, optimised=optimised)
        found.append(reference.check(results | {session.inputs[0]: x}))
    return found[0], found[1]


@st.composite
def convolutional(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[int]]:
    """Convolutions of all kinds, with clamps behind them, sums, joins and pooling between them, to logits."""
    axes = draw(st.sampled_from([2, 2, 1]))
    groups = draw(st.sampled_from([1, 1, 2]))
    width, channels = 2 * draw(st.integers(2, 5)), draw(st.integers(1, 4))
    size = draw(st.integers(7, 10))
    net = Network([draw(st.sampled_from([2, "batch"])), channels, *[size] * axes], draw(st.integers(0, 9)))

    def conv(x: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> str:
        bias = [net.weight(outputs, by=draw(st.sampled_from([0.1, 1.0])))] if draw(st.booleans()) else []
        dilation = draw(st.sampled_from([1, 2])) if kernel > 1 else 1
        pad = dilation * (kernel - 1) // 2
        weight = net.weight(outputs, inputs // groups, *[kernel] * axes)
        return net("Conv", x, weight, *bias, pads=[pad] * 2 * axes, dilations=[dilation] * axes, group=groups)

    def clamp(x: str) -> str:
        return net("Relu", x) if draw(st.booleans()) else x

    x = clamp(conv("x", channels, width, draw(st.sampled_from([1, 3, 5]))))
    y = clamp(conv(x, width, width, 3, groups))
    if draw(st.booleans()):
        y = clamp(net("Add", x, conv(y, width, width, draw(st.sampled_from([1, 3])))))
    if draw(st.booleans()):
        y, width = net("Concat", x, y, axis=1), 2 * width
    places = size**axes
    if draw(st.booleans()):
        y = net("MaxPool", y, kernel_shape=[2] * axes, strides=[2] * axes, pads=[1] * 2 * axes)
        places = (size // 2 + 1) ** axes
    y = conv(y, width, 4, 1)
    flat = net("Flatten", y)
    head = net("Gemm", flat, net.weight(3, 4 * places), net.weight(3), transB=1)
    return net.model(head), [2, channels, *[size] * axes]


@st.composite
def linear(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[int]]:
    """Layers one behind the other and beside one another, by MatMul or Gemm, of known and of dynamic sizes."""
    lead = [draw(st.sampled_from([3, "batch"])), *draw(st.sampled_from([[], [5], ["time"]]))]
    widths = draw(st.lists(st.integers(1, 70), min_size=2, max_size=4))
    net = Network([*lead, widths[0]], draw(st.integers(0, 9)))
    x = "x"
    for inputs, outputs in pairwise(widths):
        if len(lead) == 1 and draw(st.booleans()):
            x = net("Gemm", x, net.weight(outputs, inputs), net.weight(outputs), transB=1)
        else:
            x = net("MatMul", x, net.weight(inputs, outputs))
            x = net("Add", x, net.weight(outputs)) if draw(st.booleans()) else x
        x = net("Relu", x) if draw(st.booleans()) else x
    y, z = (net("MatMul", x, net.weight(widths[-1], 4)) for _ in range(2))
    return net.model(net("Add", y, z)), [3, *[5] * (len(lead) - 1), widths[0]]


FAST = settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))  # no shrinking: it is slow


def check_integers(model: onnx.ModelProto, shape: list[int], target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        small = quantized(model, f"target={target}", Path(folder), shape)
    x = 1.5 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    plain, fast = check(small, x, fused=target != "reference")
    assert plain.compared == fast.compared > 0 and plain.floats == fast.floats > 0
    assert not plain.untraced


@given(convolutional(), st.sampled_from(EXECUTED))
@FAST
def test_convolutions(case: tuple[onnx.ModelProto, list[int]], target: str) -> None:
    check_integers(*case, target)


@given(linear(), st.sampled_from(EXECUTED))
@FAST
def test_linear_layers(case: tuple[onnx.ModelProto, list[int]], target: str) -> None:
    check_integers(*case, target)


def test_a_channel_all_but_dead_keeps_its_bias(tmp_path: Path) -> None:
    """Its bias would be more steps than 32 bits hold: its weight gets coarser ones."""
    net = Network([64, 6])
    weight = net.draw.standard_normal((8, 6)).astype(np.float32)
    weight[2] *= 1e-9
    net.weights.append(numpy_helper.from_array(weight, "first"))
    hidden = net("Relu", net("Gemm", "x", "first", net.weight(8), transB=1))
    model = net.model(net("Gemm", hidden, net.weight(3, 8), net.weight(3), transB=1))
    source = onnx.load_from_string(model.SerializeToString())
    small = quantized(model, "smoothing=0", tmp_path, [64, 6])
    x = np.random.default_rng(1).standard_normal((64, 6)).astype(np.float32)
    wanted, found = (Session(m).run([x])[0] for m in (source, small))
    assert float((wanted - found).abs().max()) < 0.05 * float(wanted.abs().max())


def test_thousands_of_columns_add_up_within_32_bits(tmp_path: Path) -> None:
    columns = 40_000
    net = Network([1, columns])
    net.weights.append(numpy_helper.from_array(np.ones((2, columns), np.float32), "ones"))
    model = net.model(net("Gemm", "x", "ones", net.weight(2), transB=1))
    small = quantized(model, "smoothing=0,method=nearest", tmp_path, [1, columns])
    x = np.full((1, columns), 9.0, np.float32)  # beyond what calibration saw
    plain, fast = check(small, x, fused=True)
    assert plain.floats == fast.floats == 2


def test_pairs_of_products_fit_into_sixteen_bits_without_vnni(tmp_path: Path) -> None:
    """vpmaddubsw adds two products of an unsigned and a signed byte, and clips the sum."""
    net = Network([2, 32])
    model = net.model(net("Gemm", "x", net.weight(16, 32), net.weight(16), transB=1))
    greatest = {}
    for target in ("ort-x86", "ort-x86-avx2"):
        small = quantized(model, f"target={target}", tmp_path, [2, 32])
        codes = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}["w0_quantized"].astype(int)
        greatest[target] = 2 * 255 * np.abs(codes).max()
        assert kernels_of(tmp_path / "small.onnx")[0]["QGemm"] == 1
    assert greatest["ort-x86"] > np.iinfo(np.int16).max >= greatest["ort-x86-avx2"]
