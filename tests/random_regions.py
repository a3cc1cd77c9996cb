"""Random graphs that are one region: pointwise steps with broadcasting, and reductions over the last axis."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from regauge.ir.edit import Builder, remove_dead
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.region import trace
from regauge.ir.graph import Graph, Value

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNARY = ("relu", "sigmoid", "silu", "tanh", "gelu", "neg", "abs", "softplus", "erf", "hardswish", "elu", "log_sigmoid")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
EXACT_UNARY = ("relu", "neg", "abs")
REDUCTIONS = ("sum", "mean", "amax", "amin")
ROWS = ("softmax", "log_softmax", "layer_norm", "rms_norm")


@st.composite
def regions(draw: Callable[[Any], Any]) -> Graph:
    """A graph whose nodes are one legal region, with one or two results; some have exact operators alone."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = (*draw(st.lists(st.sampled_from((1, 2, 3, 17)), max_size=2)), draw(st.sampled_from((1, 7, 33, 100, 257))))
    graph = Graph("random")
    build = Builder(graph)
    exact = draw(st.booleans())
    reduces = not exact and len(shape) > 1 and draw(st.booleans())
    values = [build.input("x0", shape, dtype)]
    for number in range(draw(st.integers(1, 3))):
        own = [size if draw(st.booleans()) else 1 for size in shape]
        values.append(build.input(f"x{number + 1}", own[draw(st.integers(0, len(own) - 1)) :], dtype))

    def pick() -> Value:
        return draw(st.sampled_from(values))

    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(("unary", "binary", "number", "choice", *(("reduce", "row") if reduces else ()))))
        full = [value for value in values if value.shape == shape]
        if kind == "unary":
            values.append(build(draw(st.sampled_from(EXACT_UNARY if exact else UNARY)), pick()))
        elif kind == "binary":
            values.append(build(draw(st.sampled_from(BINARY)), pick(), pick()))
        elif kind == "number":
            values.append(build(draw(st.sampled_from(BINARY[:3])), pick(), draw(st.sampled_from((0.5, 2, -1.5)))))
        elif kind == "choice" and not exact:
            values.append(build.where(build.lt(pick(), pick()), pick(), draw(st.sampled_from((0.0, 1.5)))))
        elif kind == "reduce":
            op = draw(st.sampled_from(REDUCTIONS))
            values.append(build(op, draw(st.sampled_from(full)), dims=(len(shape) - 1,), keepdim=True))
        elif kind == "row":
            values.append(_row(build, draw(st.sampled_from(ROWS)), draw(st.sampled_from(full)), shape))
    last = values[-1] if values[-1].producer is not None else build.relu(values[0])
    last = last if last.shape == shape else build.add(last, values[0])
    others = [value for value in values if value.producer is not None and value.shape == shape and value is not last]
    graph.outputs = [last, *(others[:1] if others and draw(st.booleans()) else ())]
    remove_dead(graph)
    assume(fault(trace(graph.nodes, graph.outputs)) is None)  # two results may have nothing to do with each other
    return graph


@st.composite
def products(draw: Callable[[Any], Any]) -> Graph:
    """A graph that is one contraction, with pointwise steps before it and behind it."""
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from(((), (2,), (2, 3))))
    rows, columns, depth = (draw(st.sampled_from(sizes)) for sizes in ((2, 17, 70), (3, 33, 80), (5, 16, 40)))
    graph = Graph("random")
    build = Builder(graph)
    x = build.input("x", (*batch, rows, depth), dtype)
    if draw(st.booleans()):
        x = build(draw(st.sampled_from(UNARY)), x)
    if draw(st.booleans()):
        x = build.mul(x, build.input("scale", (rows, depth), dtype))
    if draw(st.booleans()):
        y = build.matmul(x, build.input("y", (*batch, depth, columns), dtype))
    else:
        y = build.linear(x, build.input("w", (columns, depth), dtype), build.input("b", (columns,), dtype))
    others = [build.input("r", y.shape, dtype), build.input("c", (columns,), dtype), build.input("s", (rows, 1), dtype)]
    values = [y]
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            values.append(build(draw(st.sampled_from(UNARY)), values[-1]))
        else:
            values.append(build(draw(st.sampled_from(BINARY)), values[-1], draw(st.sampled_from(others))))
    graph.outputs = list(dict.fromkeys([values[-1], draw(st.sampled_from(values))]))
    return graph


