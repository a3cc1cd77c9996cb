"""ONNX forms of layout and convolution operators: read as onnxruntime runs them, written back with the sizes of a cut.

Each case stands between a first layer that gives h, of free channels, and a last layer that reads y.
"""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from cutting import free_sizes
from onnx_models import halves, masked, model_of, pruned
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.from_onnx import load
from regauge.ir.running.interpret import run

END = 2**63 - 1

# Operator set, width of y, sizes of the free Dims, and the nodes; ``s = {1, 2}`` is a constant of integers.
VECTORS = {
    "reshape": (13, 8, [2, 4], "s = {-1, 2, 4} r = Reshape (h, s) t = {0, -1} y = Reshape (r, t)"),
    "flatten": (13, 8, [2, 2, 2], "s = {0, 2, 2, 2} r = Reshape (h, s) y = Flatten (r)"),
    "transpose": (13, 8, [8], "a = Transpose (h) y = Transpose <perm = [1, 0]> (a)"),
    "concat": (13, 16, [8], "a = Neg (h) y = Concat <axis = -1> (h, a)"),
    "split attribute": (11, 8, [3, 5], "a, b = Split <axis = 1, split = [3, 5]> (h) y = Concat <axis = 1> (b, a)"),
    "split without sizes": (11, 8, [4, 4], "a, b = Split <axis = -1> (h) y = Concat <axis = 1> (b, a)"),
    "split input": (13, 8, [3, 5], "s = {3, 5} a, b = Split <axis = 1> (h, s) y = Concat <axis = 1> (b, a)"),
    "split in three": (18, 8, [2, 3, 3], """a, b, c = Split <axis = 1, num_outputs = 3> (h)
                       y = Concat <axis = 1> (c, a, b)"""),
    "slice attributes": (9, 8, [3, 5], f"""a = Slice <starts = [3], ends = [{END}], axes = [1]> (h)
                         b = Slice <starts = [0], ends = [-5], axes = [1]> (h) y = Concat <axis = 1> (a, b)"""),
    "slice inputs": (13, 5, [3, 5], f"s = {{0, 3}} e = {{{END}, 8}} y = Slice (h, s, e)"),
    "slice every second": (13, 4, [4], f"s = {{1}} e = {{{END}}} a = {{-1}} p = {{2}} y = Slice (h, s, e, a, p)"),
    "slice backwards": (13, 8, [], f"s = {{-1}} e = {{-{END}}} a = {{1}} p = {{-1}} y = Slice (h, s, e, a, p)"),
    "squeeze attributes": (11, 8, [8], "a = Unsqueeze <axes = [0, 3]> (h) y = Squeeze <axes = [0, -1]> (a)"),
    "squeeze inputs": (13, 8, [8], "s = {-1, 1} a = Unsqueeze (h, s) y = Squeeze (a, s)"),
    "squeeze all": (13, 8, [8], "s = {1} a = Unsqueeze (h, s) y = Squeeze (a)"),
    "expand": (13, 24, [3, 8], """o = {2} a = Unsqueeze (h, o) s = {1, 1, 3} b = Expand (a, s)
               t = {0, -1} y = Reshape (b, t)"""),
    "tile": (13, 16, [2, 8], "s = {1, 2} y = Tile (h, s)"),
    "pad attribute": (10, 11, [2, 8], "y = Pad <pads = [0, 1, 0, 2]> (h)"),
    "pad input": (13, 11, [2, 8], "s = {0, 1, 0, 2} y = Pad (h, s)"),
    "pad axes": (18, 9, [2, 3, 6], "s = {3, -2} a = {-1} y = Pad (h, s, , a)"),
    "filled": (13, 12, [4, 8], """s = {2, 4} c = ConstantOfShape <value = float[1] {1.5}> (s)
               y = Concat <axis = 1> (h, c)"""),
    "range": (13, 8, [8], """z = Constant <value = float {0}> () e = Constant <value = float {8}> ()
              o = Constant <value = float {1}> () r = Range (z, e, o) y = Add (h, r)"""),
    "triangle": (14, 8, [], "y = Trilu (h)"),
    "unit matrix": (13, 8, [8], "t = Transpose (h) a = MatMul (h, t) e = EyeLike (a) y = MatMul (e, h)"),
    "einsum": (13, 8, [8], "y = Einsum <equation = \"bi, bi -> bi\"> (h, h)"),
    "gemm transposed": (13, 8, [8, 8], """t = Transpose (h)
                        y = Gemm <transA = 1, alpha = 0.5, beta = 2.0> (t, square, row)"""),
}  # fmt: skip

