"""Limits that the steps of ``simplify`` keep to, and the scopes they work in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.edit import Builder
from regauge.ir.folding.limits import BYTES_BEFORE
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.sizes.expressions import Size

LEAST_GROWTH = 64 * 1024  # bytes that any module may grow by; a file may not


@dataclass(frozen=True)
class Limits:
    """``most_bytes``: of the parameters of the whole graph. ``tie_trained``: whether equal trained weights are tied.

    ``bytes_before``: of them before any run of ``simplify``, for what may use only the room that others made.
    ``file_bytes``: that a file may grow by on top, for constants in place of what it computes so far.
    """

    most_bytes: int
    tie_trained: bool = False
    bytes_before: int = 0
    file_bytes: int = 0


def limits_of(graph: Graph, growth: float, tie_trained: bool, *, folds_file: bool = False) -> Limits:
    """``growth`` is a part of the graph's bytes, as they were before any run of ``simplify``; ``folds_file`` says
    whether the file of a loaded graph is folded too."""
    now = total_bytes(graph)
    before = min(now, graph.metadata.get(BYTES_BEFORE, now))
    share, loaded = int(growth * before), "onnx" in graph.metadata
    least = LEAST_GROWTH if growth > 0 and not loaded else 0
    return Limits(before + max(share, least), tie_trained, before, share if loaded and folds_file else 0)


def total_bytes(graph: Graph) -> int:
    return sum(bytes_of(parameter) for parameter in graph.all_parameters())


def bytes_of(value: Value) -> int:
    """Bytes of a tensor of fixed size; 0 for types torch does not have, and for what a file computes."""
    return 0 if isinstance(value, Parameter) and not value.stored else size_of(value)


def size_of(value: Value) -> int:
    """Bytes of a tensor wherever it comes from."""
    return count_of(value.shape) * width_of(value.dtype)


def count_of(shape: tuple[Size, ...]) -> int:
    return math.prod(size if isinstance(size, int) else 1 for size in shape)


def width_of(dtype: Dtype) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 0


def scopes(graph: Graph, build: Builder | None = None) -> Iterator[tuple[Graph, Builder]]:
    """The graph and every region inside it, outer ones first, each with a builder; the builders share their names."""
    build = Builder(graph) if build is None else build
    yield graph, build
    for node in list(graph.nodes):
        for region in node.regions:
            yield from scopes(region, build.region(region))


def held_values(graph: Graph) -> set[Value]:
    """Outputs and states: what something beside nodes reads."""
    held = {output for output in graph.outputs if isinstance(output, Value)}
    return held.union(*({state.before, state.after} for state in graph.states))
