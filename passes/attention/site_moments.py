"""The moments of what the projections of attention read, site by site, in one run of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.graph import Graph, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.attention.sites import Site
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments

_ROWS = 64  # for each column of a layer
RIDGE = 1e-4  # share of the mean square of a column


@dataclass(frozen=True)
class SiteMoments:
    """Second moments of the inputs of a site's queries, keys and values, per row."""

    query: Moments
    key: Moments
    value: Moments


def site_moments(graph: Graph, sites: Sequence[Site], batches: Sequence[Any]) -> Iterator[tuple[Site, SiteMoments]]:
    """Each site with its moments, in the order of the graph; inputs that several read are looked at once."""
    first: dict[Value, Layer] = {}
    for site in sites:
        for heads in site.parts[:3]:
            first.setdefault(heads.x, heads.layer)
    held: dict[Value, Moments] = {}
    waiting = [(site, [heads.x for heads in site.parts[:3]]) for site in sites]
    for layer, moments in visit_moments(graph, first.values(), batches):
        held[layer.node.inputs[0]] = moments  # type: ignore[index]
        while waiting and all(x in held for x in waiting[0][1]):
            site, inputs = waiting.pop(0)
            yield site, SiteMoments(*(held[x] for x in inputs))
            still = {x for _, later in waiting for x in later}
            held = {x: found for x, found in held.items() if x in still}


def site_rows(graph: Graph, sites: Sequence[Site], batches: Sequence[Any]) -> dict[Value, torch.Tensor]:
    """What each projection reads, [rows, columns]: of values of one shape the same positions, evenly drawn.

    Memory: at most :data:`_ROWS` rows for each column, of all sites.
    """
    layers: dict[Value, Layer] = {}
    for site in sites:
        for heads in site.parts[:3]:
            layers.setdefault(heads.x, heads.layer)
    by_node = {layer.node: layer for layer in layers.values()}
    found: dict[Value, torch.Tensor] = {}
    run = Lockstep(graph, batches)
    for node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        given = [layer.rows_of_input(x) for x in run.values(node.inputs[0])]
        step = max(1, sum(map(len, given)) // (_ROWS * layer.columns))
        found[node.inputs[0]] = torch.cat([x[::step] for x in given])  # type: ignore[index]
    return found


def metric_of(moments: Moments, *, centred: bool = False, bias: bool = False) -> torch.Tensor:
    """The mean of x x', [columns, columns]: about the mean, or with a one behind each row where there is a ``bias``."""
    found = moments.centred().double() if centred else moments.gram if bias else moments.gram[:-1, :-1]
    found = found / max(1, moments.rows)
    ridge(found[: moments.columns, : moments.columns])
    return found


def ridge(metric: torch.Tensor) -> None:
    """Add to the diagonal of a metric, in place, what keeps directions that the data does not take from being free."""
    metric.diagonal().add_(RIDGE * metric.diagonal().mean())
