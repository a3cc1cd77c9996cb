"""Random graphs that are one region: pointwise steps with broadcasting, at other places of axes, reductions over the
last axis, products, and windows."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, reject
from hypothesis import strategies as st

from regauge.backends.triton_kernels.sparsity import dense_of, stored, stored_bitmap
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.errors import FusionError
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.tracing import trace
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
    moves = draw(st.booleans())
    reduces = not exact and len(shape) > 1 and draw(st.booleans())
    values = [build.input("x0", shape, dtype)]
    for number in range(draw(st.integers(1, 3))):
        own = [size if draw(st.booleans()) else 1 for size in shape]
        values.append(build.input(f"x{number + 1}", own[draw(st.integers(0, len(own) - 1)) :], dtype))

    def pick() -> Value:
        return draw(st.sampled_from(values))

    kinds = ("unary", "binary", "number", "choice", *(("reduce", "row") if reduces else ()), *(("moved",) * moves))
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(kinds))
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
        elif kind == "moved":
            values.append(_moved(draw, build, draw(st.sampled_from(full))))
    last = values[-1] if values[-1].producer is not None else build.relu(values[0])
    last = last if last.shape == shape else build.add(last, values[0])
    others = [value for value in values if value.producer is not None and value.shape == shape and value is not last]
    graph.outputs = [last, *(others[:1] if others and draw(st.booleans()) else ())]
    remove_dead(graph)
    assume(fault(trace(graph.nodes, graph.outputs)) is None)  # two results may have nothing to do with each other
    return graph


def _moved(draw: Callable[[Any], Any], build: Builder, x: Value) -> Value:
    """The value at other places of an axis: its parts the other way round, shifted, backwards, or taken apart."""
    axis = draw(st.integers(0, x.rank - 1))
    size = int(x.shape[axis])
    way = draw(st.sampled_from(("flip", "split", *(("turn", "shift", "steps") if size > 1 else ()))))
    place = draw(st.integers(1, size - 1)) if size > 1 else 0
    if way == "flip":
        return build.flip(x, dims=(axis,))
    if way == "split":
        shape = (*x.shape[:axis], size, 1, *x.shape[axis + 1 :])
        return build.reshape(build.neg(build.reshape(x, shape=shape)), shape=x.shape)
    if way == "shift":
        pads = [(0, 0)] * x.rank
        pads[axis] = (place, 0)
        cut = build.slice(x, dim=axis, start=0, end=size - place)
        return build.pad(cut, pads=tuple(pads), value=draw(st.sampled_from((0, 1.5))))
    low, high = (build.slice(x, dim=axis, start=a, end=b) for a, b in ((0, place), (place, size)))
    if way == "turn":
        return build.concat(build.neg(high), low, dim=axis)
    pads = [(0, 0)] * x.rank
    pads[axis] = (0, size - -(-size // 2))
    return build.pad(build.slice(x, dim=axis, start=0, end=size, step=2), pads=tuple(pads), value=0)


@st.composite
def windows(draw: Callable[[Any], Any]) -> Graph:
    """A graph that is one region around windows: a pool or a convolution, and pointwise steps."""
    dtype = draw(st.sampled_from(DTYPES))
    channels, size = draw(st.sampled_from((1, 2, 6))), (draw(st.sampled_from((3, 8))), draw(st.sampled_from((5, 21))))
    graph = Graph("random")
    build = Builder(graph)
    x = build.input("x", (2, channels, *size), dtype)
    if draw(st.booleans()):
        x = build.mul(build(draw(st.sampled_from(UNARY)), x), build.input("scale", (channels, 1, 1), dtype))
    if draw(st.booleans()):
        x = build.pad(x, pads=((0, 0), (0, 0), (0, 1), (1, 0)), value=draw(st.sampled_from((0, -1.0))))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    options = {"stride": stride, "padding": tuple(draw(st.integers(0, n // 2)) for n in kernel)}
    way = draw(st.sampled_from(("max", "mean", "each", "all")))
    if way == "max":
        y = build.max_pool(x, kernel_size=kernel, ceil_mode=draw(st.booleans()), **options)
    elif way == "mean":
        y = build.avg_pool(x, kernel_size=kernel, count_include_pad=draw(st.booleans()), **options)
    else:
        groups = channels if way == "each" else 1
        weight = build.input("w", (channels * 2, channels // groups, *kernel), dtype)
        dilation = (1, draw(st.integers(1, 2))) if kernel[1] < 3 else (1, 1)
        bias = build.input("b", (channels * 2,), dtype) if draw(st.booleans()) else None
        y = build.conv(x, weight, bias, groups=groups, dilation=dilation, **options)
    y = build(draw(st.sampled_from(UNARY)), y) if draw(st.booleans()) else y
    graph.outputs = [build.add(y, build.input("r", y.shape[-1:], dtype)) if draw(st.booleans()) else y]
    assume(fault(trace(graph.nodes, graph.outputs)) is None)
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
def few_bit_products(draw: Callable[[Any], Any]) -> Graph:
    """One or two products of one factor with weights of few bits: any storage, scales and zero points."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns, group = (draw(st.sampled_from(sizes)) for sizes in ((1, 17, 70), (3, 33), (8, 16, 20, 32)))
    depth = group * draw(st.sampled_from((1, 3)))
    build = Builder(Graph("random"))
    kind = draw(st.sampled_from(("float", "rows", "whole", "float8")))
    if kind == "float":
        x = build.input("x", (rows, depth), dtype)
    else:
        codes = torch.float8_e4m3fn if kind == "float8" else draw(st.sampled_from((torch.int8, torch.uint8)))
        x = build.input("x", (rows, depth), codes)
        if kind == "rows" and codes == torch.int8:
            x = build.mul(build.cast(x, dtype=dtype), build.input("t", (rows, 1), dtype))
        else:
            x = build.dequantize(x, build.parameter("t", torch.tensor(0.125, dtype=dtype)))
    products = [
        _few_bit_product(draw, build, x, columns, group, dtype, place) for place in range(draw(st.integers(1, 2)))
    ]
    values = [build.add(products[0], build.input("r", (rows, columns), dtype)), *products[1:]]
    build.graph.outputs = [build.mul(build.silu(values[0]), values[1])] if len(values) > 1 else values
    try:
        trace(build.graph.nodes, build.graph.outputs)  # type: ignore[arg-type]
    except FusionError:  # their groups are parts of one another in no way
        reject()
    return build.graph


