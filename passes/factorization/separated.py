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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from math import prod
from typing import Any

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
from regauge.passes.factorization.problems import Problem, places
from regauge.passes.factorization.turns import in_turns
from regauge.passes.factorization.unfolded import Unfolded

_RANKS_TRIED = 8  # of a side, where not all pairs are looked at


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
        unfolded = Unfolded(problem, self.first)
        most = ranks_up_to(min(unfolded.inner, unfolded.rest * problem.layer.outputs), multiple)
        if self.third:
            shapes: list[tuple[int, ...]] = [*self._shapes(unfolded, most, graph, multiple)]
        else:
            shapes = [(rank,) for rank in _thinned(most)]
        by_rank = {rank: [*own] for rank, own in groupby(shapes, key=lambda shape: shape[0])}
        if not self.third and all((self.first, rank) in problem.behind for rank in by_rank):
            losses = {shape: problem.behind[self.first, shape[0]] for shape in shapes}
        else:
            losses = self._losses(unfolded, by_rank, _thinned(most))
        cost, scale = partial(self._cost, problem.layer, graph), problem.scale
        return [Choice(self.name, ranks, *cost(ranks), max(losses[ranks] / scale, 0.0)) for ranks in shapes]

    def _losses(
        self, unfolded: Unfolded, by_rank: Mapping[int, Sequence[tuple[int, ...]]], others: Sequence[int]
    ) -> dict[tuple[int, ...], float]:
        """What is lost with ranks, by the first of them; that of a first link alone with ``others`` is kept, too."""
        problem, found = unfolded.problem, dict[tuple[int, ...], float]()
        ranks = sorted({*by_rank, *others})
        for rank, behind in zip(ranks, unfolded.links_behind(ranks), strict=True):
            problem.behind[self.first, rank] = float(behind.least)
            own = by_rank.get(rank, ())
            lost = behind.lost(problem.outputs) if own and self.third else None
            found.update({shape: float(behind.least if lost is None else lost[shape[1]]) for shape in own})
        return found

    def _shapes(
        self, unfolded: Unfolded, most: Sequence[int], graph: Graph, multiple: int
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
        unfolded = Unfolded(problem, self.first)
        parts = in_turns(unfolded, unfolded.start(ranks[0]), ranks[1] if self.third else None)
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
