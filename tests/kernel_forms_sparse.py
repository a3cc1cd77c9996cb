"""Forms of kernels whose weights are stored without their zeros; ``f`` is a Form of kernel_forms.py."""

from typing import Any

import torch

from regauge.backends.kernel_sparsity import dense_of, stored
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


def gate_and_up_sparse(f: Any, rows: Any, columns: int) -> Any:
    b, (gate, up) = f.build, (n_of_m(f, columns, 2, 4) for _ in range(2))
    x = f.x(rows, int(gate.shape[1]))
    return b.mul(b.silu(b.linear(x, gate)), b.linear(x, up))
