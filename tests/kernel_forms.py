"""The forms that kernels take, each as a small graph that is one region."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attention_forms import ATTENTION_FORMS
from kernel_forms_quantizing import (
    add_norm_quantize,
    add_norm_quantize_float8,
    add_norm_quantize_rows,
    add_norm_quantize_rows_float8,
    int8_to_int8,
    silu_mul_quantize,
    silu_mul_quantize_float8,
    silu_mul_quantize_rows,
    silu_mul_quantize_rows_float8,
)
from kernel_forms_sparse import (
    bitmap_as_weight,
    bitmap_of_codes,
    bitmap_weight,
    gate_and_up_bitmap,
    gate_and_up_sparse,
    int8_beside_sparse,
    sparse_24_weight,
    sparse_48_weight,
)
from loss_forms import cross_entropy, smooth_cross_entropy, weighted_cross_entropy
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value


class Form:
    """A graph in the making: ``x(2, 3)`` is an input, ``w(3)`` a weight drawn at random."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.graph = Graph("form")
        self.build = Builder(self.graph)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def x(self, *shape: Any, dtype: torch.dtype | None = None) -> Value:
        name = self.build.unique("xyzuvabcdefg"[len(self.graph.inputs)])
        self.build.release([name])
        return self.build.input(name, shape, dtype or self.dtype)

    def w(self, *shape: int) -> Value:
        tensor = torch.randn(shape, generator=self.generator).to(self.dtype)
        return self.build.parameter(self.build.unique("w"), tensor)

    def codes(self, *shape: int, dtype: torch.dtype = torch.int8, low: int = -127, high: int = 128) -> Value:
        """A weight of integers, or of floats, of 8 bits."""
        if dtype.is_floating_point:
            tensor = (torch.randn(shape, generator=self.generator) * 64).to(dtype)
        else:
            tensor = torch.randint(low, high, shape, generator=self.generator).to(dtype)
        return self.build.parameter(self.build.unique("q"), tensor, trainable=False)

    def scale(self, *shape: int) -> Value:
        tensor = (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype) / 64
        return self.build.parameter(self.build.unique("s"), tensor)


def swiglu(f: Form, rows: Any, columns: int) -> Any:
    return f.build.mul(f.build.silu(f.x(rows, columns)), f.x(rows, columns))


def geglu(f: Form, rows: Any, columns: int) -> Any:
    return f.build.mul(f.build.gelu(f.x(rows, columns)), f.x(rows, columns))


def broadcast(f: Form, rows: Any, columns: int) -> Any:
    """Along rows and along columns, in three axes."""
    b, x = f.build, f.x(2, rows, columns)
    return b.add(b.mul(b.mul(b.silu(x), f.x(2, rows, columns)), f.w(columns)), f.w(2, 1, 1))


def mish_batch_norm(f: Form, rows: Any, columns: int) -> Any:
    x = f.x(2, 5, columns)
    variance = f.build.parameter("var", torch.rand(5, generator=f.generator).to(f.dtype) + 0.5, "buffer")
    return f.build.mish(f.build.batch_norm(x, f.w(5), f.w(5), f.w(5), variance, eps=1e-3))


def softmax(f: Form, rows: Any, columns: int) -> Any:
    return f.build.softmax(f.x(rows, columns), dim=1)


def masked_softmax(f: Form, rows: Any, columns: int) -> Any:
    b, x = f.build, f.x(2, rows, columns)
    hidden = f.x(rows, columns, dtype=torch.bool)
    return b.softmax(b.where(hidden, float("-inf"), b.mul(x, 0.125)), dim=2)


def softmax_of_columns(f: Form, rows: Any, columns: int) -> Any:
    return f.build.softmax(f.x(columns, rows), dim=0)


def log_softmax(f: Form, rows: Any, columns: int) -> Any:
    return f.build.log_softmax(f.x(rows, columns), dim=1)


