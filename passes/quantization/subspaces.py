"""Directions of great variance kept apart from the others, which few bits can hold then (Saxena et al. 2025, ResQ).

    x = U_l' x_l + U_h' x_h        y = Q4(x_l) Q4(W U_l')' + Q8(x_h) Q8(W U_h')'

U_h are the eigenvectors of the greatest eigenvalues of E[x x'], an eighth of them in the paper, U_l the others; inside
each of the two another rotation spreads what is left of outliers. U goes into the weights that write and read a frame,
and each layer that reads it becomes two, whose results are added up: so each part has scales of its own, and its own
bits. Deviations: E[x x'] is that of all layers that read a frame, each with the same trace; heads of attention have one
U in common, where the paper has one for each; what layers read behind an activation is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.gauge.frames import Frame, frames_at
from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.quantization.hadamard import Kind, rotation

HIGH = "high precision"  # in graph.metadata: bits that weights have at least, by name
BITS = 8
GROUP = 32

Readers = dict[Frame, list[Layer]]


def least_bits(graph: Graph) -> Mapping[str, int]:
    """Bits that weights have at least, by name."""
    found: Mapping[str, int] = graph.metadata.get(HIGH, {})
    return found


def readers_of(graph: Graph, frames: Sequence[Frame]) -> Readers:
    """The linear layers that read each frame along their whole input."""
    found: Readers = {}
    for node in graph.nodes:
        layer = layer_of(node) if node.op in ("linear", "matmul") else None
        if layer is None or not isinstance(node.inputs[0], Value):
            continue
        own = frames_at(frames, node.inputs[0], -1)
        if len(own) == 1 and layer.columns_of(graph, own[0][0].dim).size == layer.columns:
            found.setdefault(own[0][0], []).append(layer)
    return found


def principal(
    graph: Graph,
    readers: Readers,
    batches: Sequence[Any],
    share: float,
    kind: Kind,
    generator: torch.Generator,
) -> dict[Frame, torch.Tensor]:
    """Orthogonal matrices [size, size] whose first rows span the directions of the greatest variance."""
    by_layer = {layer: frame for frame, layers in readers.items() for layer in layers}
    grams = {frame: torch.zeros(int(frame.dim.size), int(frame.dim.size)).double() for frame in readers}
    for layer, moments in visit_moments(graph, by_layer, batches):
        frame = by_layer[layer]
        columns = torch.from_numpy(layer.columns_of(graph, frame.dim))
        gram = moments.gram[:-1, :-1]
        own = torch.stack([gram[places][:, places] for places in columns.t()]).sum(0)
        grams[frame] += own / own.trace().clamp(min=1e-30)
    found = {}
    for frame, gram in grams.items():
        directions = torch.linalg.eigh(gram).eigenvectors.flip(1).t()
        count = high_count(frame, share)
        ends = ((0, count), (count, len(gram)))
        parts = [rotation(kind, end - start, generator) @ directions[start:end] for start, end in ends]
        found[frame] = torch.cat(parts)
    return found


def high_count(frame: Frame, share: float) -> int:
    """How many directions of a frame are kept apart: at least one, and not all.

    Of a wide frame multiples of the groups of inputs that kernels have scales for, which both parts keep then.
    """
    size = int(frame.dim.size)
    step = GROUP if size % GROUP == 0 and size >= 4 * GROUP else 1
    return min(max(step, round(share * size / step) * step), size - step)


def read_apart(graph: Graph, columns: Mapping[str, torch.Tensor], *, by: str) -> None:
    """Let each layer, by the name of its node, read these of its columns by a layer of its own; in place."""
    build = Builder(graph, by=by)
    parts: dict[tuple[Value, tuple[int, ...]], Value] = {}
    high: dict[str, int] = {}
    for node in [node for node in graph.nodes if node.name in columns]:
        layer = layer_of(node)
        assert layer is not None
        mask = torch.zeros(layer.columns, dtype=torch.bool)
        mask[columns[node.name]] = True
        x, weight, bias = node.inputs[0], layer.weight.tensor.detach(), node.inputs[2:3]
        assert isinstance(x, Value)
        made = []
        with build.at(node):
            for kept, suffix in ((~mask, "low"), (mask, "high")):
                places = kept.nonzero()[:, 0]
                key = (x, tuple(places.tolist()))
                if key not in parts:
                    parts[key] = _picked(build, x, places, suffix)
                name = build.unique(f"{layer.weight.name}_{suffix}")
                own = weight.index_select(layer.contracted, places).contiguous()
                parameter = build.parameter(name, own, trainable=layer.weight.trainable)
                last = bias if suffix == "high" else []
                made.append(build(node.op, parts[key], parameter, *last, **node.attributes))
            high[name] = BITS
            replace_uses(graph, node.output, build.add(*made))
    remove_dead(graph)
    graph.metadata = {**graph.metadata, HIGH: {**graph.metadata.get(HIGH, {}), **high}}


def _picked(build: Builder, x: Value, places: torch.Tensor, suffix: str) -> Value:
    """Entries of the last axis: a slice where they lie side by side."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        found: Value = build.slice(x, dim=x.rank - 1, start=first, end=last + 1)
        return found
    table = build.parameter(build.unique(f"{x.name}_{suffix}"), places, "buffer")
    picked: Value = build.index_select(x, table, dim=x.rank - 1)
    return picked
