"""Masks of single weights: which entries are kept; and what sparsifiers with such masks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.base import Cut, reasons
from regauge.passes.name_patterns import matches
from regauge.passes.report import sparse_cut
from regauge.passes.training.places import contracted_axes
from regauge.passes.training.sparsifier import Sparsifier


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the ``count`` largest entries; of equal ones the first."""
    ranked = torch.argsort(values.flatten(), descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[ranked[:count]] = True
    return mask.reshape(values.shape)


class WeightSparsifier(Sparsifier):
    """Zeros in the weights that contract their input (linear maps, convolutions); sizes stay as they are.

    What ``finish`` gives holds zeros as ordinary weights, which further training would fill: train to the end with the
    sparsifier. Other parameters (biases, norms, embeddings, depthwise kernels) are left dense, and with an n:m pattern
    also weights whose contracted axis is no multiple of m.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        *,
        pattern: tuple[int, int] | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, graph)
        if pattern is not None and not 0 < pattern[0] < pattern[1]:
            raise PassError(f"pattern={pattern} is no pattern: of every m entries n are kept, (2, 4)")
        self.pattern = pattern
        self.axes = self._weights(include, exclude)
        if not self.axes:
            why = ", ".join(reasons(self.left)) or "none contracts its input"
            raise PassError(f"{type(self).__name__} finds no weight that it may make sparse: {why}")
        tensors = {parameter: self.bound.tensor(parameter) for parameter in self.axes}
        self.masks = {parameter: torch.ones_like(tensor, dtype=torch.bool) for parameter, tensor in tensors.items()}

    def _weights(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> dict[Parameter, int]:
        """The weights that become sparse, with the axis that they contract."""
        trained = list(self.bound.trained())
        found: dict[Parameter, int] = {}
        read = contracted_axes(self.graph)
        for member in sorted((m for m in read if m.parameter in trained), key=lambda m: trained.index(m.parameter)):
            parameter, axis = member.parameter, member.axis
            if include and not matches(parameter.names, include):
                self.left["not included"] += 1
            elif matches(parameter.names, exclude):
                self.left["excluded"] += 1
            elif self.pattern is not None and int(parameter.shape[axis]) % self.pattern[1]:
                self.left[f"its contracted axis is no multiple of {self.pattern[1]}"] += 1
            else:
                found[parameter] = axis
        return found

    @property
    def sparsity(self) -> float:
        """The share of the entries of the sparse weights that are masked."""
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def apply(self) -> None:
        """Set the masked entries of the module's own parameters to zero."""
        for parameter, mask in self.masks.items():
            tensor = self.bound.tensor(parameter)
            tensor.mul_(mask.to(tensor.device))

    def _finish(self) -> Graph:
        self.apply()
        return self.bound.trained_graph(self.name)

    def _cuts(self, result: Graph) -> Iterable[Cut]:
        return [sparse_cut(p.name, mask.numel(), int((~mask).sum())) for p, mask in self.masks.items()]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": {p.name: mask.clone() for p, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.masks = {p: state["masks"][p.name].to(self.masks[p].device).clone() for p in self.masks}
