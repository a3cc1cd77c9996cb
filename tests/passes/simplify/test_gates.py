"""Gates of image channels are spread before they are multiplied where a runtime keeps images in blocks, else left."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import regauge
from onnx_simplified import normal, parsed, simplified

GATED = """<ir_version: 8, opset_import: ["" : OPSET]> net (float[SHAPE] x) => (float[n, 16, 4, 5] y) {
  c = Conv <group = GROUPS> (x, k)
  r = Relu (c)
  p = GlobalAveragePool (r)
  d = Conv (p, down)
  s = GATE (d)
  m = Mul (FACTORS)
  y = LAST
}
"""


HARD = "HardSigmoid <alpha = 0.16666667>"


def model(
    shape: str = "2, 4, 4, 5",
    gate: str = "Sigmoid",
    factors: str = "r, s",
    last: str = "Conv (m, up)",
    opset: int = 17,
    channels: int = 16,
    groups: int = 1,
) -> onnx.ModelProto:
    text = GATED
    for name, value in {
        "OPSET": opset,
        "SHAPE": shape,
        "GATE": gate,
        "FACTORS": factors,
        "LAST": last,
        "GROUPS": groups,
    }.items():
        text = text.replace(name, str(value))
    weights = {"k": normal(channels, 4 // groups, 1, 1), "down": normal(channels, channels, 1, 1)}
    return parsed(text, **weights, **({"up": normal(16, channels, 1, 1)} if "up" in last else {}))


def count(found: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in found.graph.node)


@pytest.mark.parametrize(
    ("options", "spread"),
    [
        ({}, 1),
        ({"factors": "s, r"}, 1),
        ({"gate": HARD}, 1),
        ({"opset": 11}, 1),
        ({"opset": 10}, 0),
        ({"shape": "2, 4, h, w"}, 0),
        ({"shape": "n, 4, 4, 5"}, 0),
        ({"groups": 2}, 0),
        ({"last": "Neg (m)"}, 0),
        ({"gate": "Neg"}, 0),
        ({"channels": 8}, 0),
    ],
    ids=[
        "plain",
        "turned",
        "hard",
        "opset-11",
        "opset-10",
        "sizes-open",
        "batch-open",
        "narrow-groups",
        "no-convolution",
        "no-gate",
        "few-channels",
    ],
)
def test_a_gate_is_spread_where_images_stay_in_blocks(options: dict, spread: int, tmp_path: Path) -> None:
    before = model(**options)
    small = simplified(before, tmp_path)
    assert count(small, "Resize") == spread
    assert len(small.graph.node) == len(before.graph.node) + spread
    feed = {"x": normal(2, 4, 4, 5)}
    runs = [onnxruntime.InferenceSession(m.SerializeToString()).run(None, feed)[0] for m in (before, small)]
    np.testing.assert_array_equal(*runs)
    assert count(simplified(small, tmp_path), "Resize") == spread


def test_onnxruntime_multiplies_a_spread_gate_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    small = simplified(model(), tmp_path / "small")
    found = {}
    for name, one in (("before", model()), ("after", small)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[name] = count(onnx.load(tmp_path / f"{name}.onnx"), "ReorderOutput")
    if found["before"] == 0:
        pytest.skip("this onnxruntime has no blocks of channels on this machine")
    assert found["after"] < found["before"]


def test_a_gate_that_was_captured_from_torch_stays() -> None:
    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.down, self.last = (torch.nn.Conv2d(16, 16, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            image = self.first(x).relu()
            return self.last(image * self.down(image.mean((2, 3), keepdim=True)).sigmoid())

    graph = regauge.capture(Gate().eval(), (torch.randn(2, 16, 8, 8),))
    assert "interpolate" not in [node.op for node in regauge.optimize(graph, "simplify").nodes]
