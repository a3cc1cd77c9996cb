"""What the steps of ``simplify`` have to keep to, and the scopes they work in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.sizes import Size

LEAST_GROWTH = 64 * 1024  # bytes that any module may grow by; a file may not
NODE_BYTES = 64  # what a node takes in a file, about: a small constant in its place does not make it larger
BYTES_BEFORE = "bytes_before_simplify"  # metadata: so that a second run does not grant what the first one used up


@dataclass(frozen=True)
class Limits:
    """``most_bytes``: of the parameters of the whole graph. ``tie_trained``: whether equal trained weights are tied.

    ``bytes_before``: of them before any run of ``simplify``, for what may use only the room that others made.
    """

    most_bytes: int
    tie_trained: bool = False
    bytes_before: int = 0


def limits_of(graph: Graph, growth: float, tie_trained: bool) -> Limits:
    """``growth`` is a part of the graph's bytes, as they were before any run of ``simplify``."""
    now = total_bytes(graph)
    before = min(now, graph.metadata.get(BYTES_BEFORE, now))
    least = LEAST_GROWTH if growth > 0 and "onnx" not in graph.metadata else 0
    return Limits(before + max(int(growth * before), least), tie_trained, before)


def total_bytes(graph: Graph) -> int:
    return sum(bytes_of(parameter) for parameter in graph.all_parameters())


def bytes_of(value: Value) -> int:
    """Bytes of a tensor of fixed size; 0 for types torch does not have, and for what a file computes."""
    if isinstance(value, Parameter) and not value.stored:
        return 0
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
