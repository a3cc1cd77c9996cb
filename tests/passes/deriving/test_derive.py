"""``derive``: what only pays in combination is found, what is found is equal, and nothing else is touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regauge
from regauge.ir.edit import Builder
from regauge.ir.errors import EquivalenceError, PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.roofline import DEVICES
from regauge.passes.base import Context
from regauge.passes.deriving import reading
from regauge.passes.deriving.derive import _Derivation
from regauge.passes.deriving.readers import RANGES, READERS
from regauge.passes.deriving.search import Limit


def captured(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...], **options: Any) -> Graph:
    class Model(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return function(*given)

    return regauge.capture(Model(), tuple(torch.randn(shape) for shape in shapes), **options)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def macs(graph: Graph) -> tuple[int, int]:
    entry = graph.report.passes[0]
    return entry.before.macs, entry.after.macs


def test_a_chain_of_matmuls_begins_at_its_narrow_end() -> None:
    graph = captured(lambda a, b, c, d: a @ b @ c @ d, (64, 64), (64, 64), (64, 64), (64, 2))
    done = regauge.optimize(graph, "derive")
    assert ops(done) == ["matmul"] * 3
    assert macs(done) == (2 * 64**3 + 2 * 64**2, 3 * 2 * 64**2)
    assert [value for _, value in done.nodes[0].operands()] == done.inputs[2:]


def test_products_with_a_common_factor_become_one() -> None:
    """Two steps: the sum of x and y comes out once that of a and b has."""
    graph = captured(lambda x, y, a, b: x @ a + x @ b + y @ a + y @ b, (256, 64), (256, 64), (64, 64), (64, 64))
    done = regauge.optimize(graph, "derive")
    assert sorted(ops(done)) == ["add", "add", "matmul"]
    assert macs(done) == (4 * 256 * 64**2, 256 * 64**2)


def test_an_einsum_becomes_matmuls() -> None:
    graph = captured(lambda a, b, c: torch.einsum("ab,bc,cd->ad", a, b, c), (64, 128), (128, 128), (128, 4))
    done = regauge.optimize(graph, "derive")
    assert ops(done) == ["matmul", "matmul"]
    assert macs(done) == (64 * 128 * 128 * 4, 128 * 128 * 4 + 64 * 128 * 4)


class LowRankAttention(torch.nn.Module):
    """Scores of a few queries with keys that are computed from latents of low rank, for heads of ``width``."""

    def __init__(self, heads: int = 4, width: int = 32, rank: int = 8) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query = torch.nn.Linear(heads * width, heads * width)
        self.down = torch.nn.Linear(heads * width, rank, bias=False)
        self.up = torch.nn.Linear(rank, heads * width, bias=False)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.width).transpose(1, 2)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, key = self.split(torch.tanh(self.query(x))), self.split(self.up(self.down(context)))
        return torch.softmax(query @ key.transpose(-1, -2) * self.width**-0.5, -1)


def test_keys_of_low_rank_are_never_computed() -> None:
    """Both maps go to the few queries instead of the many keys: through the split of heads, and two transposes."""
    batch, tokens, keys, heads, width, rank = 2, 1, 256, 4, 32, 8
    graph = regauge.capture(LowRankAttention().eval(), (torch.randn(2, 1, 128), torch.randn(2, 256, 128)))
    done = regauge.optimize(graph, "derive")
    all_, wide = batch * tokens * heads, heads * width
    query = batch * tokens * wide**2
    before = query + batch * keys * rank * 2 * wide + all_ * width * keys
    assert macs(done) == (before, query + all_ * width * rank + all_ * rank * wide + all_ * wide * keys)
    assert done.report.passes[0].after.parameters == done.report.passes[0].before.parameters


def test_dynamic_sizes_come_from_data_and_stay_dynamic(tmp_path: Path) -> None:
    shapes = ((2, 1, 128), (2, 16, 128))
    graph = regauge.capture(
        LowRankAttention().eval(),
        tuple(map(torch.randn, shapes)),
        dynamic={0: {0: "batch"}, 1: {0: "batch", 1: "keys"}},
    )
    at_least = regauge.optimize(graph, "derive")
    batch = (torch.randn(2, 1, 128), torch.randn(2, 256, 128))
    done = regauge.optimize(graph, "derive", data=[batch])
    assert not at_least.report.passes[0].changed and done.report.passes[0].changed
    other = (torch.randn(3, 1, 128), torch.randn(3, 7, 128))
    torch.testing.assert_close(done.to_torch()(*other), graph.run(other)[0])
    done.to_onnx(tmp_path / "derived.onnx")


def test_convolutions_with_one_tap_are_products_over_channels() -> None:
    """Two in a row with a narrow end in a sum with one more, which no single merge makes cheaper."""

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, a) + torch.nn.functional.conv2d(x, b)

    graph = captured(function, (1, 32, 16, 16), (32, 32, 1, 1), (32, 32, 1, 1))
    done = regauge.optimize(graph, "derive")
    assert macs(done) == (2 * 32 * 32 * 256, 32 * 32 * 256)
    assert "conv" not in ops(done)


def test_models_without_anything_to_choose_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8))
    graph = regauge.capture(model.eval(), (torch.randn(2, 8),))
    done = regauge.optimize(graph, "derive")
    assert not done.report.passes[0].changed and str(done) == str(graph)


def test_what_is_read_twice_is_computed_once() -> None:
    graph = captured(lambda a, b, c, d: (a @ b) @ c + torch.relu(a @ b) @ d, (64, 64), (64, 64), (64, 2), (64, 2))
    done = regauge.optimize(graph, "derive")
    assert macs(done)[1] <= macs(done)[0]


def test_expressions_are_found_on_both_sides_of_what_is_none() -> None:
    """A quotient of two tensors is no product, but the one above it is, and so is what is made of it."""
    shapes = [(64, 64), (64, 64), (64, 2), (64, 2), (2, 64), (64, 64)]
    graph = captured(lambda a, b, c, d, e, f: ((a @ b @ c) / (2 + d * d)) @ e @ f, *shapes)
    done = regauge.optimize(graph, "derive")
    assert len(done.report.passes[0].notes) == 2
    assert macs(done)[1] == 2 * 64 * 64 * 2 + 2 * 64 * 64 + 64 * 2 * 64


def test_a_budget_bounds_the_search() -> None:
    graph = captured(lambda *m: m[0] @ m[1] @ m[2] @ m[3] @ m[4] @ m[5], *[(64, 64)] * 5, (64, 2))
    done = regauge.optimize(graph, "derive{budget=1}")
    assert "1 states, stopped by the budget" in done.report.passes[0].notes[0]
    assert macs(done)[1] == 5 * 2 * 64**2  # the cheapest steps were enough
    assert "stopped" not in regauge.optimize(graph, "derive{budget=20s}").report.passes[0].notes[0]
    with pytest.raises(PassError, match="must be at least 1"):
        regauge.optimize(graph, "derive{budget=0}")


def test_a_wrong_derivation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.passes.deriving import lowering

    whole = lowering.Lowering._term
    monkeypatch.setattr(lowering.Lowering, "_term", lambda self, scale, tensors: whole(self, scale * 2, tensors))
    with pytest.raises(EquivalenceError, match="derived wrongly"):
        regauge.optimize(captured(lambda a, b, c: a @ b @ c, (64, 64), (64, 64), (64, 2)), "derive")


SIZES = (1, 2, 3, 4, 6)


class Drawn:
    """A random expression: values of float64 inputs and weights, which are small integers."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.graph = Graph("random")
        self.build = Builder(self.graph)

    def choose(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def value(self, shape: tuple[int, ...], depth: int) -> Value:
        if depth == 0:
            return self.build.input(f"x{len(self.graph.inputs)}", shape, torch.float64)
        makers = [self.sum, self.product, self.scaled, self.permuted, self.reshaped, self.reduced]
        makers += [self.matmul] * 3 if len(shape) > 1 else []
        makers += [self.linear] if shape else []
        return self.choose(*makers)(shape, depth - 1)

    def sum(self, shape: tuple[int, ...], depth: int) -> Value:
        op = self.choose("add", "sub")
        return self.build(op, self.value(shape, depth), self.value(self.narrower(shape), depth))

    def product(self, shape: tuple[int, ...], depth: int) -> Value:
        return self.build.mul(self.value(shape, depth), self.value(self.narrower(shape), depth))

    def narrower(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.choose(True, False):
            return shape
        return tuple(self.choose(size, 1) for size in shape[self.choose(*range(len(shape) + 1)) :])

    def scaled(self, shape: tuple[int, ...], depth: int) -> Value:
        return self.build.mul(self.value(shape, depth), self.choose(2, -3))

    def permuted(self, shape: tuple[int, ...], depth: int) -> Value:
        dims = self.draw(st.permutations(range(len(shape))))
        inner = [0] * len(shape)
        for place, dim in enumerate(dims):
            inner[dim] = shape[place]
        return self.build.permute(self.value(tuple(inner), depth), dims=tuple(dims))

    def reshaped(self, shape: tuple[int, ...], depth: int) -> Value:
        inner: list[int] = []
        for size in shape:
            if inner and self.choose(True, False):
                inner[-1] *= size
            elif size in (4, 6) and self.choose(True, False):
                inner += [2, size // 2]
            else:
                inner.append(size)
        return self.build.reshape(self.value(tuple(inner), depth), shape=shape)

    def reduced(self, shape: tuple[int, ...], depth: int) -> Value:
        place = self.choose(*range(len(shape) + 1))
        inner = (*shape[:place], self.choose(*SIZES), *shape[place:])
        return self.build.sum(self.value(inner, depth), dims=(place,))

    def matmul(self, shape: tuple[int, ...], depth: int) -> Value:
        shared = self.choose(*SIZES)
        left, right = (*shape[:-1], shared), (*self.narrower(shape[:-2]), shared, shape[-1])
        return self.build.matmul(self.value(left, depth), self.value(right, depth))

    def linear(self, shape: tuple[int, ...], depth: int) -> Value:
        inputs = self.choose(*SIZES)
        count = len(self.graph.parameters)
        weight = self.build.parameter(f"w{count}", torch.randint(-3, 4, (shape[-1], inputs)).double())
        bias = self.choose(None, True)
        bias = bias and self.build.parameter(f"b{count}", torch.randint(-3, 4, (shape[-1],)).double())
        return self.build.linear(self.value((*shape[:-1], inputs), depth), weight, bias)


@st.composite
def expressions(draw: Callable[[Any], Any]) -> Graph:
    drawn = Drawn(draw)
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=0, max_size=3)))
    drawn.graph.outputs = [drawn.value(shape, draw(st.integers(2, 4)))]
    return drawn.graph