def _few_bit_product(
    draw: Callable[[Any], Any], build: Builder, x: Value, columns: int, group: int, dtype: torch.dtype, place: int
) -> Value:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    depth = int(x.shape[1])
    storage = draw(st.sampled_from(("int8", "uint8", "float8", "int4", "sparse", "sparse int8", "bitmap")))
    if storage == "bitmap" and depth % 32 == 0:
        weight = torch.randn(columns, depth, generator=generator).to(dtype)
        return build.linear(x, _bitmap(build, weight * (weight > draw(st.sampled_from((0.3, 9.0)))), place))
    if storage == "sparse":
        return build.linear(x, _sparse(draw, build, torch.randn(columns, depth, generator=generator).to(dtype), place))
    turned = storage not in ("int4", "sparse int8") and draw(st.booleans())
    per = draw(st.sampled_from(("tensor", "output", "group")))
    shape = (columns, depth // 2) if storage == "int4" else (depth, columns) if turned else (columns, depth)
    q = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    if storage == "int8":
        q = (q.int() - 128).to(torch.int8)
    elif storage == "float8":
        q = (torch.randn(shape, generator=generator) * 50).to(torch.float8_e5m2)
    if storage == "sparse int8":
        codes: Value = _sparse(draw, build, q.view(torch.int8), place)
    else:
        codes = build.parameter(f"q{place}", q, trainable=False)
    if storage == "int4":
        codes = build.unpack(codes, base=16, count=2)
        if draw(st.booleans()):  # the halves of a row, or of a group
            width = (group if per == "group" else draw(st.sampled_from((depth, group)))) // 2
            halves = build.reshape(codes, shape=(columns, depth // 2 // width, width, 2))
            codes = build.reshape(build.permute(halves, dims=(0, 1, 3, 2)), shape=(columns, depth))
    outputs = 1 if turned else 0
    grouped = (depth // group, columns) if turned else (columns, depth // group)
    scales = {"tensor": (), "output": (columns,), "group": grouped}[per]
    axes = {"tensor": {}, "output": {"axis": outputs}, "group": {"axis": 1 - outputs, "block_size": group}}[per]
    scale = build.parameter(f"s{place}", ((torch.rand(scales, generator=generator) + 0.5) / 512).to(dtype))
    zero = None
    if storage != "float8" and draw(st.booleans()):
        numbers = torch.randint(0, 16, scales, generator=generator).to(q.dtype)
        zero = build.parameter(f"z{place}", numbers, "buffer")
    w = build.dequantize(codes, scale, zero, **axes)
    return build.matmul(x, w) if turned else build.linear(x, w)


def _sparse(draw: Callable[[Any], Any], build: Builder, weight: torch.Tensor, place: int) -> Value:
    """What is left of a weight where at most so many of so many neighbours are stored."""
    depth = weight.shape[1]
    patterns = [(keep, of) for keep, of in ((1, 2), (2, 4), (1, 4), (4, 8), (3, 8)) if depth % of == 0]
    keep, of = draw(st.sampled_from(patterns))
    there = torch.rand(len(weight), depth // of, of).argsort(2) < keep
    values, mask = stored(weight * there.flatten(1), keep, of)
    read = build.parameter(f"v{place}", values, trainable=False), build.parameter(f"m{place}", mask, "buffer")
    return dense_of(build, *read, keep, of)


def _bitmap(build: Builder, weight: torch.Tensor, place: int) -> Value:
    """A weight of which what is not zero is stored, and a bit for each place."""
    values, mask, starts = stored_bitmap(weight)
    words = build.parameter(f"m{place}", mask, "buffer"), build.parameter(f"b{place}", starts, "buffer")
    return build.bitmap(build.parameter(f"v{place}", values, trainable=False), *words, of=32)


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
    shape = (batch, heads, source)
    k, v = (_read_back(draw, build, name, (*shape, size), dtype) for name, size in (("k", depth), ("v", width)))
    shapes = ((length, source), (heads * shared, length, source), (batch, 1, 1, source))
    mask = draw(st.sampled_from((None, torch.bool, dtype)))
    causal = draw(st.booleans()) and mask is None
    given = [] if mask is None else [build.input("mask", draw(st.sampled_from(shapes)), mask)]
    q = build.mul(q, 0.5) if draw(st.booleans()) else q
    if shared > 1 or draw(st.booleans()):
        options: dict[str, Any] = {"softcap": 2.0} if draw(st.booleans()) else {}
        op = "capped_attention" if options else "attention"
        options |= {"scale": 0.5, "is_causal": causal, "enable_gqa": shared > 1}
        options["lower_right"] = causal and draw(st.booleans())
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


def _of_latents(draw: Callable[[Any], Any], build: Builder, name: str, shape: tuple[int, ...], dtype: Any) -> Value:
    """Keys or values of heads that are products with latents, of each head or of all, with a bias or a scale or not."""
    batch, heads, source, size = shape
    own, rank = draw(st.sampled_from((1, heads))), draw(st.sampled_from((1, 8, 17)))
    latents = build.input(f"{name}_latents", (batch, own, source, rank), dtype)
    found = build.matmul(latents, build.input(f"{name}_weight", (heads, rank, size), dtype))
    if draw(st.booleans()):
        found = build.add(found, build.input(f"{name}_bias", (heads, 1, size), dtype))
    return build.mul(found, build.input(f"{name}_scale", (size,), dtype)) if draw(st.booleans()) else found


def _read_back(draw: Callable[[Any], Any], build: Builder, name: str, shape: tuple[int, ...], dtype: Any) -> Value:
    """Keys or values as they are, products with latents, or of codes of any number of bits, scaled and shifted by place
    or by channel."""
    *outer, source, size = shape
    bits = draw(st.sampled_from((0, 0, 1, 2, 4, 8, -8)))
    if bits == 1:
        return _of_latents(draw, build, name, shape, dtype)
    if not bits or size * bits % 8:
        return build.input(name, shape, dtype)
    stored = build.input(name, (*outer, source, size * abs(bits) // 8), torch.int8 if bits < 0 else torch.uint8)
    codes = stored if abs(bits) == 8 else build.unpack(stored, base=2**bits, count=8 // bits)
    x = build.mul(build.cast(codes, dtype=dtype), 2.0 ** (1 - abs(bits)))
    ranges = ((*outer, source, 1), (size,), (*outer, source, size))
    for step in range(draw(st.integers(0, 3))):
        other = build.input(f"{name}_{step}", draw(st.sampled_from(ranges)), dtype)
        x = build(draw(st.sampled_from(("mul", "add", "sub"))), x, other)
    return x


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
