"""What of a kernel only ever meets the border of zeros is cut off, in files whose images have fixed sizes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed, simplified

TEXT = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 4, SIZE] x) => (float[n, 4, a, b] y) {
  c = Conv <group = GROUPS, pads = [PADS], strides = [STRIDES], dilations = [DILATIONS]> (x, w, bias)
  y = Relu (c)
}
"""


def kernel_of(model: onnx.ModelProto) -> tuple[tuple[int, ...], list[int]]:
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == conv.input[1]]
    pads = next(list(attribute.ints) for attribute in conv.attribute if attribute.name == "pads")
    return tuple(weight.dims[2:]), pads


@pytest.mark.parametrize(
    ("size", "kernel", "pads", "strides", "dilations", "found", "left"),
    [
        ("2, 2", (5, 5), "2, 2, 2, 2", "1, 1", "1, 1", (3, 3), [1, 1, 1, 1]),
        ("1, 1", (3, 3), "1, 1, 1, 1", "1, 1", "1, 1", (1, 1), [0, 0, 0, 0]),
        ("2, 3", (7, 7), "3, 3, 3, 3", "1, 1", "1, 1", (3, 5), [1, 2, 1, 2]),
        ("2, 2", (3, 3), "2, 2, 2, 2", "1, 1", "2, 2", (1, 1), [0, 0, 0, 0]),
        ("4, 4", (5, 5), "2, 2, 2, 2", "2, 2", "1, 1", (5, 5), [2, 2, 2, 2]),
        ("2, 2", (3, 3), "1, 1, 1, 1", "2, 2", "1, 1", (3, 3), [1, 1, 1, 1]),
        ("8, 8", (5, 5), "2, 2, 2, 2", "1, 1", "1, 1", (5, 5), [2, 2, 2, 2]),
        ("h, w", (5, 5), "2, 2, 2, 2", "1, 1", "1, 1", (5, 5), [2, 2, 2, 2]),
    ],
    ids=["small", "one-pixel", "two-sizes", "dilated", "strided", "one-end-alone", "large", "sizes-open"],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_kernels_are_cropped(
    size: str, kernel: tuple[int, int], pads: str, strides: str, dilations: str, found: tuple[int, int],
    left: list[int], groups: int, tmp_path: Path,
) -> None:  # fmt: skip
    text = TEXT
    for name, value in {
        "SIZE": size,
        "GROUPS": groups,
        "PADS": pads,
        "STRIDES": strides,
        "DILATIONS": dilations,
    }.items():
        text = text.replace(name, str(value))
    model = parsed(text, w=normal(4, 4 // groups, *kernel), bias=normal(4))
    small = simplified(model, tmp_path)
    assert kernel_of(small) == (found, left)
    shape = [2, 2] if "h" in size else [int(number) for number in size.split(",")]
    assert_equal_runs(model, small, {"x": normal(2, 4, *shape)})


def test_a_kernel_that_is_read_twice_or_was_captured_from_torch_stays(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[2, 1, 1, 1] x) => (float[2, 1, 1, 1] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w)
      r = Relu (a)
      b = Conv <pads = [1, 1, 1, 1]> (r, w)
      y = Relu (b)
    }"""
    small = simplified(parsed(text, w=np.ones((1, 1, 3, 3), np.float32)), tmp_path)
    assert list(small.graph.initializer[0].dims) == [1, 1, 3, 3]
    module = torch.nn.Conv2d(2, 2, 3, padding=1).eval()
    graph = regauge.optimize(regauge.capture(module, (torch.randn(1, 2, 1, 1),)), "simplify")
    assert tuple(graph.parameters["weight"].shape) == (2, 2, 3, 3)
