"""``convert-gqa``: fewer heads of keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.fewer import METHODS, Method, misfit
from regauge.passes.attention.repair import Copy, cache_note
from regauge.passes.attention.sharing import NewHeads
from regauge.passes.attention.site_moments import site_moments
from regauge.passes.attention.sites import Site
from regauge.passes.base import GIVE_DATA, Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.noise import noise_batches
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class ConvertGqa(Pass):
    """Let groups of query heads share heads of keys and values, which are fewer: grouped-query attention.

    before  attention(q, k, v)                      q, k, v: f32[n,8,s,64]
    after   attention(q, k', v', enable_gqa=true)   k', v': f32[n,2,s,64]

    The projections of keys and values become smaller, and with them what a cache of both holds for each token. Aligned:
    heads of a group have the joint subspace in common that the scores and the output need most, and the weights of
    queries and of the output undo what differs; behind rotary positions only a rotation and a scale of each pair can be
    undone, and behind norms of queries and keys only what these do not see. Groups are those that lose least, of all
    partitions where these are few. The mean of neighbouring heads is GQA's (Ainslie et al. 2023); key-driven, query
    heads go to such means by the norms of their keys (Khan et al. 2024).
    With data, layers behind are then refitted by least squares, without gradients; without, inputs are made up, and
    nothing is refitted.
    """

    name: ClassVar[str] = "convert-gqa"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    kv_heads: int = option(help="heads of keys and of values that are left", at_least=1)
    method: Method = option("aligned", "how heads become one: by their joint subspace, their mean, or key-driven")
    repair: bool | None = option(None, "refit the layers behind on data; true where data is given")
    include: tuple[str, ...] = option((), "globs on names of the weights of keys: only these")
    exclude: tuple[str, ...] = option((), "globs on names of the weights of keys: not these")

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.repair and context.data is None:
            raise PassError(f"convert-gqa needs data for repair: {GIVE_DATA}")
        copy = Copy(assembled(graph), by=self.name)
        sites = self._chosen(copy.sites, context.left)
        if not sites:
            return graph
        given = context.data is not None
        batches = (
            calibration_batches(graph, context) if given else [] if self.method == "mean" else noise_batches(graph)
        )
        done = copy.write(self._found(copy.result, sites, batches), context.left)
        if not done:
            return graph
        for site, _ in done:
            key = site.parts[1]
            context.cuts.append(Cut(f"{key.layer.weight.name}: heads", key.count, self.kv_heads))
        context.note(cache_note(copy.sites, done))
        if given and self.repair is not False:
            context.note(copy.heal(batches))
        return copy.result

    def _chosen(self, sites: Sequence[Site], left: Counter[str]) -> list[Site]:
        names = [name for site in sites if site.key is not None for name in site.key.layer.weight.names]
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        if not sites:
            left["no attention was found"] += 1
        found = []
        for site in sites:
            own = [] if site.key is None else site.key.layer.weight.names
            reason = misfit(site, self.kv_heads, self.method)
            if reason is None and self.include and not matches(own, self.include):
                reason = "not included"
            if reason is None and matches(own, self.exclude):
                reason = "excluded"
            if reason is None:
                found.append(site)
            else:
                left[reason] += 1
        return found

    def _found(self, graph: Graph, sites: Sequence[Site], batches: Sequence[Any]) -> list[tuple[Site, NewHeads]]:
        make = METHODS[self.method]
        if self.method == "mean":
            return [(site, make(site, None, self.kv_heads)) for site in sites]
        return [(site, make(site, moments, self.kv_heads)) for site, moments in site_moments(graph, sites, batches)]
