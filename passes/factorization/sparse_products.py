"""Matrices as products of a few sparse ones: FAuST (Le Magoarou and Gribonval 2016).

Supports come from the hierarchical algorithm of :mod:`regauge.passes.factorization.palm` on the matrix scaled by the
diagonals of the metrics, which the outer factors take back without another entry. Then the entries are fitted in the
whole metrics, factor beside factor, on these supports; the paper has no metrics, and no such fit.

Costs are counted in entries that are not zero: the weights are stored with zeros, which sparse layouts
(:mod:`regauge.ir.storage.sparse_layouts`) and ``to_onnx(sparse_weights=True)`` leave out, and dense kernels multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.least_squares import bettered
from regauge.passes.factorization.palm import product, sparse_factors
from regauge.passes.factorization.problems import Problem, places

_COUNTS = (2, 3, 4)  # of factors
_DENSITIES = 5  # that are weighed with each
_FIRST_TURNS, _TURNS = 10, 100  # of palm4MSA, when choices are weighed and then
_FITS = 8  # turns of fitting entries
_GAIN = 1e-3  # of the error in such a turn, below which there is no other
_NAMES = {2: ("down", "up"), 3: ("down", "core", "up"), 4: ("down", "core0", "core1", "up")}


class SparseProduct:
    """The rank of a choice is the entries for each index of the longer side of a factor; its axis counts factors."""

    name = "faust"

    def misfit(self, layer: Layer) -> str | None:
        if layer.node.op not in ("linear", "matmul"):
            return f"{self.name} is for linear layers"
        return f"{self.name} is for layers of one matrix" if layer.blocks > 1 else None

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        layer, rows = problem.layer, places(graph, problem.layer.node.output, -1)
        short, long = sorted((layer.outputs, layer.columns))
        found = []
        for count in _COUNTS:
            most = (short * long - 1) // ((count - 1) * short + long)
            for each in np.unique(np.geomspace(1, max(1, most), _DENSITIES).round().astype(int)).tolist():
                factors = _factors(problem, count, each, _FIRST_TURNS)
                entries = _most_entries(layer, count, each)
                if entries < short * long:
                    loss = problem.error(product(factors))
                    found.append(Choice(self.name, (each,), entries, entries * rows, loss, (count,)))
        return found

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        return [(min(layer.outputs, layer.columns), count) for count in _COUNTS]

    def links(self, problem: Problem, numbers: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        each, count = numbers
        factors = _fitted(problem, _factors(problem, count, each, _TURNS))
        op = problem.layer.node.op
        stored = [factor.t() if op == "matmul" else factor for factor in factors]
        return [Link(name, op, own) for name, own in zip(_NAMES[count], stored, strict=True)], product(factors)


def _most_entries(layer: Layer, count: int, each: int) -> int:
    short, long = sorted((layer.outputs, layer.columns))
    return min(each, short) * (long + (count - 1) * short)


def _factors(problem: Problem, count: int, each: int, turns: int) -> list[torch.Tensor]:
    """The better of what palm4MSA finds and of the largest entries beside identities, where it starts from."""
    before, behind = _scales(problem.outputs, problem.layer.outputs), _scales(problem.inputs, problem.layer.columns)
    target = before[:, None] * problem.weight * behind
    short, long = sorted(target.shape)
    plain = [torch.eye(short, dtype=target.dtype) for _ in range(count)]
    place = 0 if len(target) == short else count - 1
    plain[place] = torch.zeros_like(target).flatten()
    kept = target.abs().flatten().sort(descending=True, stable=True).indices[: each * long]
    plain[place][kept] = target.flatten()[kept]
    plain[place] = plain[place].reshape(target.shape)
    least, found = float((product(plain) - target).square().sum()), plain
    if least > 0:
        sparse = sparse_factors(target, count, each, turns)
        if float((product(sparse) - target).square().sum()) < least:
            found = sparse
    return [found[0] / behind, *found[1:-1], found[-1] / before[:, None]]


def _scales(metric: torch.Tensor | None, size: int) -> torch.Tensor:
    """The roots of the diagonal of a metric."""
    if metric is None:
        return torch.ones(size, dtype=torch.float64)
    diagonal = metric.diagonal()
    return diagonal.clamp(min=1e-6 * float(diagonal.mean()) + 1e-30).sqrt()


def _fitted(problem: Problem, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The entries that are not zero, each factor beside the others, as long as that lowers the error by a share."""
    found, least = list(factors), problem.error(product(factors))
    for _ in range(_FITS if least > problem.rounding else 0):
        last = list(found)
        for place, factor in enumerate(found):
            image = partial(_with_one, tuple(found), place, factor != 0)
            found[place] = torch.where(factor != 0, bettered(problem, image, factor), 0.0)
        error = problem.error(product(found))
        if not error < least:
            return last
        gained, least = least - error, error
        if gained < _GAIN * least:
            break
    return found


def _with_one(factors: Sequence[torch.Tensor], place: int, kept: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return product([*factors[:place], factor * kept, *factors[place + 1 :]])
