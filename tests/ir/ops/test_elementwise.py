"""Pointwise operators: broadcasting leaves Dims alone, numbers stand in any slot, ONNX reads Div, Mod, Pow its way."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import randn

from cutting import cut_all, free_sizes
from onnx_node import check_node, normal, operators
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.errors import RegaugeWarning
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import Symmetry, get_operator
from regauge.ir.running.interpret import run


def network(*shape: int) -> tuple[Graph, Builder, Value]:
    graph = Graph()
    build = Builder(graph)
    return graph, build, build.input("x", shape, torch.float32)


def symmetry(value: Value) -> Symmetry:
    assert value.producer is not None
    stated = value.producer.operator.symmetry
    return stated if isinstance(stated, Symmetry) else stated(value.producer)


# -- extents -----------------------------------------------------------------------------------------------------------


def test_an_axis_of_size_one_spreads_over_a_dim_and_leaves_it_free() -> None:
    graph, build, x = network(2, 3)
    h = build.linear(x, build.parameter("a", randn(8, 3)))
    h = build.mul(h, build.parameter("gain", randn(1, 1)))
    h = build.add(h, build.parameter("shift", randn(8)))
    graph.outputs = [build.linear(h, build.parameter("b", randn(4, 8)))]
    assert free_sizes(graph) == {"a:0": 8}
    cut_all(graph, [randn(2, 3)])


def test_a_dim_that_only_one_operand_has_reaches_the_result() -> None:
    graph, build, x = network(2, 3)
    column = build.unsqueeze(build.linear(x, build.parameter("a", randn(6, 3))), dim=2)
    row = build.unsqueeze(build.linear(x, build.parameter("b", randn(4, 3))), dim=1)
    outer = build.mul(column, row)
    graph.outputs = [build.linear(build.reshape(outer, shape=(2, 24)), build.parameter("c", randn(5, 24)))]
    assert free_sizes(graph) == {"a:0": 6, "b:0": 4}
    cut_all(graph, [randn(2, 3)])


def test_both_sides_of_a_sum_are_cut_together() -> None:
    graph, build, x = network(2, 3)
    left = build.linear(x, build.parameter("a", randn(8, 3)))
    right = build.linear(x, build.parameter("b", randn(8, 3)))
    graph.outputs = [build.linear(build.add(left, right), build.parameter("c", randn(4, 8)))]
    assert free_sizes(graph) == {"a:0": 8}


# -- torch -------------------------------------------------------------------------------------------------------------

TORCH = {
    "alpha": lambda x: torch.add(x, x, alpha=2) - torch.sub(x, 1, alpha=3),
    "reversed": lambda x: (1 - x) / (2 / (x.abs() + 1)) + 2**x,
    "rounded division": lambda x: (x // 0.3, torch.div(x, 0.3, rounding_mode="trunc"), x % 0.3, torch.fmod(x, 0.3)),
    "addcmul": lambda x: (torch.addcmul(x, x, x, value=2), torch.addcdiv(x, x, x + 9), torch.lerp(x, x + 1, 0.3)),
    "bounds": lambda x: (x.clamp(0, 1), x.clamp(min=0), x.clamp(max=0.2), x.clamp(x - 1, x + 0.1), x.clamp_min(0)),
    "two extremes": lambda x: (torch.max(x, -x), torch.min(x, -x), torch.maximum(x, x + 1), torch.atan2(x, x + 1)),
    "choices": lambda x: (torch.where(x > 0, x, 0.0), torch.where(x > 0, 1.0, 0.0), x.masked_fill(x > 0, -1)),
    "bits": lambda x: ((x > 0) & (x < 1), (x > 0) | (x < 1), (x > 0) ^ (x < 1), ~(x > 0)),
    "types": lambda x: (x.double(), x.half(), x.long(), x > 0, x.to(torch.int32), x.type_as(x.double())),
    "copies": lambda x: x.clone() + x.detach() + x.contiguous(),
    "integers": lambda x: (x.long() * 2 // 3, x.long() / 2, x.long().masked_fill(x > 0, 7)),
    "activations": lambda x: (
        torch.nn.functional.rrelu(x), torch.nn.functional.relu6(x), torch.nn.functional.gelu(x, approximate="tanh"),
        torch.nn.functional.glu(x, 1), torch.nn.functional.elu_(x * 1), torch.nn.functional.logsigmoid(x),
    ),
}  # fmt: skip


class Called(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", TORCH)
def test_torch_calls_are_read_by_records_and_compute_the_same(name: str) -> None:
    module, x = Called(TORCH[name]).eval(), randn(2, 4, 5)
    graph = capture(module, (x,))
    assert "torch_call" not in operators(graph)
    expected = torch.utils._pytree.tree_leaves(module(x))
    for actual, wanted in zip(run(graph, [x]), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_max_over_an_axis_whose_positions_nobody_reads_leaves_it_free() -> None:
    class Peak(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).max(1)[0]

    graph = capture(Peak(), (randn(2, 3),))
    assert free_sizes(graph) == {"first.weight:0": 8}


# -- symmetry ----------------------------------------------------------------------------------------------------------


def test_symmetry_depends_on_the_operands() -> None:
    _, build, x = network(2, 3)
    gain = build.parameter("gain", randn(3))
    assert symmetry(build.clamp(x, 0)) is Symmetry.HOMOGENEOUS
    assert symmetry(build.clamp(x, -1, 1)) is Symmetry.POINTWISE
    assert symmetry(build.div(x, 2)) is Symmetry.PRODUCT
    assert symmetry(build.div(1, x)) is Symmetry.POINTWISE
    assert symmetry(build.div(gain, x)) is Symmetry.POINTWISE
    assert symmetry(build.where(build.gt(x, 0), x, 0.0)) is Symmetry.INDEXWISE
    assert symmetry(build.where(build.gt(x, 0), x, 1.0)) is Symmetry.POINTWISE
    assert symmetry(build.where(build.gt(x, 0), x, gain)) is Symmetry.POINTWISE
    assert symmetry(build.maximum(x, build.neg(x))) is Symmetry.HOMOGENEOUS
    assert symmetry(build.maximum(x, gain)) is Symmetry.POINTWISE
    assert symmetry(build.cast(x, dtype=torch.float16)) is Symmetry.LINEAR
    assert symmetry(build.cast(x, dtype=torch.int32)) is Symmetry.POINTWISE
    assert symmetry(build.hardtanh(x)) is Symmetry.ODD
    assert symmetry(build.hardtanh(x, min_val=0.0, max_val=6.0)) is Symmetry.POINTWISE


def test_layers_say_what_the_node_computes() -> None:
    _, build, x = network(2, 4, 3)
    cases = {
        "nn.ReLU()": build.relu(x),
        "nn.GELU(approximate='tanh')": build.gelu(x, approximate="tanh"),
        "nn.PReLU(4)": build.prelu(x, build.parameter("slope", randn(4))),
        "nn.GLU(1)": build.glu(x, dim=1),
        "nn.Dropout1d(p=0.2)": build.feature_dropout(x, p=0.2),
        "nn.ReLU6()": build.hardtanh(x, min_val=0.0, max_val=6.0),
        "nn.Hardtanh(-1.0, 1.0)": build.hardtanh(x),
    }
    for text, value in cases.items():
        layer = value.producer.operator.layer
        assert layer is not None and layer(value.producer) == text


def test_gated_units_halve_one_dim_that_stands_twice() -> None:
    graph, build, x = network(2, 3)
    h = build.glu(build.linear(x, build.parameter("a", randn(8, 3))), dim=-1)
    graph.outputs = [build.linear(h, build.parameter("b", randn(5, 4)))]
    assert free_sizes(graph) == {"a:0.0": 4}
    cut_all(graph, [randn(2, 3)])


def test_records_keep_pythons_own_names() -> None:
    assert get_operator("pow").evaluate(torch.tensor(3.0), 2) == 9
    assert get_operator("abs").evaluate(torch.tensor(-3.0)) == 3


# -- ONNX --------------------------------------------------------------------------------------------------------------

X = normal(2, 4, 6, 7)
POSITIVE = np.abs(X) + 1.1
WHOLE = np.array([-7, 7, -8])
UNARY = (
    "Neg Abs Sign Exp Erf Sin Cos Tan Atan Sinh Cosh Asinh Floor Ceil Round Sigmoid Tanh Relu IsNaN IsInf Softplus "
    "Softsign HardSwish Identity LeakyRelu Elu Selu Celu HardSigmoid ThresholdedRelu Shrink"
).split()


@pytest.mark.parametrize("op", UNARY)
def test_onnx_functions_of_one_value(op: str) -> None:
    assert "onnx_call" not in operators(check_node(op, [X]))


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Reciprocal", "Acosh"])
def test_onnx_functions_of_positive_values(op: str) -> None:
    check_node(op, [POSITIVE])


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("LeakyRelu", {"alpha": 0.2}),
        ("Selu", {"alpha": 1.0, "gamma": 2.0}),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
        ("ThresholdedRelu", {"alpha": 0.3}),
        ("Shrink", {"lambd": 0.3, "bias": 0.3}),
        ("Shrink", {"lambd": 0.3, "bias": 0.1}),
        ("IsInf", {"detect_negative": 0}),
        ("Cast", {"to": 7}),
        ("Cast", {"to": 9}),
        ("Gelu", {"opset": 20}),
        ("Gelu", {"opset": 20, "approximate": "tanh"}),
        ("Mish", {"opset": 18}),
        ("Clip", {"opset": 6, "min": -0.5, "max": 0.5}),
        ("Clip", {"opset": 6}),
        ("Dropout", {"opset": 7, "ratio": 0.3}),
        ("Dropout", {"opset": 13}),
        ("QuickGelu", {"domain": "com.microsoft"}),
    ],
)
def test_onnx_attributes(op: str, options: dict[str, Any]) -> None:
    assert "onnx_call" not in operators(check_node(op, [X], **options))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "Equal", "Less", "GreaterOrEqual"])
def test_onnx_pairs(op: str) -> None:
    check_node(op, [POSITIVE, normal(6, 1)])
    number = check_node(op, [POSITIVE, np.float32(2)], constants={1})
    assert number.nodes[0].inputs[1] == 2.0
    check_node(op, [np.float32(2), POSITIVE], constants={0})
    check_node(op, [np.array([[1, 2, 3]]), np.array([[3], [1]])])


def test_onnx_division_of_integers_cuts_towards_zero() -> None:
    check_node("Div", [WHOLE, np.int64(2)], constants={1})
    check_node("Div", [np.int64(-7), np.array([2, 3, -4])], constants={0})


def test_onnx_mod_has_two_signs() -> None:
    check_node("Mod", [WHOLE, np.array([3, 3, 3])])
    check_node("Mod", [X, POSITIVE], fmod=1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_to_negative_powers_are_left_to_the_runtime(dtype: type) -> None:
    with pytest.warns(RegaugeWarning, match="negative powers"):
        graph = check_node("Pow", [np.array([0, 1, 2], dtype=dtype), np.array([-2, -1, 3], dtype=dtype)], constants=[1])
    assert operators(graph) == ["onnx_call"]
    graph = check_node("Pow", [np.array([0, 1, 2], dtype=dtype), np.array([2, 1, 3], dtype=dtype)], constants=[1])
    assert operators(graph) == ["pow"]


def test_onnx_power_keeps_the_type_of_its_base() -> None:
    graph = check_node("Pow", [np.array([2, 3]), np.array([2.0, 0.5], dtype=np.float32)])
    assert graph.outputs[0].dtype == torch.int64  # type: ignore[union-attr]


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_onnx_operators_of_any_number_of_operands(op: str) -> None:
    check_node(op, [X, normal(7), normal(6, 1)])


@pytest.mark.parametrize("bounds", [(-0.5, 0.5), (None, 0.5), (0.0, None)])
@pytest.mark.parametrize("constant", [True, False])
def test_onnx_clip_takes_bounds_as_inputs(bounds: tuple[float | None, ...], constant: bool) -> None:
    inputs = [X, *(None if bound is None else np.float32(bound) for bound in bounds)]
    check_node("Clip", inputs, constants={1, 2} if constant else ())


@pytest.mark.parametrize("shape", [(4, 1, 1), (1,), (2, 4, 6, 7), (1, 4, 1, 1), (7,), (4, 6, 7)])
def test_onnx_slopes_are_broadcast(shape: tuple[int, ...]) -> None:
    ops = operators(check_node("PRelu", [X, normal(*shape)], constants={1}))
    assert ("prelu" in ops) == (shape in [(4, 1, 1), (1,), (1, 4, 1, 1)])


def test_onnx_choice_and_logic() -> None:
    check_node("Where", [X > 0, X, np.float32(0)], constants={2})
    for op in ("And", "Or", "Xor"):
        check_node(op, [X > 0, normal(7) > 0])
        for inputs in ([np.True_, X > 0], [X > 0, np.False_]):  # which torch's functions do not take as numbers
            constant = {i for i, array in enumerate(inputs) if np.ndim(array) == 0}
            assert operators(check_node(op, inputs, constants=constant)) == [f"logical_{op.lower()}"]
    check_node("Not", [X > 0])
    check_node("CastLike", [X, np.array([1])])
    check_node("BitShift", [np.array([1, 8], np.uint8), np.array([1, 2], np.uint8)], direction="LEFT")
    check_node("BiasGelu", [X, normal(7)], domain="com.microsoft")
    check_node("FastGelu", [X, normal(7)], domain="com.microsoft")
