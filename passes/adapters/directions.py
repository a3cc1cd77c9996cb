"""EVA: the directions in which the inputs of layers vary most on data, as many for each as they explain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Parameter
from regauge.passes.adapters.sites import Site
from regauge.passes.calibration.layer_moments import visit_moments

_MOST = 2  # times the rank that was asked for, that one layer may have: what the paper calls rho


def input_directions(
    graph: Graph, chosen: Sequence[Site], batches: Sequence[Any], rank: int, left: Counter[str]
) -> dict[Parameter, torch.Tensor]:
    """[rank of the layer, columns] by weight: the first principal directions of the inputs (Paischer et al. 2024).

    The ranks sum up to ``rank`` for each layer at most; those directions are taken that explain the greatest shares of
    the variance of their layer's inputs, which is about their mean, as in the authors' code. Instead of from batches
    one after the other, the directions are computed of the moments of all.
    """
    layers = [site.layer for site in chosen if site.layer is not None and site.blocks == 1]
    left["no single matrix that inputs have directions for"] += len(chosen) - len(layers)
    found: dict[Parameter, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, moments in visit_moments(graph, layers, batches):
        sums = moments.gram[-1, :-1]
        values, vectors = torch.linalg.eigh(moments.gram[:-1, :-1] - torch.outer(sums, sums) / moments.rows)
        most = min(_MOST * rank, layer.outputs, layer.columns)
        shares = values.flip(0).clamp(min=0) / values.sum().clamp(min=1e-300)
        found[layer.weight] = shares[:most], vectors.flip(1).t()[:most]
    every = torch.cat([shares for shares, _ in found.values()]) if found else torch.zeros(0)
    budget = min(rank * len(found), len(every))
    taken = torch.zeros(len(every), dtype=torch.bool)
    taken[every.argsort(descending=True, stable=True)[:budget]] = True
    parts = torch.split(taken, [len(shares) for shares, _ in found.values()])
    counts = [int(part.sum()) for part in parts]
    result = {w: found[w][1][:count] for w, count in zip(found, counts, strict=True) if count}
    left["its inputs vary too little for a share of the ranks"] += len(found) - len(result)
    return result
