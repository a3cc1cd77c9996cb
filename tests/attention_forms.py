"""The forms that kernels of attention take, each as a small graph that is one region (``kernel_forms``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regauge.ir.graph import Value

if TYPE_CHECKING:
    from kernel_forms import Form


def causal_attention(f: Form, rows: Any, columns: int) -> Any:
    """Two heads of queries share one of keys and values."""
    q, k, v = f.x(2, 4, rows, 128), f.x(2, 2, columns, 128), f.x(2, 2, columns, 128)
    return f.build.attention(q, k, v, scale=128**-0.5, is_causal=True, enable_gqa=True)


def later_causal_attention(f: Form, rows: Any, columns: int) -> Any:
    """Queries are the last of the positions: half of these, if not more."""
    q, k, v = f.x(2, 4, min(rows, max(columns // 2, 1)), 64), f.x(2, 2, columns, 64), f.x(2, 2, columns, 64)
    return f.build.attention(q, k, v, scale=0.125, is_causal=True, lower_right=True, enable_gqa=True)


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


def few_bit_cache(
    f: Form, columns: int, size: int, group: int | None = None, *, statistics: bool = False, bits: int = 4
) -> Value:
    """What ``kv-quantize{bits=4}`` reads back of keys or values: two heads of codes, two a byte, with the step and the
    lowest number of each position (or of each group of channels there), and statistics of channels."""
    b, count, shared = f.build, 1 if group is None else size // group, 8 // bits
    step, low = (b.cast(f.x(2, 2, columns, count, dtype=torch.float16), dtype=torch.float32) for _ in range(2))
    codes = b.unpack(f.x(2, 2, columns, size // shared, dtype=torch.uint8), base=2**bits, count=shared)
    y = b.cast(codes, dtype=torch.float32)
    if group is not None:
        step, low = (b.unsqueeze(part, dim=4) for part in (step, low))
        y = b.reshape(y, shape=(2, 2, columns, count, group))
    y = b.add(b.mul(y, b.mul(step, 0.1)), low)
    y = y if group is None else b.reshape(y, shape=(2, 2, columns, size))
    if statistics:
        y = b.add(b.mul(y, f.w(2, 1, size)), f.w(2, 1, size))
    return y if f.dtype == torch.float32 else b.cast(y, dtype=f.dtype)


def int4_cache_attention(f: Form, rows: Any, columns: int) -> Any:
    """A prompt behind others: what is cached has 4 bits."""
    keys, values = (few_bit_cache(f, columns, 64, statistics=True) for _ in range(2))
    visible = f.x(rows, columns, dtype=torch.bool)
    return f.build.attention(f.x(2, 6, rows, 64), keys, values, visible, scale=0.125, enable_gqa=True)


def int4_cache_decoding(f: Form, rows: Any, columns: int) -> Any:
    """One query for each of eight heads, two of which are cached."""
    keys, values = (few_bit_cache(f, columns, 128) for _ in range(2))
    return f.build.attention(f.x(2, 8, 1, 128), keys, values, scale=0.125, enable_gqa=True)


def int2_cache_decoding(f: Form, rows: Any, columns: int) -> Any:
    """Four numbers of a head share a byte, of keys and of values."""
    keys, values = (few_bit_cache(f, columns, 128, bits=2) for _ in range(2))
    return f.build.attention(f.x(2, 8, 1, 128), keys, values, scale=0.125, enable_gqa=True)


def int4_groups_attention(f: Form, rows: Any, columns: int) -> Any:
    """Groups of channels with ranges of their own: numbers are made of codes one by one."""
    keys, values = (few_bit_cache(f, columns, 64, 32) for _ in range(2))
    return f.build.attention(f.x(2, 2, rows, 64), keys, values, scale=0.125)


def int8_cache_attention(f: Form, rows: Any, columns: int) -> Any:
    """Signed codes, with a scale and a zero point for each channel of keys, and a scale for each position of values."""
    b, scale, zero = f.build, f.x(3, 1, 80), f.x(3, 1, 80)
    keys = b.mul(b.sub(b.cast(f.x(3, columns, 80, dtype=torch.int8), dtype=f.dtype), zero), b.mul(scale, 0.02))
    values = b.mul(b.cast(f.x(3, columns, 24, dtype=torch.int8), dtype=f.dtype), f.x(3, columns, 1))
    return b.attention(b.tanh(f.x(3, rows, 80)), keys, values, scale=0.2)


def turned_latents_attention(f: Form, rows: Any, columns: int) -> Any:
    """Two heads of keys are computed from latents that they share, turned by their positions, and read by two heads of
    queries each, as ``kv-latent`` leaves them (Palu)."""
    b, width, rank = f.build, 128 if columns >= 512 else 32, 256 if columns >= 512 else 40
    q, latents = f.x(2, 4, min(rows, 16), width), f.x(2, columns, rank)
    keys = b.permute(
        b.reshape(b.linear(latents, f.w(2 * width, rank)), shape=(2, columns, 2, width)), dims=(0, 2, 1, 3)
    )
    low, high = (b.slice(keys, dim=3, start=start, end=start + width // 2, step=1) for start in (0, width // 2))
    turned = b.concat(b.neg(high), low, dim=3)
    keys = b.add(b.mul(keys, f.x(columns, width)), b.mul(turned, f.x(columns, width)))
    return b.attention(q, keys, f.x(2, 2, columns, width), scale=width**-0.5 / 8, enable_gqa=True)


def latent_keys_with_bias_attention(f: Form, rows: Any, columns: int) -> Any:
    """Latents of each head, a bias behind the product, and a scale of each number of a head."""
    b, q, latents = f.build, f.x(3, rows, 64), f.x(3, columns, 24)
    keys = b.add(b.matmul(latents, b.permute(f.w(3, 64, 24), dims=(0, 2, 1))), f.w(3, 1, 64))
    return b.attention(q, b.mul(keys, f.w(64)), f.x(3, columns, 64), f.x(rows, columns, dtype=torch.bool), scale=0.02)


def latent_values_attention(f: Form, rows: Any, columns: int) -> Any:
    """Two heads of values are products with latents that they share, and have a bias, as ``kv-latent{joint=true}``
    leaves them; two heads of queries read each."""
    b, width, rank = f.build, 128 if columns >= 512 else 32, 192 if columns >= 512 else 40
    q, keys, latents = f.x(2, 4, min(rows, 16), width), f.x(2, 2, columns, width), f.x(2, columns, rank)
    values = b.reshape(b.linear(latents, f.w(2 * width, rank), f.w(2 * width)), shape=(2, columns, 2, width))
    return b.attention(q, keys, b.permute(values, dims=(0, 2, 1, 3)), scale=width**-0.5, enable_gqa=True)


def latent_pair_attention(f: Form, rows: Any, columns: int) -> Any:
    """Keys and values of each head are made of latents of their own, which differ in rank; a mask hides some."""
    b, q = f.build, f.x(3, min(rows, 16), 64)
    keys = b.matmul(f.x(3, columns, 40), b.permute(f.w(3, 64, 40), dims=(0, 2, 1)))
    values = b.mul(b.matmul(f.x(3, columns, 24), f.w(3, 24, 48)), f.w(48))
    return b.attention(q, keys, values, f.x(min(rows, 16), columns, dtype=torch.bool), scale=0.02)


def written_out_attention(f: Form, rows: Any, columns: int) -> Any:
    """Node by node, with heads behind positions, and a width that is no power of two."""
    b, q, k, v = f.build, f.x(2, rows, 3, 40), f.x(2, columns, 3, 40), f.x(2, columns, 3, 72)
    scores = b.matmul(b.permute(q, dims=(0, 2, 1, 3)), b.permute(k, dims=(0, 2, 3, 1)))
    scores = b.where(f.x(rows, columns, dtype=torch.bool), -1e4, b.mul(scores, 0.2))
    return b.matmul(b.softmax(scores, dim=3), b.permute(v, dims=(0, 2, 1, 3)))


def wide_attention(f: Form, rows: Any, columns: int) -> Any:
    """Heads that no program holds: latents with and without what is turned, as multi-head latent attention has them."""
    width, other = (4096, 4096) if columns >= 512 else (320, 264)
    q, k, v = f.x(4, rows, width), f.x(1, columns, width), f.x(1, columns, other)
    return f.build.attention(q, k, v, scale=width**-0.5, is_causal=True)


def large_heads_attention(f: Form, rows: Any, columns: int) -> Any:
    """Four heads of queries share one of keys and values, of 512 numbers each, which also gradients take in parts."""
    q, k, v = f.x(2, 4, rows, 512), f.x(2, 1, columns, 512), f.x(2, 1, columns, 512)
    return f.build.attention(q, k, v, scale=512**-0.5, is_causal=True, enable_gqa=True)


def position_bias_attention(f: Form, rows: Any, columns: int) -> Any:
    """A bias for each head and pair of places, as T5 has it, of queries that are the last of the positions."""
    q, k, v = f.x(2, 4, min(rows, columns), 64), f.x(2, 2, columns, 64), f.x(2, 2, columns, 64)
    bias = f.x(4, min(rows, columns), columns)
    return f.build.attention(q, k, v, bias, scale=0.125, is_causal=True, lower_right=True, enable_gqa=True)


def sloped_attention(f: Form, rows: Any, columns: int) -> Any:
    """A slope for each head times distances, as ALiBi has it, and a weight for each key of a sequence."""
    b, q, k, v = f.build, f.x(2, 3, rows, 40), f.x(2, 3, columns, 40), f.x(2, 3, columns, 24)
    scores = b.mul(b.matmul(q, b.permute(k, dims=(0, 1, 3, 2))), 0.2)
    away = b.mul(f.x(rows, columns), 2.0)
    scores = b.add(b.add(scores, b.mul(f.x(3, 1, 1), away)), f.x(2, 1, 1, columns))
    return b.matmul(b.softmax(scores, dim=3), v)


ATTENTION_FORMS = (
    causal_attention, later_causal_attention, masked_attention, biased_attention, rotary_attention, capped_attention,
    decoding_attention, latent_attention, quantized_cache_attention, int4_cache_attention, int4_cache_decoding,
    int2_cache_decoding, int4_groups_attention, int8_cache_attention, turned_latents_attention,
    latent_keys_with_bias_attention, latent_values_attention, latent_pair_attention, written_out_attention,
    wide_attention, large_heads_attention, position_bias_attention, sloped_attention,
)  # fmt: skip
