"""Layout rules: reshapes, permutes and pieces, with fixed and dynamic sizes, and where they must stay."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, randn

import regauge
from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.passes.simplify import identities, layout, pieces, transposes
from simplifying import BATCH, made, ops, simplified

RULES = identities.RULES + layout.RULES + pieces.RULES + transposes.RULES
Call = Callable[[Any, Any], Any]


def after(call: Call, *shape: Any) -> list[str]:
    """What is left of ``tanh(call(x))`` after the rules; the tanh goes in again."""
    return ops(simplified(made(lambda build, x: build.tanh(call(build, x)), x=shape or (BATCH, 6, 4)), RULES))


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (lambda b, x: b.reshape(b.reshape(x, shape=(BATCH, 24)), shape=(BATCH, 4, 6)), ["reshape"]),
        (lambda b, x: b.reshape(b.reshape(x, shape=(BATCH, 24)), shape=(BATCH, 6, 4)), []),
        (lambda b, x: b.reshape(b.reshape(x, shape=(6 * BATCH, 4)), shape=(BATCH, 6, 4)), []),
        (lambda b, x: b.squeeze(b.unsqueeze(x, dim=1), dims=(1,)), []),
        (lambda b, x: b.squeeze(b.reshape(x, shape=(BATCH, 1, 24)), dims=(1,)), ["reshape"]),
        (lambda b, x: b.permute(b.permute(x, dims=(0, 2, 1)), dims=(0, 2, 1)), []),
        (lambda b, x: b.permute(b.permute(x, dims=(1, 0, 2)), dims=(0, 2, 1)), ["permute"]),
        (lambda b, x: b.squeeze(b.permute(b.unsqueeze(x, dim=0), dims=(1, 2, 0, 3)), dims=(2,)), []),
        (lambda b, x: b.permute(b.relu(b.permute(x, dims=(0, 2, 1))), dims=(0, 2, 1)), ["relu"]),
        (lambda b, x: b.mean(b.permute(x, dims=(0, 2, 1)), dims=(1,)), ["mean"]),
        (lambda b, x: b.sum(b.permute(x, dims=(2, 0, 1)), dims=(0, 2), keepdim=True), ["sum", "permute"]),
        (lambda b, x: b.reshape(b.permute(b.reshape(x, shape=(6 * BATCH, 4)), dims=(1, 0)), shape=(4, BATCH, 6)),
         ["permute"]),
        (lambda b, x: b.slice(b.slice(x, dim=1, start=1, end=5), dim=1, start=0, end=2), ["slice"]),
        (lambda b, x: b.slice(b.concat(x, b.relu(x), dim=1), dim=1, start=0, end=6), []),
        (lambda b, x: b.slice(b.concat(x, b.relu(x), dim=0), dim=0, start=BATCH, end=2 * BATCH), ["relu"]),
        (lambda b, x: b.concat(*b.split(x, dim=1, sizes=(1, 2, 3)), dim=1), []),
        (lambda b, x: b.concat(*[b.slice(x, dim=2, start=i, end=i + 1) for i in range(4)], dim=2), []),
        (lambda b, x: b.split(x, dim=1, sizes=(1, 2, 3))[1], ["slice"]),
        (lambda b, x: b.split(b.concat(x, x, x, dim=1), dim=1, sizes=(6, 12))[0], []),
        (lambda b, x: b.concat(b.concat(x, b.relu(x), dim=2), x, dim=-1), ["relu", "concat"]),
        (lambda b, x: b.index_select(x, b.constant(torch.arange(1, 4)), dim=1), ["slice"]),
        (lambda b, x: b.expand(b.expand(x, shape=(1, BATCH, 6, 4)), shape=(3, BATCH, 6, 4)), ["expand"]),
    ],
)  # fmt: skip
def test_two_steps_are_one_or_none(call: Call, left: list[str]) -> None:
    assert after(call) == [*left, "tanh"]


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x: b.unsqueeze(b.unsqueeze(x, dim=1), dim=3),  # one reshape of all axes says less
        lambda b, x: b.reshape(b.permute(x, dims=(0, 2, 1)), shape=(BATCH, 24)),
        lambda b, x: b.permute(b.softmax(b.permute(x, dims=(0, 2, 1)), dim=1), dims=(0, 2, 1)),
        lambda b, x: b.permute(b.add(b.permute(x, dims=(1, 0, 2)), b.flip(b.permute(x, dims=(1, 0, 2)), dims=(0,))),
                               dims=(1, 0, 2)),
        lambda b, x: b.reshape(b.permute(b.reshape(x, shape=(BATCH, 24)), dims=(1, 0)), shape=(6, 4 * BATCH)),
        lambda b, x: b.reshape(b.permute(b.reshape(x, shape=(BATCH, 4, 6)), dims=(0, 2, 1)), shape=(BATCH, 3, 8)),
        lambda b, x: b.slice(b.slice(x, dim=1, start=1, end=5), dim=2, start=0, end=2),
        lambda b, x: b.slice(b.concat(x, b.relu(x), dim=1), dim=1, start=5, end=7),  # across a border
        lambda b, x: b.slice(b.pad(x, pads=((0, 0), (1, 1), (0, 0)), value=1.0), dim=1, start=1, end=7),
        lambda b, x: b.concat(b.slice(x, dim=1, start=2, end=4), b.slice(x, dim=1, start=0, end=2), dim=1),
        lambda b, x: b.concat(b.slice(x, dim=1, start=0, end=4, step=2), b.slice(x, dim=1, start=4, end=6), dim=1),
        lambda b, x: b.concat(b.slice(x, dim=1, start=0, end=3), b.slice(x, dim=1, start=2, end=6), dim=1),
        lambda b, x: b.concat(b.concat(x, b.relu(x), dim=1), b.concat(x, x, dim=1), dim=2),
        lambda b, x: b.index_select(x, b.constant(torch.tensor([0, 2, 4])), dim=1),
        lambda b, x: b.index_select(x, b.constant(torch.tensor([0, 1])), dim=0),  # the batch may be 1: an error then
    ],
)  # fmt: skip
def test_what_moves_entries_stays(call: Call) -> None:
    graph = made(lambda build, x: build.tanh(call(build, x)), x=(BATCH, 6, 4))
    after = graph.copy()
    assert rewrite_graph(after, RULES).total == 0 and str(after) == str(graph)


def test_what_others_read_is_not_made_twice() -> None:
    def shared(build: Any, x: Any) -> Any:
        y = build.relu(build.permute(x, dims=(0, 2, 1)))
        return [build.permute(y, dims=(0, 2, 1)), build.tanh(y)]

    graph = made(shared, x=(BATCH, 6, 4))
    assert ops(simplified(graph, RULES)) == ops(graph)

    def joined(build: Any, x: Any) -> Any:
        y = build.concat(x, build.relu(x), build.tanh(x), dim=1)
        return [build.neg(build.slice(y, dim=1, start=0, end=12)), build.neg(y)]

    graph = made(joined, x=(BATCH, 6, 4))
    assert ops(simplified(graph, RULES)) == ops(graph)


def test_a_gate_keeps_its_permute_free() -> None:
    """silu between two permutes, whose input is read twice; and constants stored in the other order."""

    def gated(build: Any, x: Any) -> Any:
        y = build.permute(x, dims=(0, 2, 3, 1))
        y = build.mul(build.mul(y, build.sigmoid(y)), build.parameter("gain", randn(3).double()))
        return build.tanh(build.permute(y, dims=(0, 3, 1, 2)))

    graph = made(gated, x=(BATCH, 3, 4, 5))
    after = simplified(graph, RULES)
    assert ops(after) == ["sigmoid", "mul", "mul", "tanh"]
    assert {name: p.shape for name, p in after.parameters.items()} == {"gain": (3, 1, 1)}


class ChannelsLast(nn.Module):
    """Images in the layout of another framework, flattened in its order, and a weight used as it is stored there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 5 * 6, 7)
        self.table = nn.Parameter(randn(2, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = torch.cat([y[..., :2], y[..., 2:]], dim=-1).permute(0, 3, 1, 2) + 1
        y = y.permute(0, 2, 3, 1)
        first, _, last = y.split([2, 1, 2], dim=1)
        return self.head(torch.cat([first, y[:, 2:3], last], 1).flatten(1)) @ self.table.t()


def test_a_module_in_another_layout() -> None:
    model = ChannelsLast().eval()
    x = randn(2, 3, 5, 6)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    after: Graph = regauge.optimize(graph, "simplify{skip=[affine,chains]}")
    assert ops(after) == ["conv", "relu", "add", "reshape", "linear", "linear"]
    module = after.to_torch()
    assert list(module.state_dict()) == list(model.state_dict())
    for batch in (1, 3):
        x = randn(batch, 3, 5, 6)
        torch.testing.assert_close(module(x), model(x))


@st.composite
def regrouped_shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape of as many entries: axes taken apart, others merged, ones put in."""
    parts: list[int] = []
    for size in shape:
        major = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) if size else 0
        parts += [major, size // major] if size and draw(st.booleans()) else [size]
    result: list[int] = []
    while parts:
        count = draw(st.integers(1, 3))
        result.append(math.prod(parts[:count]))
        parts = parts[count:]
    return (*result, 1) if draw(st.booleans()) else tuple(result)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_permute_between_reshapes_is_the_same_however_it_is_written(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 6]), min_size=1, max_size=5)))
    middle = data.draw(regrouped_shapes(shape))
    dims = tuple(data.draw(st.permutations(range(len(middle)))))
    last = data.draw(regrouped_shapes(tuple(middle[dim] for dim in dims)))

    def call(build: Any, x: Any) -> Any:
        return build.tanh(build.reshape(build.permute(build.reshape(x, shape=middle), dims=dims), shape=last))

    simplified(made(call, x=shape), RULES)  # compares both graphs


def test_keys_are_in_one_other_order_but_pieces_of_a_permuted_value_stay() -> None:
    def keys(build: Any, heads: Any) -> Any:
        flat = build.permute(build.reshape(heads, shape=(2 * BATCH, 6, 2)), dims=(0, 2, 1))
        return build.reshape(flat, shape=(BATCH, 2, 2, 6))

    def apart(build: Any, x: Any) -> Any:
        return keys(build, build.permute(build.reshape(x, shape=(BATCH, 6, 2, 2)), dims=(0, 2, 1, 3)))

    def fused(build: Any, x: Any) -> Any:
        both = build.permute(build.reshape(x, shape=(BATCH, 6, 1, 2, 2)), dims=(2, 0, 3, 1, 4))
        return keys(build, build.select(both, dim=0, index=0))

    assert after(apart) == ["reshape", "permute", "tanh"]
    assert "permute-of-regrouped" not in rewrite_graph(made(fused, x=(BATCH, 6, 4)), RULES).counts
