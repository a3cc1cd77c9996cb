"""Which axes meet in which factor, and how large bonds are: alternating local enumeration, within what a choice costs.

One variable after the other takes the value that loses least beside the others, of all or of those near its own, until
none changes: TnALE (Li et al. 2023, Alternating Local Enumeration: Solving Tensor Network Structure Search with Fewer
Evaluations, algorithm 1). Variables are the order of the axes of outputs, which says what they are paired with, the
sizes of all axes, and each bond, whose growth the others pay for. There a loss trades size against error; here the size
is given, and the rank interpolation of their start is not needed, since choices start from the best grid point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from regauge.passes.factorization.networks import Network, Sizes, count
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.splitting import split

_ROUNDS = 3
_FACTORS = (0.5, 0.75, 0.9, 1.1, 1.33, 2.0)  # by which a bond is changed, and by one index


@dataclass(frozen=True)
class Structure:
    """A network with the sizes of its axes and bonds."""

    network: Network
    sizes: dict[str, int]

    @property
    def key(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        return self.network.outputs, tuple(sorted(self.sizes.items()))


@dataclass
class Search:
    """For one matrix: structures of at most so many parameters and products, and what was found of each."""

    problem: Problem
    axes: Sequence[Sizes]
    paired: bool
    most: tuple[int, int]
    _losses: dict[object, float] = field(default_factory=dict)

    def bettered(self, start: Structure) -> Structure:
        """A structure near the start that loses no more."""
        best = start
        for _ in range(_ROUNDS):
            before = best
            for variable in ("order", "axes", *best.network.bonds):
                best = min([best, *self._near(best, variable)], key=self._loss)
            if best == before:
                break
        return best

    def _near(self, now: Structure, variable: str) -> Iterator[Structure]:
        network = now.network
        if variable == "order":
            for order in permutations(network.outputs) if self.paired else []:
                yield from self._fitted(Network(network.inputs, "".join(order), network.factors), now.sizes, "")
        elif variable == "axes":
            for axes in self.axes:
                yield from self._fitted(network, {**now.sizes, **axes}, "")
        else:
            size = now.sizes[variable]
            for other in sorted({size - 1, size + 1, *(round(size * factor) for factor in _FACTORS)}):
                if other > 0:
                    yield from self._fitted(network, {**now.sizes, variable: other}, variable)

    def _fitted(self, network: Network, sizes: Sizes, fixed: str) -> Iterator[Structure]:
        """With the bonds that these sizes allow; those that are not fixed are as large as what is left pays for."""
        found = _capped(network, sizes)
        others = [bond for bond in network.bonds if bond != fixed]
        while not self._fits(network, found):
            wide = [bond for bond in others if found[bond] > 1]
            if not wide:
                return
            found[max(wide, key=lambda bond: found[bond])] -= 1
        for bond in others:
            while self._fits(network, more := {**found, bond: found[bond] + 1}) and _capped(network, more) == more:
                found = more
        yield Structure(network, _capped(network, found))

    def _fits(self, network: Network, sizes: Sizes) -> bool:
        return network.parameters(sizes) <= self.most[0] and network.products(sizes) <= self.most[1]

    def _loss(self, own: Structure) -> float:
        if own.key not in self._losses:
            factors = split(own.network, self.problem, own.sizes)
            self._losses[own.key] = self.problem.error(own.network.image(factors, own.sizes))
        return self._losses[own.key]


def _capped(network: Network, sizes: Sizes) -> dict[str, int]:
    """No bond above what the factors before and behind it can use."""
    found = dict(sizes)
    for bond, (_, rows, columns) in zip(network.bonds, network.unfoldings(), strict=True):
        found[bond] = min(found[bond], count(rows, found), count(columns, found))
    return found
