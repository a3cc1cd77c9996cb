"""Small weights of which 8 bits lose most of the outputs on data: half precision of them takes few bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.calibration.batches import examples_in, part_of
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.probe import Probe
from regauge.passes.quantization.formats import Format
from regauge.passes.quantization.grid import Form
from regauge.passes.quantization.halves import Half, holds
from regauge.passes.quantization.trials import trials

MEASURED = 16  # examples on which losses are measured
_ROOM = 1 / 160
"""Of the bytes of a graph in float what half precision may add: a fortieth of what 8 bits leave."""
_LEFT = 0.1  # of what all of them lose: the rest is not worth more bytes


def kept_in_half(
    graph: Graph, layers: Sequence[Layer], formats: Mapping[str, Format], batches: Sequence[Any]
) -> dict[str, Format]:
    """The layers, by names of their weights, that get half precision in place of integers of 8 bits.

    In the order of what they lose for each entry, each alone in 8 bits (sensitivity "loss"), until bytes are used up
    or a tenth of the loss is left. Larger weights have tables of numbers, which lose less, and are not among them.
    """
    small = [layer for layer in layers if isinstance(formats[layer.weight.name], Form)]
    small = [layer for layer in small if holds(layer.weight.tensor.detach())]
    if not small:
        return {}
    probe = Probe(graph, _first(batches))
    tried = trials(graph, small, {layer.weight.name: [formats[layer.weight.name]] for layer in small}, None)
    lost = {name: probe.change(own[0].data) for name, own in tried.items()}
    entries = {layer.weight.name: layer.weight.tensor.numel() for layer in small}
    room, left, found = _ROOM * figures(graph).bytes, sum(lost.values()), dict[str, Format]()
    enough = _LEFT * left
    for name in sorted(lost, key=lambda name: lost[name] / entries[name], reverse=True):
        if left <= enough:
            break
        if entries[name] <= room:  # bytes, of which each entry takes one more
            room, left, found[name] = room - entries[name], left - lost[name], Half()
    return found


def _first(batches: Sequence[Any]) -> list[Any]:
    """The first examples of batches, which may hold one each."""
    found, missing = list[Any](), MEASURED
    for batch in batches:
        count = examples_in(batch)
        found.append(batch if count <= missing else part_of(batch, slice(0, missing), count))
        missing -= min(count, missing)
        if not missing:
            break
    return found
