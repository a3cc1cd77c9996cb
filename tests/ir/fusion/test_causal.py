"""Masks of positions become causal attention, where they say just that."""

import math

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.fusion.causal import mark_causal
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.graph import Graph, State, Value
from regauge.ir.sizes.expressions import symbol

N = 9


def places(b: Builder, start: int = 0, size: int = N) -> tuple[Value, Value]:
    """Positions of rows and of columns."""
    rows = b.unsqueeze(b.arange(start=start, end=start + size), dim=1)
    return rows, b.unsqueeze(b.arange(end=size), dim=0)


def later(b: Builder) -> tuple[Value, Value]:
    """Positions of the last rows, and of all columns."""
    return places(b, PAST, LATER)[0], places(b)[1]


def table(b: Builder, tensor: torch.Tensor) -> Value:
    return b.parameter("table", tensor, "buffer")


def ones(b: Builder, dtype: torch.dtype = torch.bool, value: float = True) -> Value:
    return b.full(shape=(N, N), value=value, dtype=dtype)


def lowest(b: Builder) -> Value:
    return ones(b, torch.float32, -math.inf)


TRIL = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
CAUSAL = {
    "rows >= columns": lambda b: b.ge(*places(b)),
    "columns <= rows": lambda b: b.le(*reversed(places(b))),
    "columns < rows + 1": lambda b: b.lt(*reversed(places(b, start=1))),
    "rows + 2 > columns + 1": lambda b: b.gt(b.add(places(b)[0], 2), b.add(places(b)[1], 1)),
    "not columns > rows": lambda b: b.logical_not(b.gt(*reversed(places(b)))),
    "not rows < columns": lambda b: b.logical_not(b.lt(*places(b))),
    "tril": lambda b: b.tril(ones(b)),
    "tril of floats": lambda b: b.cast(b.tril(ones(b, torch.float32, 1.0)), dtype=torch.bool),
    "tril is not zero": lambda b: b.ne(b.tril(ones(b, torch.float32, 1.0)), 0),
    "triu is zero": lambda b: b.eq(b.triu(ones(b, torch.float32, 1.0), diagonal=1), 0),
    "not triu": lambda b: b.logical_not(b.triu(ones(b), diagonal=1)),
    "with more axes": lambda b: b.unsqueeze(b.tril(ones(b)), dim=0),
    "added": lambda b: b.where(b.ge(*places(b)), 0.0, -math.inf),
    "added, turned": lambda b: b.where(b.lt(*places(b)), torch.finfo(torch.float32).min, 0.0),
    "added triu": lambda b: b.triu(ones(b, torch.float32, -math.inf), diagonal=1),
    "table": lambda b: table(b, TRIL[0]),
    "part of a table": lambda b: b.slice(
        b.slice(table(b, torch.ones(12, 12, dtype=torch.bool).tril()), dim=0, start=0, end=N, step=1),
        dim=1, start=0, end=N, step=1,
    ),
    "added table": lambda b: table(b, torch.full((N, N), -math.inf).triu(1)),
}  # fmt: skip
PAST, LATER = 4, N - 4
LOWER_RIGHT = {
    "rows behind a cache": lambda b: b.ge(*later(b)),
    "counted from the past": lambda b: b.ge(b.add(b.unsqueeze(b.arange(end=LATER), dim=1), PAST), places(b)[1]),
    "tril": lambda b: b.tril(b.full(shape=(LATER, N), value=True, dtype=torch.bool), diagonal=PAST),
    "added": lambda b: b.where(b.ge(*later(b)), 0.0, -math.inf),
    "table": lambda b: table(b, TRIL[0, 0, PAST:]),
    "added table": lambda b: table(b, torch.full((N, N), -math.inf).triu(1)[PAST:]),
    "end of a table": lambda b: b.slice(table(b, TRIL[0, 0]), dim=0, start=PAST, end=N, step=1),
    "middle of a table": lambda b: b.slice(
        b.slice(table(b, torch.ones(1, 12, 12, dtype=torch.bool).tril()), dim=1, start=PAST + 2, end=N + 2, step=1),
        dim=-1, start=2, end=N + 2, step=1,
    ),
}  # fmt: skip
OTHER = {
    "columns < rows": lambda b: b.lt(*reversed(places(b))),
    "shifted": lambda b: b.ge(*places(b, start=2)),
    "backwards": lambda b: b.le(*places(b)),
    "triu": lambda b: b.triu(ones(b)),
    "below the diagonal": lambda b: b.tril(ones(b), diagonal=-1),
    "a finite number": lambda b: b.where(b.ge(*places(b)), 0.0, -100.0),
    "of another table": lambda b: table(b, TRIL.logical_not()),
    "rows of a table further on": lambda b: b.slice(
        table(b, torch.ones(12, N).bool().tril()), dim=0, start=3, end=12, step=1
    ),
    "a table that is trained": lambda b: b.parameter("bias", torch.full((N, N), -math.inf).triu(1)),
    "with an axis that queries lack": lambda b: table(b, TRIL),
    "one column for all": lambda b: b.where(b.tril(b.full(shape=(N, 1), value=True, dtype=torch.bool)), 0.0, lowest(b)),
    "one position for all": lambda b: b.where(b.ge(places(b)[0], b.arange(end=1)), 0.0, lowest(b)),
    "less than one, as an integer": lambda b: b.cast(
        b.cast(b.tril(ones(b, torch.float32, 0.5)), dtype=torch.int32), dtype=torch.bool
    ),
    "positions that types of 8 bits count": lambda b: b.ge(*(b.cast(one, dtype=torch.int8) for one in places(b))),
    "one more input": lambda b: b.logical_and(b.ge(*places(b)), b.input("padding", (1, N), torch.bool)),
}


