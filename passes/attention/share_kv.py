"""``share-kv``: attention layers that read the keys and values of an earlier one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node
from regauge.ir.rewriting.rewrite import Refusal
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.entries import Tracer
from regauge.passes.attention.fewer import misfit
from regauge.passes.attention.following import follower_misfit, write_follower
from regauge.passes.attention.grouping import neighbours
from regauge.passes.attention.layer_groups import Fitted, Kind, LayerGroup, Rows, distance, means, unfitted
from regauge.passes.attention.repair import Copy, cache_note
from regauge.passes.attention.sharing import NewHeads, may_be_ordered, write_heads
from regauge.passes.attention.site_moments import site_rows
from regauge.passes.attention.sites import Site
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.noise import noise_batches
from regauge.passes.options import option

_KINDS: dict[str, Kind] = {"aligned": "joint", "mlkv": "mean", "cla": "first", "kvsharer": "first"}


@dataclass(frozen=True, kw_only=True)
class ShareKv(Pass):
    """Let attention layers read the keys and values of an earlier layer, so that these are made and kept once.

    before  attention(q1, k1, v1)    attention(q2, k2, v2)
    after   attention(q1, k, v)      attention(q2', k, v)

    Groups of neighbouring layers share: those of the first one (cla: Brandon et al. 2024), made by the mean of their
    weights (mlkv: Zuhri et al. 2024), or aligned: by weights that come closest to the keys and values of all layers, as
    far as the inputs of the first one tell them. Or single layers do (kvsharer: Yang et al. 2024), those whose keys and
    values are farthest apart first, as long as the outputs stay alike. With data, queries and outputs of all these
    layers are then solved by least squares, heads being matched first, and what lies behind is refitted.
    """

    name: ClassVar[str] = "share-kv"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    layers: int = option(help="attention layers that keep keys and values of their own", at_least=1)
    method: Literal["aligned", "cla", "mlkv", "kvsharer"] = option("aligned", "which layers share, and what")
    threshold: float = option(0.5, "kvsharer: cosine of the outputs before and after that is kept", at_most=1)
    repair: bool | None = option(None, "fit queries and outputs, refit the layers behind; true where data is given")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "kvsharer" and "threshold" in self.given_options():
            raise PassError("share-kv: threshold is for single layers: leave it out, or write method=kvsharer")

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.repair and context.data is None:
            raise PassError(f"share-kv needs data for repair: {GIVE_DATA}")
        whole = assembled(graph)
        copy = Copy(whole, by=self.name)
        sites = self._candidates(copy, context.left)
        if len(sites) <= self.layers:
            context.left["it has no more layers with keys and values that can be shared"] += 1
            return graph
        batches = calibration_batches(graph, context) if context.data is not None else noise_batches(whole)
        fit = context.data is not None and self.repair is not False
        rows = site_rows(copy.result, sites, batches)
        if self.method == "kvsharer":
            groups = self._alike(whole, sites, rows, batches, context.left)
        else:
            groups = [[sites[place] for place in group] for group in neighbours(len(sites), self.layers)]
        leaders = self._write(copy, groups, rows, fit or self.method == "aligned", context.left)
        if not leaders:
            return graph
        for site, leader in leaders.items():
            context.note(f"{_label(site)} reads keys and values of {_label(leader)}")
        context.note(cache_note(copy.sites, (), leaders))
        if fit:
            context.note(copy.heal(batches))
        return copy.result

    def _candidates(self, copy: Copy, left: Counter[str]) -> list[Site]:
        found: list[Site] = []
        tracer = Tracer(copy.result)
        for site in copy.sites:
            reason = misfit(site, None, "aligned")
            if reason is None and found:
                reason = follower_misfit(tracer, found[0], site)
            if reason is None:
                found.append(site)
            else:
                left[reason] += 1
        return found

    # -- which layers --------------------------------------------------------------------------------------------------

    def _alike(
        self, graph: Graph, sites: Sequence[Site], rows: Rows, batches: Sequence[Any], left: Counter[str]
    ) -> list[list[Site]]:
        """Pairs of layers, the farthest apart first, the later one reading the earlier one's, while outputs stay alike.

        They are compared on the first batch. A layer that is read keeps its own, one that reads is not read.
        """
        order = sorted(combinations(range(len(sites)), 2), key=lambda p: -distance(sites[p[0]], sites[p[1]], rows))
        owner: dict[int, int] = {}
        before = _flat(graph, batches[0])
        for first, later in order:
            if len(owner) == len(sites) - self.layers:
                break
            if first in owner or later in owner or later in owner.values():
                continue
            tried = Copy(graph, by=self.name)
            places = {site.node.name: at for at, site in enumerate(tried.sites)}
            own = [tried.sites[places[site.node.name]] for site in sites]
            groups = _groups(own, {**owner, later: first})
            self._write(tried, groups, rows, False, Counter())
            if float(torch.cosine_similarity(before, _flat(tried.result, batches[0]), dim=0)) >= self.threshold:
                owner[later] = first
            else:
                left["the outputs would change too much"] += 1
        return _groups(sites, owner)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(
        self, copy: Copy, groups: Sequence[Sequence[Site]], rows: Rows, fit: bool, left: Counter[str]
    ) -> dict[Site, Site]:
        """Let the layers of each group share; returns whose keys and values each follower reads."""
        found: dict[Site, Site] = {}
        for first, *others in (group for group in groups if len(group) > 1):
            try:
                fitted = self._fitted([first, *others], rows, fit)
                leader = self._write_first(copy, first, fitted)
            except Refusal as reason:
                left[str(reason)] += 1
                continue
            for site, new in zip(others, fitted.layers[1:], strict=True):
                try:
                    copy.replaced(site, write_follower(copy.result, site, leader, new, by=self.name))
                    found[site] = first
                except Refusal as reason:
                    left[str(reason)] += 1
        return found

    def _fitted(self, group: Sequence[Site], rows: Rows, fit: bool) -> Fitted:
        if fit:
            ordered = all(may_be_ordered(site, site.parts[1].head_of.tolist()) for site in group)
            return LayerGroup(group, rows, ordered=ordered).fitted(_KINDS[self.method])
        key, value = (means(group if self.method == "mlkv" else group[:1], part) for part in (1, 2))
        return Fitted(key, value, [unfitted(site) for site in group])

    def _write_first(self, copy: Copy, site: Site, fitted: Fitted) -> Node:
        """The attention node whose keys and values the others read."""
        if self.method in ("cla", "kvsharer"):
            return site.node
        first, head_of = fitted.layers[0], tuple(site.parts[1].head_of.tolist())
        new = NewHeads(first.query, fitted.key, fitted.value, first.output, head_of, first.shift)
        result = write_heads(copy.result, site, new, by=self.name)
        copy.replaced(site, result)
        assert result.producer is not None
        return result.producer


def _groups(sites: Sequence[Site], owner: Mapping[int, int]) -> list[list[Site]]:
    """Each layer that is read, with those that read it."""
    readers = {first: [later for later, own in sorted(owner.items()) if own == first] for first in owner.values()}
    return [[sites[first], *(sites[later] for later in readers[first])] for first in sorted(readers)]


def _flat(graph: Graph, batch: Any) -> torch.Tensor:
    """The first output, all its numbers in a row."""
    with torch.no_grad():
        found: torch.Tensor = graph.run(batch)[0]
    return found.flatten().double()


def _label(site: Site) -> str:
    return site.parts[1].layer.weight.name
