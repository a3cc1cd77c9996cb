"""Writing new heads into a copy of a graph, and refitting what lies behind them by least squares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.rewrite import Refusal
from regauge.passes.attention.sharing import NewHeads, write_heads
from regauge.passes.attention.sites import Site, attention_sites
from regauge.passes.calibration.batches import examples_in
from regauge.passes.depth.healing import heal


def rewritten(
    graph: Graph,
    every: Sequence[Site],
    found: Sequence[tuple[Site, NewHeads]],
    batches: Sequence[Any] | None,
    left: Counter[str],
    *,
    by: str,
) -> tuple[Graph, list[Site], str]:
    """A copy of a graph with new heads at sites of it, refitted on ``batches`` where there are some.

    ``every`` are all sites of the graph. Returns the copy, the sites that changed, and what to report; ``left`` counts
    the others by reason.
    """
    moved: dict[Value, Value] = {}
    result = copy_graph(graph, moved)
    twins = dict(zip(every, attention_sites(result), strict=True))
    done, changed = [], []
    for site, new in found:
        own = twins[site]
        try:
            changed.append(write_heads(result, own, new, by=by))
        except Refusal as reason:
            left[str(reason)] += 1
            continue
        done.append(site)
        moved[site.node.output] = changed[-1]
    if batches is None or not done:
        return result, done, ""
    live = set(result.values())
    known = {old: new for old, new in moved.items() if new in live}
    count = heal(graph, result, known, batches, by=by, changed=changed)
    return result, done, f"layers refitted on {sum(map(examples_in, batches))} examples: {count}"


def cache_bytes(sites: Sequence[Site]) -> str:
    """What a cache of all keys and values that were found holds for each token, in words."""
    total = 0
    for site in sites:
        for heads in (site.key, site.value):
            if heads is not None:
                total += heads.count * heads.size * heads.layer.weight.tensor.element_size()
    return f"{total} bytes per token"
