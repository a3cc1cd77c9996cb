"""Shapes at dynamic sizes without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import onnx
import torch
from hypothesis import given, settings

from regauge.ir.graph import Value
from regauge.ir.operator import get_operator
from regauge.ir.shapes import infer_in_full, infer_shortly
from regauge.ir.sizes.expressions import evaluate, symbol

N = symbol("n")
SIZES = st.sampled_from((N, 2 * N, 2 * N + 3))


def agree(name: str, *shapes: tuple[Any, ...], **attributes: Any) -> None:
    """The shape at a dynamic size is that of tensors without data at each of several numbers."""
    operator = get_operator(name)
    _, full = operator.bind((), attributes)
    found = infer_shortly(operator, _values(shapes), full)
    assert found is not None
    for number in (9, 12, 17):
        fixed = {N: number}
        assert evaluate(found[0][0], fixed) == infer_in_full(operator, _values(evaluate(shapes, fixed)), full)[0][0]


def _values(shapes: Sequence[tuple[Any, ...]]) -> list[Value]:
    return [Value(name=f"v{place}", shape=shape, dtype=torch.float32) for place, shape in enumerate(shapes)]


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))
def test_windows(size: Any, kernel: int, step: int, pad: int, spread: int) -> None:
    options = {"stride": (step,), "padding": (pad,), "dilation": (spread,)}
    agree("conv", (1, 2, size), (4, 2, kernel), **options)
    agree("conv_transpose", (1, 2, size), (2, 4, kernel), **options)
    if 2 * pad <= kernel:
        agree("max_pool", (1, 2, size), kernel_size=(kernel,), **options)
        agree("avg_pool", (1, 2, size), kernel_size=(kernel,), stride=(step,), padding=(pad,))


def test_places_of_extremes() -> None:
    for options in ({"dim": 1}, {"dim": -1, "keepdim": True}):
        agree("argmax", (2, N, 3), **options)
        agree("argmin", (2, 4, N), **options)
    operator = get_operator("argmax")
    found = infer_shortly(operator, _values([(2, N)]), {"dim": 1, "keepdim": False})
    assert found is not None and found[0][1] == torch.int64


def test_pools_to_a_fixed_size() -> None:
    for size in (N, 2 * N + 3):
        agree("adaptive_avg_pool", (1, 2, size), output_size=(1,))
        agree("adaptive_max_pool", (1, 2, size, size), output_size=(3, 2))


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(0, 3), st.integers(0, 3), st.sampled_from(("constant", "reflect", "replicate", "circular")))
def test_pads(size: Any, before: int, after: int, mode: str) -> None:
    agree("pad", (2, 4, size), pads=((0, 0), (0, 0), (before, after)), mode=mode)


def test_a_file_of_windows_over_a_dynamic_length_is_loaded_without_the_compiler(tmp_path: Path) -> None:
    """Importing it takes several seconds."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    pads = helper.make_tensor("pads", onnx.TensorProto.INT64, [6], [0, 0, 0, 0, 0, 64])
    weight = helper.make_tensor("w", kind, [2, 1, 16], [0.0] * 32)
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"], mode="reflect"),
        helper.make_node("Conv", ["padded", "w"], ["y"], strides=[4]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"]),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, [1, 1, "n"])]
    outputs = [helper.make_tensor_value_info("y", kind, [1, 2, "m"])]
    outputs += [helper.make_tensor_value_info("pooled", kind, [1, 2, 1])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [pads, weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    path = tmp_path / "windows.onnx"
    onnx.save(model, path)
    program = (
        "import sys, regauge\n"
        f"graph = regauge.optimize(regauge.load({str(path)!r}), 'simplify')\n"
        "print(graph.outputs[0].shape, 'torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "(1, 2, floor(n/4) + 13) False"
