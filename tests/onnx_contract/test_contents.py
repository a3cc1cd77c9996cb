"""Lines 7, 8, 12, 14 and 15 of the contract under ``simplify``: tensors keep their bits and their place."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import regauge
from onnx_simplified import assert_equal_runs, canonical, normal, operators, parsed, simplified
from regauge.backends.run_onnxruntime import Session

# Something to simplify, so that the file is written anew: an Identity, and two equal constants.
CHANGED = """
<ir_version: 10, opset_import: ["" : 21]>
changed (float[n, 4] x) => (float[n, 4] y) {
  i = Identity (x)
  one = Constant <value_float = 1.0> ()
  uno = Constant <value_float = 1.0> ()
  a = Add (i, one)
  y = Div (a, uno)
}
"""


def held(tensor: TensorProto) -> onnx.ModelProto:
    """A model one of whose outputs is this initializer."""
    model = parsed(CHANGED)
    model.graph.output.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.graph.initializer.append(tensor)
    return model


ODD = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
ODD.view(np.int32)[0] = 0x7FC12345  # a NaN with a payload
TENSORS = {
    "odd": numpy_helper.from_array(ODD, "t"),
    "empty": numpy_helper.from_array(np.zeros((0, 3), np.float32), "t"),
    "scalar": numpy_helper.from_array(np.array(-0.0, np.float32), "t"),
    "complex": numpy_helper.from_array(np.array([1 + 2j, complex(-0.0, np.nan)], np.complex64), "t"),
    "text": helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"\xc3\xa9"]),
    "brain": helper.make_tensor("t", TensorProto.BFLOAT16, [3], [1.0, -2.0, float("nan")]),
    "half": numpy_helper.from_array(np.array([-0.0, np.inf, 6e-8], np.float16), "t"),
    "eighth": helper.make_tensor("t", TensorProto.FLOAT8E4M3FN, [2], [1.0, -2.0]),
    "eighth with inf": helper.make_tensor("t", TensorProto.FLOAT8E5M2, [2], [1.0, -2.0]),
    "nibbles": helper.make_tensor("t", TensorProto.INT4, [3], [1, -2, 7]),
    "unsigned nibbles": helper.make_tensor("t", TensorProto.UINT4, [3], [1, 15, 7]),
    "truths": numpy_helper.from_array(np.array([True, False]), "t"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_keep_their_bits(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    small = simplified(held(tensor), tmp_path)
    assert "Identity" not in operators(small)
    (written,) = [i for i in small.graph.initializer if i.name == "t"]
    assert written.data_type == tensor.data_type and written.dims == tensor.dims
    if tensor.data_type == TensorProto.STRING:
        assert written.string_data == tensor.string_data
    else:
        assert onnx_ir.from_proto(written).tobytes() == onnx_ir.from_proto(tensor).tobytes()


def test_odd_numbers_survive_folding_bit_by_bit(tmp_path: Path) -> None:
    """Two equal constants are told apart by bits: 0.0 is not -0.0, and one NaN is not another."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    odd (float[n, 5] x) => (float[n, 5] y, float[5] p, float[5] q) {
      i = Identity (x)
      y = Add (i, zeros)
      p = Neg (zeros)
      q = Identity (odd)
    }
    """
    zeros = np.zeros(5, np.float32)
    model = parsed(text, zeros=zeros, odd=ODD, minus=-zeros)
    model.graph.node.append(helper.make_node("Add", ["minus", "odd"], ["sum"]))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, [5]))
    small = simplified(model, tmp_path)
    inputs = {"x": normal(2, 5)}
    before, after = (Session(m, optimisation="off").run(inputs) for m in (model, small))
    for a, b in zip(before, after, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_sparse_initializers_are_written_densely_and_noted(tmp_path: Path) -> None:
    model = parsed(CHANGED.replace("Div (a, uno)", "Mul (a, s)"))
    values = numpy_helper.from_array(np.array([2, 3], np.float32), "s")
    indices = numpy_helper.from_array(np.array([1, 3], np.int64), "s_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    small = simplified(model, tmp_path)
    (dense,) = [i for i in small.graph.initializer if i.name == "s"]
    np.testing.assert_array_equal(numpy_helper.to_array(dense), [0, 2, 0, 3])
    notes = {entry.key: entry.value for entry in small.metadata_props}["regauge.notes"]
    assert notes == "sparse initializer 's' is held and written densely"


QDQ = """
<ir_version: 8, opset_import: ["" : 17]>
quantized (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y) {
  xq = QuantizeLinear (x, xs, xz)
  xd = DequantizeLinear (xq, xs, xz)
  wd = DequantizeLinear <axis = 0> (w, ws, wz)
  h = Conv <pads = [1, 1, 1, 1]> (xd, wd)
  i = Identity (h)
  m = BatchNormalization (i, gain, shift, mean, var)
  yq = QuantizeLinear (m, xs, xz)
  y = DequantizeLinear (yq, xs, xz)
}
"""


def test_quantization_pairs_are_untouched(tmp_path: Path) -> None:
    """Nothing is folded into or through them: of the eight nodes only the Identity goes."""
    draw = np.random.default_rng(0)
    model = parsed(
        QDQ,
        xs=np.float32(0.05),
        xz=np.uint8(128),
        w=draw.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8),
        ws=np.abs(normal(4)) / 50,
        wz=np.zeros(4, np.int8),
        gain=normal(4),
        shift=normal(4),
        mean=normal(4),
        var=np.abs(normal(4)) + 1,
    )
    small = simplified(model, tmp_path)
    assert operators(small) == operators(model) - Counter(Identity=1)
    before = {node.output[0]: node for node in model.graph.node}
    for node in small.graph.node:
        if "Linear" in node.op_type:
            assert canonical(node) == canonical(before[node.output[0]])
    feeds = {"x": normal(2, 3, 6, 6)}
    a, b = (Session(m, optimisation="off").run(feeds)[0] for m in (model, small))
    assert (a - b).abs().max() <= 0.05 * 1.001  # a quantization step


TIED = """
<ir_version: 8, opset_import: ["" : 17]>
tied (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {
  h = Gemm <transB = 1> (x, w)
  s = Mul (h, gain)
  y = Relu (s)
  z = MatMul (x, w)
}
"""


def test_a_weight_of_several_readers_is_not_folded_into(tmp_path: Path) -> None:
    model = parsed(TIED, w=normal(4, 4), gain=normal(4))
    small = simplified(model, tmp_path)
    assert [i.name for i in small.graph.initializer] == ["w", "gain"]
    assert [numpy_helper.to_array(i).tobytes() for i in small.graph.initializer] == [
        numpy_helper.to_array(i).tobytes() for i in model.graph.initializer
    ]
    assert_equal_runs(model, small, {"x": normal(3, 4)})


def test_absent_inputs_and_outputs_stay_positional(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    absent (float[3, n, 4] x) => (float[n, 4] y, float[1, n, 5] last) {
      i = Identity (x)
      seq, last = GRU <hidden_size = 5> (i, w, r)
      none, cell = LSTM <hidden_size = 5> (i, wl, rl)
      c = Clip (i, , high)
      y = ReduceMax <axes = [0], keepdims = 0> (c)
    }
    """
    text = text.replace("seq, last", "gru_all, last").replace("none, cell", "lstm_all, cell")
    model = parsed(
        text, w=normal(1, 15, 4), r=normal(1, 15, 5), wl=normal(1, 20, 4), rl=normal(1, 20, 5), high=np.float32(0.5)
    )
    nodes = {node.op_type: node for node in model.graph.node}
    nodes["GRU"].output[0] = ""
    small = simplified(model, tmp_path)
    found = {node.op_type: node for node in small.graph.node}
    assert list(found["GRU"].output) == ["", "last"] and "LSTM" not in found
    assert list(found["Clip"].input) == ["x", "", "high"]
    assert_equal_runs(model, small, {"x": normal(3, 2, 4)})


def test_weights_beside_the_model_stay_there(tmp_path: Path) -> None:
    model = parsed(TIED.replace("MatMul (x, w)", "Relu (x)"), w=normal(4, 4), gain=normal(4))
    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    source, target = tmp_path / "in" / "m.onnx", tmp_path / "out" / "m.onnx"
    onnx.save(model, source, save_as_external_data=True, location="m.data", size_threshold=0)
    regauge.optimize(regauge.load(source), "simplify").to_onnx(target)
    assert sorted(p.name for p in target.parent.iterdir()) == ["m.data", "m.onnx"]
    small = onnx.load(target, load_external_data=False)
    assert operators(small) == {"Gemm": 1, "Relu": 2}
    (weight,) = small.graph.initializer
    assert weight.name == "w" and {e.key: e.value for e in weight.external_data}["location"] == "m.data"
    assert (target.parent / "m.data").stat().st_size == 64


@pytest.mark.nightly
def test_a_model_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    """2.2 GB of weights in a sparse file: they are copied in pieces, and never in memory all at once."""
    import resource

    rows, layers = 11_500, 17
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    large (float[1, 2800] x) => (float[1, {rows}] y0) {{ i = Identity (x)  y0 = MatMul (i, w0) }}
    """
    model = onnx.parser.parse_model(text)
    size = 2800 * rows * 4
    with open(tmp_path / "m.data", "wb") as file:
        file.truncate(size * layers)
    for layer in range(layers):
        if layer:
            model.graph.node.append(helper.make_node("MatMul", ["i", f"w{layer}"], [f"y{layer}"]))
            model.graph.output.append(helper.make_tensor_value_info(f"y{layer}", TensorProto.FLOAT, [1, rows]))
        weight = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[2800, rows])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "m.data"), ("offset", size * layer), ("length", size)):
            weight.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(weight)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "out").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = regauge.optimize(regauge.load(tmp_path / "m.onnx"), "simplify{skip=[ties]}")
    graph.to_onnx(tmp_path / "out" / "m.onnx", verify=False)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert used < 6 * size
    assert os.stat(tmp_path / "out" / "m.data").st_size >= size * layers
    small = onnx.load(tmp_path / "out" / "m.onnx", load_external_data=False)
    assert operators(small) == {"MatMul": layers}
