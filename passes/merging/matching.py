"""Weight matching: two networks of one architecture, the second with its channels in the order of the first's.

Git Re-Basin (Ainsworth et al. 2023, algorithm 1): one Dim after the other is permuted as a linear assignment says is
best, with all others as they are, until nothing changes. What may be permuted, and which axes go together, is read off
the Dims. Beyond the paper, indices within heads or groups are matched in each of these by itself, and heads are
compared by what they have in common once their own indices are matched. A second search begins at what cannot be
permuted, inputs and outputs, and first matches each Dim by those weights alone whose other Dims are matched by then, so
that a network whose channels are in another order is found again; the better of the two counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from regauge.ir.dims.extents import Dim, leaves, positions_on
from regauge.ir.dims.kept import KeptWithin, numbered, weight_kept
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.reorder import may_be_reordered
from regauge.ir.dims.resize import taken
from regauge.ir.edit import record
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Parameter

_MOST_SWEEPS = 100


@dataclass(frozen=True)
class Match:
    """A graph with its indices in the order of a reference, and how near that brought it.

    ``moved`` has for each Dim the indices that have another place, and all of them; ``before`` and ``after`` are the
    cosines of each weight with that of the reference, and of all weights together under the empty name; ``apart`` says
    why Dims kept their order.
    """

    graph: Graph
    moved: Mapping[str, tuple[int, int]]
    before: Mapping[str, float]
    after: Mapping[str, float]
    apart: Mapping[str, int]

    @property
    def agreement(self) -> tuple[float, float]:
        """The cosine of all weights with the reference's, before and after."""
        return self.before[""], self.after[""]


def match(graph: Graph, reference: Graph, *, seed: int = 0, by: str = "align") -> Match:
    """``graph`` with the indices of its Dims ordered so that its weights are most like those of ``reference``.

    It computes the same, up to rounding in sums. ``seed`` draws the order in which Dims are looked at. Raises
    GraphError where the two are not of one architecture.
    """
    check_alike([reference, graph])
    search = _Matching(graph, reference)
    found = search.run(np.random.default_rng(seed))
    result, before = graph, cosines(graph, reference)
    if found:
        result = taken(graph, found)
        record(result, by, f"{len(found)} Dims in the order of {reference.name}")
        result.version += 1
    moved = {dim.name: _moved(order) for dim, order in found.items()}
    after = cosines(result, reference) if found else before
    return Match(result, moved, before, after, _apart(graph, search.groups))


def align(graph: Graph, reference: Graph, *, seed: int = 0, by: str = "align") -> Graph:
    """The graph of :func:`match`."""
    return match(graph, reference, seed=seed, by=by).graph


def cosines(graph: Graph, reference: Graph) -> dict[str, float]:
    """Of each weight with that of another graph; of all together under the empty name."""
    both = [
        {p.name: p.tensor.detach().double() for p in own.all_parameters() if _counts(p)} for own in (graph, reference)
    ]
    found, total = dict[str, float](), torch.zeros(3, dtype=torch.float64)
    for parameter in filter(_counts, reference.all_parameters()):
        a, b = (tensors[parameter.name] for tensors in both)
        sums = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
        total += sums
        found[parameter.name] = _cosine(sums)
    return {"": _cosine(total), **found}


def _cosine(sums: torch.Tensor) -> float:
    product, one, other = sums.tolist()
    return float(product / max((one * other) ** 0.5, 1e-300)) if one or other else 1.0


def _moved(order: np.ndarray | KeptWithin) -> tuple[int, int]:
    """How many indices have another place, and how many there are."""
    indices = order.indices if isinstance(order, KeptWithin) else order
    return int((indices != np.arange(indices.shape[-1])).sum()), indices.size


def _apart(graph: Graph, matched: Collection[Dim]) -> dict[str, int]:
    """Why Dims of weights are not matched: how many for each reason."""
    reasons = Counter[str]()
    for group in graph.groups():
        if group.dim not in matched and isinstance(group.dim.size, int) and group.dim.size > 1:
            reasons[str(group.pins[0].reason) if group.pins else "operators tell its indices apart"] += 1
    return dict(reasons)


