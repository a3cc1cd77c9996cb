"""Writing new heads into a copy of a graph, and refitting what lies behind them by least squares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.rewriting.rewrite import Refusal
from regauge.passes.attention.sharing import NewHeads, write_heads
from regauge.passes.attention.sites import Heads, Site, attention_sites
from regauge.passes.calibration.batches import examples_in
from regauge.passes.depth.healing import heal


class Copy:
    """A copy of a graph whose sites are given new heads; then it is refitted to what the graph gave."""

    def __init__(self, graph: Graph, *, by: str) -> None:
        self.graph, self.by = graph, by
        self._moved: dict[Value, Value] = {}
        self.result = copy_graph(graph, self._moved)
        self.sites = attention_sites(self.result)
        self._before = {new: old for old, new in self._moved.items()}
        self._changed: list[Value] = []

    def write(self, found: Sequence[tuple[Site, NewHeads]], left: Counter[str]) -> list[tuple[Site, NewHeads]]:
        """Give sites of the copy new heads; returns those where it could be done, ``left`` counts the others."""
        done = []
        for site, new in found:
            try:
                changed = write_heads(self.result, site, new, by=self.by)
            except Refusal as reason:
                left[str(reason)] += 1
                continue
            self.replaced(site, changed)
            done.append((site, new))
        return done

    def replaced(self, site: Site, result: Value) -> None:
        """Note which value of the copy is the result of a site now."""
        self._moved[self._before[site.node.output]] = result
        self._changed.append(result)

    def heal(self, batches: Sequence[Any]) -> str:
        """Refit what lies behind; returns what to report."""
        live = set(self.result.values())
        moved = {old: new for old, new in self._moved.items() if new in live}
        count = heal(self.graph, self.result, moved, batches, by=self.by, changed=self._changed)
        return f"layers refitted on {sum(map(examples_in, batches))} examples: {count}"


def cache_note(sites: Sequence[Site], done: Sequence[tuple[Site, NewHeads]], followers: Collection[Site] = ()) -> str:
    """What a cache of keys and values holds for each token, before and after, of all sites that were found.

    ``done`` have new heads, ``followers`` none of their own any more.
    """
    changed = dict(done)
    before: dict[Any, int] = {}
    after: dict[Any, int] = {}
    for site in sites:
        for part in ("key", "value"):
            heads: Heads | None = getattr(site, part)
            if heads is None:
                continue
            own = heads.layer.node, *heads.channels.flatten().tolist()  # once where several sites read them
            each = heads.size * heads.layer.weight.tensor.element_size()
            before[own] = each * heads.count
            if site not in followers:
                after[own] = each * (len(getattr(changed[site], part).weight) if site in changed else heads.count)
    return f"cache of keys and values: {sum(before.values())} -> {sum(after.values())} bytes per token"
