"""What a node says and its reader does not ask for: it is kept as it is, where it was read as if it did not say it."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnx_node import node_model, normal
from onnx_oracle import opaque, quietly_loaded
from regauge.frontends.from_onnx import load
from regauge.ir.errors import RegaugeWarning
from regauge.ir.running.interpret import run

HEADS = [normal(1, 2, 4, 8) for _ in range(3)]
PACKED = [normal(2, 4, 6) for _ in range(3)]


def stated(op: str, *shapes: tuple[int, ...], **attributes: object) -> onnx.ModelProto:
    return node_model(op, [normal(*shape) for shape in shapes], 17, (), "", 1, **attributes)


def test_an_attribute_of_a_later_opset_is_not_passed_over() -> None:
    """Attention has had windows since opset 25: all positions were looked at."""
    model = node_model("Attention", HEADS, 25, (), "", 1, left_window_size=1)
    with pytest.warns(RegaugeWarning, match="left_window_size=1 is not supported"):
        assert opaque(load(model)) == ["Attention"]
    open_window = node_model("Attention", HEADS, 25, (), "", 1, left_window_size=-1)
    assert opaque(quietly_loaded(open_window)) == []


def test_an_input_that_no_reader_knows_is_not_passed_over() -> None:
    past = [None] * 5
    cached = node_model(
        "MultiHeadAttention", [*PACKED, *past, np.array([2], np.int32)], 17, (), "com.microsoft", 1, num_heads=2
    )
    with pytest.warns(RegaugeWarning, match=r"its input 8 \(input8\) is not supported"):
        assert opaque(load(cached)) == ["com.microsoft::MultiHeadAttention"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (stated("Conv", (1, 2, 5, 5), (3, 2, 3, 3), kernel_shape=[3, 1]), "kernel_shape"),
        (stated("GRU", (4, 2, 5), (1, 9, 5), (1, 9, 3), hidden_size=4), "hidden_size"),
    ],
)
def test_sizes_that_weights_do_not_have_are_told(model: onnx.ModelProto, says: str) -> None:
    with pytest.warns(RegaugeWarning, match=f"{says}=.* is not what its operands say"):
        load(model)


def test_channels_major_space_to_depth() -> None:
    x = normal(1, 2, 4, 4)
    node = helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=2, mode="CRD")
    ends = [helper.make_tensor_value_info("x", 1, x.shape), helper.make_tensor_value_info("y", 1, [1, 8, 2, 2])]
    model = helper.make_model(
        helper.make_graph([node], "crd", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 28)]
    )
    graph = quietly_loaded(model)
    assert opaque(graph) == []
    wanted = torch.from_numpy(ReferenceEvaluator(model).run(None, {"x": x})[0])
    torch.testing.assert_close(run(graph, [torch.from_numpy(x)])[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["com.microsoft::MatMulNBits", "SimplifiedLayerNormalization", "Gemm"])
def test_what_tools_write_without_any_effect_is_passed_over(op: str) -> None:
    """Of operators without a schema that onnx knows, attributes that have their default; hints for a runtime; and what
    has become the rule."""
    domain, _, name = op.rpartition("::")
    arrays, attributes, opset = {
        "MatMulNBits": (
            [normal(2, 32), np.zeros((4, 1, 16), np.uint8), normal(4)],
            {"K": 32, "N": 4, "bits": 4, "block_size": 32, "accuracy_level": 4, "weight_prepacked": 0},
            17,
        ),
        "SimplifiedLayerNormalization": ([normal(2, 8), normal(8)], {"axis": -1, "stash_type": 1}, 17),
        "Gemm": ([normal(2, 3), normal(3, 4), normal(4)], {"broadcast": 1}, 6),
    }[name]
    assert opaque(quietly_loaded(node_model(name, arrays, opset, (), domain, 1, **attributes))) == []
