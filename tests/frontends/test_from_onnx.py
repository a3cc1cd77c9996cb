"""Loading ONNX: the real files, what can be wrong with one, weights, names, overridable initializers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_models import NETWORK, NETWORK_WEIGHTS, PERCEPTRON, PERCEPTRON_WEIGHTS, model_of, save
from onnx_oracle import assert_equals_runtime, free_sizes, opaque, quietly_loaded
from regauge.frontends.examine_onnx import examine_onnx
from regauge.frontends.from_onnx import load
from regauge.ir.errors import LoadError, RegaugeWarning
from regauge.ir.running.interpret import run

CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "onnx"
SPEECH = {"sequence": 576, "batch": 1, "input_0": 1, "input_1": 576, "state_1": 1}
FILES = {
    "face_version-RFB-320": {},
    "face_version-RFB-320_simplified": {},
    "magika_standard_v1": {},
    "magika_standard_v2_1": {},
    "silero_v3": {"sequence": 4000},
    "silero_v6": SPEECH,
    "silero_v6_16k_op15": SPEECH,
}


def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def corpus_file(name: str) -> Path:
    path = CORPUS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: it belongs to the shared corpus, not to the repository")
    return path


@pytest.mark.parametrize("name", FILES)
def test_real_file_computes_what_onnxruntime_computes(name: str) -> None:
    graph = assert_equals_runtime(corpus_file(name), FILES[name], high=250, given={"sr": np.array(16000)})
    assert opaque(graph) == []
    assert graph.axes.problems == []


def test_face_detector_has_the_same_groups_before_and_after_simplification() -> None:
    before, after = (quietly_loaded(corpus_file(f"face_version-RFB-320{s}")) for s in ("", "_simplified"))
    assert free_sizes(before) == free_sizes(after) != []


def test_sources(tmp_path: Path) -> None:
    proto = model_of(NETWORK, NETWORK_WEIGHTS)
    path = save(proto, tmp_path / "m.onnx")
    sources = [path, str(path), proto, onnx_ir.from_proto(proto)]
    assert len({tuple(free_sizes(load(source))) for source in sources}) == 1
    with pytest.raises(LoadError, match="cannot load a int"):
        load(3)


def test_names_and_origins_lead_back_to_the_carried_model() -> None:
    graph = load(model_of(NETWORK, NETWORK_WEIGHTS))
    assert set(graph.parameters) == set(NETWORK_WEIGHTS)
    carried = graph.metadata["onnx"]
    by_name = {node.outputs[0].name: node for node in carried.graph}
    for node in graph.nodes:
        assert node.origin is by_name[node.outputs[0].origin.name]
    assert [node.name for node in graph.nodes][-1] == "y"
    assert [str(size) for size in graph.inputs[0].shape] == ["batch", "3", "8", "8"]


# -- what can be wrong with a file -------------------------------------------------------------------------------------


def message_of(source: object) -> str:
    with pytest.raises(LoadError) as caught:
        load(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    assert "no such file" in message_of(tmp_path / "m.onnx")
    assert "is a folder" in message_of(tmp_path)
    path = save(model_of(NETWORK, NETWORK_WEIGHTS), tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-500])
    assert "truncated or not an ONNX model" in message_of(path)
    (tmp_path / "text.onnx").write_text("hello")
    assert "truncated or not an ONNX model" in message_of(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "truncated or not an ONNX model" in message_of(tmp_path / "empty.onnx")


def external(tmp_path: Path) -> Path:
    return save(
        model_of(NETWORK, NETWORK_WEIGHTS),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.bin",
        size_threshold=0,
    )


def test_missing_or_short_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "m.bin"
    data.write_bytes(data.read_bytes()[:-200])
    assert "m.bin is too short" in message_of(path)
    data.unlink()
    assert "external data file m.bin is missing" in message_of(path)


@pytest.mark.parametrize("location", ["../m.bin", "/etc/passwd"])
def test_external_data_outside_of_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = external(folder)
    (tmp_path / "m.bin").write_bytes((folder / "m.bin").read_bytes())
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    assert "outside the model's folder" in message_of(path)


def small(
    nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray] | None = None, **options: object
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    return helper.make_model(graph, **{"opset_imports": [helper.make_opsetid("", 18)], "ir_version": 9, **options})


def test_cycle_duplicate_names_and_undefined_values() -> None:
    cycle = small(
        [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Relu", ["b"], ["y"]),
        ]
    )
    assert "cycle" in message_of(cycle)
    twice = small([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])])
    assert "two values are called 'y'" in message_of(twice)
    unknown = small([helper.make_node("Add", ["x", "nowhere"], ["y"])])
    assert "reads 'nowhere', which nothing defines" in message_of(unknown)
    weights = small([helper.make_node("Add", ["x", "w"], ["y"])], {"w": np.ones(4, np.float32)})
    weights.graph.initializer.append(weights.graph.initializer[0])
    assert "two values are called 'w'" in message_of(weights)


def test_unknown_element_type() -> None:
    model = small([helper.make_node("Add", ["x", "w"], ["y"])], {"w": np.ones(4, np.float32)})
    model.graph.initializer[0].data_type = 99
    assert "initializer 'w' has the unknown element type 99" in message_of(model)


def test_nodes_out_of_order_are_sorted() -> None:
    nodes = [helper.make_node("Relu", ["h"], ["y"]), helper.make_node("Neg", ["x"], ["h"])]
    assert [node.op for node in load(small(nodes)).nodes] == ["neg", "relu"]


# -- weights -----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        pytest.skip("this system does not tell resident memory in /proc")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_external_weights_are_read_on_demand_and_not_kept(tmp_path: Path) -> None:
    size = 4096
    weights = {name: np.zeros((size, size), np.float32) for name in ("w1", "w2")}
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    model = small(nodes, weights)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = size
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.bin")
    del model, weights
    before = resident_bytes()
    graph = load(path)
    graph.groups()
    assert resident_bytes() - before < 16 << 20
    assert graph.parameters["w1"].tensor.shape == (size, size)
    assert resident_bytes() - before < 32 << 20


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "BFLOAT16", "FLOAT16"])
def test_element_types_survive(kind: str) -> None:
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [3, 4], [1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7])
    node = helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT)
    model = small(
        [node, helper.make_node("Add", ["x", "f"], ["y"])], opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    model.graph.initializer.append(tensor)
    graph = quietly_loaded(model)
    (result,) = run(graph, [torch.zeros(3, 4)])
    assert result.flatten().tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]


def test_strings_flow_through_opaque_nodes() -> None:
    node = helper.make_node("StringConcat", ["s", "s"], ["y"])
    graph = helper.make_graph(
        [node],
        "text",
        [helper.make_tensor_value_info("s", TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.warns(RegaugeWarning, match="StringConcat"):
        loaded = load(model)
    (result,) = run(loaded, [np.array(["a", "b"], dtype=object)])
    assert list(result) == ["aa", "bb"]


def test_texts_among_the_initializers(tmp_path: Path) -> None:
    """Nothing knows their bytes, and those of an empty tensor have no type: the file was not loaded."""
    for texts in ([b"a", b"c", b"c"], []):
        graph = helper.make_graph(
            [helper.make_node("Equal", ["s", "known"], ["y"])],
            "text",
            [helper.make_tensor_value_info("s", TensorProto.STRING, [len(texts)])],
            [helper.make_tensor_value_info("y", TensorProto.BOOL, [len(texts)])],
            [helper.make_tensor("known", TensorProto.STRING, [len(texts)], texts)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        loaded = quietly_loaded(model)
        assert opaque(loaded) == ["Equal"]
        if texts:
            (result,) = run(loaded, [np.array(["a", "b", "c"], dtype=object)])
            assert result.tolist() == [True, False, True]
        converted = quietly_loaded(loaded.to_onnx(tmp_path / "again.onnx", overwrite=True))
        assert opaque(converted) == ["Equal"]


def test_constants_that_became_numbers_are_no_parameters(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    half = numpy_helper.from_array(np.array(0.5, dtype=np.float32), "half")
    model = helper.make_model(
        helper.make_graph([helper.make_node("Mul", ["x", "half"], ["y"])], "g", [x], [y], [half]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    graph = load(model)
    assert not graph.parameters and graph.nodes[0].inputs[1] == 0.5
    graph.to_onnx(tmp_path / "same.onnx")  # the carried file keeps it
    assert [i.name for i in onnx.load(tmp_path / "same.onnx").graph.initializer] == ["half"]
    assert_equals_runtime(model)


def test_sparse_initializers_are_densified_with_a_note() -> None:
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])])
    values = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    indices = helper.make_tensor("w_indices", TensorProto.INT64, [3, 2], [0, 1, 2, 0, 3, 4])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 5]))
    graph = load(model)
    expected = torch.zeros(4, 5)
    expected[0, 1], expected[2, 0], expected[3, 4] = 1, 2, 3
    assert torch.equal(graph.parameters["w"].tensor, expected)
    assert "'w' is held and written densely" in graph.metadata["onnx_notes"][0]
    assert len(model.graph.sparse_initializer) == 1


# -- overridable initializers ------------------------------------------------------------------------------------------


def overridable(version: int) -> onnx.ModelProto:
    model = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)
    model.ir_version = version
    for name, shape in PERCEPTRON_WEIGHTS.items():
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


def test_overridable_initializers_are_pinned_inputs_with_defaults() -> None:
    model = overridable(8)
    graph = load(model)
    assert [value.name for value in graph.inputs] == ["x", "unused", *PERCEPTRON_WEIGHTS]
    assert "pass freeze=True" in graph.metadata["input_reasons"]["w1"]
    assert free_sizes(graph) == []
    x, unused = torch.randn(2, 6), torch.zeros(2)
    frozen = load(model, freeze=True)
    torch.testing.assert_close(run(graph, [x, unused]), run(frozen, [x, unused]))
    assert free_sizes(frozen) == [8]
    assert [f.count for f in examine_onnx(model) if f.operator == "initializer"] == [4]


@pytest.mark.parametrize("version", [3, 4])
def test_old_exporters_listed_every_weight(version: int) -> None:
    assert free_sizes(load(overridable(version))) == [8]


def test_weights_in_constant_nodes_are_parameters() -> None:
    model = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    graph = load(model)
    assert {p.name: p.kind for p in graph.parameters.values()} == dict.fromkeys(PERCEPTRON_WEIGHTS, "parameter")
    assert free_sizes(graph) == [8]


# -- what is kept as it is ---------------------------------------------------------------------------------------------


def test_unknown_operators_are_kept_pinned_and_named() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mystery", ["h"], ["m"], domain="example", name="riddle"),
        helper.make_node("MatMul", ["m", "v"], ["y"]),
    ]
    weights = {"w": np.ones((4, 8), np.float32), "v": np.ones((8, 3), np.float32)}
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example", 1)]
    model = small(nodes, weights, opset_imports=opsets)
    model.graph.value_info.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 8]))
    with pytest.warns(RegaugeWarning, match="Mystery"):
        graph = load(model)
    assert opaque(graph) == ["example::Mystery"]
    assert free_sizes(graph) == []
    (finding,) = examine_onnx(model)
    assert (finding.operator, finding.source) == ("example::Mystery", "riddle")


def test_opaque_operators_run_in_onnxruntime() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["y"], to=TensorProto.FLOAT),
    ]
    model = small(nodes)
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 2
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "count"
    assert_equals_runtime(model)


def foreign(nodes: list[onnx.NodeProto], *inputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    """A model of operators that onnxruntime has and ONNX has not."""
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "foreign", [value("x", TensorProto.FLOAT, ["n", 3]), *inputs], [output])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=9
    )


def test_an_operator_that_onnx_lacks_is_run_to_see_what_its_data_decides() -> None:
    """What the second axis is, the place of the new one says: both may be of any size."""
    node = helper.make_node("ExpandDims", ["x", "axis"], ["y"], domain="com.microsoft")
    model = foreign([node], value("axis", TensorProto.INT32, []))
    for axis in (0, 1):
        graph = assert_equals_runtime(model, given={"axis": np.array(axis, np.int32)})
    assert graph.outputs[0].signature == "f32[y_0,y_1,3]"  # type: ignore[union-attr]


def test_functions_that_an_operator_does_not_call_hide_nothing_of_it() -> None:
    """A file with local functions, as ``fuse`` writes them, knows as much of foreign operators as one without."""
    opset = helper.make_opsetid("", 18)
    twice = helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [opset])
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["h"], domain="com.microsoft", transB=1),
        helper.make_node("Twice", ["h"], ["y"], domain="own"),
    ]
    model = foreign(nodes, value("w", TensorProto.FLOAT, [5, 3]))
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("own", 1))
    graph = assert_equals_runtime(model)
    assert opaque(graph) == ["com.microsoft::FusedMatMul"]
    assert graph.nodes[0].output.signature == "f32[h_0,5]"


def test_a_rank_that_data_decides_is_unknown_to_all_that_reads_it() -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = foreign(nodes, value("s", TensorProto.INT64, ["k"]))
    graph = assert_equals_runtime(model, {"n": 4}, given={"s": np.array([2, 3, 2])})
    assert opaque(graph) == ["Reshape", "Relu"]
    assert [v.signature for node in graph.nodes for v in node.outputs] == ["f32[...]", "f32[...]"]


def test_a_reshape_whose_sizes_do_not_seem_to_fit_has_them_all_the_same() -> None:
    nodes = [
        helper.make_node("Shape", ["z"], ["m"]),
        helper.make_node("Concat", ["m", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["h"]),
        helper.make_node("Reshape", ["x", "t"], ["k"]),
        helper.make_node("Sub", ["h", "k"], ["y"]),
    ]
    model = foreign(nodes, value("z", TensorProto.FLOAT, ["m"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 3]), "rest"))
    graph = assert_equals_runtime(model, {"n": 4, "m": 2})
    assert opaque(graph) == ["Reshape", "Reshape"]
    assert graph.outputs[0].signature == "f32[m,floor(n/m),3]"  # type: ignore[union-attr]
