"""Forms of kernels whose weights are stored without their zeros; ``f`` is a Form of kernel_forms.py."""

from typing import Any

import torch

from regauge.backends.triton_kernels.sparsity import dense_of, stored, stored_bitmap
from regauge.ir.graph import Value


def n_of_m(f: Any, columns: int, keep: int, of: int, turned: bool = False) -> Value:
    """A weight of which ``keep`` of every ``of`` entries are stored."""
    inputs = -(-columns // 32) * 32
    places = torch.rand(columns, inputs // of, of, generator=f.generator).argsort(2) < keep
    weight = torch.randn(columns, inputs, generator=f.generator) * places.flatten(1)
    values, mask = stored(weight.to(f.dtype), keep, of)
    read = [f.build.parameter(f.build.unique("w"), values), f.build.parameter(f.build.unique("mask"), mask, "buffer")]
    w = dense_of(f.build, *read, keep, of)
    return f.build.permute(w, dims=(1, 0)) if turned else w


def sparse_24_weight(f: Any, rows: Any, columns: int) -> Any:
    b, w = f.build, n_of_m(f, columns, 2, 4)
    return b.gelu(b.linear(f.x(rows, int(w.shape[1])), w, f.w(columns)))


def sparse_48_weight(f: Any, rows: Any, columns: int) -> Any:
    b, w = f.build, n_of_m(f, columns, 4, 8, turned=True)
    return b.matmul(f.x(2, rows, int(w.shape[0])), w)


def bitmap(f: Any, outputs: int, inputs: int, kept: float = 0.4) -> Value:
    """A weight with zeros anywhere, and in some rows nothing else."""
    inputs = -(-inputs // 32) * 32
    weight = torch.randn(outputs, inputs, generator=f.generator)
    weight *= torch.rand(outputs, inputs, generator=f.generator) < kept
    weight[::5] = 0
    values, mask, starts = stored_bitmap(weight.to(f.dtype))
    read = f.build.parameter(f.build.unique("w"), values)
    words = [f.build.parameter(f.build.unique(name), t, "buffer") for name, t in (("mask", mask), ("starts", starts))]
    return f.build.bitmap(read, *words, of=32)


def bitmap_weight(f: Any, rows: Any, columns: int) -> Any:
    b, w = f.build, bitmap(f, columns, columns)
    return b.gelu(b.linear(f.x(rows, int(w.shape[1])), w, f.w(columns)))


def gate_and_up_bitmap(f: Any, rows: Any, columns: int) -> Any:
    b, (gate, up) = f.build, (bitmap(f, columns, 64) for _ in range(2))
    x = f.x(2, rows, 64)
    return b.mul(b.silu(b.linear(x, gate)), b.linear(x, up))


def bitmap_of_codes(f: Any, rows: Any, columns: int) -> Any:
    """Integers on both sides, most of the weight zeros, which has a scale for each output."""
    b = f.build
    codes = torch.randint(-127, 128, (columns, 96), generator=f.generator)
    codes *= torch.rand(columns, 96, generator=f.generator) < 0.3
    values, mask, starts = stored_bitmap(codes.to(torch.int8))
    read = b.parameter(b.unique("q"), values, trainable=False)
    words = [b.parameter(b.unique(name), t, "buffer") for name, t in (("mask", mask), ("starts", starts))]
    x = b.mul(b.cast(f.x(rows, 96, dtype=torch.int8), dtype=f.dtype), f.x(rows, 1))
    return b.linear(x, b.dequantize(b.bitmap(read, *words, of=32), f.scale(columns), axis=0))


def int8_beside_sparse(f: Any, rows: Any, columns: int) -> Any:
    """Integers beside a weight whose values have a type of their own: half precision does not hold them."""
    b = f.build
    weight = torch.randn(columns, 128, 2, generator=f.generator)
    weight[:, :, 1] = 0
    values, mask = stored(weight.flatten(1).to(f.dtype), 1, 2)
    read = b.parameter(b.unique("w"), values), b.parameter(b.unique("mask"), mask, "buffer")
    x = b.mul(b.cast(f.x(rows, 256, dtype=torch.int8), dtype=f.dtype), f.x(rows, 1))
    return b.linear(x, dense_of(b, *read, 1, 2))


def bitmap_as_weight(f: Any, rows: Any, columns: int) -> Any:
    """Not multiplied: the weight itself, halved."""
    return f.build.mul(bitmap(f, rows, columns), 0.5)


def gate_and_up_sparse(f: Any, rows: Any, columns: int) -> Any:
    b, (gate, up) = f.build, (n_of_m(f, columns, 2, 4) for _ in range(2))
    x = f.x(rows, int(gate.shape[1]))
    return b.mul(b.silu(b.linear(x, gate)), b.linear(x, up))
