"""Layers that make queries, keys and values together are taken apart, so that each has a layer that can be replaced."""

from __future__ import annotations

import glob

from regauge.ir.graph import Graph
from regauge.passes.attention.sites import attention_sites
from regauge.passes.base import Context
from regauge.passes.factorization.split_projections import SplitProjections


def split_layers(graph: Graph) -> Graph:
    """The same function with one layer each for the queries, keys and values of every attention, as far as it can be.

    A layer whose result is read in other ways, too, stays as it is.
    """
    fused: dict[str, None] = {}
    for site in attention_sites(graph):
        for heads in (site.key, site.value):
            if heads is not None and heads.channels.numel() < heads.layer.outputs:
                fused[glob.escape(heads.layer.weight.name)] = None  # names may have brackets, which globs read
    return SplitProjections(include=tuple(fused)).call(graph, Context()) if fused else graph
