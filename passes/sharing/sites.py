"""Layers that stand for each other in blocks of one structure: what is shared, and in what it is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.problems import Problem
from regauge.passes.name_patterns import matches
from regauge.passes.sharing.structure import Repeated

Problems = Mapping[str, Problem]  # by the name of the layer's weight


@dataclass(frozen=True)
class Site:
    """One layer of every block of a structure: the names of their weights [blocks], and the size of each."""

    names: tuple[str, ...]
    size: int


class Item(Protocol):
    """Layers that are to have something in common."""

    @property
    def names(self) -> Sequence[str]:
        """Of the layers' weights."""

    @property
    def parameters(self) -> int:
        """How many the layers have together."""

    def matrix(self, problem: Problem) -> torch.Tensor:
        """What one of the layers is multiplied by, [outputs, columns]; what is its own is kept for ``write``."""

    def write(self, graph: Graph, layers: Sequence[Layer], *, by: str) -> None:
        """Put what is shared and what is each layer's own into the graph; ``layers`` are in the order of ``names``."""


def sites_of(found: Repeated, include: Sequence[str], exclude: Sequence[str], left: Counter[str]) -> list[Site]:
    """The layers that blocks of one structure may share; ``left`` counts the others by reason."""
    sites = []
    for weights in zip(*found.weights, strict=True):
        reason = _misfit(weights, include, exclude)
        if reason:
            left[reason] += len(weights)
        elif weights[0].kind == "parameter" and weights[0].rank > 1:
            sites.append(Site(tuple(weight.name for weight in weights), weights[0].tensor.numel()))
    return sites


def _misfit(weights: Sequence[Parameter], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if weights[0].kind != "parameter" or weights[0].rank < 2:
        return None
    if include and not all(matches(weight.names, include) for weight in weights):
        return "not included"
    if any(matches(weight.names, exclude) for weight in weights):
        return "excluded"
    layers = [layer_of(node) for weight in weights for node in weight.consumers()]
    fits = len(layers) == len(weights) and all(layer is not None for layer in layers)
    return None if fits else "no single matrix that the input is multiplied by"


def problems_at(site: Site, problems: Problems, blocks: Sequence[int] | None = None) -> list[Problem]:
    """Those of a site's layers, of some of the blocks."""
    return [problems[site.names[block]] for block in (blocks if blocks is not None else range(len(site.names)))]