@given(expressions())
def test_random_expressions_are_equal_however_they_are_computed(graph: Graph) -> None:
    """Whatever the search finds is laid out, cheaper or not, and is the same to the last bit."""
    result = graph.copy()
    limit = Limit(50, float("inf"))
    work = _Derivation(result, DEVICES["cpu"], limit, gain=-1e12, context=Context())
    for node in list(result.nodes):
        if node in result._nodes:
            work.visit(node)
    inputs = [torch.randint(-2, 3, value.shape).double() for value in graph.inputs]
    assert torch.equal(result.run(inputs)[0], graph.run(inputs)[0])


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_zeros_are_put_around_what_is_computed_and_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a feature map that windows need more of, as in Swin Transformer, behind the map instead of before it."""
    graph = captured(lambda x, w: torch.nn.functional.pad(x, (0, 0, 4, 60)) @ w, (8, 64, 128), (128, 128))
    done = regauge.optimize(graph, "derive")
    assert ops(done) == ["matmul", "pad"] or ops(done) == ["reshape", "matmul", "reshape", "pad"]
    assert macs(done) == (8 * 128 * 128 * 128, 8 * 64 * 128 * 128)
    without = {op: read for op, read in READERS.items() if op not in RANGES}
    monkeypatch.setattr(reading, "READERS", without)
    assert ops(regauge.optimize(graph, "derive")) == ops(graph)  # no other rule finds it


def test_weights_of_zeros_between_channels_are_not_read() -> None:
    """Channels of a shortcut that are filled up with zeros: the sum goes over those that are there."""
    graph = captured(lambda x, w: torch.nn.functional.pad(x, (32, 96)) @ w, (512, 128), (256, 256))
    done = regauge.optimize(graph, "derive")
    assert sorted(ops(done)) == ["matmul", "slice"]
    assert macs(done) == (512 * 256 * 256, 512 * 128 * 256)
    (cut,) = [node for node in done.nodes if node.op == "slice"]
    assert (cut.attributes["dim"], cut.attributes["start"], cut.attributes["end"]) == (0, 32, 160)


def test_only_the_part_that_is_read_is_computed() -> None:
    graph = captured(lambda x, w: (x @ w)[:, 8:24], (512, 128), (128, 128))
    done = regauge.optimize(graph, "derive")
    assert ops(done) == ["slice", "matmul"]
    assert macs(done) == (512 * 128 * 128, 512 * 128 * 16)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.nn.functional.pad(x, (0, 0, 4, 60), value=1.0) @ w,  # what is around is not zero
        lambda x, w: torch.nn.functional.pad(x + 1.0, (0, 0, 4, 60)) @ w,  # nor is it the same sum there
        lambda x, w: (x @ w)[:, ::2],
    ],
)
def test_other_ranges_stay(function: Callable[..., torch.Tensor]) -> None:
    graph = captured(function, (64, 128), (128, 128))
    assert ops(regauge.optimize(graph, "derive")) == ops(graph)


@given(st.data())
def test_what_is_found_with_ranges_is_equal(data: st.DataObject) -> None:
    """Zeros and slices anywhere in a chain of products and sums."""
    torch.manual_seed(0)
    sizes = st.sampled_from((2, 3, 64))
    graph = Graph("g")
    build = Builder(graph)
    value = build.input("x", (data.draw(sizes), data.draw(sizes)), torch.float32)
    for place in range(data.draw(st.integers(2, 4))):
        dim = data.draw(st.integers(0, 1))
        size = int(value.shape[dim])
        kind = data.draw(st.sampled_from(("pad", "slice", "matmul", "add")))
        if kind == "pad":
            amounts = data.draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
            value = build.pad(value, pads=(amounts, (0, 0)) if dim == 0 else ((0, 0), amounts))
        elif kind == "slice" and size > 2:
            start = data.draw(st.integers(0, size - 2))
            value = build.slice(value, dim=dim, start=start, end=data.draw(st.integers(start + 2, size)), step=1)
        elif kind == "add":
            value = build.add(value, build.input(f"y{place}", tuple(value.shape), torch.float32))
        else:
            other = build.input(f"w{place}", (int(value.shape[1]), data.draw(sizes)), torch.float32)
            value = build.matmul(value, other)
    graph.outputs = [value]
    done = regauge.optimize(graph, "derive{gain=0}")
    tensors = [torch.randint(-3, 4, tuple(map(int, value.shape))).float() for value in graph.inputs]
    assert torch.equal(done.run(tensors)[0], graph.run(tensors)[0])
