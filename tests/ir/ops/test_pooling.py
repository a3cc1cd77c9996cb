"""Pools and resampling: windows pin, a pool to size one reduces; ONNX's windows and samplings are read or refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn, randn

from cutting import cut_all, free_sizes
from onnx_models import halves, masked, pruned
from onnx_node import check_node, normal, operators
from regauge.frontends.capture import capture
from regauge.frontends.from_onnx import load
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import Symmetry
from regauge.ir.running.interpret import run


def network(*shape: int) -> tuple[Graph, Builder, Value]:
    graph = Graph()
    build = Builder(graph)
    return graph, build, build.input("x", shape, torch.float32)


# -- extents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("max_pool", {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
        ("avg_pool", {"kernel_size": (2, 2), "stride": (2, 2)}),
        ("adaptive_avg_pool", {"output_size": (3, 2)}),
        ("interpolate", {"scale": (2.0, 2.0)}),
        ("interpolate", {"size": (5, 9), "mode": "bicubic", "align_corners": False}),
    ],
)
def test_channels_pass_through_windows(op: str, options: dict[str, Any]) -> None:
    graph, build, x = network(2, 3, 8, 8)
    h = build(op, build.conv(x, build.parameter("a", randn(8, 3, 1, 1))), **options)
    graph.outputs = [build.conv(h, build.parameter("b", randn(4, 8, 1, 1)))]
    assert free_sizes(graph) == {"a:0": 8}
    cut_all(graph, [randn(2, 3, 8, 8)])


def test_a_pool_to_size_one_reduces_its_axis() -> None:
    """Tokens made by a linear layer may be dropped before a global mean, not before windows."""
    for size, free in (((1,), {"a:0": 8}), ((2,), {})):
        graph, build, x = network(2, 3, 5)
        tokens = build.linear(x, build.parameter("a", randn(8, 5)))
        graph.outputs = [build.adaptive_avg_pool(tokens, output_size=size)]
        assert free_sizes(graph) == free


def test_positions_of_largest_entries_pin() -> None:
    graph, build, x = network(2, 3, 5)
    tokens = build.linear(x, build.parameter("a", randn(8, 5)))
    values, indices = build.adaptive_max_pool(tokens, output_size=(1,), return_indices=True)
    graph.outputs = [values]
    assert free_sizes(graph) == {} and indices.dtype == torch.int64
    assert values.producer.operator.symmetry(values.producer) is Symmetry.POINTWISE


def test_sampled_positions_pin_and_channels_do_not() -> None:
    graph, build, x = network(2, 3, 6, 6)
    grid = build.input("grid", (2, 4, 4, 2), torch.float32)
    h = build.grid_sample(build.conv(x, build.parameter("a", randn(8, 3, 1, 1))), grid)
    graph.outputs = [build.conv(h, build.parameter("b", randn(4, 8, 1, 1)))]
    assert free_sizes(graph) == {"a:0": 8}
    cut_all(graph, [randn(2, 3, 6, 6), torch.rand(2, 4, 4, 2) * 2 - 1])


# -- torch -------------------------------------------------------------------------------------------------------------

TORCH = {
    "1d": lambda x: (F.max_pool1d(x[0], 2), F.avg_pool1d(x[0], 2, padding=1), F.adaptive_avg_pool1d(x[0], 3)),
    "2d": lambda x: (F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "3d": lambda x: (F.max_pool3d(x, 2), F.avg_pool3d(x[None], 2), F.adaptive_avg_pool3d(x[None], 1)),
    "divisor": lambda x: (F.avg_pool2d(x, 2, divisor_override=3), F.avg_pool3d(x, 2, divisor_override=3)),
    "indices": lambda x: (*F.max_pool2d(x, 2, return_indices=True), *F.adaptive_max_pool2d(x, 2, return_indices=True)),
    "p-norm": lambda x: (F.lp_pool2d(x, 2, 2), F.adaptive_max_pool1d(x[0], 2)),
    "by scale": lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, scale_factor=1.3, mode="bilinear")),
    "by size": lambda x: (F.interpolate(x, size=(5, 5), mode="bilinear"), F.interpolate(x, size=(4, 4), mode="area")),
    "exact": lambda x: (F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), F.interpolate(x[0], size=5)),
    "corners": lambda x: (F.interpolate(x, scale_factor=1.5, mode="bicubic", align_corners=True),),
    "antialias": lambda x: (F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),),
    "recomputed": lambda x: (F.interpolate(x, scale_factor=0.5, mode="bilinear", recompute_scale_factor=True),),
    "other ranks": lambda x: (
        F.interpolate(x[0], scale_factor=2, mode="linear"), F.interpolate(x[None], scale_factor=2, mode="trilinear")
    ),
    "grid": lambda x: (
        F.grid_sample(x, F.affine_grid(x[:, :2, 0, :3], (2, 4, 3, 3), align_corners=True), align_corners=True),
    ),
}  # fmt: skip


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", TORCH)
def test_torch_calls_are_read_by_records_and_compute_the_same(name: str) -> None:
    module, x = Called(TORCH[name]).eval(), randn(2, 4, 8, 8)
    graph = capture(module, (x,))
    assert "torch_call" not in operators(graph)
    assert graph.axes.problems == []
    for actual, wanted in zip(run(graph, [x]), module(x), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_sizes_may_be_dynamic() -> None:
    class Pyramid(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = F.max_pool2d(x, 3, 2, 1)
            return x + F.interpolate(small, size=x.shape[2:]) + F.interpolate(F.avg_pool2d(x, 1), scale_factor=1)

    graph = capture(Pyramid(), (randn(2, 4, 8, 10),), dynamic={"x": {2: "height", 3: "width"}})
    x = randn(2, 4, 9, 7)
    torch.testing.assert_close(run(graph, [x])[0], Pyramid()(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool1d((2,), stride=2, dilation=2, ceil_mode=True),
        nn.AvgPool2d((2, 3), stride=(2, 1), count_include_pad=False, padding=(1, 0)),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d((2, 1)),
        nn.Upsample(scale_factor=(2.0, 2.0), mode="bilinear", align_corners=False),
        nn.Upsample(size=(3, 5)),
    ],
    ids=str,
)
def test_the_layer_text_computes_what_the_layer_does(layer: nn.Module) -> None:
    x = randn(2, 4, 8) if isinstance(layer, nn.MaxPool1d) else randn(2, 4, 8, 8)
    node = capture(layer, (x,)).nodes[-1]
    assert node.operator.layer is not None
    text = node.operator.layer(node)
    assert text is not None and type(layer).__name__ in text
    torch.testing.assert_close(eval(text, {"nn": nn})(x), layer(x))


# -- ONNX --------------------------------------------------------------------------------------------------------------

X = normal(2, 4, 6, 7)
WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [3, 3], "strides": [3, 3], "auto_pad": "VALID"},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
]
ROUNDED_UP: list[dict[str, Any]] = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
]


@pytest.mark.parametrize("window", [*WINDOWS, *ROUNDED_UP], ids=str)
def test_onnx_pools(window: dict[str, Any]) -> None:
    for op, options in (("MaxPool", {}), ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1})):
        assert "onnx_call" not in operators(check_node(op, [X], **window, **options))
    if "ceil_mode" not in window:
        assert "lp_pool" in operators(check_node("LpPool", [X], p=3, **window))


def test_onnx_pools_of_other_ranks_and_global_ones() -> None:
    check_node("MaxPool", [normal(2, 4, 9)], kernel_shape=[3], strides=[2], dilations=[2])
    check_node("MaxPool", [normal(2, 4, 5, 5, 5)], kernel_shape=[3, 3, 3])
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        check_node(op, [X])
        check_node(op, [normal(2, 3, 5)])


@pytest.mark.filterwarnings("ignore")
def test_onnx_indices_stay_with_onnxruntime() -> None:
    assert operators(check_node("MaxPool", [X], results=2, kernel_shape=[2, 2])) == ["onnx_call"]


NOTHING = np.array([], np.float32)
TARGETS: list[tuple[Any, Any]] = [
    ([1, 1, 2, 2], None), ([1, 1, 0.5, 0.5], None), ([1, 1, 1.5, 0.7], None),
    (None, [2, 4, 12, 14]), (None, [2, 4, 5, 4]), (None, [2, 4, 1, 3]),
]  # fmt: skip
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resize_inputs(scales: Any, sizes: Any) -> list[Any]:
    given = NOTHING if scales is None else np.array(scales, np.float32)
    return [X, NOTHING, given] + ([np.array(sizes)] if sizes is not None else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scales", "sizes"), TARGETS, ids=str)
@pytest.mark.parametrize("where", COORDINATES)
def test_onnx_resize_is_right_wherever_it_is_not_refused(where: str, scales: Any, sizes: Any) -> None:
    inputs = resize_inputs(scales, sizes)
    for rounding in ROUNDINGS:
        options = {"coordinate_transformation_mode": where, "nearest_mode": rounding}
        check_node("Resize", inputs, opset=13, constants={1, 2, 3}, mode="nearest", **options)
    for mode in ("linear", "cubic"):
        options = {"coordinate_transformation_mode": where, "mode": mode}
        check_node("Resize", inputs, opset=13, constants={1, 2, 3}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"},
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "round_prefer_floor"},
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"},
    ],
    ids=str,
)
def test_what_exporters_write_for_doubling_is_an_interpolation(options: dict[str, Any]) -> None:
    inputs = resize_inputs([1, 1, 2, 2], None)
    assert operators(check_node("Resize", inputs, opset=13, constants={1, 2, 3}, **options)) == ["interpolate"]


@pytest.mark.parametrize("antialias", [{"mode": "linear"}, {"mode": "cubic", "cubic_coeff_a": -0.5}])
def test_onnx_antialiasing(antialias: dict[str, Any]) -> None:
    options = {"antialias": 1, "exclude_outside": 1, "opset": 18, "constants": {1, 2, 3}}
    graph = check_node("Resize", resize_inputs(None, [2, 4, 4, 3]), **options, **antialias)
    assert operators(graph) == ["interpolate"]


def test_onnx_resize_of_some_axes_and_in_older_opsets() -> None:
    doubled = np.array([1, 1, 2, 2], np.float32)
    check_node("Resize", [X, NOTHING, NOTHING, np.array([12, 14])], opset=18, constants={1, 2, 3}, axes=[2, 3])
    check_node("Resize", [X, doubled], opset=10, constants={1})
    check_node("Upsample", [X, doubled], opset=9, constants={1})
    check_node("Upsample", [X], opset=7, scales=[1.0, 1.0, 2.0, 2.0])


def resized_network(sizes: Sequence[int]) -> Any:
    """Conv, Resize to full sizes (the channels among them), Conv."""
    weights = {"a": normal(8, 3, 1, 1), "b": normal(4, 8, 1, 1), "sizes": np.array(sizes)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "a"], ["h"]),
            helper.make_node(
                "Resize",
                ["h", "", "", "sizes"],
                ["r"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),  # fmt: skip
            helper.make_node("Conv", ["r", "b"], ["y"]),
        ],
        "resized",
        [helper.make_tensor_value_info("x", 1, ["batch", 3, 5, 5])],
        [helper.make_tensor_value_info("y", 1, ["batch", 4, 10, 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_stored_sizes_follow_the_channels(tmp_path: Path) -> None:
    model = resized_network([2, 8, 10, 10])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    graph = load(model)
    keep = halves(graph)
    assert free_sizes(graph) == {"a:0": 8}
    pruned(graph, keep).to_onnx(tmp_path / "small.onnx")
    feed = {"x": normal(2, 3, 5, 5)}
    small = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, feed)[0]
    whole = onnxruntime.InferenceSession(masked(model, graph, keep).SerializeToString()).run(None, feed)[0]
    np.testing.assert_allclose(small, whole, rtol=1e-5, atol=1e-6)


def test_a_resize_to_sizes_that_name_the_batch_is_refused_where_the_batch_is_dynamic() -> None:
    with pytest.warns(UserWarning, match="Resize"):
        assert "onnx_call" in operators(load(resized_network([2, 8, 10, 10])))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_onnx_grid_sample(mode: str, padding: str) -> None:
    for corners in (0, 1):
        options = {"mode": mode, "padding_mode": padding, "align_corners": corners}
        check_node("GridSample", [X, normal(2, 3, 3, 2)], opset=16, **options)
    check_node("GridSample", [X, normal(2, 3, 3, 2)], opset=20, mode="linear")
    check_node("AffineGrid", [normal(2, 2, 3), np.array([2, 3, 4, 5])], opset=20, constants={1})
