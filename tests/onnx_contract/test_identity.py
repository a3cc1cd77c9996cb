"""A run without passes gives back the same model: the same bytes from a file, the same model from an object."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_models import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    NETWORK,
    NETWORK_WEIGHTS,
    PERCEPTRON,
    PERCEPTRON_WEIGHTS,
    model_of,
    pruned,
    save,
)
from regauge.frontends.from_onnx import load

FUNCTIONS = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
calls (float[n, 4] x) => (float[n, 4] y) {
  h = local.twice (x)
  y = local.twice (h)
}
<domain: "local", opset_import: ["" : 17]>
twice (a) => (b) { b = Add (a, a) }
"""

CUSTOM = """
<ir_version: 8, opset_import: ["" : 17, "acme" : 3]>
custom (float[n, 4] x) => (float[n, 4] y) {
  h = acme.Mystery <knob = 3, name = "k"> (x, w)
  y = Relu (h)
}
"""

PASSING = """
<ir_version: 8, opset_import: ["" : 17]>
passing (float[n, 4] x, float[2] unused) => (float[n, 4] x, float[4] w, float[n, 4] y) { y = Add (x, w) }
"""

OLD = """
<ir_version: 3, opset_import: ["" : 9]>
old (float[n, 4] x, float[4, 4] w) => (float[n, 4] y) { y = MatMul (x, w) }
"""

MODELS = {
    "perceptron": model_of(PERCEPTRON, PERCEPTRON_WEIGHTS),
    "network": model_of(NETWORK, NETWORK_WEIGHTS),
    "attention": model_of(ATTENTION, ATTENTION_WEIGHTS),
    "functions": onnx.parser.parse_model(FUNCTIONS),
    "weights are inputs": model_of(OLD, {"w": (4, 4)}),
    "outputs are an input and a weight": model_of(PASSING, {"w": (4,)}),
}


def canonical(model: onnx.ModelProto) -> bytes:
    """Field order and fields that are spelt out with their default value are no difference."""
    return onnx_ir.to_proto(onnx_ir.from_proto(model)).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", MODELS)
def test_from_a_file_the_bytes_are_the_same(name: str, tmp_path: Path) -> None:
    source = save(MODELS[name], tmp_path / "source.onnx")
    load(source).to_onnx(tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.onnx", "source.onnx"]


@pytest.mark.parametrize("name", MODELS)
def test_from_an_object_the_model_is_the_same(name: str, tmp_path: Path) -> None:
    before = MODELS[name].SerializeToString(deterministic=True)
    path = load(MODELS[name]).to_onnx(tmp_path / "copy.onnx")
    assert canonical(onnx.load(path)) == canonical(MODELS[name])
    assert MODELS[name].SerializeToString(deterministic=True) == before


def test_a_copied_graph_is_still_the_same_model(tmp_path: Path) -> None:
    source = save(MODELS["network"], tmp_path / "source.onnx")
    path = load(source).copy().to_onnx(tmp_path / "copy.onnx")
    assert path.read_bytes() == source.read_bytes()


@pytest.mark.filterwarnings("ignore::regauge.ir.errors.RegaugeWarning")
def test_custom_operators_are_kept_verbatim(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(CUSTOM)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    path = load(model).to_onnx(tmp_path / "copy.onnx")
    assert canonical(onnx.load(path)) == canonical(model)


def odd_tensors() -> list[TensorProto]:
    floats = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    tensors = [
        numpy_helper.from_array(floats, "odd_floats"),
        numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"),
        numpy_helper.from_array(np.array(3, np.int64), "scalar"),
        numpy_helper.from_array(np.array([1 + 2j], np.complex64), "complex"),
        helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xc3\xa9"]),
        helper.make_tensor("brain", TensorProto.BFLOAT16, [3], [1.0, -2.0, 0.5]),
        helper.make_tensor("eighth", TensorProto.FLOAT8E4M3FN, [2], [1.0, -2.0]),
        helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, -2, 7]),
    ]
    return tensors


def test_every_kind_of_tensor_survives_a_cut_elsewhere(tmp_path: Path) -> None:
    model = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)
    model.ir_version = 10
    model.opset_import[0].version = 21
    odd = odd_tensors()
    model.graph.initializer.extend(odd)
    path = pruned(load(model)).to_onnx(tmp_path / "small.onnx")
    written = {i.name: i for i in onnx.load(path).graph.initializer}
    for tensor in odd:
        if tensor.data_type != TensorProto.STRING:
            assert onnx_ir.from_proto(written[tensor.name]).tobytes() == onnx_ir.from_proto(tensor).tobytes()
        assert written[tensor.name].data_type == tensor.data_type and written[tensor.name].dims == tensor.dims
    assert written["text"].string_data == odd[4].string_data


def test_what_people_wrote_into_the_model_survives_a_cut(tmp_path: Path) -> None:
    model = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)
    model.ir_version = 10
    helper.set_model_props(model, {"author": "somebody"})
    model.graph.doc_string = "the graph"
    model.graph.node[0].name, model.graph.node[0].doc_string = "first", "the first node"
    model.graph.node[0].metadata_props.add(key="origin", value="layer 1")
    model.graph.initializer[0].doc_string = "the first weight"
    written = onnx.load(pruned(load(model)).to_onnx(tmp_path / "small.onnx"))
    props = {p.key: p.value for p in written.metadata_props}
    assert props["author"] == "somebody" and all(k == "author" or k.startswith("regauge.") for k in props)
    assert (written.producer_name, written.doc_string, written.graph.doc_string) == ("somebody", "a model", "the graph")
    node = written.graph.node[0]
    assert (node.name, node.doc_string, node.metadata_props[0].value) == ("first", "the first node", "layer 1")
    assert written.graph.initializer[0].doc_string == "the first weight"


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pruned(load(MODELS["attention"])).to_onnx(tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    first = pruned(load(MODELS["attention"])).to_onnx(tmp_path / "first.onnx")
    second = load(first).to_onnx(tmp_path / "second.onnx")
    assert first.read_bytes() == second.read_bytes()