def attention(mask: str, masks: dict, queries: int = N) -> Graph:
    graph = Graph("g")
    build = Builder(graph)
    q, k, v = (build.input(name, (2, size, 8), torch.float32) for name, size in (("q", queries), ("k", N), ("v", N)))
    graph.outputs = [build.attention(q, k, v, masks[mask](build), scale=0.3)]
    return graph


@pytest.mark.parametrize("mask", CAUSAL)
def test_a_mask_that_orders_positions_is_an_attribute(mask: str) -> None:
    graph = attention(mask, CAUSAL)
    tensors = [torch.randn(2, N, 8) for _ in range(3)]
    name = graph.outputs[0].name  # type: ignore[union-attr]
    (before,) = graph.run(tensors)
    assert mark_causal(graph) == 1
    (node,) = graph.nodes
    assert node.attributes["is_causal"] and node.output.name == name
    torch.testing.assert_close(graph.run(tensors)[0], before)
    assert mark_causal(graph) == 0


@pytest.mark.parametrize("mask", LOWER_RIGHT)
def test_a_mask_of_the_last_positions_is_an_attribute(mask: str) -> None:
    graph = attention(mask, LOWER_RIGHT, LATER)
    tensors = [torch.randn(2, size, 8) for size in (LATER, N, N)]
    (before,) = graph.run(tensors)
    assert mark_causal(graph) == 1
    (node,) = graph.nodes
    assert node.attributes["is_causal"] and node.attributes["lower_right"]
    torch.testing.assert_close(graph.run(tensors)[0], before)
    assert mark_causal(graph) == 0


def test_a_cache_of_dynamic_length_leaves_no_mask() -> None:
    past, new = symbol("past"), symbol("new")
    graph = Graph("g", symbols={past: (0, None), new: (1, None)})
    build = Builder(graph)
    q, k, v = (build.input(name, (2, new, 8), torch.float32) for name in "qkv")
    k, v = (build.concat(build.input(f"past_{x.name}", (2, past, 8), torch.float32), x, dim=1) for x in (k, v))
    rows = build.unsqueeze(build.arange(start=past, end=past + new), dim=1)
    mask = build.ge(rows, build.unsqueeze(build.arange(end=past + new), dim=0))
    graph.outputs = [build.attention(q, k, v, mask, scale=0.3)]
    runs = [[torch.randn(2, size, 8) for size in (n, n, n, p, p)] for p, n in ((0, 3), (5, 1), (4, 6))]
    before = [graph.run(run)[0] for run in runs]
    assert mark_causal(graph) == 1 and graph.nodes[-1].attributes["lower_right"] and len(graph.nodes) == 3
    for run, wanted in zip(runs, before, strict=True):
        torch.testing.assert_close(graph.run(run)[0], wanted)


@pytest.mark.parametrize("mask", OTHER)
def test_other_masks_stay(mask: str) -> None:
    graph = attention(mask, OTHER)
    assert mark_causal(graph) == 0 and not graph.nodes[-1].attributes["is_causal"]


@pytest.mark.parametrize("kept", ["a start", "a table"])
def test_masks_of_buffers_that_runs_write_stay(kept: str) -> None:
    graph = Graph("g")
    build = Builder(graph)
    q, k, v = (build.input(name, (2, N, 8), torch.float32) for name in "qkv")
    rows, columns = places(build)
    if kept == "a start":
        buffer = build.parameter("start", torch.zeros((), dtype=torch.int64), "buffer")
        after, mask = build.add(buffer, 1), build.ge(build.add(rows, buffer), columns)
    else:
        buffer = mask = table(build, TRIL[0, 0])
        after = build.logical_not(buffer)
    graph.outputs = [build.attention(q, k, v, mask, scale=0.3)]
    assert mark_causal(graph.copy()) == 1
    graph.states.append(State("kept", buffer, after))
    assert mark_causal(graph) == 0


def test_layers_that_share_a_mask_are_a_kernel_each_and_read_none() -> None:
    graph = Graph("g")
    build = Builder(graph)
    n = symbol("n")
    graph.symbols[n] = (2, None)
    q, k, v = (build.input(name, (2, n, 64), torch.float16) for name in "qkv")
    mask = build.ge(build.unsqueeze(build.arange(end=n), dim=1), build.unsqueeze(build.arange(end=n), dim=0))
    y = build.attention(q, k, v, mask, scale=0.125)
    graph.outputs = [build.attention(y, k, v, mask, scale=0.125)]
    assert mark_causal(graph) == 2
    y = graph.nodes[0].output
    plan = plan_fusion(graph, at={n: 512})
    assert [{load.value.value.name for load in region.loads} for region in plan.regions] == [{*"qkv"}, {*"kv", y.name}]
    assert len(plan.kernels) == 2
