"""The factors of a network split off a matrix one after the other, by singular values in the metrics of its problem.

The axes that a factor shares with what follows it are a batch of matrices; rows are the axes of its own, columns those
of what follows. The matrices are whitened by the parts of the metrics that lie in one of them, averaged over the
axes that it does not tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.networks import Network, Sizes, count
from regauge.passes.factorization.problems import Problem


def split(network: Network, problem: Problem, sizes: Sizes) -> list[torch.Tensor]:
    """The factors, each with the axes of its letters."""
    given = network.outputs + network.inputs
    rest = torch.einsum(f"{given}->{network.axes}", problem.weight.reshape([sizes[axis] for axis in given]))
    axes, found = network.axes, []
    for factor, bond, (batch, own, others) in zip(network.factors, network.bonds, network.unfoldings(), strict=False):
        rows, columns = (_Side(network, problem, batch, part, sizes) for part in (own, others))
        matrices = torch.einsum(f"{axes}->{batch}{rows.axes}{columns.axes}", rest)
        matrices = rows.whitened(matrices.reshape(-1, rows.size, columns.size))
        u, s, v = torch.linalg.svd(columns.whitened(matrices.mT).mT, full_matrices=False)
        rank = sizes[bond]
        first, behind = rows.plain(u[..., :rank]), columns.plain((s[..., :rank, None] * v[..., :rank, :]).mT)
        found.append(_as_axes(first, f"{batch}{rows.axes}{bond}", factor, sizes))
        axes = f"{batch}{columns.axes}{bond}"
        rest = _as_axes(behind, axes, axes, sizes)
    return balanced(network, [*found, torch.einsum(f"{axes}->{network.factors[-1]}", rest)])


def balanced(network: Network, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same product with the indices of each bond as large in the factor before it as in that behind it."""
    found = list(factors)
    for bond in network.bonds:
        before, behind = [place for place, factor in enumerate(network.factors) if bond in factor]
        sizes = [
            torch.einsum(f"{network.factors[place]}->{bond}", found[place].square()).sqrt()
            for place in (before, behind)
        ]
        share = (sizes[1] / sizes[0].clamp(min=1e-300)).sqrt().clamp(min=1e-150)
        for place, scale in ((before, share), (behind, 1 / share)):
            found[place] = torch.einsum(
                f"{network.factors[place]},{bond}->{network.factors[place]}", found[place], scale
            )
    return found


def _as_axes(tensor: torch.Tensor, given: str, wanted: str, sizes: Sizes) -> torch.Tensor:
    return torch.einsum(f"{given}->{wanted}", tensor.reshape([sizes[axis] for axis in given]))


class _Side:
    """The rows or the columns of a batch of matrices: axes of inputs, of outputs and bonds, and roots of metrics."""

    def __init__(self, network: Network, problem: Problem, batch: str, own: str, sizes: Sizes) -> None:
        self.parts = [
            "".join(axis for axis in own if axis in side) for side in (network.inputs, network.outputs, network.bonds)
        ]
        self.axes = "".join(self.parts)
        self.sizes = [count(part, sizes) for part in self.parts]
        self.size = count(self.axes, sizes)
        self.roots = []
        metrics = ((network.inputs, problem.inputs), (network.outputs, problem.outputs))
        for part, (side, metric) in zip(self.parts[:2], metrics, strict=True):
            self.roots.append(None if metric is None or not part else _roots(metric, side, batch, part, sizes))

    def whitened(self, matrices: torch.Tensor) -> torch.Tensor:
        """[batch, size, n] times the roots."""
        return self._through(matrices, lambda root, x: root.mT @ x)

    def plain(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of ``whitened``."""
        return self._through(matrices, lambda root, x: torch.linalg.solve_triangular(root.mT, x, upper=True))

    def _through(
        self, matrices: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        inputs, outputs = self.roots
        first, second, _ = self.sizes
        shape = matrices.shape
        if inputs is not None:
            matrices = change(inputs, matrices.reshape(len(matrices), first, -1))
        if outputs is not None:
            apart = matrices.reshape(shape[0], first, second, -1)
            matrices = change(outputs[:, None], apart)
        return matrices.reshape(shape)


def _roots(metric: torch.Tensor, side: str, batch: str, own: str, sizes: Sizes) -> torch.Tensor:
    """Of a metric the parts between the axes ``own`` of a side, a root for each index of the batch, which is [batch,
    size, size]; other axes of the side are summed over."""
    again = {axis: axis.upper() for axis in own}
    second = "".join(again.get(axis, axis) for axis in side)
    among = "".join(axis for axis in batch if axis in side)
    grid = metric.reshape([sizes[axis] for axis in side] * 2)
    size = count(own, sizes)
    blocks = torch.einsum(f"{side}{second}->{among}{own}{''.join(again.values())}", grid).reshape(-1, size, size)
    roots = torch.stack([factor_of(block, 0.0) for block in blocks])
    shape = [sizes[axis] if axis in among else 1 for axis in batch]
    whole = [sizes[axis] for axis in batch]
    return roots.reshape(*shape, size, size).expand(*whole, size, size).reshape(-1, size, size)
