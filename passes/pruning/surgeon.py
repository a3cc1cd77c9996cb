"""The optimal brain surgeon on one Dim: the order in which indices go, and the cost of each once others make up for it.

A step removes a few per cent of the indices. What goes is found one after the other among those that cost least now,
exactly, since the downdate of H^-1 and of W on these needs no other columns; then all columns are updated at once,
which is a product of matrices.

Where the matrices of all layers that read the Dim do not fit into :data:`MEMORY`, only the indices that cost least
alone are taken apart so, and the others keep their order by what each costs alone; these would be the last to go.

Of a Dim that is cut within majors, an *index* here is one in one index of these. They go so that all majors have lost
equally many after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.pruning.inverse_hessian import InverseHessian, factors, inverse_hessian

RIDGE = 1e-2  # share of the mean square of a column
_MANY = 10  # so many times the columns are many rows; with fewer the ridge rises as they are short of that
MEMORY = 2 << 30  # bytes of inverse Hessians and weights that are held for one Dim
_STEPS = 24  # a larger Dim is taken apart in about so many steps
_SMALL = 96  # a Dim of so many indices loses one in each step
_NEAR = 3  # times the indices that go in a step: so many of the cheapest are looked at
_SUBSTEPS = 8  # a step removes its indices in about so many turns
_DOUBLE = 1024  # matrices up to this size are handled in double precision
_WORTH = 0.8  # of the columns left: then matrices are copied without the others
_SKETCH = 768  # rows that the outputs of larger ones are added up to: their squares are right to a twentieth

Change = Callable[[dict[str, torch.Tensor]], float]


@dataclass
class Part:
    """The state of the surgeon on some columns of a :class:`Share`: their inverse Hessian and their scaled weights.

    What goes is taken out in place; the matrices are copied without it only once it is a part of them worth that.
    """

    columns: torch.Tensor  # [indices, columns each]: where each index is in the matrices; -1 where it is not
    inverse: InverseHessian
    weights: torch.Tensor  # [columns, r], of which only the products of columns count

    def costs(self, alive: torch.Tensor) -> torch.Tensor:
        """dE of each index in ``alive``, were it to go next; nothing for those that the block lacks."""
        columns = self.columns[alive]
        here = columns[:, 0] >= 0
        if not bool(here.all()):
            total = torch.zeros(len(alive), dtype=torch.float64)
            total[here] = self.costs(alive[here]) if bool(here.any()) else total[here]
            return total
        if columns.shape[1] == 1:
            columns = columns[:, 0]
            square: torch.Tensor = self.weights.square().sum(1)[columns]
            return (square / self.inverse.diagonal()[columns].clamp(min=1e-30)).double()
        factor = factors(self.inverse.blocks(columns))
        # W_P' L^-T: solved from this side nothing is transposed in memory
        half: torch.Tensor = torch.linalg.solve_triangular(factor.mT, self.weights[columns].mT, upper=True, left=False)
        return half.square().sum((1, 2)).double()

    def remove(self, gone: torch.Tensor) -> None:
        """Take indices out and let the other columns make up for them."""
        columns = _present(self.columns[gone])
        if not len(columns):
            return
        self.inverse.take_out(columns, self.weights)
        self.columns[gone] = -1
        left = _present(self.columns)
        if len(left) < _WORTH * len(self.inverse):
            self.columns = _places(self.columns)
            self.inverse, self.weights = self.inverse.at(left), self.weights[left]

    def near(self, indices: torch.Tensor) -> Part:
        """The same of a few indices alone: what goes among them changes the others of them exactly so."""
        flat = _present(self.columns[indices])
        return Part(_places(self.columns[indices]), self.inverse.matrix_at(flat), self.weights[flat])


def _present(columns: torch.Tensor) -> torch.Tensor:
    """The columns of those indices that the block has, in a row."""
    return columns[columns >= 0]


def _without(columns: torch.Tensor, count: int) -> torch.Tensor:
    """Which of so many columns are none of these, as a mask."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[columns] = False
    return kept


def _places(columns: torch.Tensor) -> torch.Tensor:
    """Where these columns are once only they are left."""
    has = columns >= 0
    return torch.where(has, torch.cumsum(has.reshape(-1), 0).reshape(columns.shape) - 1, -1)