def layer_norm(f: Form, rows: Any, columns: int) -> Any:
    return f.build.layer_norm(f.x(rows, columns), f.w(columns), f.w(columns), normalized_shape=(columns,))


def gated_rms_norm(f: Form, rows: Any, columns: int) -> Any:
    """What stands before the norm and behind it is in the kernel."""
    b, x = f.build, f.x(2, rows, columns)
    y = b.rms_norm(b.mul(x, 0.5), f.w(columns), normalized_shape=(columns,), eps=1e-6)
    return b.mul(y, b.silu(f.x(2, rows, columns)))


def add_rms_norm(f: Form, rows: Any, columns: int) -> Any:
    """Two results: the stream, and its norm."""
    h = f.build.add(f.x(rows, columns), f.x(rows, columns))
    return h, f.build.rms_norm(h, f.w(columns), normalized_shape=(columns,), eps=1e-6)


def plain_rms_norm(f: Form, rows: Any, columns: int) -> Any:
    """Without an ``eps``: it is that of the type."""
    return f.build.rms_norm(f.build.mul(f.x(rows, columns), 1e-3), normalized_shape=(columns,))


def group_norm_silu(f: Form, rows: Any, columns: int) -> Any:
    return f.build.silu(f.build.group_norm(f.x(2, 6, columns), f.w(6), f.w(6), num_groups=2))


def deviation(f: Form, rows: Any, columns: int) -> Any:
    """A result for each row only, and one for each entry."""
    b, x = f.build, f.x(rows, columns)
    centred = b.sub(x, b.mean(x, dims=(1,), keepdim=True))
    return b.std(x, dims=(1,)), b.div(centred, b.add(b.std(x, dims=(1,), keepdim=True), 1e-3))


def total(f: Form, rows: Any, columns: int) -> Any:
    return f.build.sum(f.build.abs(f.x(rows, columns)), dims=None)


def turned(f: Form, rows: Any, columns: int) -> Any:
    """Through a reshape that splits an axis and a permutation: heads of a layer, scaled and laid out anew."""
    b, x = f.build, f.x(rows, 4 * columns)
    heads = b.permute(b.reshape(b.tanh(x), shape=(rows, 4, columns)), dims=(1, 0, 2))
    return b.mul(heads, f.w(4, 1, columns))


def number(f: Form, rows: Any, columns: int) -> Any:
    """Scalars among the operands."""
    return f.build.maximum(f.build.mul(f.x(rows, columns), f.x()), f.x(1))


def rotary(f: Form, rows: Any, columns: int) -> Any:
    """A rotary position code: halves are laid end to end the other way round."""
    b, x = f.build, f.x(2, rows, 2 * columns)
    low, high = f.x(2, rows, columns), f.x(2, rows, columns)
    turned = b.concat(b.neg(high), low, dim=2)
    return b.add(b.mul(x, f.w(rows, 2 * columns)), b.mul(turned, f.w(rows, 2 * columns)))


def joined(f: Form, rows: Any, columns: int) -> Any:
    """Channels of three values, end to end, behind activations."""
    b = f.build
    parts = [b.relu(f.x(2, 3, columns)), b.sigmoid(f.x(2, 5, columns)), f.x(2, 2, columns)]
    return b.mul(b.concat(*parts, dim=1), f.w(10, 1))


def rotary_inside(f: Form, rows: Any, columns: int) -> Any:
    """Halves are cut out of what the kernel computes, and laid end to end the other way round."""
    b, x = f.build, f.build.mul(f.x(2, rows, 2 * columns), f.w(2 * columns))
    low = b.slice(x, dim=2, start=0, end=columns)
    high = b.slice(x, dim=2, start=columns, end=2 * columns)
    turned = b.concat(b.neg(high), low, dim=2)
    return b.add(b.mul(x, f.w(rows, 2 * columns)), b.mul(turned, f.w(rows, 2 * columns)))


