"""The forms that kernels take, each as a small graph that is one region."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

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


def causal_attention(f: Form, rows: Any, columns: int) -> Any:
    """Two heads of queries share one of keys and values."""
    q, k, v = f.x(2, 4, rows, 128), f.x(2, 2, columns, 128), f.x(2, 2, columns, 128)
    return f.build.attention(q, k, v, scale=128**-0.5, is_causal=True, enable_gqa=True)


def masked_attention(f: Form, rows: Any, columns: int) -> Any:
    """Heads whose sizes are no powers of two, and other ones of values."""
    q, k, v = f.x(2, 3, rows, 80), f.x(2, 3, columns, 80), f.x(2, 3, columns, 24)
    return f.build.attention(q, k, v, f.x(rows, columns, dtype=torch.bool), scale=0.2)


def biased_attention(f: Form, rows: Any, columns: int) -> Any:
    """Written out, with a scale before, a bias of each head between, and a gate behind."""
    b, q, k, v = f.build, f.x(2, rows, 3, 64), f.x(2, columns, 3, 64), f.x(2, columns, 3, 64)
    q = b.permute(b.mul(q, 0.125), dims=(0, 2, 1, 3))
    scores = b.add(b.matmul(q, b.permute(k, dims=(0, 2, 3, 1))), f.x(3, rows, columns))
    mixed = b.matmul(b.softmax(scores, dim=3), b.permute(v, dims=(0, 2, 1, 3)))
    return b.mul(b.reshape(b.permute(mixed, dims=(0, 2, 1, 3)), shape=(2, rows, 192)), b.sigmoid(f.x(2, rows, 192)))


def rotary_attention(f: Form, rows: Any, columns: int) -> Any:
    """Queries and keys are turned in the kernel, by tables of as many positions as there are of each."""

    def rotated(size: int, heads: int) -> Value:
        b, x, low, high = f.build, *(f.x(2, heads, size, width) for width in (64, 32, 32))
        turned = b.concat(b.neg(high), low, dim=3)
        return b.add(b.mul(x, f.x(size, 64)), b.mul(turned, f.x(size, 64)))

    q, k = rotated(rows, 4), rotated(columns, 2)
    return f.build.attention(q, k, f.x(2, 2, columns, 64), scale=0.125, enable_gqa=True)


def capped_attention(f: Form, rows: Any, columns: int) -> Any:
    q, k, v = f.x(3, rows, 64), f.x(3, columns, 64), f.x(3, columns, 64)
    return f.build.capped_attention(q, k, v, f.x(rows, columns), scale=0.2, softcap=5.0)


def decoding_attention(f: Form, rows: Any, columns: int) -> Any:
    """One query for each head, with a mask of what a cache holds."""
    q, k, v = f.x(2, 4, 1, 64), f.x(2, 4, columns, 64), f.x(2, 4, columns, 64)
    return f.build.attention(q, k, v, f.x(2, 1, 1, columns, dtype=torch.bool), scale=0.2)


def latent_attention(f: Form, rows: Any, columns: int) -> Any:
    """Keys and values are the same latents, which all heads share."""
    q, latents = f.x(2, 4, rows, 64), f.x(2, 1, columns, 64)
    return f.build.attention(q, latents, latents, scale=0.125)


def quantized_cache_attention(f: Form, rows: Any, columns: int) -> Any:
    """Keys and values as codes of 8 bits, with a range for each position and head, as ``kv-quantize`` has them."""

    def read_back() -> Value:
        b, ranges = f.build, [f.x(2, 2, columns, 1) for _ in range(2)]
        codes = b.cast(f.x(2, 2, columns, 64, dtype=torch.uint8), dtype=f.dtype)
        return b.add(b.mul(b.mul(codes, ranges[0]), 0.01), ranges[1])

    q = f.x(2, 4, 1, 64)
    return f.build.attention(q, read_back(), read_back(), scale=0.125, enable_gqa=True)


FORMS: Mapping[str, Callable[[Form, Any, int], Any]] = {
    form.__name__: form
    for form in (
        swiglu, geglu, broadcast, mish_batch_norm, softmax, masked_softmax, softmax_of_columns, log_softmax, layer_norm,
        gated_rms_norm, add_rms_norm, plain_rms_norm, group_norm_silu, deviation, total, turned,
        number, rotary, joined, dense_gelu_residual, dense_in_heads, gated_product, scores,
        with_itself, causal_attention, masked_attention, biased_attention, rotary_attention, capped_attention,
        decoding_attention, latent_attention, quantized_cache_attention,
    )
}  # fmt: skip


def form_graph(name: str, dtype: torch.dtype, rows: Any = 5, columns: int = 37) -> Graph:
    """One of FORMS as a graph."""
    form = Form(dtype)
    found = FORMS[name](form, rows, columns)
    form.graph.outputs = list(found) if isinstance(found, tuple) else [found]
    return form.graph
