"""Convolutions in two or three links: one part of the kernel first, the rest behind it.

    W[o, i, r] = sum over p, q  up[o, q] core[q, p, r] first[p, i]

with i the indices of a column of the weight that the first link contracts, and r the others:

tucker    i = channel          r = place of the kernel     three links (Kim et al. 2016, Compression of Deep CNNs)
tucker-1  i = channel          r = place of the kernel     two links, up and core are one; of outputs it is low-rank
columns   i = channel, row     r = column                  two links, up and core are one (Jaderberg et al. 2014)
rows      i = channel, column  r = row

Of transposed convolutions the link with the kernel is transposed (tucker, tucker-1).

Beside a first link the best core and up are those of :mod:`regauge.passes.factorization.metric_svd` in the metric that
it leaves; beside these the first link is a least squares problem. They are solved in turns, from the directions that
are best with the metric of inputs averaged over r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from regauge.ir.cost import smallest_sizes
from regauge.ir.graph import Graph, Value
from regauge.ir.ops.windows import per_axis
from regauge.ir.sizes.expressions import Size
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.core_shapes import core_shapes
from regauge.passes.factorization.forms import Choice, kernel_sizes, ranks_up_to, single_places
from regauge.passes.factorization.least_squares import bettered, divided_by
from regauge.passes.factorization.metric_svd import Factored, factored
from regauge.passes.factorization.nested_links import Behind, Metrics, links_behind
from regauge.passes.factorization.problems import Problem, places

Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""The first link [rank, inner], the core [last or outputs, rank x rest], and [outputs, last] where there is a third."""

_TURNS = 16
_GAIN = 1e-3  # of the error in a turn, below which there is no other
_RANKS_TRIED = 8  # of a side, where not all pairs are looked at
_RIDGE = 1e-9  # of the metric behind the first link