@st.composite
def attentions(draw: Callable[[Any], Any]) -> Graph:
    """A graph that is attention, as one node or written out, with several masks, shared heads and other sizes."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, shared = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))
    length, source = draw(st.sampled_from((1, 3, 17))), draw(st.sampled_from((2, 33, 70)))
    depth, width = draw(st.sampled_from((4, 16, 20))), draw(st.sampled_from((1, 3, 16, 24)))
    graph = Graph("attention")
    build = Builder(graph)
    batch, heads = draw(st.sampled_from(((1, heads), (2, 1))))
    q = build.input("q", (batch, heads * shared, length, depth), dtype)
    k, v = (build.input(name, (batch, heads, source, size), dtype) for name, size in (("k", depth), ("v", width)))
    shapes = ((length, source), (heads * shared, length, source), (batch, 1, 1, source))
    mask = draw(st.sampled_from((None, torch.bool, dtype)))
    causal = draw(st.booleans()) and mask is None
    given = [] if mask is None else [build.input("mask", draw(st.sampled_from(shapes)), mask)]
    q = build.mul(q, 0.5) if draw(st.booleans()) else q
    if shared > 1 or draw(st.booleans()):
        options: dict[str, Any] = {"softcap": 2.0} if draw(st.booleans()) else {}
        op = "capped_attention" if options else "attention"
        options |= {"scale": 0.5, "is_causal": causal, "enable_gqa": shared > 1}
        y = build(op, q, k, v, *given, **options)
    else:
        scores = build.div(build.matmul(q, build.permute(k, dims=(0, 1, 3, 2))), 3.0)
        if given:
            scores = build.add(scores, *given) if mask is dtype else build.where(*given, scores, -1e4)
        y = build.matmul(build.softmax(scores, dim=3), v)
    y = build.permute(y, dims=(0, 2, 1, 3))
    graph.outputs = [build.silu(y) if draw(st.booleans()) else y]
    assume(trace(graph.nodes, graph.outputs).kind == "attention")
    return graph


@st.composite
def streams(draw: Callable[[Any], Any], dtype: torch.dtype | None = None) -> Graph:
    """A graph of two or three chains over the same axes, with nothing between them but what they read."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    shape = (draw(st.sampled_from((2, 3))), draw(st.sampled_from((1, 3, 17))), draw(st.sampled_from((4, 33, 100))))
    graph = Graph("streams")
    build = Builder(graph)
    both = [
        build.input("a", shape, dtype),
        build.input("b", shape[1:], dtype),
        build.input("c", (shape[0], 1, 1), dtype),
    ]
    reduces = draw(st.booleans())
    for name in "xyz"[: draw(st.integers(2, 3))]:
        order = draw(st.permutations((0, 1, 2)))
        x = build.input(name, tuple(shape[axis] for axis in order), dtype)
        x = build.permute(x, dims=tuple(order.index(axis) for axis in range(3)))
        for _ in range(draw(st.integers(1, 3))):
            if draw(st.booleans()):
                x = build(draw(st.sampled_from(UNARY)), x)
            else:
                x = build(draw(st.sampled_from(BINARY)), x, draw(st.sampled_from(both)))
        x = _row(build, draw(st.sampled_from(ROWS)), x, shape) if reduces else x
        order = draw(st.permutations((0, 1, 2)))
        graph.outputs.append(build.permute(x, dims=tuple(order)) if draw(st.booleans()) else x)
    return graph


def _row(build: Builder, op: str, x: Value, shape: tuple[int, ...]) -> Value:
    if op.endswith("softmax"):
        return build(op, x, dim=len(shape) - 1)
    return build(op, x, normalized_shape=shape[-1:], eps=1e-3)
