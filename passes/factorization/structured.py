"""Matrices as structured products: Monarch, block tensor trains, sums of Kronecker products and their like.

Each is a network (:mod:`regauge.passes.factorization.networks`). Its factors are split off one after the other
(:mod:`regauge.passes.factorization.splitting`): with two factors and without data this is the best there is (Dao et al.
2022, Monarch, theorem 1; Van Loan and Pitsianis 1993 for Kronecker products), with more it is as good as tensor trains
are (Oseledets 2011). They are then bettered beside one another in turns, in the whole metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from itertools import product as combinations

import numpy as np
import torch

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.curvature import inverse_curvature
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.least_squares import bettered
from regauge.passes.factorization.networks import Network, Sizes
from regauge.passes.factorization.problems import Problem, places
from regauge.passes.factorization.splitting import balanced, split
from regauge.passes.factorization.structure_search import Search, Structure

_TURNS = 24
_FIRST_TURNS = 2  # when choices are weighed
_STEPS = 3  # of conjugate gradients on a factor, in a turn
_GAIN = 1e-3  # of the error in a turn, below which there is no other
_SPLITS = 8  # of the axes that are weighed for a layer: those of fewest parameters, and as many of fewest products
_RANKS = 12  # that are weighed with each


@dataclass(frozen=True)
class Structured:
    """A form by its network. The numbers of a choice are the sizes of bonds, then those of the other axes.

    Where it is ``paired`` the axes of outputs may come in any order, which says what axes of inputs they share a factor
    with; the order follows the sizes then. ``searched`` choices are bettered by :class:`Search`.
    """

    name: str
    network: Network
    paired: bool = False
    searched: bool = False

    def misfit(self, layer: Layer) -> str | None:
        if layer.node.op not in ("linear", "matmul"):
            return f"{self.name} is for linear layers"
        if layer.blocks > 1:
            return f"{self.name} is for layers of one matrix"
        return None if self.axes(layer) else f"{self.name} needs sizes that can be divided"

    def axes(self, layer: Layer) -> tuple[Sizes, ...]:
        """The sizes of axes that are weighed for a layer."""
        return _weighed(self.network, layer.outputs, layer.columns)

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        network, rows = self.network, places(graph, problem.layer.node.output, -1)
        first = []
        for axes in self.axes(problem.layer):
            for sizes, factors in self._at_ranks(problem, axes, multiple):
                costs = network.parameters(sizes), rows * network.products(sizes)
                loss = problem.error(network.image(factors, sizes))
                first.append(self._choice(network, sizes, costs, loss))
        found = dict[tuple[int, ...], Choice]()
        for choice in _worth_having(first):
            own = network
            sizes = self.sizes(choice.numbers)
            if self.searched:
                most = (network.parameters(sizes), network.products(sizes))
                better = Search(problem, self.axes(problem.layer), self.paired, most).bettered(Structure(own, sizes))
                own, sizes = better.network, better.sizes
            factors = _in_turns(own, problem, sizes, split(own, problem, sizes), _FIRST_TURNS)
            costs = own.parameters(sizes), rows * own.products(sizes)
            last = self._choice(own, sizes, costs, problem.error(own.image(factors, sizes)))
            found[last.numbers] = last
        return list(found.values())

    def _choice(self, network: Network, sizes: Sizes, costs: tuple[int, int], loss: float) -> Choice:
        axes = tuple(sizes[axis] for axis in self.network.axes)
        order = tuple(self.network.outputs.index(axis) for axis in network.outputs) if self.paired else ()
        return Choice(self.name, network.ranks(sizes), *costs, loss, axes, order)

    def _at_ranks(
        self, problem: Problem, axes: Sizes, multiple: int
    ) -> Iterator[tuple[dict[str, int], list[torch.Tensor]]]:
        """The factors with each rank that has fewer parameters than the matrix."""
        network, whole = self.network, problem.weight.numel()
        if not network.bonds:
            if network.parameters(axes) < whole:
                yield dict(axes), split(network, problem, axes)
            return
        most = max(network.bond_sizes(axes, whole).values())
        sizes = [{**axes, **network.bond_sizes(axes, rank)} for rank in range(multiple, most + 1, multiple)]
        sizes = [own for own in sizes if network.parameters(own) < whole]
        if not sizes:
            return
        greatest = split(network, problem, sizes[-1])
        for place in np.unique(np.geomspace(1, len(sizes), _RANKS).round().astype(int) - 1).tolist():
            own = sizes[place]
            alone = len(network.bonds) == 1  # then the directions of a rank are the first of a greater one
            yield own, _cut(network, greatest, own) if alone else split(network, problem, own)

    def links(self, problem: Problem, numbers: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        network, sizes = self.network_of(numbers), self.sizes(numbers)
        factors = _in_turns(network, problem, sizes, split(network, problem, sizes), _TURNS)
        return network.links(factors, sizes), network.image(factors, sizes)

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        """One for each way to split the axes; without bonds everything is in one block."""
        network, numel = self.network, layer.outputs * layer.columns
        if not network.bonds:
            one = {axis: 1 for axis in network.axes}
            one |= {network.inputs[-1]: layer.columns, network.outputs[-1]: layer.outputs}
            return [(*network.ranks(one), *one.values())]
        found = []
        for place, axes in enumerate(self.axes(layer)):
            every = list(permutations(range(len(network.outputs)))) if self.paired else [()]
            found.append((*network.bond_sizes(axes, numel).values(), *axes.values(), *every[place % len(every)]))
        return found

    def network_of(self, numbers: Sequence[int]) -> Network:
        """The network in whose order the axes of outputs come, by the numbers of a choice."""
        if not self.paired:
            return self.network
        outputs = self.network.outputs
        return replace(self.network, outputs="".join(outputs[place] for place in numbers[-len(outputs) :]))

    def sizes(self, numbers: Sequence[int]) -> dict[str, int]:
        """Those of all axes, bonds among them, by the numbers of a choice."""
        letters = self.network.bonds + self.network.axes
        ours = numbers[: -len(self.network.outputs)] if self.paired else numbers
        return dict(zip(letters, ours[-len(letters) :], strict=True))


def _worth_having(choices: Sequence[Choice]) -> list[Choice]:
    """Those that lose less than all that have fewer parameters, or than all that have fewer multiplications."""
    kept: dict[int, Choice] = {}
    for cost in ("parameters", "macs"):
        least = float("inf")
        for number, choice in sorted(enumerate(choices), key=lambda item: (getattr(item[1], cost), item[1].loss)):
            if choice.loss < least:
                least, kept[number] = choice.loss, choice
    return [kept[number] for number in sorted(kept)]


@cache
def _weighed(network: Network, outputs: int, columns: int) -> tuple[Sizes, ...]:
    """Of the ways to split both sides into axes those that cost least at rank one, and split one side in earnest."""
    found = []
    for sizes in _splits(network, outputs, columns):
        several = [side for side in (network.inputs, network.outputs) if len(side) > 1]
        if any(all(sizes[axis] > 1 for axis in side) for side in several):
            found.append({**sizes, **network.bond_sizes(sizes, 1)})
    if network.bonds:  # else the axes alone say how large it is
        kept = [sorted(found, key=cost)[:_SPLITS] for cost in (network.parameters, network.products)]
        found = list({tuple(sizes.values()): sizes for half in kept for sizes in half}.values())
    return tuple({axis: sizes[axis] for axis in network.axes} for sizes in found)


def _splits(network: Network, outputs: int, columns: int) -> Iterator[dict[str, int]]:
    every = list(_factorings(outputs, len(network.outputs)))
    for given, made in combinations(_factorings(columns, len(network.inputs)), every):
        sizes = dict(zip(network.inputs, given, strict=True))
        if all(sizes.setdefault(axis, size) == size for axis, size in zip(network.outputs, made, strict=True)):
            yield sizes


def _factorings(size: int, parts: int) -> Iterator[tuple[int, ...]]:
    """The ways to write a number as a product, in order."""
    if parts == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            yield from ((first, *rest) for rest in _factorings(size // first, parts - 1))


def _cut(network: Network, factors: Sequence[torch.Tensor], sizes: Sizes) -> list[torch.Tensor]:
    """The first directions of the only bond."""
    bond = network.bonds
    return [
        tensor.narrow(factor.index(bond), 0, sizes[bond])
        for factor, tensor in zip(network.factors, factors, strict=True)
    ]


def _in_turns(
    network: Network, problem: Problem, sizes: Sizes, factors: Sequence[torch.Tensor], turns: int
) -> list[torch.Tensor]:
    """Each factor bettered beside the others, until a turn gains little."""
    found, error = list(factors), problem.error(network.image(factors, sizes))
    for _ in range(turns if error > problem.rounding else 0):
        for place in range(len(found)):
            divided = inverse_curvature(network, problem, sizes, found, place)
            image = partial(_with_one, network, sizes, tuple(found), place)
            found[place] = bettered(problem, image, found[place], divided, _STEPS)
        before, error = error, problem.error(network.image(found, sizes))
        if before - error <= _GAIN * before:
            break
    return balanced(network, found)


def _with_one(
    network: Network, sizes: Sizes, factors: Sequence[torch.Tensor], place: int, factor: torch.Tensor
) -> torch.Tensor:
    return network.image([*factors[:place], factor, *factors[place + 1 :]], sizes)
