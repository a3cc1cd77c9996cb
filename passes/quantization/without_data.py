"""Weights stored without data: rounded to the nearest, and what that changes made up for by weights and batch norms.

correction   the mean of what a layer gives changes by (Q(W) - W) E[x], which its bias takes back (Nagel et al. 2019,
             Data-Free Quantization, section 4.2); E[x] by :mod:`regauge.passes.calibration.expected_inputs`
udfc         what rounding takes from a channel is taken for a combination of the rounded channels, and the layers that
             read it take that over before they are rounded themselves (Bai et al. 2023, Unified Data-Free Compression:
             Pruning and Quantization without Fine-Tuning). In the words of :mod:`regauge.passes.pruning.closed_form`,
             w_j - q_j is the removed row and the q_i are the kept ones, q_j among them: s_jj is the paper's own factor
             of a quantized channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch

from regauge.ir.dims.extents import leaves
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.channel_moments import ChannelMoments, ChannelReader, combinations
from regauge.passes.calibration.expected_inputs import ExpectedInputs
from regauge.passes.calibration.layers import Layer
from regauge.passes.on_floats import SPARSE
from regauge.passes.quantization.formats import Format, Stored
from regauge.passes.quantization.weights import rows_of, with_zeros

WithoutData: TypeAlias = Literal["udfc"]

RIDGE = 0.3  # l2 as a share of the mean square of a rounded row


def stored_without_data(
    changed: Graph,
    layers: Sequence[Layer],
    formats: Mapping[str, Format],
    expected: ExpectedInputs | None,
    *,
    udfc: bool = False,
    by: str,
) -> tuple[dict[str, Stored], int]:
    """What is stored of ``layers`` of ``changed``, by the names of their weights, and how many biases were corrected.

    What it stands for is written into ``changed``, and biases where inputs are ``expected``. With ``udfc`` zeros that
    ``sparsify`` set stay, as they do by themselves where each weight gets the nearest code.
    """
    found: dict[str, Stored] = {}
    corrected = 0
    absorbing = _Absorbing(changed) if udfc else None
    sparse = changed.metadata.get(SPARSE, {}).keys()
    for layer in layers:
        name, weight = layer.weight.name, rows_of(layer)
        meant = weight if absorbing is None else absorbing.meant(layer, weight)
        form = formats[name] if absorbing is None else with_zeros(formats[name], layer, sparse)
        stored = form.rounded(meant)
        if absorbing is not None:
            absorbing.rounded(layer, meant, stored.values)
        found[name] = stored
        mean = expected.of(layer) if expected is not None else "it is not asked for"
        if isinstance(mean, torch.Tensor):
            lost = (weight - stored.values).reshape(layer.blocks, layer.outputs, layer.columns)
            shifted = layer.shifted(torch.einsum("boc,bc->bo", lost, mean).reshape(-1))
            if shifted is not None:
                set_weight(changed, *shifted, by=by)
                corrected += 1
        values = stored.values.reshape(layer.blocks, layer.outputs, layer.columns)
        set_weight(changed, layer.weight, layer.from_matrices(values), by=by)
    return found, corrected


class _Absorbing:
    """Layers of a graph, in its order, with what rounding took from the channels that they read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._now: dict[Layer, torch.Tensor] = {}
        self._meant: dict[Layer, torch.Tensor] = {}
        self._channels = ChannelReader(graph, "rows", self._now, self._meant)

    def meant(self, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        """The weight [outputs, columns] that makes the most of rounded inputs; as it is where a layer has blocks."""
        x = layer.node.inputs[0]
        if layer.blocks > 1 or not isinstance(x, Value):
            return weight
        found = weight.clone()
        for dim in leaves(self.graph.axes.of[layer.weight][layer.contracted]):
            columns = torch.from_numpy(layer.columns_of(self.graph, dim))
            moments = self._channels.of(x, dim) if columns.numel() else ""
            if not isinstance(moments, ChannelMoments):
                continue
            gram, size = moments.gram(), int(dim.size)
            inner = gram[:size, :size]
            shares = combinations(inner, gram[:size, size:] - inner, RIDGE)
            found[:, columns] += torch.einsum("oje,ij->oie", weight[:, columns], shares)
        return found

    def rounded(self, layer: Layer, meant: torch.Tensor, values: torch.Tensor) -> None:
        if layer.blocks == 1:
            self._meant[layer], self._now[layer] = meant, values
