"""Dynamic sizes in the range that a file allows: short axes and axes of size 1 run as they do in the source model."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import regauge
from onnx_models import save
from onnx_simplified import assert_equal_runs, normal, parsed, simplified

NUMBERS = {
    "m7": -7, "m3": -3, "m2": -2, "m1": -1, "zero": 0, "one": 1, "two": 2, "three": 3, "five": 5, "end": 2**63 - 1,
}  # fmt: skip


def network(inputs: str, body: str, output: str = "float[] y", **weights: np.ndarray) -> onnx.ModelProto:
    """A model whose result has no stated shape."""
    vectors = {name: np.array([number]) for name, number in NUMBERS.items()}
    text = f'<ir_version: 8, opset_import: ["" : 17]> net ({inputs}) => ({output}) {{ {body} }}'
    model = parsed(text, **vectors, **weights)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def assert_same_at(model: onnx.ModelProto, folder: Path, *shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    small = simplified(model, folder)
    assert len(small.graph.node) <= len(model.graph.node)
    assert_equal_runs(model, small, *({name: normal(*shape) for name, shape in given.items()} for given in shapes))
    return small


def loaded_shape(model: onnx.ModelProto, folder: Path) -> str:
    return str(list(regauge.load(save(model, folder / "loaded.onnx")).outputs[0].shape))  # type: ignore[union-attr]


SLICES = {
    "both ends meet": "h = Slice (x, m2, two, zero)  q = Slice (h, zero, one, zero)  y = Neg (q)",
    "from beyond the beginning": "h = Slice (x, m7, five, zero)  q = Slice (h, zero, one, zero)  y = Neg (q)",
    "inside": "h = Slice (x, three, m1, zero)  q = Slice (h, zero, one, zero)  y = Neg (q)",
    "of the end": "h = Slice (x, m3, m1, zero)  q = Relu (h)  y = Relu (q)",
    "of a slice": "h = Slice (x, one, end, zero)  y = Slice (h, one, end, zero)",
    "in steps": "h = Slice (x, zero, end, zero, two)  y = Slice (h, one, end, zero, two)",
    "up to a limit, beside a weight": "h = Slice (x, zero, three, zero)  y = Add (h, w)",
    "and the rest": """h = Slice (x, zero, two, zero)  q = Slice (x, two, end, zero)
                       y = Concat <axis = 0> (q, h)""",
    "from a place that may count from the end": """s = Shape (x)  n = Slice (s, zero, one, zero)  b = Sub (n, three)
                                                   h = Slice (x, b, end, zero)  y = Neg (h)""",
}


@pytest.mark.parametrize("body", SLICES.values(), ids=SLICES)
def test_slices_of_short_axes(body: str, tmp_path: Path) -> None:
    model = network("float[N, 2] x", body, w=normal(3, 2))
    lengths = (3, 4, 9) if "w)" in body else (1, 2, 3, 4, 5, 8)
    assert_same_at(model, tmp_path, *({"x": (length, 2)} for length in lengths))


@pytest.mark.parametrize(
    "body",
    [
        "h = Slice (x, zero, three, zero)  y = Shape (h)",
        "h = Slice (x, one, three, zero)  y = Shape (h)",
        "h = Slice (x, two, end, zero)  y = Shape (h)",
        "i = Cast <to = 7> (x)  h = Slice (i, two, m1, zero)  y = Shape (h)",
        "h = Slice (x, two, end, zero)  k = MatMul (h, w)  y = Shape (k)",
    ],
)
def test_sizes_of_slices_are_those_of_short_axes_too(body: str, tmp_path: Path) -> None:
    model = network("float[N, 2] x", body, "int64[K] y", w=normal(2, 2))
    assert_same_at(model, tmp_path, *({"x": (length, 2)} for length in (1, 2, 3, 7)))


@pytest.mark.parametrize(
    ("start", "stop", "size"),
    [
        ("zero", "end", "N"), ("one", "end", "N - 1"), ("zero", "m1", "N - 1"), ("zero", "three", "Min(3, N)"),
        ("two", "end", "Max(0, N - 2)"), ("one", "m1", "Max(0, N - 2)"), ("m3", "m1", "Min(2, N - 1)"),
    ],
)  # fmt: skip
def test_sizes_of_slices_are_as_plain_as_can_be(start: str, stop: str, size: str, tmp_path: Path) -> None:
    model = network("float[N, 2] x", f"h = Slice (x, {start}, {stop}, zero)  y = Neg (h)")
    assert loaded_shape(model, tmp_path) == f"[{size}, 2]"


@pytest.mark.parametrize("choice", ["Add (scores, mask)", "Add (mask, scores)"])
def test_a_table_that_is_cut_to_a_length_fits_that_length(choice: str, tmp_path: Path) -> None:
    body = f"""
      s = Shape (x)  t = Slice (s, two, three, zero)
      wide = Slice (table, zero, t, two)  mask = Slice (wide, zero, t, three)
      xt = Transpose <perm = [0, 1, 3, 2]> (x)  scores = MatMul (x, xt)
      masked = {choice}  p = Softmax <axis = -1> (masked)  y = MatMul (p, x)
    """
    model = network("float[B, 2, T, 4] x", body, table=normal(1, 1, 16, 16))
    assert loaded_shape(model, tmp_path) == "[B, 2, T, 4]"
    graph = regauge.load(tmp_path / "loaded.onnx")
    assert not [node for node in graph.nodes if node.op == "onnx_call"]
    assert_same_at(model, tmp_path, *({"x": (2, 2, length, 4)} for length in (1, 3, 16)))


EXPANSIONS = {
    "then cut": "h = Expand (x, tall)  y = Slice (h, zero, two, zero)",
    "alone": "y = Expand (x, cube)",
    "then mapped": "r = Relu (x)  q = Relu (r)  h = Expand (q, tall)  y = MatMul (h, w)",
    "of integers": "i = Cast <to = 7> (x)  y = Expand (i, tall)",
}


@pytest.mark.parametrize("body", EXPANSIONS.values(), ids=EXPANSIONS)
def test_a_dynamic_size_that_may_be_one_is_expanded_to_a_number(body: str, tmp_path: Path) -> None:
    output = "int64[A, B] y" if "Cast" in body else "float[] y"
    tables = {"tall": np.array([3, 1]), "cube": np.array([1, 6, 1]), "w": normal(2, 2)}
    model = network("float[N, 2] x", body, output, **tables)
    assert_same_at(model, tmp_path, *({"x": (size, 2)} for size in ((1, 6) if "cube" in body else (1, 3))))


PAIRS = [{"x": (a, 2), "z": (b, 2)} for a, b in ((1, 1), (1, 3), (3, 1), (3, 3))]


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("s = Shape (z)  h = Expand (x, s)  r = Relu (h)  y = Relu (r)", "float[] y"),
        ("h = Add (x, z)  y = Shape (h)", "int64[2] y"),
        ("h = Add (x, z)  s = Shape (h)  y = Gather (s, zero)", "int64[1] y"),
        ("h = Add (x, z)  s = Shape (h)  y = Expand (one, s)", "int64[A, B] y"),
    ],
)
def test_sizes_that_only_a_broadcast_of_dynamic_sizes_tells(body: str, output: str, tmp_path: Path) -> None:
    assert_same_at(network("float[N, 2] x, float[M, 2] z", body, output), tmp_path, *PAIRS)


def test_sizes_that_inference_makes_up_are_not_those_of_another_node(tmp_path: Path) -> None:
    body = "a = Add (x, z)  b = Add (x, u)  y = Neg (a)  v = Neg (b)"
    model = network("float[N, 2] x, float[M, 2] z, float[K, 2] u", body, "float[] y, float[] v")
    first, second = regauge.load(save(model, tmp_path / "loaded.onnx")).outputs
    assert first.shape[0] != second.shape[0]  # type: ignore[union-attr]