def shifted(f: Form, rows: Any, columns: int) -> Any:
    """Differences of neighbours, padded, each with the one that it faces; every other entry, and one row."""
    b, x = f.build, f.build.tanh(f.x(3, 5, 2 * columns))
    later, earlier = (b.slice(x, dim=2, start=s, end=s + 2 * columns - 1) for s in (1, 0))
    padded = b.pad(b.sub(later, earlier), pads=((0, 0), (0, 0), (1, 0)), value=0.5)
    faced = b.add(padded, b.flip(b.silu(padded), dims=(1, 2)))
    entry = b.unsqueeze(b.select(b.neg(faced), dim=2, index=3), dim=2)
    return b.mul(b.slice(faced, dim=2, start=1, end=2 * columns, step=2), entry)


def depthwise(f: Form, rows: Any, columns: int) -> Any:
    """Padding on one side, a window for each channel, bias and activation."""
    b = f.build
    x = b.pad(f.x(2, 6, 7, columns), pads=((0, 0), (0, 0), (0, 1), (2, 0)))
    y = b.conv(x, f.w(6, 1, 3, 3), f.w(6), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=6)
    return b.hardswish(y)


def pooled(f: Form, rows: Any, columns: int) -> Any:
    """The greatest of each window, of what is computed before."""
    b = f.build
    x = b.mul(f.x(2, 3, 9, columns), f.w(3, 1, 1))
    return b.relu(b.max_pool(x, kernel_size=(3, 2), stride=(2, 2), padding=(1, 1), dilation=(1, 1), ceil_mode=True))


def averaged(f: Form, rows: Any, columns: int) -> Any:
    """Means of windows, of those entries that are there."""
    options = {"kernel_size": (3,), "stride": (2,), "padding": (1,), "count_include_pad": False}
    return f.build.add(f.build.avg_pool(f.x(2, 3, columns), **options), f.w(3, 1))


def squeezed(f: Form, rows: Any, columns: int) -> Any:
    """A mean over all of each channel, and a gate of it."""
    b, x = f.build, f.x(2, 3, 5, columns)
    return b.mul(x, b.sigmoid(b.adaptive_avg_pool(x, output_size=(1, 1))))


def convolved(f: Form, rows: Any, columns: int) -> Any:
    """A convolution with groups as a product over windows, batch norm and activation behind it."""
    b = f.build
    y = b.conv(f.x(2, 6, 6, 7), f.w(10, 3, 3, 2), None, stride=(2, 1), padding=(1, 1), dilation=(1, 1), groups=2)
    variance = b.parameter("var", torch.rand(10, generator=f.generator).to(f.dtype) + 0.5, "buffer")
    return b.relu(b.batch_norm(y, f.w(10), f.w(10), f.w(10), variance, eps=1e-3))


def written_out_norm(f: Form, rows: Any, columns: int) -> Any:
    """A layer norm as graphs of older exporters have it, node by node."""
    b, x = f.build, f.x(rows, columns)
    centred = b.sub(x, b.mean(x, dims=(1,), keepdim=True))
    variance = b.mean(b.mul(centred, centred), dims=(1,), keepdim=True)
    return b.add(b.mul(b.div(centred, b.sqrt(b.add(variance, 1e-3))), f.w(columns)), f.w(columns))


def instance_norm_relu(f: Form, rows: Any, columns: int) -> Any:
    return f.build.relu(f.build.instance_norm(f.x(2, 3, rows, columns), f.w(3), f.w(3), eps=1e-3))


def embedded_norm(f: Form, rows: Any, columns: int) -> Any:
    """Two tables, looked up by token and by place, and the norm of what they hold together."""
    b = f.build
    token = b.embedding(f.w(11, columns), f.x(2, rows, dtype=torch.int64))
    h = b.add(token, b.embedding(f.w(7, columns), f.x(rows, dtype=torch.int64)))
    return h, b.layer_norm(h, f.w(columns), f.w(columns), normalized_shape=(columns,))


