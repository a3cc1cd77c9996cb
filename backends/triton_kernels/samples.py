"""Small regions that stand for the forms of kernels: what tables of configurations are screened and tuned with.

kernel, sizes = sample("contraction", (4096, 11008, 4096), "bf16")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from regauge.backends.triton_kernels.kernel import Kernel, triton_kernel
from regauge.ir.dims.extents import Dim
from regauge.ir.dtypes import dtype_from_name
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value

Sizes: TypeAlias = tuple[int, int, int]
Sample: TypeAlias = tuple[Kernel, Mapping[Dim, int]]
"""A kernel, and the sizes of its loops."""
Read: TypeAlias = Callable[..., Value]
"""Gives a value that the region reads, of a shape."""


def _gate(build: Builder, read: Read, sizes: Sizes) -> Any:
    """silu(x) * y, with a bias, so that not all is one loop."""
    rows, columns, _ = sizes
    return build.add(build.mul(build.silu(read(rows, columns)), read(rows, columns)), read(columns))


def _norm(build: Builder, read: Read, sizes: Sizes) -> Any:
    """A residual, and its norm: two results."""
    rows, columns, _ = sizes
    stream = build.add(read(rows, columns), read(rows, columns))
    scale, bias = read(columns), read(columns)
    return stream, build.layer_norm(stream, scale, bias, normalized_shape=(columns,))


def _layer(build: Builder, read: Read, sizes: Sizes) -> Any:
    """A layer with its bias, GELU and a residual."""
    rows, columns, contracted = sizes
    y = build.linear(read(rows, contracted), read(columns, contracted), read(columns))
    return build.add(build.gelu(y), read(rows, columns))


SAMPLES: Mapping[str, Callable[[Builder, Read, Sizes], Any]] = {
    "pointwise": _gate,
    "rows": _norm,
    "looped": _norm,
    "contraction": _layer,
}


def sample(form: str, sizes: Sizes, dtype: str) -> Sample:
    """A kernel of a form for rows, columns and contracted indices; raises FusionError for an unknown form or type."""
    if form not in SAMPLES:
        raise FusionError(f"there are no kernels of the form {form!r}: give {', '.join(SAMPLES)}")
    graph = Graph(form)
    build = Builder(graph)
    kind = dtype_from_name(dtype)
    if not isinstance(kind, torch.dtype):
        raise FusionError(f"there are no kernels of type {dtype!r}: give f32, f16 or bf16")

    def read(*shape: int) -> Value:
        return build.input(build.unique("x"), shape, kind)

    found = SAMPLES[form](build, read, sizes)
    graph.outputs = list(found) if isinstance(found, tuple) else [found]
    region = trace(graph.nodes, [value for value in graph.outputs if isinstance(value, Value)])
    return triton_kernel(region, form), {dim: int(dim.size) for dim in region.sized}


def parsed(text: str) -> Sample:
    """``FORM:ROWSxCOLUMNS:TYPE`` or ``FORM:ROWSxCOLUMNSxCONTRACTED:TYPE``; raises FusionError for anything else."""
    form, _, rest = text.partition(":")
    numbers, _, dtype = rest.partition(":")
    parts = numbers.split("x")
    wanted = 3 if form == "contraction" else 2
    if form in SAMPLES and (len(parts) != wanted or not all(part.isdecimal() and int(part) for part in parts)):
        usual = f"{form}:{'x'.join(['4096'] * wanted)}:bf16"
        raise FusionError(f"--shapes {text}: give rows, columns{' and what is contracted' * (wanted > 2)}, as {usual}")
    rows, columns, contracted = (*map(int, parts), 1)[:3] if form in SAMPLES else (1, 1, 1)
    return sample(form, (rows, columns, contracted), dtype)
