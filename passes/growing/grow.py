"""``grow``: wider Dims that compute the same, as a start for training on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.reorder import may_be_reordered
from regauge.ir.graph import Graph
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.growing.copies import widened
from regauge.passes.growing.readers import Readers, readers_of
from regauge.passes.options import option
from regauge.passes.pruning.selection import select


@dataclass(frozen=True, kw_only=True)
class Grow(Pass):
    """Make Dims wider by copies of their indices: the same function, with more weights to train.

    before  h = relu(x w1')        y = h w2'
    after   h = relu(x w1[c]')     y = h (w2[:, c] * s)'      c: all indices, and some of them again; s: their shares

    Net2WiderNet (Chen et al. 2016, section 2.2), on whatever Dim has indices that no operator tells apart: channels,
    hidden units, heads, the stream of a residual network. Known deviations: copies are spread evenly, since norms and
    means want as many of each index (then only whole factors are left as they are), and in place of noise, which
    changes the function, ``split=uneven`` lets copies count differently, so that gradients tell them apart.
    """

    name: ClassVar[str] = "grow"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    factor: float = option(2.0, "how many times as wide each Dim becomes", above=1)
    split: Literal["uneven", "even"] = option("uneven", "what each copy counts: drawn, or all the same")
    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: widen nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these stay as they are")
    seed: int = option(0, "draws which indices have more copies, and what each counts", at_least=0)

    def call(self, graph: Graph, context: Context) -> Graph:
        readers = copiable(graph, self.include, self.exclude, context.left)
        generator = np.random.default_rng(self.seed)
        copies, shares = dict[Dim, np.ndarray](), dict[Dim, np.ndarray]()
        for dim, own in list(readers.items()):
            size = int(dim.size)
            count = round(size * self.factor)
            if count == size or (own.even and count % size):
                reason = "something takes the mean of its indices: a whole factor keeps it" if count > size else ""
                context.left[reason or "it is too small for that factor"] += 1
                del readers[dim]
                continue
            copies[dim] = _copied(size, count, generator)
            shares[dim] = _shares(copies[dim], size, generator if self.split == "uneven" else None)
            context.cuts.append(Cut(dim.name, size, count))
        return widened(graph, copies, shares, readers, by=self.name) if copies else graph


def copiable(graph: Graph, include: Sequence[str], exclude: Sequence[str], left: Counter[str]) -> dict[Dim, Readers]:
    """The Dims whose indices may have copies, with what reads them; ``left`` counts the others by reason."""
    chosen = [group.dim for group in select(graph.groups(), include, exclude, left)]
    allowed = may_be_reordered(graph, chosen)
    if len(allowed) < len(chosen):
        left["its indices have an order that is read"] += len(chosen) - len(allowed)
    found: Mapping[Dim, Readers | str] = readers_of(graph, allowed)
    left.update(own for own in found.values() if isinstance(own, str))
    return {dim: own for dim, own in found.items() if isinstance(own, Readers)}


def _copied(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """All indices so many times, and then some of them once more."""
    more = np.sort(generator.choice(size, count % size, replace=False))
    return np.concatenate([np.tile(np.arange(size), count // size), more])


def _shares(copies: np.ndarray, size: int, generator: np.random.Generator | None) -> np.ndarray:
    """What each copy counts, 1 together for each index; drawn between half and one and a half of the others'."""
    drawn = np.ones(len(copies)) if generator is None else generator.uniform(0.5, 1.5, len(copies))
    shares: np.ndarray = drawn / np.bincount(copies, drawn, size)[copies]
    return shares