IMAGES = {
    "depth to space": (13, 2, [2], "y = DepthToSpace <blocksize = 2> (h)"),
    "pixel shuffle": (13, 2, [2], "y = DepthToSpace <blocksize = 2, mode = \"CRD\"> (h)"),
    "space to depth": (13, 32, [8], "y = SpaceToDepth <blocksize = 2> (h)"),
    "grouped": (13, 8, [2, 2, 4], "y = Conv <group = 4, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (h, grouped)"),
    "same upper": (13, 8, [2, 2, 4], "y = Conv <group = 4, auto_pad = \"SAME_UPPER\", strides = [2, 2]> (h, grouped)"),
    "same lower": (13, 8, [2, 2, 4], "y = Conv <group = 4, auto_pad = \"SAME_LOWER\", strides = [2, 2]> (h, grouped)"),
    "uneven pads": (13, 8, [2, 2, 4], "y = Conv <group = 4, pads = [0, 1, 2, 1]> (h, grouped)"),
    "transposed": (13, 12, [2, 3, 4], """y = ConvTranspose
                   <group = 4, strides = [2, 2], pads = [1, 0, 0, 1]> (h, turned)"""),
    "transposed to a shape": (13, 12, [2, 3, 4], """y = ConvTranspose
                              <group = 4, strides = [2, 2], output_shape = [8, 8]> (h, turned)"""),
    "transposed same": (13, 12, [2, 3, 4], """y = ConvTranspose
                        <group = 4, strides = [2, 2], auto_pad = \"SAME_UPPER\"> (h, turned)"""),
    "pad reflect": (13, 8, [8], "s = {0, 0, 1, 2, 0, 0, 0, 1} y = Pad <mode = \"reflect\"> (h, s)"),
    "pad edge": (13, 8, [8], "s = {0, 0, 1, 2, 0, 0, 0, 1} y = Pad <mode = \"edge\"> (h, s)"),
}  # fmt: skip


def model(
    opset: int, header: str, first: str, body: str, last: str, weights: dict[str, tuple[int, ...]]
) -> onnx.ModelProto:
    def constant(match: re.Match[str]) -> str:
        return f"{match[1]} = Constant <value = int64[{match[2].count(',') + 1}] {{{match[2]}}}> ()"

    nodes = re.sub(r"(\w) = \{([^}]*)\}", constant, body)
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> case {header} {{ {first} {nodes} {last} }}'
    return model_of(text, {name: shape for name, shape in weights.items() if re.search(rf"\b{name}\b", text)})


def check(built: onnx.ModelProto, shape: tuple[int, ...], free: list[int], tmp_path: Path) -> None:
    """Loaded = onnxruntime; pruned and written back = masked, both in onnxruntime."""
    graph = load(built)
    assert not graph.axes.problems and not [node for node in graph.nodes if node.op == "onnx_call"]
    assert sorted(free_sizes(graph).values()) == free
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (expected,) = Session(built, optimisation="off").run([x])
    np.testing.assert_allclose(run(graph, [x])[0], expected, rtol=1e-4, atol=1e-4)
    keep = halves(graph)
    pruned(graph, keep).to_onnx(tmp_path / "small.onnx")
    (actual,) = Session(tmp_path / "small.onnx", optimisation="off").run([x])
    (zeroed,) = Session(masked(built, graph, keep), optimisation="off").run([x])
    np.testing.assert_allclose(actual, zeroed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", VECTORS)
def test_vectors(case: str, tmp_path: Path) -> None:
    opset, width, free, body = VECTORS[case]
    weights = {"first": (8, 3), "bias": (8,), "last": (width, 5), "square": (8, 8), "row": (1, 8)}
    header, first = "(float[2, 3] x) => (float[2, 5] out)", "h = Gemm <transB = 1> (x, first, bias)"
    check(model(opset, header, first, body, "out = MatMul (y, last)", weights), (2, 3), free, tmp_path)


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str, tmp_path: Path) -> None:
    opset, width, free, body = IMAGES[case]
    weights = {"first": (8, 3, 1, 1), "bias": (8,), "last": (5, width, 1, 1)}
    weights |= {"grouped": (8, 2, 3, 3), "turned": (8, 3, 3, 3)}
    header, first = "(float[2, 3, 4, 4] x) => (float[2, 5, p, q] out)", "h = Conv (x, first, bias)"
    check(model(opset, header, first, body, "out = Conv (y, last)", weights), (2, 3, 4, 4), free, tmp_path)
