"""ReLU6 and its kind, which scales do not go through: replaced by a ReLU, behind which each channel has its own bound.

before   y = hardtanh(x, 0, 6)     after   y = minimum(relu(x), bound)     bound: 6 s, one for each channel
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses, set_input
from regauge.ir.gauge.frames import Frame, frames_at
from regauge.ir.gauge.insertion import entries
from regauge.ir.graph import Graph, Node

_OPEN = "_open"  # what the name of a ReLU in place of a clip ends with


def opened(graph: Graph) -> tuple[Graph, dict[str, float]]:
    """A copy in which clips from 0 to a bound are ReLUs, and the bounds by the names of their results."""
    result, bounds = graph.copy(), dict[str, float]()
    build = Builder(result)
    for node in result.nodes:
        bound = _bound(node)
        if bound is not None:
            with build.at(node):
                replaced = build.relu(node.inputs[0], name=f"{node.name}{_OPEN}")
            bounds[replaced.name] = bound
            replace_uses(result, node.output, replaced)
            remove_node(result, node)
    return (result, bounds) if bounds else (graph, bounds)


def _bound(node: Node) -> float | None:
    """The upper bound of a clip at zero below."""
    if node.op == "hardtanh":
        low, high = node.attributes["min_val"], node.attributes["max_val"]
    elif node.op == "clamp":
        low, high = (*node.inputs[1:], None, None)[:2]
    else:
        return None
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return float(high) if numbers and low == 0 < high else None


def closed(graph: Graph, bounds: Mapping[str, float], scales: Mapping[str, torch.Tensor], *, by: str) -> None:
    """Put the bounds back behind the ReLUs of :func:`opened`, times the scales of their channels."""
    build = Builder(graph, by=by)
    for name, bound in bounds.items():
        value = graph.find(name)
        relu = value.producer
        assert relu is not None and isinstance(value.dtype, torch.dtype)
        users = list(value.uses)
        with build.at(relu):
            if name in scales:
                table = build.parameter(build.unique(f"{name}_bound"), (bound * scales[name]).to(value.dtype), "buffer")
                clipped = build.minimum(value, table)
            else:
                clipped = build.hardtanh(relu.inputs[0], min_val=0.0, max_val=bound, name=name.removesuffix(_OPEN))
        for node, slot in users:
            set_input(node, slot, clipped, graph)
        graph.outputs = [clipped if output is value else output for output in graph.outputs]
        if name not in scales:
            remove_node(graph, relu)


def channel_scales(
    graph: Graph, bounds: Mapping[str, float], scales: Mapping[Frame, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """By what each of these values is multiplied, a tensor that broadcasts; values that stay are left out."""
    found: dict[str, torch.Tensor] = {}
    for name in bounds:
        value = graph.find(name)
        for axis in range(value.rank):
            for frame, place, side in frames_at(scales, value, axis):
                table = torch.cat([scales[frame].reshape(-1), torch.ones(1, dtype=torch.float64)])
                factor = table[torch.from_numpy(entries(graph, frame, place))] ** side
                found[name] = found.get(name, torch.ones((), dtype=torch.float64)) * factor
    return {name: factor[0] for name, factor in found.items() if bool((factor != 1).any())}
