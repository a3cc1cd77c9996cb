"""Scale variables: who shares one, which can be moved, and that the function is the same once it was."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings

from random_networks import networks
from regauge.ir import operator as records
from regauge.ir.edit import Builder, set_weight
from regauge.ir.errors import LawError
from regauge.ir.graph import Graph, Parameter
from regauge.ir.laws.operators import check_law
from regauge.ir.operator import get_operator, operator, sample
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.ir.scales.scaling import Scaling
from regauge.ir.scales.table import scale_rows
from regauge.ir.scales.variables import Scales, ScaleVariable, cell_name, find_scales
from small_graphs import multilayer_perceptron, residual_network


def variable(scales: Scales, name: str, part: int = 0) -> ScaleVariable:
    return scales.of(scales.graph.find(name))[part]


def moved(scales: Scales, which: ScaleVariable, amount: float) -> Graph:
    """The graph with one variable moved: its weights, and those that follow, multiplied by powers of the amount."""
    result = scales.graph.copy()
    for own, power in [(which, Fraction(1)), *which.follows]:
        for cell, part_power in own.parts:
            if isinstance(cell.value, Parameter):
                parameter = result.parameters[cell.value.name]
                tensor = parameter.tensor.clone()
                view = tensor
                for axis, positions in scales.layouts[cell.value].places(cell):
                    view = view.narrow(axis, positions.start, positions.stop - positions.start)
                view *= amount ** float(power * part_power)
                set_weight(result, parameter, tensor)
    return result


def attention() -> Graph:
    """softmax((x q) (x k)') (x v) out, with four linear layers."""
    graph = Graph("attention")
    build = Builder(graph)
    x = build.input("x", (2, 5, 8), torch.float64)

    def weight(name: str) -> Parameter:
        return build.parameter(name, torch.randn(8, 8, dtype=torch.float64))

    q, k, v = (build.linear(x, weight(f"w{part}"), name=part) for part in "qkv")
    scores = build.softmax(build.matmul(q, build.permute(k, dims=(0, 2, 1)), name="scores"), dim=-1, name="shares")
    graph.outputs = [build.linear(build.matmul(scores, v, name="mixed"), weight("out"), name="y")]
    return graph


def test_hidden_values_of_a_perceptron_move_between_the_weights_around_them() -> None:
    scales = find_scales(multilayer_perceptron(4, 6, 5, 3))
    hidden = variable(scales, "relu")
    assert hidden.state == "moves" and hidden is variable(scales, "linear") is variable(scales, "layer0.weight")
    assert {(other.name, power) for other, power in hidden.follows} == {("layer1.weight", -1)}
    assert variable(scales, "x").reasons == ["it is an input of the graph"]
    assert [variable.state for variable in scales.variables].count("fixed") == 2


def test_a_residual_stream_is_one_variable() -> None:
    scales = find_scales(residual_network())
    stream = variable(scales, "add")
    assert stream is variable(scales, "add_1") is variable(scales, "relu") is variable(scales, "stem.bn.bias")
    followers = {other.name: power for other, power in stream.follows}
    assert stream.state == "moves" and followers["stem.bn.weight"] == 1 and followers["block0.first.weight"] == -1
    # what a norm reads moves with the convolution in front and the mean that is taken off, and the gain undoes it
    block = variable(scales, "conv_1")
    assert block is variable(scales, "block0.first.bn.mean") and block.state == "moves"
    assert variable(scales, "block0.first.bn.var").state == "broken"


def test_queries_and_keys_move_against_each_other() -> None:
    scales = find_scales(attention())
    q, k = scales.graph.find("q"), scales.graph.find("k")
    (shared,) = set(scales.of(q)) | set(scales.of(k))
    powers = {cell.value.name: power for cell, power in shared.parts}
    assert shared.state == "moves" and powers["q"] == -powers["k"]
    assert variable(scales, "scores").state == "broken"
    assert variable(scales, "shares").reasons == ["shares = softmax gives numbers between 0 and 1"]
    assert variable(scales, "v") is variable(scales, "mixed") and variable(scales, "v").state == "moves"


def test_segments_of_a_concatenation_have_variables_of_their_own() -> None:
    graph = Graph("dense")
    build = Builder(graph)
    x = build.input("x", (2, 4), torch.float64)
    weights = [build.parameter(f"w{n}", torch.randn(6, 4, dtype=torch.float64)) for n in range(2)]
    first, second = (build.relu(build.linear(x, weight)) for weight in weights)
    joined = build.concat(first, second, dim=1, name="joined")
    head = build.parameter("head", torch.randn(3, 12, dtype=torch.float64))
    graph.outputs = [build.linear(joined, head, name="y")]
    scales = find_scales(graph)
    left, right = scales.of(joined)
    assert left is not right and left is scales.of(first)[0] and right is scales.of(second)[0]
    assert (left.state, right.state) == ("moves", "moves")
    assert [(cell_name(cell), power) for cell, power in left.parts][-1] == ("head[0]", -1)  # the columns that read it
    inputs = sample_inputs(graph)
    torch.testing.assert_close(moved(scales, left, 4.0).run(inputs), graph.run(inputs))


def test_a_value_that_is_added_to_its_square_is_held() -> None:
    graph = Graph("square")
    build = Builder(graph)
    x = build.linear(build.input("x", (2, 4), torch.float64), build.parameter("w", torch.eye(4, dtype=torch.float64)))
    total = build.add(x, build.pow(x, 2), name="total")
    graph.outputs = [build.linear(total, build.parameter("v", torch.eye(4, dtype=torch.float64)))]
    found = variable(find_scales(graph), "total")
    assert (found.state, found.reasons) == ("held", ["total = add ties it to scales that are fixed"])


def test_a_root_follows_with_half_the_power() -> None:
    graph = Graph("root")
    build = Builder(graph)
    x = build.mul(build.input("x", (2, 4), torch.float64), build.parameter("w", torch.ones(4, dtype=torch.float64)))
    root = build.sqrt(build.abs(x), name="root")
    graph.outputs = [build.mul(root, build.parameter("v", torch.ones(4, dtype=torch.float64)))]
    found = variable(find_scales(graph), "root")
    powers = {cell.value.name: power for cell, power in found.parts}
    assert found.state == "moves" and powers["w"] == 2 * powers["root"] == -2 * powers["v"]


@given(networks())
@settings(max_examples=25, deadline=None)
def test_moving_a_variable_leaves_the_function_as_it_is(graph: Graph) -> None:
    scales = find_scales(graph)
    inputs = sample_inputs(graph)
    expected = graph.run(inputs)
    for found in scales.variables:
        assert (found.state == "moves") or not found.follows
        if found.state == "moves" and not found.of_weights and found.follows:
            torch.testing.assert_close(moved(scales, found, 2.0).run(inputs), expected, rtol=1e-9, atol=1e-9)


def test_a_long_chain_is_solved_without_deep_recursion() -> None:
    scales = find_scales(multilayer_perceptron(*[3] * 1500))
    assert sum(found.state == "moves" for found in scales.variables if not found.of_weights) == 1498


def test_the_table_tells_what_takes_a_scale_up() -> None:
    rows = scale_rows(find_scales(multilayer_perceptron(4, 6, 3)))
    assert rows[2] == ["linear", "moves", "relu, layer0.weight, layer1.weight^-1", "layer0.weight, layer1.weight^-1",
                       "layer0.weight:0 (6)"]  # fmt: skip


def test_a_wrong_scaling_breaks_the_law() -> None:
    @operator(rule="... -> ...", samples=lambda: [sample(torch.randn(3))], scaling=Scaling(powers={"x": 2}))
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x * x * x

    try:
        with pytest.raises(LawError, match=r"cube, sample 0, scales.*state its scaling"):
            check_law("cube", 0, "scales")
    finally:
        del records._BY_NAME["cube"]
    assert get_operator("relu").scaling is None  # its symmetry says it


def test_segments_that_an_operator_mixes_are_found_by_the_law() -> None:
    @operator(
        rule="a -> a",  # it should be said that indices go through one another
        samples=lambda: [sample(torch.randn(6))],
        symmetry=records.Symmetry.LINEAR,
    )
    def reverse(x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)

    try:
        with pytest.raises(LawError, match="scales of segments"):
            check_law("reverse", 0, "scales")
    finally:
        del records._BY_NAME["reverse"]
