"""The links of a convolution in turns, each fitted beside the others.

    M = up S      S[q, i, r] = sum over p  core[q, p, r] first[p, i]

The error is  <V, W> - 2 <V, M> + <M, M>  with V = sum over bands b of  B_b W A_b, which is found once, and the products
in the metrics. So each link needs V reduced by the others, and the reduced metrics: of outputs up' B_b up, of inputs
those of what the first link gives. The gradient that steps leave tells the error, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias

import torch

from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.least_squares import Divided, divided_by_roots, lowered, root_of
from regauge.passes.factorization.nested_links import Metrics
from regauge.passes.factorization.problems import ROUNDING
from regauge.passes.factorization.unfolded import Unfolded

Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""The first link [rank, inner], the core [last or outputs, rank x rest], and [outputs, last] where there is a third."""
Step: TypeAlias = Callable[[Parts], tuple[Parts, float]]
"""Better parts, and what they lose."""

_TURNS = 16
_GAIN = 1e-3  # of the error in a turn, below which there is no other
_EXACT = 1e-6  # of what is lost without any weight: errors below it are not told by differences


def in_turns(unfolded: Unfolded, first: torch.Tensor, last: int | None) -> Parts:
    """All links from a first one: what follows it in closed form and it beside that, in turns; then, where errors are
    told by bands, each beside the others. ``last`` is the rank in front of a third link."""
    plain = Turns(unfolded, [(unfolded.metric, unfolded.problem.outputs)])
    parts = plain.turned(*plain.closed(first, last), lambda found: plain.closed(plain.first_bettered(found)[0], last))
    if not unfolded.problem.bands:
        return parts
    turns = Turns(unfolded, unfolded.metrics)
    return turns.turned(parts, turns.lost(parts), turns.bettered)


