"""The pass that gives a decoder a cache."""

from __future__ import annotations

from dataclasses import dataclass

from regauge.ir.edit import record
from regauge.ir.graph import Graph
from regauge.ir.states import carried
from regauge.passes.base import Context, Pass
from regauge.passes.decoding.cache_bytes import cache_bytes, in_words
from regauge.passes.decoding.incremental import Incremental
from regauge.passes.decoding.positions import find_positions
from regauge.passes.decoding.recognised import recognised_caches
from regauge.passes.decoding.same_steps import check_steps
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class KvCache(Pass):
    """Give a causal decoder a cache: what it computes for new positions, with keys and values of past ones as states.

    before   logits [batch, length, ...] = decoder(tokens [batch, length])
    after    logits of the new positions, keys.next, values.next = decoder(new tokens, keys, values)

    Kept are keys and values where attention reads them, or whatever takes less room and gives them: before heads are
    repeated, the latent of ``kv-latent``, the codes of ``kv-quantize``. Places, angles and masks count from the past
    positions on. ``regauge.ir.states.Steps`` runs the result step by step. What it gives is compared with the whole
    graph on made-up inputs, over three steps; a graph that is not causal is refused (PassError).

    Caches that a graph has already, inputs that come out with new entries behind them, are declared as states, and
    nothing else is changed.
    """

    name = "kv-cache"

    axis: str | None = option(None, "name of the dynamic size that counts positions, where attention does not tell")

    def call(self, graph: Graph, context: Context) -> Graph:
        if carried(graph):
            context.left["it has states already"] += 1
            return graph
        result = graph.copy()
        result.states += recognised_caches(result)
        if carried(result):
            result.version += 1
            context.note("its own caches were found")
        else:
            positions = find_positions(graph, self.axis)
            Incremental(result, find_positions(result, self.axis), by=self.name).run()
            if not carried(result):
                context.left[f"nothing mixes positions along {positions.length}: there is nothing to keep"] += 1
                return graph
            check_steps(graph, result, positions.length)
        record(result, self.name, f"{len(carried(result))} caches")
        context.note(f"{len(carried(result))} caches, {in_words(cache_bytes(result))} for each position of a sequence")
        return result
