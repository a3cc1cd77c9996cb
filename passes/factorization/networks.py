"""Matrices as small tensor networks: features split into axes, and factors that are contracted with some of them.

    inputs "ki"    outputs "lj"    factors "kjri", "jlkr"       W[l j, k i] = sum over r  first[k j r i] second[j l k r]

Letters are axes; those of neither side are bonds, whose sizes are the ranks. A letter on both sides is a diagonal. The
factors are contracted with the features one after the other, each as one plain operator:

- axes of a factor that are there already and that what follows still needs are a batch (here k, then j);
- those that nothing needs afterwards are contracted (here i, then k and r);
- new ones are made (here j and r, then l); axes that the factor does not have are rows.

With a batch it is a matmul with weight [batch, contracted, made], without one a linear with weight [made, contracted].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from math import prod

import torch

from regauge.passes.factorization.arrangements import Arrangement
from regauge.passes.factorization.chains import Link

Sizes = Mapping[str, int]
_NAMES = {1: ["blocks"], 2: ["down", "up"], 3: ["down", "core", "up"]}


@dataclass(frozen=True)
class Step:
    """How one factor is applied: its axes by what becomes of them, and the axes that it leaves alone."""

    place: int
    batch: str
    contracted: str
    made: str
    rows: str

    @property
    def axes(self) -> str:
        return self.batch + self.contracted + self.made + self.rows


@dataclass(frozen=True)
class Network:
    """The axes of both sides, from major to minor, and the factors, a letter for each axis.

    Every factor but the last makes one bond, which a later one contracts.
    """

    inputs: str
    outputs: str
    factors: tuple[str, ...]

    @cached_property
    def bonds(self) -> str:
        """The axes that are summed over, in the order of the factors that make them."""
        every = dict.fromkeys("".join(self.factors))
        return _without("".join(every), self.inputs + self.outputs)

    @cached_property
    def axes(self) -> str:
        """Those of both sides, each once."""
        return "".join(dict.fromkeys(self.inputs + self.outputs))

    def bond_sizes(self, sizes: Sizes, rank: int) -> dict[str, int]:
        """The bonds at a rank, or at the most that they can be where this is less."""
        found = dict(sizes)
        for place, (batch, rows, columns) in enumerate(self.unfoldings()):
            del batch
            found[self.bonds[place]] = min(rank, count(rows, found), count(columns, found))
        return {bond: found[bond] for bond in self.bonds}

    def unfoldings(self) -> list[tuple[str, str, str]]:
        """For each factor but the last, when it is split off what is left: the axes shared with what follows, its own,
        and the others; the bond is one of the others from then on."""
        found, axes = [], self.axes
        for place, factor in enumerate(self.factors[:-1]):
            later = "".join(self.factors[place + 1 :])
            mine = "".join(axis for axis in axes if axis in factor)
            batch = "".join(axis for axis in mine if axis in later)
            found.append((batch, _without(mine, batch), _without(axes, mine)))
            axes = batch + _without(axes, mine) + self.bonds[place]
        return found

    def ranks(self, sizes: Sizes) -> tuple[int, ...]:
        """The sizes of bonds; where there are none, the greatest rank of a block."""
        blocks = count(_without(self.inputs, self.outputs), sizes), count(_without(self.outputs, self.inputs), sizes)
        return tuple(sizes[bond] for bond in self.bonds) or (min(blocks),)

    def parameters(self, sizes: Sizes) -> int:
        return sum(count(factor, sizes) for factor in self.factors)

    def products(self, sizes: Sizes) -> int:
        """Multiplications for each vector of features."""
        return sum(count(step.axes, sizes) for step in self.steps(sizes))

    def steps(self, sizes: Sizes) -> list[Step]:
        """The factors in the order of fewest multiplications."""
        return min(self._orders, key=lambda steps: sum(count(step.axes, sizes) for step in steps))

    @cached_property
    def _orders(self) -> list[list[Step]]:
        return [self._in_order(order) for order in permutations(range(len(self.factors)))]

    def _in_order(self, order: Sequence[int]) -> list[Step]:
        found, state = [], self.inputs
        for number, place in enumerate(order):
            factor = self.factors[place]
            later = "".join(self.factors[other] for other in order[number + 1 :]) + self.outputs
            batch = "".join(axis for axis in state if axis in factor and axis in later)
            contracted = "".join(axis for axis in state if axis in factor and axis not in later)
            found.append(Step(place, batch, contracted, _without(factor, state), _without(state, factor)))
            state = batch + found[-1].rows + found[-1].made
        return found

    def image(self, factors: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """The matrix [outputs, columns] of factors, each with the axes that its letters say."""
        both = [axis for axis in self.outputs if axis in self.inputs]
        eyes = [torch.eye(sizes[axis], dtype=factors[0].dtype) for axis in both]
        terms = [*self.factors, *(axis + axis.upper() for axis in both)]
        outputs = "".join(axis.upper() if axis in both else axis for axis in self.outputs)
        found = torch.einsum(f"{','.join(terms)}->{outputs}{self.inputs}", *factors, *eyes)
        return found.reshape(count(self.outputs, sizes), count(self.inputs, sizes))

    def links(self, factors: Sequence[torch.Tensor], sizes: Sizes) -> list[Link]:
        """The operators that multiply by the network; axes of size one are not told apart in them."""
        alone = "".join(axis for axis in self.axes + self.bonds if sizes[axis] == 1)
        factored = tuple(_without(factor, alone) for factor in self.factors)
        small = Network(_without(self.inputs, alone), _without(self.outputs, alone), factored)
        own = [
            tensor.reshape([sizes[axis] for axis in factor])
            for factor, tensor in zip(small.factors, factors, strict=True)
        ]
        return small._links(own, sizes)

    def _links(self, factors: Sequence[torch.Tensor], sizes: Sizes) -> list[Link]:
        found: list[Link] = []
        layout = f"... {_group(self.inputs)}"
        for name, step in zip(_NAMES[len(factors)], self.steps(sizes), strict=True):
            op, order, rows = "linear", [step.made, step.contracted], " ".join(["...", *step.rows])
            if step.batch:
                op, order = "matmul", [step.batch, step.contracted, step.made]
                rows = f"{_group(step.batch)} ({rows})"
            weight = torch.einsum(f"{self.factors[step.place]}->{''.join(order)}", factors[step.place])
            weight = weight.reshape([count(axes, sizes) for axes in order])
            read = f"{rows} {_group(step.contracted)}"
            found.append(Link(name, op, weight, before=Arrangement(layout, read, sizes)))
            layout = f"{rows} {_group(step.made)}"
        wanted = f"... {_group(self.outputs)}"
        if layout != wanted:
            found[-1] = replace(found[-1], after=Arrangement(layout, wanted, sizes))
        return found


def count(axes: str, sizes: Sizes) -> int:
    """How many indices axes have together."""
    return prod(sizes[axis] for axis in axes)


def _group(axes: str) -> str:
    return f"({' '.join(axes)})"


def _without(axes: str, others: str) -> str:
    return "".join(axis for axis in axes if axis not in others)
