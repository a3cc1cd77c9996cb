"""Moving the weights of a graph to another device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regauge.ir.graph import Graph
from regauge.ir.storage.weights import Weight, dense


def on_device(
    graph: Graph, device: torch.device, known: Mapping[Weight, Weight] | None = None
) -> tuple[Graph, dict[Weight, Weight]]:
    """A copy whose weights are on a device, and for each of these weights the one that it was made from.

    Where ``known`` has a counterpart of a weight, that is taken: what was moved and not changed since is itself again.
    """
    result, origin, moved = graph.copy(), dict[Weight, Weight](), dict[Weight, Weight]()
    for parameter in result.all_parameters():
        old = parameter.weight
        if old not in moved:
            there = (known or {}).get(old)
            moved[old] = dense(old.load().to(device)) if there is None else there
            origin[moved[old]] = old
        parameter.weight = moved[old]
    return result, origin