def dense_gelu_residual(f: Form, rows: Any, columns: int) -> Any:
    """Bias, activation and residual behind the product."""
    y = f.build.gelu(f.build.linear(f.x(rows, 48), f.w(columns, 48), f.w(columns)))
    return f.build.add(y, f.x(rows, columns))


def dense_in_heads(f: Form, rows: Any, columns: int) -> Any:
    """What a product gives, in heads, scaled, and laid out anew."""
    b = f.build
    y = b.linear(f.x(2, rows, 48), f.w(4 * columns, 48))
    return b.mul(b.permute(b.reshape(y, shape=(2, rows, 4, columns)), dims=(0, 2, 1, 3)), 0.125)


def gated_product(f: Form, rows: Any, columns: int) -> Any:
    """An activation of the factor before the product."""
    x, y = f.x(rows, columns), f.x(rows, columns)
    return f.build.linear(f.build.mul(f.build.silu(x), y), f.w(24, columns), f.w(24))


def scores(f: Form, rows: Any, columns: int) -> Any:
    """A product for each of several heads, scaled and masked."""
    b, x, y = f.build, f.x(2, 3, rows, 48), f.x(2, 3, columns, 48)
    product = b.mul(b.matmul(x, b.permute(y, dims=(0, 1, 3, 2))), 48**-0.5)
    return b.where(f.x(rows, columns, dtype=torch.bool), -1e4, product)


def with_itself(f: Form, rows: Any, columns: int) -> Any:
    x = f.x(rows, columns)
    return f.build.matmul(x, f.build.permute(x, dims=(1, 0)))


def deep(columns: int) -> tuple[int, int]:
    """What products of few bits go over, and how much of it shares a scale: as much as in a model, or little."""
    return (columns, 128) if columns >= 512 else (96, 32)


def int8_weight(f: Form, rows: Any, columns: int) -> Any:
    """A scale for each output, bias and activation behind the product."""
    b, depth = f.build, deep(columns)[0]
    w = b.dequantize(f.codes(columns, depth), f.scale(columns), axis=0)
    return b.silu(b.linear(f.x(rows, depth), w, f.w(columns)))


