"""A layer with the columns of its weight in two axes: those that a first link contracts, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod

import torch

from regauge.passes.factorization.forms import kernel_sizes
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.metric_svd import Factored, factored
from regauge.passes.factorization.nested_links import Behind, Metrics, links_behind
from regauge.passes.factorization.nested_rows import links_behind_by_rows
from regauge.passes.factorization.problems import Problem

_RIDGE = 1e-9  # of the metric behind the first link


class Unfolded:
    """A problem with columns [inner, rest]; ``first`` are the axes of the kernel that the first link contracts."""

    def __init__(self, problem: Problem, first: Sequence[int]) -> None:
        self.problem = problem
        self.sizes = kernel_sizes(problem.layer)
        self.order = [*first, *(axis for axis in range(len(self.sizes)) if axis not in first)]
        self.inner = prod(self.sizes[axis] for axis in first)
        self.rest = problem.layer.columns // self.inner
        self.weight = self.split(problem.weight)
        self.metric = self._split_metric(problem.metric)

    def split(self, matrix: torch.Tensor) -> torch.Tensor:
        """[n, columns] as [n, inner, rest]."""
        grid = matrix.reshape(len(matrix), *self.sizes)
        return grid.permute(0, *(axis + 1 for axis in self.order)).reshape(len(matrix), self.inner, self.rest)

    def _split_metric(self, metric: Gram) -> Gram:
        return metric.unfolded(self.sizes, self.order, self.inner)

    @cached_property
    def metrics(self) -> list[Metrics]:
        """Those that errors are told by."""
        if not self.problem.bands:
            return [(self.metric, self.problem.outputs)]
        return [(self._split_metric(inputs), outputs) for inputs, outputs in self.problem.bands]

    def flat(self, split: torch.Tensor) -> torch.Tensor:
        """[n, inner, rest] as [n, columns]."""
        grid = split.reshape(len(split), *(self.sizes[axis] for axis in self.order))
        back = [self.order.index(axis) + 1 for axis in range(len(self.sizes))]
        return grid.permute(0, *back).reshape(len(split), -1)

    def start(self, rank: int) -> torch.Tensor:
        """The first link [rank, inner]: the best directions where the rest of the column does not matter."""
        return self.directions.of_rank(rank)[1]

    @cached_property
    def averaged(self) -> torch.Tensor:
        """The metric of what the first link contracts [inner, inner], the mean over the rest of the column."""
        return self.metric.over_rest() / self.rest

    @cached_property
    def directions(self) -> Factored:
        """Those of what the first link contracts, and what is lost without them."""
        rows = self.weight if self.problem.outputs is None else self._rooted()
        return factored(rows.permute(0, 2, 1).reshape(-1, self.inner), self.averaged)

    def _rooted(self) -> torch.Tensor:
        assert self.problem.outputs is not None
        root: torch.Tensor = torch.linalg.cholesky(self.problem.outputs)
        return (root.t() @ self.weight.flatten(1)).reshape(self.weight.shape)

    def image(self, first: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """[outputs, inner, rest] of a first link and what follows it, [outputs, rank x rest]."""
        found: torch.Tensor = torch.einsum("opr,pi->oir", behind.reshape(len(behind), len(first), self.rest), first)
        return found

    def product(self, first: torch.Tensor, core: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """What the links multiply by, [outputs, columns]."""
        return self.flat(self.image(first, core if up is None else up @ core))

    def behind(self, first: torch.Tensor, metric: torch.Tensor | None = None) -> Factored:
        """The best factors of what follows a first link, [outputs, rank x rest].

        ``metric`` is that of what the first link gives, if it is at hand.
        """
        metric = self.metric.behind(first).matrix() if metric is None else metric.clone()
        metric.diagonal().add_(max(_RIDGE * float(metric.diagonal().mean()), 1e-30))
        plain = torch.einsum("oir,ip->opr", self.weight, torch.linalg.pinv(first)).reshape(len(self.weight), -1)
        left = self.weight - self.image(first, plain)  # nothing at full rank, which is exact whatever the metric
        cross = torch.einsum("ojs,pj->ops", self.metric.weighed(left), first).reshape(len(self.weight), -1)
        return factored(plain + torch.linalg.solve(metric, cross.t()).t(), metric, self.problem.outputs)

    def links_behind(self, ranks: Sequence[int]) -> Iterator[Behind]:
        """What follows each of the first links that :meth:`start` gives, of ascending ranks."""
        basis = self.directions.down / self.directions.down.norm(dim=1, keepdim=True).clamp(min=1e-300)
        basis = torch.linalg.qr(basis.t(), mode="complete").Q.t()
        weight = torch.einsum("oir,pi->opr", self.weight, basis).reshape(len(self.weight), -1)
        counts = [rank * self.rest for rank in ranks]
        if self.metric.rows is None or any(own.rows is None for own, _ in self.metrics):
            return links_behind(weight, self.metric, self.metrics, basis, counts)
        turned = [(own.turned(basis), outputs) for own, outputs in self.metrics]
        whole = self.metric.turned(basis) if self.problem.bands else turned[0][0]
        return links_behind_by_rows(weight, whole, turned, counts)
