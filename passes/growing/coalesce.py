"""``coalesce``: one index for each pair, a network of half the width; and back.

Zou et al. 2024, A Multi-Level Framework for Accelerating Training Transformer Models, section 3: a network is
coalesced, the small one is trained, which costs less, and de-coalesced, and the large one goes on from a mixture of
what it was and that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, positions_on
from regauge.ir.errors import GraphError, PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.growing.copies import halved, restored
from regauge.passes.growing.grow import copiable
from regauge.passes.growing.readers import Readers
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Coalesce(Pass):
    """Let one index stand for each pair of a Dim: the mean of what writes the two, the sum of what reads them.

    before  h = relu(x w1')                            y = h w2'
    after   h = relu(x (w1[a] + w1[b])' / 2)           y = h (w2[:, a] + w2[:, b])'

    Pairs are those that are written most alike, one after the other. Of copies that ``grow`` made, which are, the
    result computes what it did. Known deviations: pairs are chosen by the weights, and not by their places; widths are
    coalesced, layers are not (``depth`` removes these).
    """

    name: ClassVar[str] = "coalesce"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: coalesce nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these stay as they are")

    def call(self, graph: Graph, context: Context) -> Graph:
        found = coalesce(graph, self.include, self.exclude)
        context.left.update(found.left)
        context.cuts.extend(Cut(name, 2 * len(pairs), len(pairs)) for name, pairs in found.pairs.items())
        return found.graph


@dataclass(frozen=True)
class Coalesced:
    """A network of half the width, and the way back; make one with :func:`coalesce`.

    ``pairs`` are the indices of each Dim of the ``original`` that one index of ``graph`` stands for, [pairs, 2].
    """

    graph: Graph
    original: Graph
    pairs: Mapping[str, np.ndarray]
    left: Mapping[str, int]
    readers: Mapping[Dim, Readers]

    def back(self, small: Graph | None = None, *, share: float = 1.0, by: str = "decoalesce") -> Graph:
        """A network of the original's shapes that computes what ``small`` does, which is ``graph``, trained or not.

        With a ``share`` below 1 weights are so much of that, and the rest of them the original's: then pairs are no
        copies of each other, and the function is another one. Raises PassError for a share beyond 0 and 1, GraphError
        for a network of other weights.
        """
        if not 0 <= share <= 1:
            raise PassError(f"the share of the small network is {share:g}: write one between 0 and 1")
        small = self.graph if small is None else small
        self._check(small)
        pairs = {dim: self.pairs[dim.name] for dim in self.readers}
        return restored(self.original, small, pairs, self.readers, share, by=by)

    def _check(self, small: Graph) -> None:
        shapes = {parameter.name: parameter.shape for parameter in small.all_parameters()}
        for parameter in self.graph.all_parameters():
            if shapes.get(parameter.name) != parameter.shape:
                found = list(shapes[parameter.name]) if parameter.name in shapes else "missing"
                raise GraphError(
                    f"{parameter.name} is {found} in the small network, and was {list(parameter.shape)} when it was "
                    "coalesced: train it as it is"
                )


def coalesce(graph: Graph, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Coalesced:
    """The network of half the width, with the way back; see :class:`Coalesce`."""
    left = Counter[str]()
    readers = copiable(graph, include, exclude, left)
    for dim in [dim for dim in readers if int(dim.size) % 2]:
        left["its indices are no pairs: an odd number of them"] += 1
        del readers[dim]
    pairs = {dim: _pairs(_written(graph, dim, own)) for dim, own in readers.items()}
    result = halved(graph, pairs, readers, by="coalesce") if pairs else graph
    return Coalesced(result, graph, {dim.name: own for dim, own in pairs.items()}, +left, readers)


def _written(graph: Graph, dim: Dim, readers: Readers) -> torch.Tensor:
    """What writes each index, [indices, entries], weights of one size in the mean."""
    found = []
    for parameter, axis in graph.axes.groups[dim].members:
        if (parameter, axis) in readers.sides or not _counts(parameter):
            continue
        positions = torch.from_numpy(positions_on(graph.axes.of[parameter][axis], dim))
        lines = parameter.tensor.detach().double().movedim(axis, 0)[positions].flatten(1)
        found.append(lines / lines.square().mean().sqrt().clamp(min=1e-30))
    return torch.cat(found, 1) if found else torch.zeros(int(dim.size), 1, dtype=torch.float64)


def _counts(parameter: Parameter) -> bool:
    return isinstance(parameter.dtype, torch.dtype) and parameter.dtype.is_floating_point


def _pairs(written: torch.Tensor) -> np.ndarray:
    """The nearest two, the nearest two of the others, and so on: [pairs, 2], the smaller index first, in order."""
    apart = torch.cdist(written, written).numpy()
    first, second = np.triu_indices(len(apart), 1)
    free, found = np.ones(len(apart), dtype=bool), []
    for place in np.argsort(apart[first, second], kind="stable"):
        a, b = first[place], second[place]
        if free[a] and free[b]:
            free[[a, b]] = False
            found.append((a, b))
    return np.asarray(sorted(found), dtype=np.int64)
