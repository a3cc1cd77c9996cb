"""Layers whose bits are judged together: those that depend on one another strongly, by the entropy of activations.

Where the output of a layer has a high entropy, what its rounding loses reaches the layers behind it, and the best bits
of both cannot be told apart; where it is low, they can (Wang et al. 2024, Q-VLM: Post-training Quantization for Large
Vision-Language Models, section 3.2: entropy as the proxy of dependency, by which the chain of layers is cut into
blocks). Within a block all choices are measured, between blocks losses add up. The paper searches ranges of rounding
in blocks where here bits are chosen, and gives thresholds of entropy, for which the mean over layers stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Node, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Statistics
from regauge.passes.quantization.ranges import Histogram

_LEVELS = 256  # that activations of 8 bits have


def dependent_blocks(graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], most: int) -> list[list[Layer]]:
    """The layers, in order, in blocks of at most ``most``: each joins that of the layer of highest entropy right before
    it, unless the entropy of that one is below the mean of all."""
    entropies = _entropies(graph, layers, batches)
    mean = sum(entropies.values()) / max(len(entropies), 1)
    before, found = _before(graph, layers), list[list[Layer]]()
    block_of: dict[Node, list[Layer]] = {}
    for layer in layers:
        joined = [node for node in before[layer.node] if entropies[node] >= mean and len(block_of[node]) < most]
        if joined:
            block = block_of[max(joined, key=lambda node: entropies[node])]
        else:
            block = []
            found.append(block)
        block.append(layer)
        block_of[layer.node] = block
    return found


def entropy_of(counts: torch.Tensor) -> float:
    """The entropy in bits of how often each level occurs."""
    shares = counts[counts > 0] / counts.sum().clamp(min=1)
    return -float((shares * shares.log2()).sum())


def _entropies(graph: Graph, layers: Sequence[Layer], batches: Sequence[Any]) -> Mapping[Node, float]:
    """In bits, of what each layer gives, as 8 bits between its ends hold it."""
    statistics = Statistics(graph)
    histograms = {layer.node: statistics.register(layer.node.output, Histogram()) for layer in layers}
    statistics.collect(batches)
    return {node: entropy_of(_levels(histogram)) for node, histogram in histograms.items()}


def _levels(histogram: Histogram) -> torch.Tensor:
    """How many entries each of 256 levels between the least and the greatest entry holds."""
    low, high = histogram.range
    place = (histogram.centres - low) / max(high - low, 1e-30) * _LEVELS
    counts = torch.zeros(_LEVELS, dtype=torch.float64)
    return counts.scatter_add_(0, place.long().clamp(0, _LEVELS - 1), histogram.counts)


def _before(graph: Graph, layers: Sequence[Layer]) -> Mapping[Node, list[Node]]:
    """The layers whose outputs reach each layer with no other one in between."""
    nodes, behind = {layer.node for layer in layers}, dict[Value, dict[Node, None]]()
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        near: dict[Node, None] = {}
        for _, value in node.operands():
            near |= behind.get(value, {})
        if node in nodes:
            found[node] = list(near)
            near = {node: None}
        behind |= dict.fromkeys(node.outputs, near)
    return found
