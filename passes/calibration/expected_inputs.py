"""What layers are given on average, without data: from the statistics that batch norms hold.

Behind a batch norm in inference a channel has the mean beta and the deviation |gamma|; it is taken for normal, and what
an activation makes of it is known then, E[relu(N(m, s^2))] = s phi(m / s) + m Phi(m / s) (Nagel et al. 2019, Data-Free
Quantization, section 4.2.1; :mod:`regauge.passes.calibration.channel_moments`). Sums add up. Beyond the paper,
the zeros that a convolution meets around an image count as such.
"""

from __future__ import annotations

import torch

from regauge.ir.dims.extents import leaves, positions_on
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.calibration.channel_moments import ChannelReader
from regauge.passes.calibration.layers import Layer

_KINDS = {"linear", "matmul", "conv", "conv_transpose"}


class ExpectedInputs:
    """Expected inputs of layers by the batch norms of a graph.

    Layers may be those of a graph that was made from it, with norms folded: values are found again by their names.
    """

    def __init__(self, graph: Graph) -> None:
        self._reader = ChannelReader(graph, "statistics", {})
        self._values = {value.name: value for node in graph.nodes for value in node.outputs}

    def of(self, layer: Layer) -> torch.Tensor | str:
        """The mean of each column of what a layer reads, [blocks, columns]; or why it is unknown."""
        x = layer.node.inputs[0]
        if not isinstance(x, Value) or isinstance(x, Parameter) or layer.node.op not in _KINDS:
            return "it has no rows of its own"
        if layer.node.op == "matmul" and layer.blocks > 1:
            return "it multiplies several matrices"
        twin, axis = self._values.get(x.name), 1 if "conv" in layer.node.op else -1
        if twin is None or twin.shape != x.shape:
            return "what it reads is an input, or came about when norms were folded"
        mean = self._along(twin, axis)
        if isinstance(mean, str):
            return mean
        sizes = x.shape[2:] if axis == 1 else ()
        if not all(isinstance(size, int) for size in sizes):  # what is read is no border then
            return mean.reshape(layer.blocks, -1).repeat_interleave(layer.taps, 1)
        given = mean.reshape(1, -1, *[1] * len(sizes)).expand(1, -1, *[int(size) for size in sizes])
        return torch.stack([rows.mean(0) for rows in layer.blocks_of_input(given)])

    def _along(self, value: Value, axis: int) -> torch.Tensor | str:
        """The mean of each index of an axis of a value of the graph."""
        extent = self._reader.graph.axes.of[value][axis]
        size, dims = value.shape[axis], leaves(extent)
        if not isinstance(size, int):
            return "its axis has no fixed size"
        found = torch.full((size,), torch.nan, dtype=torch.float64)
        why = "several parts of its axis are one Dim"
        for dim in dims:
            moments = self._reader.of(value, dim) if dims.count(dim) == 1 else why
            if isinstance(moments, str):
                why = moments
                continue
            places = torch.from_numpy(positions_on(extent, dim)).t()  # [entries, indices]
            if len(moments.mean) in (1, len(places)):
                found[places] = moments.mean.expand(places.shape)
            else:
                why = "a reshape stands between"
        return why if bool(found.isnan().any()) else found