@dataclass(frozen=True)
class Separated:
    """Which axes of a kernel [channels, rows, columns] the first link contracts, and whether there is a third link."""

    name: str
    first: tuple[int, ...]
    third: bool = False

    def misfit(self, layer: Layer) -> str | None:
        if layer.node.op not in ("conv", "conv_transpose") or layer.taps == 1:
            return f"{self.name} is for convolutions of several places"
        kernel = layer.weight.shape[2:]
        if self.first != (0,) and (len(kernel) != 2 or 1 in kernel or layer.node.op != "conv"):
            return f"{self.name} is for kernels of two axes, not transposed"
        return None

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        unfolded = _Unfolded(problem, self.first)
        most = ranks_up_to(min(unfolded.inner, unfolded.rest * problem.layer.outputs), multiple)
        if self.third:
            shapes: list[tuple[int, ...]] = [*self._shapes(unfolded, most, graph, multiple)]
        else:
            shapes = [(rank,) for rank in _thinned(most)]
        by_rank = {rank: [*own] for rank, own in groupby(shapes, key=lambda shape: shape[0])}
        found = []
        for (_, own), behind in zip(by_rank.items(), unfolded.links_behind([*by_rank]), strict=True):
            lost = behind.lost(problem.outputs) if self.third else None
            for ranks in own:
                loss = float(behind.least if lost is None else lost[ranks[1]]) / problem.scale
                found.append(Choice(self.name, ranks, *self._cost(problem.layer, graph, ranks), max(loss, 0.0)))
        return found

    def _shapes(
        self, unfolded: _Unfolded, most: Sequence[int], graph: Graph, multiple: int
    ) -> Iterator[tuple[int, int]]:
        """Ranks in front of the core and behind it; blocks side by side have the same ones, whatever suits each."""
        layer = unfolded.problem.layer
        outer = ranks_up_to(min(layer.outputs, layer.columns), multiple)
        if not most or not outer:
            return
        if layer.blocks == 1:
            pairs = np.array(most)[:, None], np.array(outer)[None]
            tails = unfolded.directions.tail, unfolded.problem.factored.tail
            found = core_shapes(most, outer, tails, self._cost(layer, graph, pairs))
        else:
            found = [*product(_thinned(most), _thinned(outer))]
        for first, last in found:
            if last <= first * unfolded.rest:
                yield first, last

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        inner = prod(kernel_sizes(layer)[axis] for axis in self.first)
        return [(inner, min(layer.outputs, layer.columns)) if self.third else (inner,)]

    def _cost(self, layer: Layer, graph: Graph, ranks: Sequence[Any]) -> tuple[Any, Any]:
        """Parameters and multiply-accumulates, of ranks or of arrays of them."""
        x, y = layer.node.inputs[0], layer.node.output
        assert isinstance(x, Value)
        sizes = kernel_sizes(layer)
        inner = 1
        for axis in self.first:
            inner *= sizes[axis]
        rest = layer.columns // inner
        before, behind = places(graph, x, 1), places(graph, y, 1)
        middle = before if layer.node.op == "conv_transpose" else behind
        if self.third:
            into, out = ranks
            parts = [(into * inner, before), (into * out * rest, middle), (out * layer.outputs, behind)]
        elif len(self.first) == 1:
            parts = [(ranks[0] * inner, before), (ranks[0] * rest * layer.outputs, middle)]
        else:
            axis = self.first[1]
            other = 3 - axis  # of the axes of the kernel, 1 and 2
            between = behind * _known(graph, x.shape[other + 1]) // _known(graph, y.shape[other + 1])
            parts = [(ranks[0] * inner, between), (ranks[0] * rest * layer.outputs, behind)]
        return sum(count for count, _ in parts), sum(count * rows for count, rows in parts)

    def links(self, problem: Problem, ranks: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        unfolded = _Unfolded(problem, self.first)
        parts = unfolded.in_turns(unfolded.start(ranks[0]), ranks[1] if self.third else None)
        return self._chain(problem.layer, *parts), unfolded.product(*parts)

    def _chain(self, layer: Layer, first: torch.Tensor, core: torch.Tensor, up: torch.Tensor | None) -> list[Link]:
        node, sizes = layer.node, kernel_sizes(layer)
        spatial = len(sizes) - 1
        rank = len(first)
        names = ("stride", "padding", "dilation", "output_padding")
        options = {name: per_axis(node.attributes[name], spatial) for name in names if name in node.attributes}
        if len(self.first) == 1:
            kernel = sizes[1:]
            down = Link("down", "conv", first.reshape(rank, -1, *(1 for _ in kernel)), single_places(spatial))
            weight = core.reshape(-1, rank, *kernel)
            middle = weight.transpose(0, 1) if node.op == "conv_transpose" else weight, {**options, "groups": 1}
            if up is None:
                return [down, Link("up", node.op, *middle)]
            last = up.reshape(*up.shape, *(1 for _ in kernel))
            return [down, Link("core", node.op, *middle), Link("up", "conv", last, single_places(spatial))]
        axis = self.first[1] - 1  # of the kernel, that the first link goes along
        plain = {"stride": 1, "padding": 0, "dilation": 1}
        along = [
            {n: tuple(v if i == a else plain[n] for i, v in enumerate(o)) for n, o in options.items()} for a in (0, 1)
        ]
        shapes = [[sizes[1 + i] if i == a else 1 for i in (0, 1)] for a in (0, 1)]
        other = 1 - axis
        return [
            Link("down", "conv", first.reshape(rank, sizes[0], *shapes[axis]), {**along[axis], "groups": 1}),
            Link("up", "conv", core.reshape(-1, rank, *shapes[other]), {**along[other], "groups": 1}),
        ]


def _thinned(ranks: Sequence[int]) -> Sequence[int]:
    step = max(1, len(ranks) // _RANKS_TRIED)
    return ranks[step - 1 :: step]


def _known(graph: Graph, size: Size) -> int:
    return smallest_sizes(graph)(size)


class _Unfolded:
    """A problem with the columns in two axes: those that the first link contracts, and the rest."""

    def __init__(self, problem: Problem, first: Sequence[int]) -> None:
        self.problem = problem
        self.sizes = kernel_sizes(problem.layer)
        self.many = len(first)
        self.order = [*first, *(axis for axis in range(len(self.sizes)) if axis not in first)]
        self.inner = 1
        for axis in first:
            self.inner *= self.sizes[axis]
        self.rest = problem.layer.columns // self.inner
        self.weight = self._split(problem.weight)
        columns = problem.layer.columns
        inputs = torch.eye(columns, dtype=torch.float64) if problem.inputs is None else problem.inputs
        self.metric = self._split_metric(inputs)

    def _split(self, matrix: torch.Tensor) -> torch.Tensor:
        """[n, columns] as [n, inner, rest]."""
        grid = matrix.reshape(len(matrix), *self.sizes)
        return grid.permute(0, *(axis + 1 for axis in self.order)).reshape(len(matrix), self.inner, self.rest)

    def _split_metric(self, metric: torch.Tensor) -> torch.Tensor:
        """[columns, columns] as [inner, rest, inner, rest]."""
        rows = self._split(metric).reshape(metric.shape)
        return self._split(rows.t()).reshape(self.inner, self.rest, self.inner, self.rest)

    @cached_property
    def _metrics(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Those that errors are told by: of inputs [inner, rest, inner, rest], and of outputs."""
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
    def directions(self) -> Factored:
        """Those of what the first link contracts, and what is lost without them."""
        rows = self.weight if self.problem.outputs is None else self._rooted()
        unfolded = rows.permute(0, 2, 1).reshape(-1, self.inner)
        averaged = torch.einsum("irjr->ij", self.metric) / self.rest
        return factored(unfolded, averaged)

    def _rooted(self) -> torch.Tensor:
        assert self.problem.outputs is not None
        root = torch.linalg.cholesky(self.problem.outputs)
        return torch.einsum("op,oir->pir", root, self.weight)

    def in_turns(self, first: torch.Tensor, last: int | None) -> Parts:
        """All links from a first one: what follows it in closed form and it beside that, in turns; then, where errors
        are told by bands, each beside the others. ``last`` is the rank in front of a third link."""
        plain = self if not self.problem.bands else _Unfolded(replace(self.problem, bands=()), self.order[: self.many])
        parts = plain.closed(first, last)
        parts = plain.turned(parts, lambda found: plain.closed(plain.first_bettered(*found), last))
        if not self.problem.bands:
            return parts
        return self.turned(parts, self.bettered)

    def turned(self, parts: Parts, step: Callable[[Parts], Parts]) -> Parts:
        """The parts after steps, as long as each lowers the error by a share."""
        least = self.problem.error(self.product(*parts))
        for _ in range(max(1, _TURNS // self.problem.layer.blocks) if least > self.problem.rounding else 0):
            found = step(parts)
            error = self.problem.error(self.product(*found))
            if not error < least:
                break
            parts, gained, least = found, least - error, error
            if gained < _GAIN * least:
                break
        return parts

    def closed(self, first: torch.Tensor, last: int | None) -> Parts:
        """The best links behind a first one, in the metrics of the problem."""
        behind = self.behind(first)
        if last is None:
            return first, behind.up @ behind.down, None
        up, core = behind.of_rank(last)
        return first, core, up

    def bettered(self, parts: Parts) -> Parts:
        """Each part a little better beside the others."""
        first, core, up = parts
        first = self.first_bettered(first, core, up)
        outputs, metric = self.problem.outputs, self.metric_behind(first)
        behind = [(self._metric_behind(first, own), left) for own, left in self._metrics]
        through = [(own, _through(left, up)) for own, left in behind]
        left = outputs if up is None or outputs is None else up.t() @ outputs @ up
        core = bettered(
            self.problem,
            lambda found: self.product(first, found, up),
            core,
            divided_by(left, metric),
            curved=lambda found: _weighed(found, through),
        )
        if up is not None:
            right = core @ metric @ core.t()
            through = [(core @ own @ core.t(), left) for own, left in behind]
            up = bettered(
                self.problem,
                lambda found: self.product(first, core, found),
                up,
                divided_by(outputs, right),
                curved=lambda found: _weighed(found, through),
            )
        return first, core, up

    def first_bettered(self, first: torch.Tensor, core: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        behind = (core if up is None else up @ core).reshape(-1, len(first), self.rest)
        rest = torch.einsum("iris->rs", self.metric) / self.metric.diagonal(dim1=0, dim2=2).sum()
        moved = torch.einsum("opr,rs->ops", behind, rest)
        weighed = behind if self.problem.outputs is None else torch.einsum("ou,upr->opr", self.problem.outputs, behind)
        left = torch.einsum("opr,oqr->pq", weighed, moved)
        right = torch.einsum("irjr->ij", self.metric)
        inner = core.reshape(-1, len(first), self.rest)
        columns = self.inner * self.rest
        through = [(own.reshape(columns, columns), _through(left, up)) for own, left in self._metrics]

        def curved(found: torch.Tensor) -> torch.Tensor:
            image = _weighed(self.image(found, core).reshape(len(core), -1), through)
            return torch.einsum("qpr,qir->pi", inner, image.reshape(len(core), self.inner, self.rest))

        return bettered(
            self.problem, lambda found: self.product(found, core, up), first, divided_by(left, right), curved=curved
        )

    def product(self, first: torch.Tensor, core: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """What the links multiply by, [outputs, columns]."""
        return self.flat(self.image(first, core if up is None else up @ core))

    def metric_behind(self, first: torch.Tensor) -> torch.Tensor:
        """The metric of what a first link gives, [rank x rest, rank x rest]."""
        return self._metric_behind(first, self.metric)

    def _metric_behind(self, first: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        image = torch.einsum("pi,irjs->prjs", first, metric)
        return torch.einsum("prjs,qj->prqs", image, first).reshape(len(first) * self.rest, -1)

    def behind(self, first: torch.Tensor) -> Factored:
        """The best factors of what follows a first link, [outputs, rank x rest]."""
        rank = len(first)
        image = torch.einsum("pi,irjs->prjs", first, self.metric)
        metric = torch.einsum("prjs,qj->prqs", image, first).reshape(rank * self.rest, -1)
        metric.diagonal().add_(max(_RIDGE * float(metric.diagonal().mean()), 1e-30))
        plain = torch.einsum("oir,ip->opr", self.weight, torch.linalg.pinv(first)).reshape(len(self.weight), -1)
        left = self.weight - self.image(first, plain)  # nothing at full rank, which is exact whatever the metric
        cross = torch.einsum("ojs,prjs->opr", left, image).reshape(len(self.weight), -1)
        return factored(plain + torch.linalg.solve(metric, cross.t()).t(), metric, self.problem.outputs)

    def links_behind(self, ranks: Sequence[int]) -> Iterator[Behind]:
        """What follows each of the first links that :meth:`start` gives, of ascending ranks."""
        basis = self.directions.down / self.directions.down.norm(dim=1, keepdim=True).clamp(min=1e-300)
        basis = torch.linalg.qr(basis.t(), mode="complete").Q.t()
        weight = torch.einsum("oir,pi->opr", self.weight, basis).reshape(len(self.weight), -1)
        inputs = None if self.problem.inputs is None else self._metric_behind(basis, self.metric)
        bands: list[Metrics] = [(inputs, self.problem.outputs)]
        if self.problem.bands:
            bands = [(self._metric_behind(basis, own), outputs) for own, outputs in self._metrics]
        return links_behind(weight, inputs, bands, [rank * self.rest for rank in ranks])

    def image(self, first: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """[outputs, inner, rest] of a first link and what follows it."""
        return torch.einsum("opr,pi->oir", behind.reshape(len(behind), len(first), self.rest), first)


def _through(outputs: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor | None:
    """The metric of outputs before a last link [outputs, last]."""
    if up is None:
        return outputs
    return up.t() @ (up if outputs is None else outputs @ up)


def _weighed(change: torch.Tensor, metrics: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    """A matrix times the metrics of both of its sides, of each band, in all."""
    found = torch.zeros_like(change)
    for inputs, outputs in metrics:
        found += change @ inputs if outputs is None else outputs @ change @ inputs
    return found