def int8_groups(f: Form, rows: Any, columns: int) -> Any:
    """A scale and a zero point for each group of inputs, the weight stored [inputs, outputs]."""
    b, (depth, group) = f.build, deep(columns)
    shapes = (depth, columns), (depth // group, columns)
    q, zero = (f.codes(*shape, dtype=torch.uint8, low=0, high=256) for shape in shapes)
    return b.matmul(f.x(2, rows, depth), b.dequantize(q, f.scale(*shapes[1]), zero, axis=0, block_size=group))


def int4(f: Form, columns: int) -> Value:
    """Two codes a byte: of each group the first half in the lower bits, with a scale and a zero point."""
    b, (depth, group) = f.build, deep(columns)
    q = b.unpack(f.codes(columns, depth // group, group // 2, dtype=torch.uint8, low=0, high=256), base=16, count=2)
    q = b.reshape(q, shape=(columns, depth // group, group // 2, 2))
    q = b.reshape(b.permute(q, dims=(0, 1, 3, 2)), shape=(columns, depth))
    zero = f.codes(columns, depth // group, dtype=torch.uint8, low=0, high=16)
    return b.dequantize(q, f.scale(columns, depth // group), zero, axis=1, block_size=group)


def int4_weight(f: Form, rows: Any, columns: int) -> Any:
    w = int4(f, columns)
    return f.build.add(f.build.linear(f.x(rows, deep(columns)[0]), w, f.w(columns)), f.x(rows, columns))


def int4_neighbours(f: Form, rows: Any, columns: int) -> Any:
    """Two neighbours a byte, and a scale for each output."""
    b, depth = f.build, deep(columns)[0]
    q = b.unpack(f.codes(columns, depth // 2, dtype=torch.uint8, low=0, high=256), base=16, count=2)
    w = b.dequantize(q, f.scale(columns), f.codes(columns, dtype=torch.uint8, low=0, high=16), axis=0)
    return b.linear(f.x(rows, depth), w)


def int2_weight(f: Form, rows: Any, columns: int) -> Any:
    """Four neighbours a byte, of which 1 is taken, and a scale for each output."""
    b, depth = f.build, deep(columns)[0]
    q = b.unpack(f.codes(columns, depth // 4, dtype=torch.uint8, low=0, high=256), base=4, count=4)
    w = b.mul(b.sub(b.cast(q, dtype=f.dtype), 1.0), b.unsqueeze(f.scale(columns), dim=1))
    return b.linear(f.x(rows, depth), w)


def int8_both(f: Form, rows: Any, columns: int) -> Any:
    """Integers on both sides: a scale for each row, found when it runs, and for each output."""
    b, depth = f.build, deep(columns)[0]
    x = b.mul(b.cast(f.x(rows, depth, dtype=torch.int8), dtype=f.dtype), f.x(rows, 1))
    w = b.dequantize(f.codes(columns, depth), f.scale(columns), axis=0)
    return b.gelu(b.linear(x, w, f.w(columns)))


def int8_both_static(f: Form, rows: Any, columns: int) -> Any:
    """One scale and a zero point for all of the activation."""
    b, depth = f.build, deep(columns)[0]
    zero = f.codes(dtype=torch.uint8, low=100, high=140)
    x = b.dequantize(f.x(rows, depth, dtype=torch.uint8), f.scale(), zero)
    return b.linear(x, b.dequantize(f.codes(columns, depth), f.scale(columns), axis=0), f.w(columns))


def int8_both_groups(f: Form, rows: Any, columns: int) -> Any:
    b, (depth, group) = f.build, deep(columns)
    x = b.mul(b.cast(f.x(rows, depth, dtype=torch.int8), dtype=f.dtype), f.x(rows, 1))
    scale = f.scale(columns, depth // group)
    return b.linear(x, b.dequantize(f.codes(columns, depth), scale, axis=1, block_size=group))


def float8_weight(f: Form, rows: Any, columns: int) -> Any:
    b, depth = f.build, deep(columns)[0]
    w = b.dequantize(f.codes(depth, columns, dtype=torch.float8_e4m3fn), f.scale(columns), axis=1)
    return b.matmul(f.x(rows, depth), w)


def float8_both(f: Form, rows: Any, columns: int) -> Any:
    b, depth = f.build, deep(columns)[0]
    x = b.dequantize(f.x(rows, depth, dtype=torch.float8_e5m2), f.scale())
    w = b.dequantize(f.codes(columns, depth, dtype=torch.float8_e4m3fn), f.scale(columns), axis=0)
    return b.relu(b.linear(x, w, f.w(columns)))


def float8_pair(f: Form, rows: Any, columns: int) -> Any:
    """Floats of 8 bits on both sides, with a scale for each row and each output."""
    b, depth = f.build, deep(columns)[0]
    x = b.mul(b.cast(f.x(rows, depth, dtype=torch.float8_e4m3fn), dtype=f.dtype), f.x(rows, 1))
    w = b.dequantize(f.codes(columns, depth, dtype=torch.float8_e4m3fn), f.scale(columns), axis=0)
    return b.linear(x, w, f.w(columns))


def float8_groups(f: Form, rows: Any, columns: int) -> Any:
    """With a scale for each group of inputs, too."""
    b, (depth, group) = f.build, deep(columns)
    x = b.dequantize(f.x(rows, depth, dtype=torch.float8_e4m3fn), f.scale())
    q = f.codes(columns, depth, dtype=torch.float8_e4m3fn)
    return b.silu(b.linear(x, b.dequantize(q, f.scale(columns, depth // group), axis=1, block_size=group)))


def gate_and_up(f: Form, rows: Any, columns: int) -> Any:
    """Two products of one factor, read once."""
    b, depth = f.build, deep(columns)[0]
    x = f.x(2, rows, depth)
    return b.mul(b.silu(b.linear(x, f.w(columns, depth))), b.linear(x, f.w(columns, depth)))


def gate_and_up_int4(f: Form, rows: Any, columns: int) -> Any:
    b, x = f.build, f.x(rows, deep(columns)[0])
    return b.mul(b.silu(b.linear(x, int4(f, columns))), b.linear(x, int4(f, columns)))


def three_products(f: Form, rows: Any, columns: int) -> Any:
    """Queries, keys and values: results beside one another."""
    b, depth = f.build, deep(columns)[0]
    x = f.x(rows, depth)
    query, key, value = (b.linear(x, f.w(columns, depth), f.w(columns)) for _ in range(3))
    return b.mul(query, 0.125), key, b.add(value, b.mul(query, key))


def grouped_queries(f: Form, rows: Any, columns: int) -> Any:
    """Queries, keys and values of a layer with fewer heads for the latter: columns of three widths, in heads."""
    b, depth = f.build, deep(columns)[0]
    x, found = f.x(2, rows, depth), []
    for heads, width, factor in ((3, columns, 0.125), (1, columns, 0.5), (2, 7, 1.5)):
        y = b.linear(x, f.w(heads * width, depth), f.w(heads * width))
        y = b.permute(b.reshape(y, shape=(2, rows, heads, width)), dims=(0, 2, 1, 3))
        found.append(b.mul(y, factor))
    return tuple(found)


def grouped_queries_int8(f: Form, rows: Any, columns: int) -> Any:
    """Two products of few bits with columns of their own, one of which is gated."""
    b, (depth, group) = f.build, deep(columns)

    def weight(outputs: int) -> Value:
        scale = f.scale(outputs, depth // group)
        return b.dequantize(f.codes(outputs, depth), scale, axis=1, block_size=group)

    x = f.x(rows, depth)
    gate, up = (b.linear(x, weight(2 * columns)) for _ in range(2))
    return b.mul(b.silu(gate), up), b.linear(x, weight(9), f.w(9))


FORMS: Mapping[str, Callable[[Form, Any, int], Any]] = {
    form.__name__: form
    for form in (
        swiglu, geglu, broadcast, mish_batch_norm, softmax, masked_softmax, softmax_of_columns, log_softmax,
        layer_norm, gated_rms_norm, add_rms_norm, plain_rms_norm, group_norm_silu, instance_norm_relu,
        written_out_norm, deviation, total, turned, number, rotary, joined, rotary_inside, shifted, depthwise, pooled,
        averaged, squeezed, convolved, embedded_norm, cross_entropy, smooth_cross_entropy, weighted_cross_entropy,
        dense_gelu_residual, dense_in_heads, gated_product, scores,
        with_itself,
        int8_weight, int8_groups, int4_weight, int4_neighbours, int2_weight, int8_both,
        sparse_24_weight, sparse_48_weight, gate_and_up_sparse, bitmap_weight, gate_and_up_bitmap,
        bitmap_of_codes, bitmap_as_weight, int8_beside_sparse, add_norm_quantize, silu_mul_quantize, int8_to_int8,
        add_norm_quantize_rows, silu_mul_quantize_rows, float8_pair, float8_groups,
        add_norm_quantize_float8, silu_mul_quantize_float8, add_norm_quantize_rows_float8,
        silu_mul_quantize_rows_float8,
        int8_both_static, int8_both_groups, float8_weight, float8_both, gate_and_up, gate_and_up_int4,
        three_products, grouped_queries, grouped_queries_int8,
        *ATTENTION_FORMS,
    )
}  # fmt: skip


def form_graph(name: str, dtype: torch.dtype, rows: Any = 5, columns: int = 37) -> Graph:
    """One of FORMS as a graph."""
    form = Form(dtype)
    found = FORMS[name](form, rows, columns)
    form.graph.outputs = list(found) if isinstance(found, tuple) else [found]
    return form.graph
