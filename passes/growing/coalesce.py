"""``coalesce``: one index for each pair, a network of half the width (or of half the depth); and back.

Zou et al. 2024, A Multi-Level Framework for Accelerating Training Transformer Models, section 3: a network is
coalesced, the small one is trained, which costs less, and de-coalesced, and the large one goes on from a mixture of
what it was and that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, positions_on
from regauge.ir.errors import GraphError, PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.growing.copies import halved, restored
from regauge.passes.growing.grow import copiable
from regauge.passes.growing.layer_pairs import JoinedBlocks, joined_blocks
from regauge.passes.growing.readers import Readers
from regauge.passes.options import option

Halved: TypeAlias = Literal["width", "depth", "both"]


@dataclass(frozen=True, kw_only=True)
class Coalesce(Pass):
    """Let one index stand for each pair of a Dim: the mean of what writes the two, the sum of what reads them.

    before  h = relu(x w1')                            y = h w2'
    after   h = relu(x (w1[a] + w1[b])' / 2)           y = h (w2[:, a] + w2[:, b])'

    Pairs are those that are written most alike, one after the other. Of copies that ``grow`` made, which are, the
    result computes what it did. ``of=depth`` lets one block stand for two neighbours of one structure, with the mean of
    their weights, and ``of=both`` does the one and then the other. Known deviation: pairs of indices are chosen by the
    weights, and not by their places.
    """

    name: ClassVar[str] = "coalesce"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    of: Halved = option("width", "what is halved: the width, the depth of repeated blocks, or both")
    include: tuple[str, ...] = option((), "globs on names of Dims (blocks) or parameters: coalesce nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims (blocks) or parameters: these stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of == "both" and (self.include or self.exclude):
            raise PassError(
                "coalesce: names are of Dims or of blocks: run of=depth and of=width with names of their own"
            )

    def call(self, graph: Graph, context: Context) -> Graph:
        found = coalesce(graph, self.include, self.exclude, self.of)
        context.left.update(found.left)
        if found.joined is not None and found.joined.pairs:
            context.note(f"blocks joined: {', '.join(' + '.join(pair) for pair in found.joined.pairs)}")
        context.cuts.extend(Cut(name, 2 * len(pairs), len(pairs)) for name, pairs in found.pairs.items())
        return found.graph


@dataclass(frozen=True)
class Coalesced:
    """A network of half the width or depth, and the way back; make one with :func:`coalesce`.

    ``pairs`` are the indices of each Dim that one index of ``graph`` stands for, [pairs, 2]: Dims of the ``original``,
    or where blocks were ``joined`` before, of what that gave.
    """

    graph: Graph
    original: Graph
    pairs: Mapping[str, np.ndarray]
    left: Mapping[str, int]
    readers: Mapping[Dim, Readers]
    joined: JoinedBlocks | None = None

    def back(self, small: Graph | None = None, *, share: float = 1.0, by: str = "decoalesce") -> Graph:
        """A network of the original's shapes that computes what ``small`` does, which is ``graph``, trained or not.

        Where blocks were joined both of a pair are copies, so that it computes what two of each in a row do. With a
        ``share`` below 1 weights are so much of that, and the rest of them the original's: then pairs are no copies of
        each other, and the function is another one. Raises PassError for a share beyond 0 and 1, GraphError for a
        network of other weights.
        """
        if not 0 <= share <= 1:
            raise PassError(f"the share of the small network is {share:g}: write one between 0 and 1")
        small = self.graph if small is None else small
        self._check(small)
        pairs = {dim: self.pairs[dim.name] for dim in self.readers}
        if self.joined is None:
            return restored(self.original, small, pairs, self.readers, share, by=by)
        wide = restored(self.joined.graph, small, pairs, self.readers, by=by) if pairs else small
        return restored(self.original, wide, {}, {}, share, by=by, stands=self.joined.stands)

    def _check(self, small: Graph) -> None:
        shapes = {parameter.name: parameter.shape for parameter in small.all_parameters()}
        for parameter in self.graph.all_parameters():
            if shapes.get(parameter.name) != parameter.shape:
                found = list(shapes[parameter.name]) if parameter.name in shapes else "missing"
                raise GraphError(
                    f"{parameter.name} is {found} in the small network, and was {list(parameter.shape)} when it was "
                    "coalesced: train it as it is"
                )


def coalesce(graph: Graph, include: Sequence[str] = (), exclude: Sequence[str] = (), of: Halved = "width") -> Coalesced:
    """The network of half the width, or depth, or both, with the way back; see :class:`Coalesce`."""
    left, joined, original = Counter[str](), None, graph
    if of != "width":
        joined = joined_blocks(graph, include, exclude, left, by="coalesce")
        graph = joined.graph
    if of == "depth":
        return Coalesced(graph, original, {}, +left, {}, joined)
    readers = copiable(graph, include, exclude, left)
    for dim in [dim for dim in readers if int(dim.size) % 2]:
        left["its indices are no pairs: an odd number of them"] += 1
        del readers[dim]
    pairs = {dim: _pairs(_written(graph, dim, own)) for dim, own in readers.items()}
    result = halved(graph, pairs, readers, by="coalesce") if pairs else graph
    return Coalesced(result, original, {dim.name: own for dim, own in pairs.items()}, +left, readers, joined)


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
