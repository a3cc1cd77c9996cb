"""Convolutions along one axis of the kernel after the other, between two of single places.

cp    W[o, i, r, c] = sum over q  up[o, q] rows[q, r] columns[q, c] first[q, i]         (Lebedev et al. 2015, section 3)
tt    W[o, i, r, c] = sum over p, q, s  up[o, s] columns[s, q, c] rows[q, p, r] first[p, i]     (Oseledets 2011, TT-SVD)

Of cp the links between are depthwise. It starts from alternating least squares
(:mod:`regauge.passes.factorization.polyadic`), these from the terms of the higher-order singular value decomposition
that hold most, which are all of the kernel at full rank; tt from singular value decompositions in turns. Then each link
is bettered beside the others. Of transposed convolutions the links between are transposed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from regauge.ir.cost import smallest_sizes
from regauge.ir.graph import Graph, Value
from regauge.ir.ops.windows import per_axis
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice, kernel_sizes, ranks_up_to, single_places
from regauge.passes.factorization.least_squares import bettered
from regauge.passes.factorization.polyadic import decomposed, in_turns, random_start, terms
from regauge.passes.factorization.problems import Problem, places

_TURNS = 12
_GAIN = 1e-3  # of the error in a turn, below which there is no other
_RANKS_TRIED = 8
_TURNS_TRIED = 10  # by which ranks of cp are compared
_RIDGE = 1e-9  # of the metric of terms

Factors = list[torch.Tensor]
Image = Callable[[Factors], torch.Tensor]


class Cp:
    """One rank for all links."""

    name = "cp"

    def misfit(self, layer: Layer) -> str | None:
        return _misfit(self.name, layer)

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        layer = problem.layer
        channels, *kernel = kernel_sizes(layer)
        each = channels + sum(kernel) + layer.outputs
        ranks = ranks_up_to(min(layer.outputs * layer.columns // each, layer.columns), multiple)
        at = _places_of_links(layer, graph)
        macs = sum(size * count for size, count in zip((channels, *kernel, layer.outputs), at, strict=True))
        if problem.inputs is not None:
            ranks = ranks[:: max(1, len(ranks) // _RANKS_TRIED)]
        losses = self._losses(problem, ranks)
        return [
            Choice(self.name, (rank,), rank * each, rank * macs, loss) for rank, loss in zip(ranks, losses, strict=True)
        ]

    def _losses(self, problem: Problem, ranks: Sequence[int]) -> list[float]:
        """Those of some ranks are tried; their logarithms are nearly straight between these."""
        if problem.inputs is not None:
            return [problem.error(self._image(self._start(problem, rank, tried=True))) for rank in ranks]
        tried = sorted({*ranks[:: max(1, len(ranks) // _RANKS_TRIED)], *ranks[-1:]})
        least = max(problem.rounding, 1e-300)
        found = [max(problem.error(self._image(self._start(problem, rank, tried=True))), least) for rank in tried]
        losses: list[float] = np.exp(np.interp(ranks, tried, np.log(found))).tolist() if tried else []
        return losses

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        return [(layer.columns,)]

    def links(self, problem: Problem, ranks: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        (rank,) = ranks
        factors = _bettered_in_turns(problem, self._image, self._start(problem, rank, tried=False))
        first, *along, up = factors
        links = [_single("down", first, problem.layer)]
        for axis, factor in enumerate(along):
            shape = [rank, 1, *(factor.shape[1] if own == axis else 1 for own in range(len(along)))]
            links.append(_along(axis, factor.reshape(shape), problem.layer, groups=rank))
        return [*links, _single("up", up, problem.layer)], self._image(factors)

    def _start(self, problem: Problem, rank: int, *, tried: bool) -> Factors:
        """What alternating least squares find of the kernel, by few turns to try a rank; on data with the best up."""
        layer = problem.layer
        sizes = kernel_sizes(layer)
        *rows, up = _largest_terms(problem.weight, rank, sizes)
        alone = Problem(layer, problem.weight)
        if alone.error(self._image([*rows, up])) > alone.rounding:
            if tried:
                (*rows, up), _ = in_turns(problem.weight, [*rows, up], _TURNS_TRIED)
            else:
                starts = [[*rows, up], random_start(rank, sizes, layer.outputs, seed=0)]
                *rows, up = decomposed(problem.weight, starts)
        if problem.inputs is None:
            return [*rows, up]
        found = terms(rows)
        left, image = problem.weight - up @ found, problem.inputs @ found.t()
        curvature = found @ image
        lower = factor_of(curvature, _RIDGE * float(curvature.diagonal().mean()))
        return [*rows, up + torch.cholesky_solve((left @ image).t(), lower).t()]

    @staticmethod
    def _image(factors: Factors) -> torch.Tensor:
        return factors[-1] @ terms(factors[:-1])


def _largest_terms(weight: torch.Tensor, rank: int, sizes: Sequence[int]) -> Factors:
    """Of the kernel in the bases of its axes the terms that hold most of it, which at full rank are all of it."""
    kernel = weight.reshape(-1, *sizes)
    bases = [_basis(kernel, axis + 1) for axis in range(len(sizes))]
    core = kernel
    for basis in bases:
        core = torch.tensordot(core, basis, dims=([1], [0]))  # the axis that was turned comes last
    kept = torch.unravel_index(core.square().sum(0).flatten().argsort(descending=True)[:rank], sizes)
    rows = [basis[:, own].t().contiguous() for basis, own in zip(bases, kept, strict=True)]
    return [*rows, weight @ terms(rows).t()]


class TensorTrain:
    """A rank between each two links."""

    name = "tt"

    def misfit(self, layer: Layer) -> str | None:
        return _misfit(self.name, layer)

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        layer = problem.layer
        channels, *kernel = kernel_sizes(layer)
        most = self._most(layer)
        at = _places_of_links(layer, graph)
        found = dict[tuple[int, ...], Choice]()
        for step in range(1, _RANKS_TRIED + 1):
            ranks = self._ranks(layer, most, step / (_RANKS_TRIED + 1), multiple)
            links = [channels * ranks[0]]
            links += [before * own * size for before, own, size in zip(ranks, ranks[1:], kernel, strict=False)]
            links += [ranks[-1] * layer.outputs]
            parameters, macs = sum(links), sum(a * b for a, b in zip(links, at, strict=True))
            if ranks not in found and parameters < layer.outputs * layer.columns:
                loss = problem.error(self._image(self._start(problem, ranks)))
                found[ranks] = Choice(self.name, ranks, parameters, macs, loss)
        return list(found.values())

    def links(self, problem: Problem, ranks: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        factors = _bettered_in_turns(problem, self._image, self._start(problem, ranks))
        first, *along, up = factors
        links = [_single("down", first, problem.layer)]
        for axis, factor in enumerate(along):
            shape = [*factor.shape[:2], *(factor.shape[2] if own == axis else 1 for own in range(len(along)))]
            links.append(_along(axis, factor.reshape(shape), problem.layer, groups=1))
        return [*links, _single("up", up, problem.layer)], self._image(factors)

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        return [tuple(self._most(layer))]

    def _most(self, layer: Layer) -> list[int]:
        sizes, found, before = kernel_sizes(layer), list[int](), 1
        for axis, size in enumerate(sizes):
            behind = layer.outputs
            for other in sizes[axis + 1 :]:
                behind *= other
            before = min(before * size, behind)
            found.append(before)
        return found

    @staticmethod
    def _ranks(layer: Layer, most: Sequence[int], share: float, multiple: int) -> tuple[int, ...]:
        """A share of the greatest ranks, none above what the links before it can give."""
        found, before = list[int](), 1
        for rank, size in zip(most, kernel_sizes(layer), strict=True):
            wanted = max(1, round(share * rank / multiple)) * multiple
            found.append(min(rank, wanted, before * size))
            before = found[-1]
        return tuple(found)

    def _start(self, problem: Problem, ranks: Sequence[int]) -> Factors:
        sizes = kernel_sizes(problem.layer)
        rest = problem.weight.reshape(-1, *sizes).movedim(0, -1).reshape(sizes[0], -1)
        factors, before = Factors(), 1
        for size, rank in zip(sizes, ranks, strict=True):
            rest = rest.reshape(before * size, -1)
            basis = torch.linalg.eigh(rest @ rest.t())[1].flip(1)[:, :rank]
            factors.append(basis.t().reshape(len(basis.t()), before, size))
            rest, before = basis.t() @ rest, basis.shape[1]
        factors[0] = factors[0].flatten(1)
        return [*factors, rest.t().contiguous()]

    @staticmethod
    def _image(factors: Factors) -> torch.Tensor:
        first, *along, up = factors
        found = first
        for factor in along:
            found = torch.einsum("qpr,pc->qcr", factor, found).flatten(1)
        return up @ found


def _misfit(name: str, layer: Layer) -> str | None:
    if layer.node.op not in ("conv", "conv_transpose") or layer.taps == 1:
        return f"{name} is for convolutions of several places"
    return None


def _basis(kernel: torch.Tensor, axis: int) -> torch.Tensor:
    """The directions [size, size] of an axis, those that hold most of the kernel first."""
    rows = kernel.movedim(axis, 0).flatten(1)
    found: torch.Tensor = torch.linalg.eigh(rows @ rows.t())[1].flip(1)
    return found


def _places_of_links(layer: Layer, graph: Graph) -> list[int]:
    """How many places each link multiplies its kernel at: those that it gives, and of transposed ones that it reads."""
    x, y = layer.node.inputs[0], layer.node.output
    assert isinstance(x, Value)
    bound = smallest_sizes(graph)
    given = [places(graph, x, 1)]
    for axis in range(2, x.rank):
        given.append(given[-1] // bound(x.shape[axis]) * bound(y.shape[axis]))
    along = given[:-1] if layer.node.op == "conv_transpose" else given[1:]
    return [given[0], *along, given[-1]]


def _single(name: str, weight: torch.Tensor, layer: Layer) -> Link:
    spatial = len(kernel_sizes(layer)) - 1
    return Link(name, "conv", weight.reshape(*weight.shape, *(1 for _ in range(spatial))), single_places(spatial))


def _along(axis: int, weight: torch.Tensor, layer: Layer, groups: int) -> Link:
    """A link that goes along one axis of the kernel, with what the layer does there."""
    spatial = len(kernel_sizes(layer)) - 1
    found = single_places(spatial)
    node = layer.node
    for name in ("stride", "padding", "dilation", "output_padding"):
        if name in node.attributes:
            plain = 1 if name in ("stride", "dilation") else 0
            own = per_axis(node.attributes[name], spatial)
            found[name] = tuple(own[a] if a == axis else plain for a in range(spatial))
    if node.op == "conv_transpose" and groups == 1:
        weight = weight.transpose(0, 1)
    return Link(f"axis{axis}", node.op, weight, {**found, "groups": groups})


def _bettered_in_turns(problem: Problem, image: Image, factors: Factors) -> Factors:
    """Each factor a little better beside the others, as long as that lowers the error by a share."""
    least = problem.error(image(factors))
    for _ in range(max(1, _TURNS // problem.layer.blocks) if least > problem.rounding else 0):
        found = list(factors)
        for place in range(len(found)):

            def beside(own: torch.Tensor, place: int = place, others: Factors = found) -> torch.Tensor:
                return image([*others[:place], own, *others[place + 1 :]])

            found[place] = bettered(problem, beside, found[place])
        error = problem.error(image(found))
        if not error < least:
            break
        factors, gained, least = found, least - error, error
        if gained < _GAIN * least:
            break
    return factors
