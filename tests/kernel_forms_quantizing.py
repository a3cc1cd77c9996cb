"""Forms of kernels whose results are codes of 8 bits; ``f`` is a Form of kernel_forms.py."""

from typing import Any

import torch


def add_norm_quantize(f: Any, rows: Any, columns: int) -> Any:
    """A residual and its norm, of which a product of integers reads codes; the scale is known before."""
    b = f.build
    stream = b.add(f.x(rows, columns), f.x(rows, columns))
    normed = b.rms_norm(stream, f.w(columns), normalized_shape=(columns,), eps=1e-6)
    return stream, b.quantize(normed, b.parameter("s", torch.tensor(0.03125, dtype=f.dtype)))


def add_norm_quantize_float8(f: Any, rows: Any, columns: int) -> Any:
    """The same as floats of 8 bits; some entries are beyond the greatest one."""
    b = f.build
    stream = b.add(f.x(rows, columns), f.x(rows, columns))
    normed = b.rms_norm(stream, f.w(columns), normalized_shape=(columns,), eps=1e-6)
    scale = b.parameter("s", torch.tensor(0.00390625, dtype=f.dtype))
    return stream, b.quantize(normed, scale, dtype=torch.float8_e4m3fn)


def silu_mul_quantize_float8(f: Any, rows: Any, columns: int) -> Any:
    """Floats of 8 bits with more of exponent, and a scale for each column."""
    b = f.build
    product = b.mul(b.silu(f.x(2, rows, columns)), f.x(2, rows, columns))
    return b.quantize(product, f.scale(columns), axis=2, dtype=torch.float8_e5m2)


def add_norm_quantize_rows(f: Any, rows: Any, columns: int) -> Any:
    """A residual, and its norm as codes with a scale for each row, which is found when it runs."""
    b = f.build
    stream = b.add(f.x(2, rows, columns), f.x(2, rows, columns))
    normed = b.rms_norm(stream, f.w(columns), normalized_shape=(columns,), eps=1e-6)
    scales = b.row_scales(normed)
    return stream, b.row_codes(normed, scales), scales


def silu_mul_quantize_rows(f: Any, rows: Any, columns: int) -> Any:
    b = f.build
    product = b.mul(b.silu(f.x(rows, columns)), f.x(rows, columns))
    scales = b.row_scales(product)
    return b.row_codes(product, scales), scales


def add_norm_quantize_rows_float8(f: Any, rows: Any, columns: int) -> Any:
    """The same as floats of 8 bits: the scales are powers of two."""
    b = f.build
    stream = b.add(f.x(2, rows, columns), f.x(2, rows, columns))
    normed = b.rms_norm(stream, f.w(columns), normalized_shape=(columns,), eps=1e-6)
    scales = b.row_scales(normed, dtype=torch.float8_e4m3fn)
    return stream, b.row_codes(normed, scales, dtype=torch.float8_e4m3fn), scales


def silu_mul_quantize_rows_float8(f: Any, rows: Any, columns: int) -> Any:
    b = f.build
    product = b.mul(b.silu(f.x(rows, columns)), f.x(rows, columns))
    scales = b.row_scales(product, dtype=torch.float8_e5m2)
    return b.row_codes(product, scales, dtype=torch.float8_e5m2), scales


def silu_mul_quantize(f: Any, rows: Any, columns: int) -> Any:
    """Codes without a sign, a scale and a zero point for each column."""
    b = f.build
    zero = f.codes(columns, dtype=torch.uint8, low=100, high=140)
    product = b.mul(b.silu(f.x(2, rows, columns)), f.x(2, rows, columns))
    return b.quantize(product, f.scale(columns), zero, axis=2, dtype=torch.uint8)


def int8_to_int8(f: Any, rows: Any, columns: int) -> Any:
    """Integers on both sides of a layer, and behind it."""
    b, depth = f.build, -(-columns // 32) * 32
    x = b.dequantize(f.x(rows, depth, dtype=torch.int8), f.scale())
    w = b.dequantize(f.codes(columns, depth), f.scale(columns), axis=0)
    y = b.relu(b.linear(x, w, f.w(columns)))
    return b.quantize(y, b.parameter("t", torch.tensor(4.0, dtype=f.dtype)))