class Turns:
    """Errors told by some metrics."""

    def __init__(self, unfolded: Unfolded, metrics: Sequence[Metrics]) -> None:
        self.unfolded, self.metrics = unfolded, _apart(metrics)
        self.outputs = unfolded.problem.outputs
        self.wanted = _weighed(unfolded.weight, metrics)
        self.whole = float((self.wanted * unfolded.weight).sum())

    def turned(self, parts: Parts, lost: float, step: Step) -> Parts:
        """The parts after steps, as long as each lowers the error by a share; ``lost`` is what they lose."""
        turns = max(1, _TURNS // self.unfolded.problem.layer.blocks)
        least = self._told(parts, lost)
        for _ in range(turns if least > ROUNDING * self.whole else 0):
            found, lost = step(parts)
            error = self._told(found, lost)
            if not error < least:
                break
            parts, gained, least = found, least - error, error
            if gained < _GAIN * least:
                break
        return parts

    def _told(self, parts: Parts, lost: float) -> float:
        return lost if lost > _EXACT * self.whole else self.lost(parts)

    def lost(self, parts: Parts) -> float:
        """The error of the parts, to the last digit."""
        first, core, up = parts
        off = self.unfolded.weight - self.unfolded.image(first, core if up is None else up @ core)
        return float((_weighed(off, self.metrics) * off).sum())

    def closed(self, first: torch.Tensor, last: int | None) -> tuple[Parts, float]:
        """The best links behind a first one, in the metrics of the problem, where these are what errors are told by."""
        metric = self.unfolded.metric.behind(first).matrix()
        behind = self.unfolded.behind(first, metric)
        up, core = (None, behind.up @ behind.down) if last is None else behind.of_rank(last)
        whole = core if up is None else up @ core
        seen = whole @ metric if self.outputs is None else self.outputs @ whole @ metric
        lost = self.whole + float(((seen - 2 * self._seen(first)) * whole).sum())
        return (first, core, up), lost

    def bettered(self, parts: Parts) -> tuple[Parts, float]:
        """Each part a little better beside the others."""
        first, lost = self.first_bettered(parts)
        _, core, up = parts
        behind = [(inputs.behind(first), outputs) for inputs, outputs in self.metrics]
        seen = self._seen(first)
        metric = self.unfolded.metric.behind(first).matrix()
        core, lost = self._core_bettered((first, core, up), seen, behind, metric)
        if up is not None:
            up, lost = self._up_bettered(core, up, seen, behind, metric)
        return (first, core, up), lost

    def first_bettered(self, parts: Parts) -> tuple[torch.Tensor, float]:
        """A better first link beside the others, and what is lost with it."""
        first, core, up = parts
        inner = core.reshape(len(core), len(first), self.unfolded.rest)
        through = [inputs.beside(inner, _through(outputs, up)) for inputs, outputs in self.metrics]

        def curved(found: torch.Tensor) -> torch.Tensor:
            return sum((own(found) for own in through), start=torch.zeros_like(found))

        wanted = self.wanted if up is None else torch.einsum("oq,oir->qir", up, self.wanted)
        wanted = torch.einsum("qpr,qir->pi", inner, wanted)
        return self._lowered(first, wanted, curved, self._beside_first(inner, up))

    def _beside_first(self, inner: torch.Tensor, up: torch.Tensor | None) -> Divided:
        moved, outputs = inner @ self._over_inner, _through(self.outputs, up)
        weighed = inner if outputs is None else (outputs @ inner.flatten(1)).reshape(inner.shape)
        return divided_by_roots(root_of(torch.einsum("opr,oqr->pq", weighed, moved)), self._root_over_rest)

    def _core_bettered(
        self, parts: Parts, seen: torch.Tensor, behind: Sequence[Metrics], metric: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        first, core, up = parts
        through = [(inputs, _through(outputs, up)) for inputs, outputs in behind]
        shape = len(core), len(first), self.unfolded.rest

        def curved(found: torch.Tensor) -> torch.Tensor:
            return _weighed(found.reshape(shape), through).flatten(1)

        left = self._root_of_outputs
        if up is not None and self.outputs is not None:
            left = root_of(up.t() @ self.outputs @ up)
        wanted = seen if up is None else up.t() @ seen
        return self._lowered(core, wanted, curved, divided_by_roots(left, root_of(metric)))

    def _up_bettered(
        self,
        core: torch.Tensor,
        up: torch.Tensor,
        seen: torch.Tensor,
        behind: Sequence[Metrics],
        metric: torch.Tensor,
    ) -> tuple[torch.Tensor, float]:
        grid = core.reshape(len(core), *behind[0][0].shape)
        through = [(inputs.weighed(grid).flatten(1) @ core.t(), outputs) for inputs, outputs in behind]

        def curved(found: torch.Tensor) -> torch.Tensor:
            return sum(
                (found @ own if outputs is None else outputs @ found @ own for own, outputs in through),
                start=torch.zeros_like(found),
            )

        divided = divided_by_roots(self._root_of_outputs, root_of(core @ metric @ core.t()))
        return self._lowered(up, seen @ core.t(), curved, divided)

    def _lowered(
        self,
        factor: torch.Tensor,
        wanted: torch.Tensor,
        curved: Callable[[torch.Tensor], torch.Tensor],
        divided: Divided,
    ) -> tuple[torch.Tensor, float]:
        factor, residual = lowered(factor, wanted - curved(factor), curved, divided)
        return factor, self.whole - float((factor * (wanted + residual)).sum())

    def _seen(self, first: torch.Tensor) -> torch.Tensor:
        """V behind a first link [outputs, rank x rest]."""
        return torch.einsum("oir,pi->opr", self.wanted, first).flatten(1)

    @cached_property
    def _over_inner(self) -> torch.Tensor:
        found = self.unfolded.metric.over_inner()
        return found / found.sum()

    @cached_property
    def _root_over_rest(self) -> torch.Tensor:
        return root_of(self.unfolded.averaged * self.unfolded.rest)

    @cached_property
    def _root_of_outputs(self) -> torch.Tensor | None:
        return None if self.outputs is None else root_of(self.outputs)


def _through(outputs: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor | None:
    """The metric of outputs before a last link [outputs, last]."""
    if up is None:
        return outputs
    return up.t() @ (up if outputs is None else outputs @ up)


def _weighed(change: torch.Tensor, metrics: Sequence[Metrics]) -> torch.Tensor:
    """[outputs, inner, rest] times the metrics of both of its sides, of each band, in all."""
    found = torch.zeros_like(change)
    for inputs, outputs in metrics:
        found += inputs.weighed(change, outputs)
    return found


def _apart(metrics: Sequence[Metrics]) -> list[Metrics]:
    """The same with one term for the ridges of all metrics that are known by their rows."""
    found, ridges = list[Metrics](), list[Metrics]()
    for inputs, outputs in metrics:
        if inputs.rows is None:
            found.append((inputs, outputs))
        else:
            found.append((Gram(rows=inputs.rows), outputs))
            ridges.append((inputs, outputs))
    if ridges:
        left = [inputs.ridge * outputs for inputs, outputs in ridges if outputs is not None]
        share = 1.0 if left else sum(float(inputs.ridge) for inputs, _ in ridges)
        columns = replace(ridges[0][0], rows=torch.zeros(0, *ridges[0][0].shape, dtype=torch.float64), ridge=share)
        found.append((columns, sum(left[1:], start=left[0]) if left else None))
    return found
