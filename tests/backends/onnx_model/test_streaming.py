"""Large initializers pass through memory once: what is written and read is what protobuf writes and reads."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from regauge.backends.onnx_model.streaming import hollow_initializers, write_proto
from regauge.backends.onnx_model.write import ChangedTensor
from regauge.frontends.from_onnx import load
from regauge.frontends.onnx_model import reading as onnx_reading
from regauge.frontends.onnx_model.reading import read_proto, read_skeleton
from regauge.ir.errors import LoadError
from regauge.ir.storage.weights import KeptWeight


def large_model() -> onnx.ModelProto:
    """Initializers that are streamed between others that are not: small ones, numbers in fields of their own, bits."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    listed = helper.make_tensor("listed", TensorProto.FLOAT, (64, 64), generator.standard_normal(4096).tolist())
    half = helper.make_tensor("half", TensorProto.BFLOAT16, (64, 64), b"\x80\x3f" * 4096, raw=True)
    noted = numpy_helper.from_array(b, "noted")
    noted.doc_string = "a tensor with a description"
    weights = [numpy_helper.from_array(a, "a"), numpy_helper.from_array(np.float32([2]), "two"), listed, half, noted]
    weights += [numpy_helper.from_array(b, "b")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 64)) for name in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Mul", ["m", "two"], ["s"]),
        helper.make_node("MatMul", ["s", "listed"], ["l"]),
        helper.make_node("MatMul", ["l", "noted"], ["k"]),
        helper.make_node("MatMul", ["k", "b"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "large", [x], [y], weights, doc_string="of the graph")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="author", value="somebody")
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "large.onnx"
    onnx.save(large_model(), path)
    return path


def test_a_streamed_file_is_the_one_that_protobuf_writes(file: Path) -> None:
    expected = onnx.load(file)
    model = onnx_ir.load(file)
    for name in ("a", "b"):
        content = torch.from_numpy(np.array(model.graph.initializers[name].const_value.numpy()))
        tensor = onnx_ir.tensor_adapters.TorchTensor(content, name=name)
        model.graph.initializers[name].const_value = (
            tensor if name == "a" else ChangedTensor(lambda t=tensor: t, dtype=tensor.dtype, shape=tensor.shape)
        )
    with hollow_initializers(model) as tensors:
        proto = onnx_ir.to_proto(model)
    assert [proto.graph.initializer[place].name for place in tensors] == ["a", "b"]
    assert model.graph.initializers["a"].const_value is tensors[0]
    write_proto(proto, tensors, file.with_name("streamed.onnx"))
    written = onnx.load(file.with_name("streamed.onnx"))
    assert list(written.graph.initializer) == list(expected.graph.initializer)
    assert file.with_name("streamed.onnx").read_bytes() == written.SerializeToString()


def test_a_tensor_that_is_not_as_large_as_it_says_is_told(file: Path) -> None:
    model = onnx_ir.load(file)
    short = onnx_ir.tensor_adapters.TorchTensor(torch.zeros(3))
    model.graph.initializers["a"].const_value = ChangedTensor(
        lambda: short, dtype=onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape((64, 64))
    )
    with hollow_initializers(model) as tensors:
        proto = onnx_ir.to_proto(model)
    with pytest.raises(ValueError, match="a has 12 bytes, its shape and type say 16384"):
        write_proto(proto, tensors, file.with_name("short.onnx"))


def test_only_plain_large_initializers_are_read_apart(file: Path) -> None:
    whole = onnx.load(file)
    proto, arrays = read_proto(file)
    assert [proto.graph.initializer[place].name for place in arrays] == ["a", "b"]
    for place, array in arrays.items():
        assert not proto.graph.initializer[place].HasField("raw_data")
        proto.graph.initializer[place].raw_data = array.tobytes()
    assert proto == whole
    graph = load(file)
    for tensor in whole.graph.initializer:
        if tensor.name in graph.parameters and tensor.data_type == TensorProto.FLOAT:
            np.testing.assert_array_equal(graph.parameters[tensor.name].tensor.numpy(), numpy_helper.to_array(tensor))
    assert graph.to_onnx(file.with_name("copy.onnx")).read_bytes() == file.read_bytes()


def test_a_skeleton_lacks_only_what_is_read_apart(file: Path) -> None:
    proto, arrays = read_proto(file)
    assert arrays and read_skeleton(file) == proto


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_told_by_onnx(file: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(LoadError, match="truncated or not an ONNX model"):
        load(file)


def test_a_graph_in_two_parts_is_parsed_as_a_whole(file: Path) -> None:
    """Protobuf lets two values of one field be merged: nobody writes that, and it is right all the same."""
    model = large_model()
    first, second = onnx.ModelProto(), onnx.ModelProto()
    first.graph.initializer.extend(model.graph.initializer)
    second.CopyFrom(model)
    del second.graph.initializer[:]
    file.write_bytes(first.SerializeToString() + second.SerializeToString())
    proto, arrays = read_proto(file)
    assert not arrays and proto == model
    assert load(file).parameters["b"].shape == (64, 64)


def test_what_is_folded_of_weights_in_memory_is_computed_once(tmp_path: Path) -> None:
    import regauge

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 32, 8, 8)) for name in "xy")
    weights = [numpy_helper.from_array(np.full((32, 32, 3, 3), 0.01, np.float32), "w")]
    weights += [
        numpy_helper.from_array(np.full(32, 1.5, np.float32), name) for name in ("gain", "shift", "mean", "var")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "gain", "shift", "mean", "var"], ["y"]),
    ]
    path = tmp_path / "conv.onnx"
    graph = helper.make_graph(nodes, "conv", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    (weight,) = [p.weight for p in regauge.optimize(load(path), "simplify").parameters.values() if p.rank == 4]
    assert isinstance(weight, KeptWeight) and weight.load() is weight.load() and weight.compute is None


def test_files_of_other_forms_are_left_to_onnx(tmp_path: Path) -> None:
    path = tmp_path / "large.textproto"
    onnx.save(large_model(), path, format="textproto")
    proto, arrays = read_proto(path)
    assert not arrays and proto == large_model()


def test_small_tensors_are_parsed_with_all_else() -> None:
    assert onnx_reading.LEAST_BYTES == 4096
