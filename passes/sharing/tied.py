"""Blocks that share one set of weights, each with a low-rank residual of its own (Relaxed Recursive Transformers).

Bae et al. 2024, Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA. What is shared is the
least-squares fit, or as in section 2.2 there the mean (average), layers at equal distances with the first and the last
one (stepwise), or the first layers (lower); the residual is the truncated singular value decomposition of what is
missing (section 2.3), here in the metrics of the data. Which blocks share is chosen by what is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.forms import LowRank, ranks_up_to
from regauge.passes.factorization.problems import Problem
from regauge.passes.sharing.fitting import Start, shared, without
from regauge.passes.sharing.grouping import Grouping, Members, groups_of, least_loss
from regauge.passes.sharing.sites import Problems, Site, problems_at
from regauge.passes.sharing.writing import write_residual, write_tied

Place: TypeAlias = tuple[int, int, Members]  # a structure, a site of it, and a group of its blocks

_RANK = 8  # where none is given and none is chosen


@dataclass
class Tied:
    """Layers that share a matrix [outputs, columns], with residuals of a rank."""

    names: tuple[str, ...]
    rank: int
    shared: torch.Tensor
    _rest: dict[str, Problem] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return self.shared.numel() + len(self.names) * self.rank * sum(self.shared.shape)

    def matrix(self, problem: Problem) -> torch.Tensor:
        if not self.rank:
            return self.shared
        rest = self._rest[problem.layer.weight.name] = without(problem, self.shared)
        up, down = rest.factored.of_rank(self.rank)
        return self.shared + up @ down

    def write(self, graph: Graph, layers: Sequence[Layer], *, by: str) -> None:
        for layer in layers if self.rank else ():
            rest = self._rest[layer.weight.name]
            own = Problem(layer, rest.weight, rest.inputs, rest.outputs)
            write_residual(graph, layer, LowRank().links(own, (self.rank,))[0], by=by)
        write_tied(graph, layers, self.shared, by=by)


def tied(site: Site, group: Members, rank: int, problems: Problems, start: Start, place: tuple[int, int]) -> Tied:
    """The layers of a group of blocks tied; ``place`` is which group it is, of how many."""
    names = tuple(site.names[block] for block in group)
    own = problems_at(site, problems, group)
    if start == "fit":
        matrix = shared(own, rank)
    elif start == "average":
        matrix = torch.stack([problem.weight for problem in own]).mean(0)
    else:
        number, groups = place
        last = len(site.names) - 1
        source = number if start == "lower" else round(number * last / max(1, groups - 1))
        matrix = problems[site.names[source]].weight
    return Tied(names, rank, matrix)


@dataclass
class TiePlan:
    """Groups of blocks for each structure, and the rank of the residuals of each layer that a group shares."""

    groups: list[list[Members]]
    ranks: dict[Place, int | None]  # None where each layer stays whole

    def items(self, sites: Sequence[Sequence[Site]], problems: Problems, start: Start) -> Iterator[Tied]:
        """The layers that are tied."""
        for (structure, site, group), rank in self.ranks.items():
            if rank is not None:
                place = self.groups[structure].index(group), len(self.groups[structure])
                yield tied(sites[structure][site], group, rank, problems, start, place)


class TieLosses:
    """What tying loses, by the tails of what is missing once layers share their best matrix."""

    def __init__(self, sites: Sequence[Sequence[Site]], problems: Problems) -> None:
        self.sites, self.problems = sites, problems
        self._tails: dict[Place, torch.Tensor] = {}

    def tail(self, place: Place) -> torch.Tensor:
        """The loss of a group's layers together, for residuals of each rank from 0."""
        if place not in self._tails:
            structure, site, group = place
            found = problems_at(self.sites[structure][site], self.problems, group)
            matrix = shared(found, 0)
            self._tails[place] = torch.stack([without(p, matrix).factored.tail / p.scale for p in found]).sum(0)
        return self._tails[place]

    def loss(self, place: Place, rank: int) -> float:
        """Beside residuals the shared matrix need not be the mean: what they hold together is one layer's more."""
        tail, count = self.tail(place), len(place[2])
        return float(tail[min(rank * count // max(1, count - 1), len(tail) - 1)])

    def of_group(self, structure: int, group: Members, rank: int) -> float:
        if len(group) == 1:
            return 0.0
        return sum(self.loss((structure, site, group), rank) for site in range(len(self.sites[structure])))

    def plan(self, blocks: int | None, rank: int | None, how: Grouping, allowed: float | None) -> TiePlan:
        """How many groups, which, and the ranks: all that are not given by what is lost within ``allowed`` parameters.

        Raises PassError where no choice is small enough.
        """
        most = max(len(own[0].names) for own in self.sites)
        plans, failed = list[tuple[float, TiePlan]](), None
        for kept in [blocks] if blocks is not None else range(1, most):
            try:
                plans.append(self._plan(kept, rank, how, allowed))
            except PassError as error:
                failed = error
        if not plans:
            assert failed is not None
            raise failed
        return min(plans, key=lambda found: found[0])[1]

    def _plan(self, kept: int, rank: int | None, how: Grouping, allowed: float | None) -> tuple[float, TiePlan]:
        groups = []
        for structure, own in enumerate(self.sites):
            count = len(own[0].names)
            loss = partial(self.of_group, structure, rank=_RANK if rank is None else rank)
            groups.append(groups_of(count, min(kept, count), how, loss))
        places = [
            (structure, site, group)
            for structure, own in enumerate(groups)
            for group in own
            for site in range(len(self.sites[structure]))
        ]
        ranks = {place: self._ranks(place, rank, whole=allowed is not None) for place in places}
        if allowed is None:
            return 0.0, TiePlan(groups, {place: own[0] for place, own in ranks.items()})
        options = {place: [self._option(place, own) for own in ranks[place]] for place in places}
        picks, loss_of_all = least_loss(options, allowed)
        return loss_of_all, TiePlan(groups, {place: ranks[place][pick] for place, pick in picks.items()})

    def _ranks(self, place: Place, rank: int | None, whole: bool) -> list[int | None]:
        """Ranks with which a layer has fewer parameters than all of the group's have now; or None, it stays whole."""
        structure, site, group = place
        size = self.sites[structure][site].size
        each = sum(self.problems[self.sites[structure][site].names[0]].weight.shape)
        limit = -(-(len(group) - 1) * size // (len(group) * each))  # n r (m + n) + m n < n m n
        asked = [0, *ranks_up_to(limit, 1)] if whole and rank is None else [_RANK if rank is None else rank]
        found: list[int | None] = [own for own in asked if own < limit]
        return [*found, None] if whole or not found else found

    def _option(self, place: Place, rank: int | None) -> tuple[int, float]:
        """Parameters and loss."""
        structure, site, group = place
        own = self.sites[structure][site]
        if rank is None:
            return len(group) * own.size, 0.0
        each = sum(self.problems[own.names[0]].weight.shape)
        return own.size + len(group) * rank * each, self.loss(place, rank)
