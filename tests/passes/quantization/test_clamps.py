"""Clamps behind products of integers: onnxruntime takes them for ranges, and the products for floats if none is."""

from pathlib import Path

import pytest
import torch

import regauge
from onnx_models import model_of
from regauge.backends.onnx_model.audit import INTEGER_KERNELS, kernels_of

BODIES = {
    "a float behind it": "c = MatMul (x, w)  d = CLAMP (c)  e = Sin (d)  y = MatMul (e, v)",
    "read twice": "c = MatMul (x, w)  d = CLAMP (c)  e = Sin (d)  f = MatMul (d, v)  y = Add (e, f)",
    "a bias in front": "c = Gemm (x, w, b)  d = CLAMP (c)  e = Sin (d)  y = MatMul (e, v)",
    "the last": "a = MatMul (x, w)  b0 = Sin (a)  c = MatMul (b0, v)  y = CLAMP (c)",
    "a bias that is computed": "a = Gemm <beta = 2.0> (x, w, b)  c = CLAMP (a)  y = MatMul (c, v)",
}


@pytest.mark.parametrize("step", ["quantize", "quantize{activations=dynamic}"])
@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
@pytest.mark.parametrize("body", BODIES)
def test_products_in_front_of_clamps_stay_integers(body: str, clamp: str, step: str, tmp_path: Path) -> None:
    """Files with these were refused by the audit: a weight was made floats at every run."""
    nodes = BODIES[body].replace("CLAMP", clamp)
    if clamp == "Clip":
        nodes = nodes.replace("Clip (c)", "Clip (c, low, high)").replace("Clip (a)", "Clip (a, low, high)")
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    clamped (float[n, 64] x) => (float[n, 64] y) <float low = {{0}}, float high = {{2}}> {{ {nodes} }}
    """
    model = model_of(text, {"w": (64, 64), "v": (64, 64), "b": (64,)})
    torch.manual_seed(0)
    small = regauge.optimize(regauge.load(model), step, data=[torch.randn(64, 64)])
    kernels, stray = kernels_of(small.to_onnx(tmp_path / "clamped.onnx"))
    assert not stray and sum(kernels[name] for name in INTEGER_KERNELS) == 2
