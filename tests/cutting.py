"""The law behind every kind of pruning: a cut graph computes what the whole one computes with those entries zeroed."""

from collections.abc import Sequence

import numpy as np
import torch

from regauge.ir.dims.groups import free_groups
from regauge.ir.dims.kept import flat_indices
from regauge.ir.dims.resize import resize
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify


def free_sizes(graph: Graph) -> dict[str, int]:
    """The free Dims of a graph by name."""
    return {group.name: int(group.size) for group in free_groups(graph)}


def cut_all(graph: Graph, inputs: Sequence[torch.Tensor]) -> Graph:
    """Cut every free Dim at once (every second index stays) and check the result against zeroed weights."""
    keep = {group.dim: np.arange(0, int(group.size), 2) for group in free_groups(graph)}
    small = resize(graph, keep)
    verify(small, axes=True)
    masked = {}
    for parameter in graph.all_parameters():
        tensor = parameter.tensor
        for axis, extent in enumerate(graph.axes.of[parameter]):
            kept = torch.zeros(tensor.shape[axis], dtype=tensor.dtype)
            kept[torch.from_numpy(flat_indices(extent, keep))] = 1
            tensor = tensor * kept.reshape([-1 if i == axis else 1 for i in range(tensor.dim())])
        masked[parameter.name] = tensor
    for actual, expected in zip(run(small, inputs), run(graph, inputs, weights=masked), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return small