@dataclass
class Share:
    """Layers that read the same rows, with the second moments of these: what an index of a Dim costs in all of them."""

    layers: tuple[Layer, ...]
    scales: tuple[torch.Tensor, ...]  # of the rows of each layer's matrix
    block: int
    moments: Moments
    columns: torch.Tensor  # [indices, columns each], in the layer's matrix; -1 where the block lacks the index

    @classmethod
    def of(
        cls,
        graph: Graph,
        dim: Dim,
        layers: Sequence[Layer],
        sensitivity: Mapping[Layer, torch.Tensor],
        block: int,
        moments: Moments,
        majors: Sequence[Dim] = (),
    ) -> Share:
        """``sensitivity`` is [blocks, outputs] for each layer; layers that share their weight are one."""
        own: dict[Parameter, Layer] = {}
        for layer in layers:
            own.setdefault(layer.weight, layer)
        scales = []
        for weight in own:
            square = torch.stack([sensitivity[layer][block] for layer in layers if layer.weight is weight]).mean(0)
            scales.append(square.clamp(min=max(1e-6 * float(square.mean()), 1e-30)).sqrt())
        one = next(iter(own.values()))
        columns = one.columns_within(graph, (*majors, dim), block) if majors else one.columns_of(graph, dim)
        return cls(tuple(own.values()), tuple(scales), block, moments, torch.from_numpy(columns))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.moments.columns <= _DOUBLE else torch.float32

    def bytes(self, indices: int) -> int:
        """Of the matrices for so many indices."""
        columns = min(indices * self.columns.shape[1], int((self.columns >= 0).sum()))
        outputs = min(columns if columns <= _DOUBLE else _SKETCH, sum(layer.outputs for layer in self.layers))
        wide = min(columns, 2 * self.moments.rows) if self.moments.scarce else columns
        return self.dtype.itemsize * columns * (wide + outputs)

    def part(self, indices: torch.Tensor, whole: InverseHessian, *, lasting: bool = True) -> Part:
        """The matrices of the given indices; ``whole`` is :meth:`inverse`. One that is not lasting is used once.

        Of all columns it has ``whole`` itself.
        """
        places, flat = _places(self.columns[indices]), _present(self.columns[indices])
        return Part(places, whole.at(flat), self._weights(flat, lasting))

    def inverse(self) -> InverseHessian:
        """H^-1 of all columns; few rows could be made up for by any columns, and more is added to their H."""
        short = _MANY * self.moments.columns / max(1, self.moments.rows)
        return inverse_hessian(self.moments, RIDGE * max(1.0, short), self.dtype)

    def costs_alone(self, whole: InverseHessian) -> torch.Tensor:
        """dE of each index, were it the only one to go."""
        total = torch.zeros(len(self.columns), dtype=torch.float64)
        many = max(1, 2048 // self.columns.shape[1])
        for start in range(0, len(self.columns), many):
            indices = torch.arange(start, min(start + many, len(self.columns)))
            part = self.part(indices, whole, lasting=False)
            total[indices] = part.costs(torch.arange(len(indices)))
        return total

    def _weights(self, columns: torch.Tensor, lasting: bool) -> torch.Tensor:
        """Scaled weights [columns, outputs] of all layers, or fewer numbers with the same products or nearly these.

        Up to :data:`_DOUBLE` columns the square root of their products, else a sketch: see :meth:`_sketch`.
        """
        outputs = sum(layer.outputs for layer in self.layers)
        if lasting and len(columns) > _DOUBLE and outputs > _SKETCH:
            return self._sketch(columns)
        if outputs <= 1.5 * len(columns) or not lasting:
            return torch.cat([part.t() for _, part in self._scaled(columns)], 1)
        square = torch.zeros(len(columns), len(columns), dtype=self.dtype)
        for _, part in self._scaled(columns):
            square.addmm_(part.t(), part)
        return factors(square).contiguous()

    def _scaled(self, columns: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The scaled weights of each layer [outputs, columns], and how many outputs came before them."""
        before = 0
        for layer, scale in zip(self.layers, self.scales, strict=True):
            yield before, self._matrix(layer)[:, columns].to(self.dtype) * scale.to(self.dtype)[:, None]
            before += layer.outputs

    def _sketch(self, columns: torch.Tensor) -> torch.Tensor:
        """W S' [columns, _SKETCH] with E[S'S] = 1: every output is added to one of S's rows, with a random sign.

        Squares of columns are right on average, and to sqrt(2 / rows) of themselves (Charikar, Chen and Farach-Colton
        2002, count sketch). With all outputs of all layers, a Dim that a large model reads everywhere would take longer
        than all else here.
        """
        found = torch.zeros(_SKETCH, len(columns), dtype=self.dtype)
        generator = torch.Generator().manual_seed(0)
        for before, part in self._scaled(columns):
            order = torch.randperm(len(part), generator=generator)
            signs = 1 - 2 * torch.randint(0, 2, (len(part), 1), generator=generator).to(self.dtype)
            found.index_add_(0, (before + order) % _SKETCH, part.mul_(signs))
        return found.t().contiguous()

    def _matrix(self, layer: Layer) -> torch.Tensor:
        return layer.matrices(layer.weight.tensor.detach())[self.block]

    def without(self, gone: torch.Tensor, whole: InverseHessian) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
        """For each layer its matrix without these indices, others making up for them, and the bias that this takes."""
        columns = _present(self.columns[gone])
        left = _without(columns, len(whole)).nonzero()[:, 0]
        removal = whole.removal(columns, left)
        means = self.moments.means().to(self.dtype)
        for layer in self.layers:
            before = self._matrix(layer).to(self.dtype)
            after = torch.zeros_like(before)
            after[:, left] = removal.made_up(before)
            yield layer, after, (before - after) @ means


def taken_apart(
    shares: Sequence[Share], size: int, change: Change | None, majors: int = 1, enough: int | None = None
) -> tuple[np.ndarray, float]:
    """Scores of all indices by taking one after the other out, and the factor to multiply them by.

    A score is the loss that the index adds when it goes, never less than that of one which went before it in the same
    major. Of a Dim within so many majors the scores are [majors x size].

    ``change`` measures how much the outputs change with other weights. What was added up is brought to that at a
    quarter and at half of the indices: errors at different places of an image may add up or cancel behind the layer.

    Where only the ``enough`` lowest scores of each major are wanted, the search ends once no other can be among them;
    all that are left then have the same.
    """
    scores, pool, parts, wholes = _opened(shares, size, majors, keep=change is not None)
    major = pool // size
    alive = torch.ones(len(pool), dtype=torch.bool)
    highest, total, corrections = np.zeros(majors), 0.0, list[float]()
    marks = [majors * (size // 4), majors * (size - size // 2)] if change is not None else []
    many = 1 if size <= _SMALL else size // _STEPS
    while int(alive.sum()) > majors and not _settled(scores, pool[~alive], highest, size, enough):
        left = alive.nonzero()[:, 0]
        for place, cost in _next(parts, left, min(many, len(left) // majors - 1), major, majors):
            own = int(major[place])
            highest[own] = max(highest[own], cost)
            scores[int(pool[place])] = highest[own]
            total += cost
            alive[place] = False
        gone = left[~alive[left]]
        for part in parts:
            part.remove(gone)
        if marks and change is not None and len(pool) - int(alive.sum()) >= marks[0] and total > 0:
            marks.pop(0)
            corrections.append(change(weights_without(shares, pool[~alive], wholes)) / total)
    last = alive.nonzero()[:, 0]
    if len(last) == majors:
        highest[major[last].numpy()] = np.maximum(highest[major[last].numpy()], _costs(parts, last).numpy())
    scores[pool[last].numpy()] = highest[major[last].numpy()]
    rest = np.ones(len(scores), dtype=bool)
    rest[pool.numpy()] = False
    scores[rest] = np.maximum(scores, highest.repeat(size))[rest]
    return scores, float(np.median(corrections)) if corrections else 1.0


def _settled(scores: np.ndarray, gone: torch.Tensor, highest: np.ndarray, size: int, enough: int | None) -> bool:
    """Whether so many indices of each major have gone with less than the ``highest`` score, which others will have."""
    if enough is None:
        return False
    which = gone.numpy()
    below = which[scores[which] < highest[which // size]]
    return int(np.bincount(below // size, minlength=len(highest)).min()) >= enough


def _opened(
    shares: Sequence[Share], size: int, majors: int, *, keep: bool
) -> tuple[np.ndarray, torch.Tensor, list[Part], list[InverseHessian | None]]:
    """Costs of indices alone, where not all fit; the indices that are taken apart; their matrices; H^-1, if kept."""
    every = majors * size
    needed = sum(share.bytes(every) for share in shares)
    costs = torch.zeros(every, dtype=torch.float64)
    if needed > MEMORY:
        for share in shares:
            costs += share.costs_alone(share.inverse())
    count = size if needed <= MEMORY else max(2, int(size * (MEMORY / needed) ** 0.5))
    cheapest = torch.argsort(costs.reshape(majors, size), 1)[:, :count].sort(1).values
    pool = (cheapest + size * torch.arange(majors)[:, None]).reshape(-1)
    parts, wholes = [], list[InverseHessian | None]()
    keep = keep and 2 * needed <= MEMORY
    for share in shares:
        whole = share.inverse()
        part = share.part(pool, whole)
        if keep and part.inverse is whole:
            part.inverse = whole.copy()
        parts.append(part)
        wholes.append(whole if keep else None)
    return costs.numpy(), pool, parts, wholes


def _costs(parts: Sequence[Part], alive: torch.Tensor) -> torch.Tensor:
    return sum((part.costs(alive) for part in parts), torch.zeros(len(alive), dtype=torch.float64))


def _next(
    parts: Sequence[Part], left: torch.Tensor, count: int, major: torch.Tensor, majors: int
) -> list[tuple[int, float]]:
    """The ``count`` indices of each major that go next, one after the other, each with what it costs then."""
    costs = _costs(parts, left)
    if count == majors == 1:
        place = int(costs.argmin())
        return [(int(left[place]), float(costs[place]))]
    nearest = _first_of_each(torch.argsort(costs), major[left], [_NEAR * count] * majors)
    near, costs = left[nearest], costs[nearest]
    local = [part.near(near) for part in parts]
    alive = torch.ones(len(near), dtype=torch.bool)
    found: list[tuple[int, float]] = []
    wanted, total = [count] * majors, count * majors
    many = max(1, total // _SUBSTEPS)
    while len(found) < total:
        here = alive.nonzero()[:, 0]
        costs = _costs(local, here) if found else costs
        cheapest = _first_of_each(torch.argsort(costs), major[near[here]], wanted)[: min(many, total - len(found))]
        found += [(int(near[here[place]]), float(costs[place])) for place in cheapest]
        for place in cheapest:
            wanted[int(major[near[here[place]]])] -= 1
        alive[here[cheapest]] = False
        if len(found) < total:
            for part in local:
                part.remove(here[cheapest])
    return found


def _first_of_each(order: torch.Tensor, major: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Of places in an order the first so many of each major, in that order."""
    if len(counts) == 1:
        return order[: counts[0]]
    own = major[order]
    taken = torch.zeros(len(order), dtype=torch.bool)
    for which, count in enumerate(counts):
        taken[(own == which).nonzero()[:count, 0]] = True
    return order[taken]


def weights_without(
    shares: Sequence[Share], gone: torch.Tensor, wholes: Sequence[InverseHessian | None] = ()
) -> dict[str, torch.Tensor]:
    """The parameters of all layers without some indices, by name: what the graph has to be run with.

    ``wholes`` are the shares' :meth:`Share.inverse`, where they are held.
    """
    matrices: dict[Layer, torch.Tensor] = {}
    shifts: dict[Layer, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}

    def store(layer: Layer, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        found[layer.weight.name] = layer.from_matrices(matrix)
        shifted = layer.shifted(shift.reshape(-1))
        if shifted is not None:
            found[shifted[0].name] = shifted[1]

    for share, whole in zip(shares, wholes or [None] * len(shares), strict=True):
        for layer, matrix, shift in share.without(gone, share.inverse() if whole is None else whole):
            if layer.blocks == 1:  # at once, in the type of the weight: all layers may be half of the model
                store(layer, matrix[None], shift)
                continue
            if layer not in matrices:
                matrices[layer] = layer.matrices(layer.weight.tensor.detach()).to(matrix.dtype, copy=True)
                shifts[layer] = torch.zeros(layer.blocks, layer.outputs, dtype=matrix.dtype)
            matrices[layer][share.block], shifts[layer][share.block] = matrix, shift
    for layer, matrix in matrices.items():
        store(layer, matrix, shifts[layer])
    return found
