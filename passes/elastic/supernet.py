"""Training nested networks together: one module, run at several widths in each step.

net = Supernet(regauge.elastic(graph), widths=(0.25, 0.5, 0.75, 1.0))
for images, labels in loader:
    loss = net.sandwich((images,), lambda logits: criterion(logits, labels))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
half = net.at(0.5, batches)      # a graph with its own batch norm statistics
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.kept import flat_indices, touches
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.elastic.elastic import Elastic, Widths
from regauge.passes.training.bound_model import BoundModel
from regauge.passes.training.distillation import first_tensor, soft_cross_entropy

Criterion = Callable[[Any], torch.Tensor]


class Supernet(nn.Module):
    """The module of an elastic graph, which also runs at smaller widths, with slices of the same weights.

    ``net(x)`` is the whole network, ``net(x, width=0.5)`` the nested one. ``widths`` are shares of every Dim that are
    kept; ``mixes`` are counts by Dim (``nested.mix(macs=0.4)``) under names of one's own, ``net(x, width="phone")``.
    Every width is a module of its own shape, so smaller ones cost less in training too. ``full`` has the trained
    parameters, under the names of the original.

    Batch norms of narrower widths take their statistics from the batch and keep none (Yu and Huang 2019, Universally
    Slimmable Networks): :meth:`at` measures them once training is over. Raises PassError for widths out
    of range.
    """

    def __init__(
        self,
        elastic: Elastic,
        widths: Sequence[float] = (0.25, 0.5, 0.75),
        mixes: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__()
        self.elastic = elastic
        self.full = elastic.graph.to_torch()
        self._bound = BoundModel(self.full, elastic.graph)
        self.counts: dict[float | str, Mapping[str, int]] = {}
        self.counts.update({width: elastic.counts(width) for width in sorted(widths) if width < 1})
        self.counts.update(mixes or {})
        if not self.counts:
            raise PassError("a Supernet has narrower widths or mixes: Supernet(nested, widths=(0.25, 0.5))")
        # in a tuple, so that torch does not take them for sub-modules with parameters of their own
        self._narrow = ({width: elastic.cut_to(counts).to_torch() for width, counts in self.counts.items()},)
        self._slices = {width: self._slices_of(counts) for width, counts in self.counts.items()}

    def _slices_of(self, counts: Mapping[str, int]) -> dict[str, dict[int, torch.Tensor]]:
        """For each tensor of the module its axes that are cut, and the positions that are kept."""
        graph = self.elastic.graph
        dims = {group.name: group.dim for group in graph.groups()}
        keep = {dims[name]: np.arange(count) for name, count in counts.items()}
        found: dict[str, dict[int, torch.Tensor]] = {}
        for parameter in graph.all_parameters():
            axes = {
                axis: torch.from_numpy(flat_indices(extent, keep))
                for axis, extent in enumerate(graph.axes.of[parameter])
                if touches(extent, keep)
            }
            found.update(dict.fromkeys(parameter.names, axes))
        return found

    def forward(self, *args: Any, width: float | str = 1.0, **kwargs: Any) -> Any:
        """The result of the network of one of the widths or mixes."""
        if width == 1:
            return self.full(*args, **kwargs)
        if width not in self._slices:
            raise PassError(f"the width {width} is none of {', '.join(map(str, [*self.counts, 1.0]))}")
        module = self._narrow[0][width].train(self.training)
        state = {**dict(self.full.named_parameters()), **dict(self.full.named_buffers())}
        slices = self._slices[width]
        cut = {name: _cut(tensor, slices[name]) for name, tensor in state.items() if name in slices}
        # constants that emission folded, rotary tables say, are each width's own: only their device and type follow
        own = {name: tensor for name, tensor in module.named_buffers() if name not in slices}
        cut |= {name: tensor.to(state[name]) for name, tensor in own.items() if name in state}
        return torch.func.functional_call(module, cut, args, kwargs)

    def sandwich(
        self, args: tuple[Any, ...], criterion: Criterion, *, between: int = 2, distil: bool = True
    ) -> torch.Tensor:
        """The loss of the widest, the narrowest and ``between`` random widths: the sandwich rule.

        The widest learns from ``criterion``, the others from what it gives (``distil``: in-place distillation, by the
        divergence of its classes) or from the criterion too (Yu and Huang 2019). The narrowest
        is the one with the fewest indices; mixes are among the others.
        """
        result = self(*args)
        loss = criterion(result)
        narrow = sorted(self.counts, key=lambda width: sum(self.counts[width].values()))
        drawn = [1 + place for place in torch.randperm(len(narrow) - 1)[:between].tolist()]
        for width in [narrow[place] for place in [0, *drawn]]:
            found = self(*args, width=width)
            part = soft_cross_entropy(first_tensor(found), first_tensor(result), 1.0) if distil else criterion(found)
            loss = loss + part
        return loss

    @torch.no_grad()
    def trained(self) -> Elastic:
        """The elastic graph with the weights as they are now."""
        graph = self._bound.trained_graph("elastic")
        return Elastic(graph, self.elastic.scores, self.elastic.left, self.elastic.round_to)

    def at(self, width: Widths | str, batches: Iterable[Any] = ()) -> Graph:
        """The nested graph of a width or mix with the trained weights, and batch norm statistics of the ``batches``.

        Batches are tensors or tuples of the arguments. Without them, statistics are slices of those of the whole.
        """
        trained = self.trained()
        graph = trained.cut_to(self.counts[width]) if isinstance(width, str) else trained.at(width)
        result = with_statistics(graph, batches)
        result.report = graph.report
        return result


def _cut(tensor: torch.Tensor, axes: dict[int, torch.Tensor]) -> torch.Tensor:
    """The slice of a tensor; of a buffer a copy, which the narrower network may write into."""
    for axis, kept in axes.items():
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor if tensor.requires_grad or axes else tensor.clone()


@torch.no_grad()
def with_statistics(graph: Graph, batches: Iterable[Any]) -> Graph:
    """The graph with the running statistics of its batch norms replaced by means over the batches, as torch counts."""
    module = graph.to_torch()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    count = 0
    for batch in batches if norms else ():
        module(*(batch if isinstance(batch, tuple | list) else (batch,)))
        count += 1
    return BoundModel(module, graph).trained_graph("statistics") if count else graph
