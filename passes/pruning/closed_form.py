"""Making up for removed channels by those that are kept, from the weights alone: no data, and no run of the graph.

Each removed channel j is taken for a combination of kept ones, and the layer that reads them takes that over:

    x_j ~ sum_i s_ij x_i      s = (G_KK + l2)^-1 G_KR      V_i += sum_j s_ij V_j

``udfc`` (Bai et al. 2023, Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning) looks at the
rows w_i and biases b_i of the layer that makes the channels, batch norm folded in, as though activations were linear:
s minimises |w_j - sum_i s_ij w_i|^2 + l1 (b_j - sum_i s_ij b_i)^2 + l2 |s_j|^2, so that G = W W' + l1 b b'. Our l2 is a
share of the mean of G's diagonal. Beyond the paper, a sum of several layers' results has the sum of their Gs.

``moments`` takes for G what the channels' products are expected to be behind their activation, by the statistics that
batch norms hold (:mod:`regauge.passes.calibration.channel_moments`): s then has the least expected squared error. In
four small trained networks with a tenth of all channels cut the outputs had 0.09 to 0.27 of the squared error of the
masked ones, and with a third or more still less than all of it. With ``udfc`` they had 0.33 to 2.4 of it, and more
where more was cut: what is a combination before a relu need not be one behind it.

Between the two layers nothing may mix channels, nor treat them unlike each other but for batch norms in inference.
Layers take over in the order of the graph, so that what makes channels is as it is once it has taken over itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.kept import Keep, KeptWithin, flat_indices, part_kept
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.memory.mapped import mapped, on_disk
from regauge.passes.calibration.channel_moments import ChannelMoments, ChannelReader, combinations
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.pruning.readers import readers

ClosedForm: TypeAlias = Literal["udfc", "moments"]
CLOSED_FORMS = get_args(ClosedForm)

BIAS = 1.0  # l1
RIDGE = {"udfc": 0.3, "moments": 1e-3}  # l2 as a share: rows say less of channels behind an activation


@dataclass
class TakenOver:
    """How many layers take over what they lost; and of each Dim that is cut why readers of it do not, one by one."""

    layers: int = 0
    left: dict[Dim, list[str]] = field(default_factory=dict)


def take_over(
    original: Graph, pruned: Graph, keep: Keep, *, form: ClosedForm, by: str, ridge: float | None = None
) -> TakenOver:
    """Let layers of ``pruned``, which is ``original`` resized to ``keep``, make up for the columns that they lost.

    Memory: the new weights, and three matrices [indices, indices] in double precision of the largest Dim.
    """
    run = _TakingOver(original, keep, form, RIDGE[form] if ridge is None else ridge)
    weights = run.run()
    parameters = {parameter.name: parameter for parameter in pruned.all_parameters()}
    for layer, matrix in weights.items():
        tensor = part_kept(layer.stored(matrix), original.axes.of[layer.weight], keep)
        to_disk = on_disk(layer.weight.weight)
        set_weight(pruned, parameters[layer.weight.name], mapped(tensor) if to_disk else tensor, by=by)
    run.done.layers = len(weights)
    return run.done


class _TakingOver:
    def __init__(self, graph: Graph, keep: Keep, form: ClosedForm, ridge: float) -> None:
        self.graph, self.keep, self.ridge = graph, keep, ridge
        self.done = TakenOver()
        self.matrices: dict[Layer, torch.Tensor] = {}  # of the original's size, zero where columns go
        self.channels = ChannelReader(graph, "rows" if form == "udfc" else "moments", self.matrices)

    def run(self) -> dict[Layer, torch.Tensor]:
        found = {}
        own = set(self.graph.nodes)
        for node, dims in readers(self.graph, self.keep).items():
            layer = layer_of(node) if node in own else None
            if layer is None:
                for dim in dims:
                    self._leave(dim, self._why_not(node, node in own))
                continue
            matrix = layer.matrix(layer.weight.tensor.detach()).double().clone()
            done = [dim for dim in dims if self._takes_over(layer, matrix, dim)]
            self.matrices[layer] = self._masked(layer, matrix)
            if done:
                found[layer] = self.matrices[layer]
        return found

    def _leave(self, dim: Dim, reason: str) -> None:
        self.done.left.setdefault(dim, []).append(reason)

    def _why_not(self, node: Node, own: bool) -> str:
        if not own:
            return "it is read in a branch or loop"
        if layer_of(node, blocks=True, shared=True) is None:
            return f"{node.op} reads it"
        return "its reader is a grouped layer, or shares its weight"

    def _takes_over(self, layer: Layer, matrix: torch.Tensor, dim: Dim) -> bool:
        """Add to the columns of kept indices what those of the others are combinations of."""
        stays = self.keep[dim]
        if isinstance(stays, KeptWithin):
            self._leave(dim, f"they are not the same ones in each index of {stays.majors[0].name}")
            return False
        columns = torch.from_numpy(layer.columns_of(self.graph, dim))
        x = layer.node.inputs[0]
        assert isinstance(x, Value)
        moments = self.channels.of(x, dim) if columns.numel() else "its reader has it more than once"
        if not isinstance(moments, ChannelMoments):
            self._leave(dim, moments)
            return False
        kept = torch.from_numpy(stays)
        gone = torch.from_numpy(np.setdiff1d(np.arange(int(dim.size)), stays))
        gram = moments.gram(BIAS)
        shares = combinations(gram[kept][:, kept], gram[kept][:, gone], self.ridge)
        matrix[:, columns[kept]] += torch.einsum("oje,ij->oie", matrix[:, columns[gone]], shares)
        matrix[:, columns[gone].reshape(-1)] = 0
        return True

    def _masked(self, layer: Layer, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix in the type of the weight, zero in the columns that go."""
        kept = flat_indices(self.graph.axes.of[layer.weight][layer.contracted], self.keep)
        mask = torch.zeros(layer.columns, dtype=matrix.dtype)
        mask[torch.from_numpy((kept[:, None] * layer.taps + np.arange(layer.taps)).reshape(-1))] = 1
        assert isinstance(layer.weight.dtype, torch.dtype)
        return (matrix * mask).to(layer.weight.dtype)
