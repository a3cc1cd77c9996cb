"""Checks that zeros which ``sparsify`` set survive later passes, which solve for weights, cut or replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of, matrices_of
from regauge.passes.on_floats import SPARSE, codes_in
from regauge.passes.quantization.dequantize import with_floats
from regauge.passes.sparsity.patterns import Pattern, grouped

_SLACK = 0.01  # of the share of zeros where no pattern says how many there must be


class Zeros(NamedTuple):
    """The pattern that a weight was given, and the share of its entries that were zero then."""

    pattern: Pattern
    share: float


def remember(graph: Graph, found: Mapping[str, Zeros]) -> None:
    """Write down which weights, by name, were given which zeros; what earlier passes wrote stays, unless it is new."""
    graph.metadata = {**graph.metadata, SPARSE: {**graph.metadata.get(SPARSE, {}), **found}}


def holding(graph: Graph) -> str:
    """In how many of the layers that have been sparsified the zeros are as they were: a line for each pattern.

    A layer that was cut or quantized is looked up by the name of its weight; one that was replaced holds nothing.
    """
    floats = with_floats(graph, by="sparsify")[0] if codes_in(graph) else graph
    layers = [layer for node in floats.nodes if (layer := layer_of(node)) is not None]
    named = {name: layer for layer in layers for name in layer.weight.names}
    counts: dict[str, list[bool]] = {}
    for name, zeros in graph.metadata[SPARSE].items():
        counts.setdefault(str(zeros.pattern), []).append(name in named and _holds(named[name], zeros))
    return ", ".join(f"sparsify's {text} holds in {sum(held)} of {len(held)} layers" for text, held in counts.items())


def _holds(layer: Layer, zeros: Zeros) -> bool:
    if zeros.pattern.misfit(layer.outputs, layer.columns // layer.taps) is not None:
        return False
    kept = matrices_of(layer)[0][:, grouped(layer)] != 0
    return zeros.pattern.holds(kept) and float((~kept).double().mean()) >= zeros.share - _SLACK
