"""``sort``: the indices of every Dim in order of importance; the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.graph import Graph
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.elastic.elastic import ordered
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Sort(Pass):
    """Order every free Dim by importance, so that its first indices are the best ones to keep: nested networks.

    before  h = relu(x w1')    y = h w2'
    after   h = relu(x w1[o]') y = h w2[:, o]'        o: the rows by falling score

    The result computes the same. Any prefix is then a network: ``regauge.elastic`` gives and trains these.
    """

    name: ClassVar[str] = "sort"
    contract: ClassVar[Contract] = "exact"

    score: Literal["l1", "l2", "bn", "random"] = option(
        "l2", "importance by weights: norms, BatchNorm gains, or chance"
    )
    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: sort nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these stay as they are")
    seed: int = option(0, "seed of score=random", at_least=0)

    def call(self, graph: Graph, context: Context) -> Graph:
        nested = ordered(graph, self.score, self.include, self.exclude, 1, self.seed)
        context.left.update(nested.left)
        if not nested.scores:
            return graph
        context.note(f"{len(nested.scores)} Dims sorted")
        return nested.graph
