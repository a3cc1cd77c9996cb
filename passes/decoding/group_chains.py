"""The latents of a group of layers, one behind the other: what each adds, and how many numbers it may take.

Layer m gives y_m = W_m x_m, and later layers may read the latents of earlier ones, not the other way round:

    c_m = A_m x_m        y_m ~ B_m1 c_1 + ... + B_mm c_m

A direction of c_m is worth what it explains of y_m, and of later y where they have no better one, over what the
latents before it explain already. Directions are chosen layer by layer: those of the reduced-rank regression of what
is left of y_m, y_m+1, ... on what is left of x_m. Later outputs count by the share ``ahead``: by 0 each latent serves
its own layer, and others only read it; by 1 it serves all of them alike, as the joint decomposition does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.errors import PassError
from regauge.passes.calibration.moments import factor_of
from regauge.passes.decoding.cache_bytes import in_words
from regauge.passes.decoding.latent_ranks import NOTHING
from regauge.passes.factorization.metric_svd import Factored, factored

_AHEAD = (0.0, 0.25, 1.0)
_STEPS = 30  # halvings of the interval of prices
_RIDGE = 1e-8  # of the mean entry of the diagonal: what single precision, in which moments are summed, may get wrong


@dataclass(frozen=True)
class Chain:
    """Of each layer the rows that make its latent [rank, columns], which may be none; and what is lost in all."""

    downs: tuple[torch.Tensor, ...]
    loss: float

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(map(len, self.downs))


@dataclass
class ChainProblem:
    """The layers of a group on data.

    ``gram`` [columns, columns] has the moments of all that they read, side by side; ``maps`` their weights, scaled so
    that a squared error is what it changes in the graph's outputs; ``entry`` the bytes of one number in the cache.
    """

    gram: torch.Tensor
    maps: Sequence[torch.Tensor]
    entry: float
    _first: dict[float, Factored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        floor = _RIDGE * float(self.gram.diagonal().mean()) + 1e-300
        self.gram = self.gram + floor * torch.eye(len(self.gram), dtype=self.gram.dtype)

    def bytes(self, chain: Chain) -> float:
        return sum(chain.ranks) * self.entry

    def as_it_is(self) -> Chain:
        """All that the layers give, which loses nothing and takes as much as without latents."""
        return Chain(tuple(self.maps), 0.0)

    def chain(self, price: float, ahead: float) -> Chain:
        """All directions that are worth more than ``price``: of the first layer one at least, of each less than it
        reads, since a cache keeps no latent that is as large as what it is made of."""
        left = self.gram.clone()  # the moments of what the latents so far do not explain
        nothing = NOTHING * self.lost(left, range(len(self.maps)))
        downs, loss = [], 0.0
        for place in range(len(self.maps)):
            found = self._first.get(ahead) if place == 0 else None
            if found is None:
                found = self._directions(left, place, ahead)
            if place == 0:
                self._first[ahead] = found
            gains = found.tail[:-1] - found.tail[1:]
            rank = min(int((gains > max(price, nothing)).sum()), self.maps[place].shape[1] - 1)
            _, down = found.of_rank(max(rank, 1) if place == 0 else rank)
            downs.append(down)
            if len(down):
                left = _explained(left, self._columns(place), down)
            loss += self.lost(left, [place])
        return Chain(tuple(downs), loss)

    def lost(self, left: torch.Tensor, places: Sequence[int]) -> float:
        """What these layers lose where their inputs vary as in ``left``."""
        found = 0.0
        for place in places:
            own, weight = self._columns(place), self.maps[place]
            found += float(((weight @ left[own, own]) * weight).sum().clamp(min=0))
        return found

    def _columns(self, place: int) -> slice:
        start = sum(own.shape[1] for own in self.maps[:place])
        return slice(start, start + self.maps[place].shape[1])

    def _directions(self, left: torch.Tensor, place: int, ahead: float) -> Factored:
        own = self._columns(place)
        inputs, rows = left[own, own], [self.maps[place]]
        if ahead:
            for later in range(place + 1, len(self.maps)):
                seen = torch.linalg.solve(inputs, left[own, self._columns(later)]).T
                rows.append(ahead**0.5 * self.maps[later] @ seen)
        return factored(torch.cat(rows), inputs)


def _explained(left: torch.Tensor, own: slice, down: torch.Tensor) -> torch.Tensor:
    """The moments that are left once the latent ``down`` x, of the columns ``own``, is known."""
    across = left[:, own] @ down.T
    among = down @ across[own]
    root = factor_of(among, 0.0)
    seen = torch.linalg.solve_triangular(root, across.T, upper=False)
    found: torch.Tensor = left - seen.T @ seen
    return found


def chains_within(problems: Sequence[ChainProblem], allowed: float, by: str) -> list[Chain]:
    """Of each group the chain with which least is lost within so many bytes in all.

    All groups keep the directions that are worth more than one price for a byte, which is found by halving; what this
    leaves of the budget is given to one after the other. Raises PassError where the smallest latents take more.
    """
    found = _within(problems, allowed, by)
    for place, problem in enumerate(problems):
        rest = allowed - _bytes(problems, found)
        if rest >= problem.entry:
            found[place] = _within([problem], problem.bytes(found[place]) + rest, by)[0]
    return found


def _within(problems: Sequence[ChainProblem], allowed: float, by: str) -> list[Chain]:
    """At one price for all of them."""
    found = _priced(problems, torch.inf)
    least = _bytes(problems, found)
    if least > allowed:
        raise PassError(f"{by}: the budget of bytes cannot be met: the smallest latents take {in_words(least)}")
    high = max(problem.lost(problem.gram, range(len(problem.maps))) for problem in problems)
    low, high = 0.0, max(high, 1e-300)
    for step in range(_STEPS):
        price = low if step == 0 else (max(low, high * 1e-6) * high) ** 0.5
        tried = _priced(problems, price)
        if _bytes(problems, tried) > allowed:
            low = price
            continue
        found = min(found, tried, key=lambda chains: sum(own.loss for own in chains))
        if step == 0:
            break
        high = price
    return found


def _priced(problems: Sequence[ChainProblem], price: float) -> list[Chain]:
    """Of each group the best chain where a byte costs so much."""
    found = []
    for problem in problems:
        chains = [problem.chain(price * problem.entry, ahead) for ahead in _AHEAD] + [problem.as_it_is()]
        if price == torch.inf:
            found.append(min(chains, key=problem.bytes))
        else:
            found.append(min(chains, key=lambda own: own.loss + price * problem.bytes(own)))
    return found


def _bytes(problems: Sequence[ChainProblem], chains: Sequence[Chain]) -> float:
    return sum(problem.bytes(own) for problem, own in zip(problems, chains, strict=True))