def check_alike(graphs: Sequence[Graph]) -> None:
    """Raise GraphError unless all graphs have parameters of the same names and shapes."""
    first = {p.name: p.shape for p in graphs[0].all_parameters()}
    for graph in graphs[1:]:
        other = {p.name: p.shape for p in graph.all_parameters()}
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                sizes = [list(found[name]) if name in found else "missing" for found in (first, other)]
                raise GraphError(
                    f"graphs {graphs[0].name!r} and {graph.name!r} are not of one architecture: {name} is {sizes[0]} "
                    f"in one, {sizes[1]} in the other"
                )


@dataclass
class _Matching:
    """The search: ``orders`` are those of the Dims of ``graph`` so far; ``unknown`` ones are not matched yet."""

    graph: Graph
    reference: Graph
    orders: dict[Dim, np.ndarray | KeptWithin] = field(default_factory=dict)
    unknown: set[Dim] = field(default_factory=set)

    def __post_init__(self) -> None:
        groups = {group.dim: group for group in self.graph.groups() if group.free}
        self.groups = {dim: groups[dim] for dim in may_be_reordered(self.graph, groups)}
        self.axes = self.graph.axes.of
        self.wanted = {p.name: p.tensor.detach().double() for p in self.reference.all_parameters() if _counts(p)}
        majors = majors_of(self.graph, self.groups)
        nested = {dim for dim, found in majors.items() if found}
        self.majors = {dim: found if nested.isdisjoint(found) else () for dim, found in majors.items()}
        self.dims_in = {
            parameter: {dim for extent in self.axes[parameter] for dim in leaves(extent) if dim in self.groups}
            for group in self.groups.values()
            for parameter, _ in group.members
        }

    def run(self, generator: np.random.Generator) -> dict[Dim, np.ndarray | KeptWithin]:
        """The orders that change something: of the search from the orders as they are, and of that from both ends."""
        found = []
        for anchored in (False, True):
            self.orders = {dim: self.as_it_is(dim) for dim in self.groups}
            if anchored:
                self.begin()
            found.append(self.descend(generator))
        _, best = max(found, key=lambda pair: pair[0])
        return {dim: order for dim, order in best.items() if not _is_plain(order)}

    def as_it_is(self, dim: Dim) -> np.ndarray | KeptWithin:
        indices, sizes = np.arange(int(dim.size)), [int(major.size) for major in self.majors[dim]]
        return KeptWithin(self.majors[dim], np.tile(indices, (*sizes, 1))) if sizes else indices

    def begin(self) -> None:
        """Match every Dim once, that with the most weights whose other Dims are matched first."""
        self.unknown = set(self.groups)
        while self.unknown:
            dim = max((dim for dim in self.groups if dim in self.unknown), key=self.evidence)
            if not self.evidence(dim):
                self.unknown = set()
                return
            self.improve(dim)
            self.unknown.discard(dim)

    def evidence(self, dim: Dim) -> int:
        """Entries of weights that tell how a Dim is to be matched."""
        within = self.within(dim)
        members = {p for other in (dim, *within) for p, _ in self.groups[other].members}
        return sum(p.tensor.numel() for p in members if self.tells(p, dim, *within))

    def within(self, dim: Dim) -> list[Dim]:
        """The Dims that have a Dim as their only major."""
        return [other for other in self.groups if self.majors[other] == (dim,)]

    def tells(self, parameter: Parameter, *dims: Dim) -> bool:
        """Whether all but the given Dims of a weight are matched."""
        return parameter.name in self.wanted and not self.unknown & (self.dims_in[parameter] - set(dims))

    def descend(self, generator: np.random.Generator) -> tuple[float, dict[Dim, np.ndarray | KeptWithin]]:
        """Sweeps over all Dims until none gets a better order; the likeness and the orders of the best one."""
        best, kept = self.likeness(), dict(self.orders)
        for _ in range(_MOST_SWEEPS):
            dims = list(self.groups)
            changed = [self.improve(dims[place]) for place in generator.permutation(len(dims))]
            now = self.likeness()
            better = now > best
            if better:
                best, kept = now, dict(self.orders)
            if not any(changed) or not better:
                break
        return best, kept

    def likeness(self) -> float:
        """The sum of the products of all weights with those of the reference."""
        pairs = [(self.wanted[p.name], self.ordered(p)) for p in self.graph.all_parameters() if p.name in self.wanted]
        return float(sum((a * b).sum() for a, b in pairs))

    def ordered(self, parameter: Parameter) -> torch.Tensor:
        """A weight as the orders so far have it."""
        return weight_kept(parameter.weight, self.axes[parameter], self.orders).load().detach().double()

    def improve(self, dim: Dim) -> bool:
        """Permute one Dim as is best with all others as they are; whether that changed its order."""
        majors = self.majors[dim]
        gains = self.products(dim, majors)
        inner = self.within(dim)
        if inner:
            gains = self.products(dim, (), without=inner)
            for other in inner:
                gains = gains + self.products_of_matched(dim, other)
        found = np.stack([_assigned(part) for part in gains])
        before = self.orders[dim]
        if isinstance(before, KeptWithin):
            where = np.ix_(*(self.positions(major) for major in majors))
            held = before.indices[where]
            new = np.take_along_axis(held, found.reshape(held.shape), -1)
            indices = before.indices.copy()
            indices[where] = new
            self.orders[dim] = KeptWithin(majors, indices)
        else:
            self.orders[dim] = before[found[0]]
        return bool((found != np.arange(found.shape[-1])).any())

    def positions(self, major: Dim) -> np.ndarray:
        """Which index of a major is at each of its positions now."""
        order = self.orders.get(major)
        return np.arange(int(major.size)) if order is None or isinstance(order, KeptWithin) else order

    def products(self, dim: Dim, majors: tuple[Dim, ...], without: Sequence[Dim] = ()) -> np.ndarray:
        """[combinations of majors, n, n]: the products of what index i has in the reference with what j has here.

        Weights that have one of the Dims ``without``, too, do not count.
        """
        size = int(dim.size)
        total = np.zeros((int(np.prod([int(m.size) for m in majors], dtype=int)), size, size))
        for parameter, axis in self.groups[dim].members:
            if self.tells(parameter, dim) and self.dims_in[parameter].isdisjoint(without):
                a, b = self.sides(parameter, axis, (*majors, dim))
                total += a @ b.transpose(0, 2, 1)
        return total

    def products_of_matched(self, dim: Dim, inner: Dim) -> np.ndarray:
        """[1, n, n]: the same for indices of a major, once the indices of a Dim within are matched."""
        count, size = int(dim.size), int(inner.size)
        total = np.zeros((count * size, count * size))
        for parameter, axis in self.groups[inner].members:
            if self.tells(parameter, dim, inner):
                a, b = (side.reshape(count * size, -1) for side in self.sides(parameter, axis, (dim, inner)))
                total += a @ b.T
        pairs = total.reshape(count, size, count, size).transpose(0, 2, 1, 3)
        gains = [[part[np.arange(size), _assigned(part)].sum() for part in row] for row in pairs]
        return np.asarray(gains)[None]

    def sides(self, parameter: Parameter, axis: int, dims: tuple[Dim, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Reference and weight as [combinations of the first Dims, indices of the last, entries of each]."""
        first, second = self.wanted[parameter.name].numpy(), self.ordered(parameter).numpy()
        sizes = [int(dim.size) for dim in dims]
        rows = (int(np.prod(sizes[:-1], dtype=int)), sizes[-1], -1)
        if len(dims) == 1:
            positions = positions_on(self.axes[parameter][axis], dims[0])
            return tuple(np.moveaxis(side, axis, 0)[positions].reshape(rows) for side in (first, second))
        number = np.broadcast_to(numbered(self.axes[parameter], axis, dims), first.shape).reshape(-1)
        order = np.argsort(number, kind="stable")[int((number < 0).sum()) :]
        return first.reshape(-1)[order].reshape(rows), second.reshape(-1)[order].reshape(rows)


def _counts(parameter: Parameter) -> bool:
    real = isinstance(parameter.dtype, torch.dtype) and parameter.dtype.is_floating_point
    return parameter.kind == "parameter" and real


def _assigned(gains: np.ndarray) -> np.ndarray:
    """For each row the column that the best assignment gives it."""
    found: np.ndarray = linear_sum_assignment(gains, maximize=True)[1]
    return found


def _is_plain(order: np.ndarray | KeptWithin) -> bool:
    indices = order.indices if isinstance(order, KeptWithin) else order
    return bool((indices == np.arange(indices.shape[-1])).all())
