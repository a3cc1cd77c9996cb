"""Scales and shifts carried back into the maps that made what they scale, and where they stay."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, rand, randn

import regauge
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.running.interpret import run
from regauge.passes.simplify.simplify import Simplify
from simplified import simplified
from simplifying import BATCH, made, ops, same_function


def carried(graph: Graph) -> Graph:
    """After the step alone, which a second run leaves as it is."""
    step = [Simplify(only=("carrying",))]
    after = regauge.optimize(graph, step)
    same_function(graph, after)
    assert str(regauge.optimize(after, step)) == str(after)
    return after


def conv(build: Builder, x: Value, name: str, count: int, bias: bool = True) -> Value:
    weight = build.parameter(f"{name}.weight", randn(count, x.shape[1], 1, 1).double())
    vector = build.parameter(f"{name}.bias", randn(count).double()) if bias else None
    return build.conv(x, weight, vector, padding=(0, 0))  # type: ignore[no-any-return]


def boxes(build: Builder, x: Value, y: Value, bias: bool = True) -> Value:
    """The boxes of two feature maps with two and three anchors of four numbers each: 1 x 22 x 4 for 1 x 3 x 2 x 2."""
    levels = []
    for name, feature, anchors in (("a", x, 2), ("b", y, 3)):
        places = int(feature.shape[2] * feature.shape[3])
        turned = build.permute(conv(build, feature, name, 4 * anchors, bias), dims=(0, 2, 3, 1))
        levels.append(build.reshape(turned, shape=(feature.shape[0], places * anchors, 4)))
    return build.concat(*levels, dim=1)  # type: ignore[no-any-return]


def table(kind: str = "constant") -> Callable[[Builder], Any]:
    """One pair of numbers per anchor: two of the first map at eight places, three of the second at two places."""
    pairs = torch.cat([(rand(n, 2) + 0.5).repeat(places, 1) for n, places in ((2, 8), (3, 2))]).double()
    return lambda build: build.parameter("sizes", pairs[None], kind, persistent=kind != "constant")


FEATURES = {"x": (1, 3, 4, 2), "y": (1, 3, 2, 1)}


def decoded(build: Builder, x: Value, y: Value, factor: Any) -> Any:
    centre, size = build.split(boxes(build, x, y), sizes=(2, 2), dim=2)
    centre = build.add(build.mul(build.mul(centre, 0.1), factor), build.constant(randn(1, 22, 2).double()))
    size = build.div(build.mul(build.exp(build.mul(size, 0.2)), factor), 2.0)
    return build.concat(build.sub(centre, size), build.add(centre, size), dim=2)


def test_what_decodes_boxes_goes_into_the_maps_that_give_them() -> None:
    """Numbers, and a table that holds the same pair at all places of an anchor."""
    graph = made(lambda b, x, y: decoded(b, x, y, table()(b)), **FEATURES)
    after = carried(graph)
    assert ops(after)[-6:] == ["split", "add", "exp", "sub", "add", "concat"]
    assert len(ops(graph)) - len(ops(after)) == 5 and "sizes" not in after.parameters
    assert {name: p.shape for name, p in after.parameters.items() if name != "constant"} == {
        "a.weight": (8, 3, 1, 1), "a.bias": (8,), "b.weight": (12, 3, 1, 1), "b.bias": (12,)
    }  # fmt: skip


def test_a_table_whose_values_may_change_by_training_stays() -> None:
    after = carried(made(lambda b, x, y: decoded(b, x, y, table("parameter")(b)), **FEATURES))
    assert ops(after).count("mul") == 2 and "sizes" in after.parameters  # the numbers alone are carried back


def test_values_that_differ_from_place_to_place_stay() -> None:
    def scaled(build: Builder, x: Value, y: Value) -> Any:
        return build.mul(boxes(build, x, y), build.constant(rand(1, 22, 4).double() + 0.5))

    assert "mul" in ops(carried(made(scaled, **FEATURES)))


@pytest.mark.parametrize("sort", ["split", "slice", "select"])
def test_the_queries_of_a_fused_projection(sort: str) -> None:
    """A scale of a third of the channels, of any batch, through a reshape into heads."""

    def attention(build: Builder, x: Value) -> Any:
        weight, bias = (build.parameter(n, randn(s).double()) for n, s in (("w", (24, 8)), ("b", (24,))))
        fused = build.linear(x, weight, bias)
        if sort == "split":
            q, k, v = build.split(fused, sizes=(8, 8, 8), dim=-1)
        elif sort == "slice":
            q, k, v = (build.slice(fused, dim=2, start=at, end=at + 8) for at in (0, 8, 16))
        else:
            turned = build.permute(build.reshape(fused, shape=(BATCH, 5, 3, 2, 4)), dims=(2, 0, 3, 1, 4))
            q, k, v = (build.select(turned, dim=0, index=i) for i in (0, 1, -1))
        return build.add(build.mul(build.div(q, 2.0), k), v)

    graph = made(attention, x=(BATCH, 5, 8))
    after = carried(graph)
    assert len(ops(after)) == len(ops(graph)) - 1 and "div" not in ops(after)


def test_through_a_biased_matmul_and_relu() -> None:
    def scaled(build: Builder, x: Value) -> Any:
        product = build.matmul(x, build.parameter("w", randn(4, 6).double()))
        value = build.relu(build.add(product, build.parameter("b", randn(6).double())))
        return build.mul(build.reshape(value, shape=(BATCH, 2, 3)), build.constant(rand(2, 1).double() + 0.5))

    after = carried(made(scaled, x=(BATCH, 4)))
    assert ops(after) == ["matmul", "add", "relu", "reshape"] and set(after.parameters) == {"w", "b"}


def _relu(build: Builder, x: Value, factor: Any) -> Any:
    value = build.relu(build.linear(x, build.parameter("w", randn(6, 4).double())))
    return build.mul(build.reshape(value, shape=(BATCH, 2, 3)), factor(build))


@pytest.mark.parametrize(
    "factor",
    [
        lambda build: -2.0,
        lambda build: build.constant(torch.tensor([1.0, -1.0, 1.0]).double()),
        lambda build: build.parameter("f", rand(3).double() + 0.5),
    ],
)
def test_no_relu_is_passed_by_what_is_or_may_become_negative(factor: Any) -> None:
    assert ops(carried(made(lambda b, x: _relu(b, x, factor), x=(BATCH, 4))))[-1] == "mul"


def _heads(build: Builder, x: Value) -> Value:
    weight, bias = (build.parameter(n, randn(s).double()) for n, s in (("w", (6, 4)), ("b", (6,))))
    return build.reshape(build.linear(x, weight, bias), shape=(BATCH, 2, 3))  # type: ignore[no-any-return]


def _kept() -> Iterator[Any]:
    def readers(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        return [build.mul(y, 2.0), build.tanh(y)]

    def output(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        return [build.mul(y, 2.0), y]

    def overlap(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        low, high = build.slice(y, dim=2, start=0, end=2), build.slice(y, dim=2, start=1, end=3)
        return build.mul(build.mul(low, 2.0), high)

    def whole(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        return build.add(build.mul(build.select(y, dim=1, index=0), 2.0), build.sum(y, dims=(1,), keepdim=False))

    def shared(build: Builder, x: Value) -> Any:
        weight = build.parameter("w", randn(6, 4).double())
        parts = [build.reshape(build.linear(v, weight), shape=(BATCH, 2, 3)) for v in (x, build.tanh(x))]
        return build.mul(build.concat(*parts, dim=1), 2.0)

    def twice(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        return build.mul(build.concat(y, y, dim=1), 2.0)

    def given(build: Builder, x: Value) -> Any:
        return build.mul(build.concat(_heads(build, x), build.reshape(x, shape=(BATCH, 2, 2)), dim=2), 2.0)

    def product(build: Builder, x: Value) -> Any:
        y = build.matmul(x, build.parameter("w", randn(4, 6).double()))
        return build.add(build.reshape(build.unsqueeze(y, dim=2), shape=(BATCH, 2, 3)), 2.0)

    def widened(build: Builder, x: Value) -> Any:
        return build.mul(build.unsqueeze(_heads(build, x), dim=0), build.constant(rand(3, 1, 1, 1).double()))

    def late(build: Builder, x: Value) -> Any:
        return build.mul(build.tanh(_heads(build, x)), 2.0)

    yield from (readers, output, overlap, whole, shared, twice, given, product, widened, late)


@pytest.mark.parametrize("function", list(_kept()), ids=lambda function: function.__name__)
def test_what_something_else_reads_or_made_is_not_scaled(function: Any) -> None:
    graph = made(function, x=(BATCH, 4))
    assert ops(carried(graph)) == ops(graph)


def test_a_part_that_no_factor_reaches_may_be_anything() -> None:
    def scaled(build: Builder, x: Value) -> Any:
        y = build.concat(_heads(build, x), build.reshape(x, shape=(BATCH, 2, 2)), dim=2)
        return build.mul(y, build.constant(torch.tensor([2.0, 3.0, 4.0, 1.0, 1.0]).double()))

    assert "mul" not in ops(carried(made(scaled, x=(BATCH, 4))))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "neg"])
@pytest.mark.parametrize("flipped", [False, True])
def test_every_scale_and_shift(op: str, flipped: bool) -> None:
    def stepped(build: Builder, x: Value) -> Any:
        y = _heads(build, x)
        other = build.constant(rand(3).double() + 0.5)
        return build.neg(y) if op == "neg" else build(op, *((other, y) if flipped else (y, other)))

    after = ops(carried(made(stepped, x=(BATCH, 4))))
    assert after == (["linear", "reshape", "div"] if op == "div" and flipped else ["linear", "reshape"])


# -- exponentials ------------------------------------------------------------------------------------------------------


def exponential(factor: Any, op: str = "mul", flipped: bool = False, keep: bool = False) -> Graph:
    def stepped(build: Builder, x: Value) -> Any:
        y = build.exp(_heads(build, x))
        other = factor(build) if callable(factor) else factor
        result = build(op, *((other, y) if flipped else (y, other)))
        return [result, y] if keep else result

    return made(stepped, x=(BATCH, 4))


@pytest.mark.parametrize("op", ["mul", "div"])
def test_a_positive_factor_behind_an_exponential_is_a_shift_before_it(op: str) -> None:
    for factor in (0.05, 40, lambda b: b.constant(rand(2, 1).double() + 0.1)):
        assert ops(carried(exponential(factor, op))) == ["linear", "reshape", "exp"]


@pytest.mark.parametrize(
    "factor",
    [0.0, -1.0, math.inf, math.nan, math.exp(-9), math.exp(9), lambda b: b.parameter("f", rand(3).double() + 0.5)],
)
def test_no_logarithm_of_what_is_not_positive_or_far_from_one(factor: Any) -> None:
    assert ops(carried(exponential(factor)))[-1] == "mul"


def test_an_exponential_that_is_read_or_divided_by_stays() -> None:
    assert ops(carried(exponential(2.0, keep=True)))[-1] == "mul"
    assert ops(carried(exponential(2.0, "div", flipped=True)))[-1] == "div"
    assert ops(carried(exponential(2.0, "add")))[-1] == "add"


def test_half_precision_keeps_its_factor() -> None:
    def stepped(build: Builder, x: Value) -> Any:
        y = build.linear(x, build.parameter("w", randn(6, 4).to(torch.bfloat16)))
        return build.mul(build.exp(build.reshape(y, shape=(BATCH, 2, 3))), 0.5)

    graph = made(stepped, torch.bfloat16, x=(BATCH, 4))
    assert ops(regauge.optimize(graph, [Simplify(only=("carrying",))]))[-1] == "mul"


@pytest.mark.parametrize(("large", "left"), [(2.0**53, 2), (3.0, 1)])
def test_shifts_that_round_to_whole_numbers_stay(large: float, left: int) -> None:
    def rounded(build: Builder, x: Value) -> Any:
        y = build.add(build.tanh(x), build.parameter("a", torch.full((4,), large).double()))
        return build.add(y, build.parameter("b", torch.full((4,), -large).double()))

    assert ops(carried(made(rounded, x=(BATCH, 4)))).count("add") == left


def test_large_and_small_arguments_overflow_and_vanish_as_before() -> None:
    """``exp(x) * c`` and ``exp(x + ln c)`` in single precision, from the smallest to the largest result."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (4096, 1), torch.float32)
    weight, bias = build.parameter("w", torch.ones(2, 1)), build.parameter("b", torch.zeros(2))
    exps = build.exp(build.reshape(build.linear(x, weight, bias), shape=(4096, 1, 2)))
    graph.outputs = [build.mul(exps, build.constant(torch.tensor([0.02, 7.0])))]
    after = regauge.optimize(graph, "simplify")
    assert ops(after) == ["linear", "reshape", "exp"]
    given = torch.linspace(-80, 86, 4096)[:, None]
    before, found = (run(g, [given])[0] for g in (graph, after))
    torch.testing.assert_close(found, before, rtol=2e-5, atol=0.0)
    ends = torch.tensor([[math.inf], [-math.inf], [math.nan], [200.0], [-200.0]]).repeat(820, 1)[:4096]
    before, found = (run(g, [ends])[0] for g in (graph, after))
    torch.testing.assert_close(found, before, rtol=0.0, atol=0.0, equal_nan=True)


# -- modules -----------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Boxes of two feature maps, scaled by a buffer per channel of the box and by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1, bias=False)])
        self.register_buffer("variance", torch.tensor([0.1, 0.1, 0.2, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        maps = (x, nn.functional.max_pool2d(x, 2))
        parts = [
            head(m).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for head, m in zip(self.heads, maps, strict=True)
        ]
        centre, size = (torch.cat(parts, 1) * self.variance).split(2, -1)
        return torch.cat([centre, size.exp() * 0.5], -1)


def test_a_detector_keeps_its_keys_and_loses_its_variances() -> None:
    graph = simplified(Detector(), randn(2, 3, 8, 6), dynamic={0: {0: "batch"}})
    assert "mul" not in ops(graph)
    assert set(graph.parameters) == {"heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias"}
