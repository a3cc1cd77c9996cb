"""Plans without data on the budget: the same share of every Dim, or rankings of the indices of many.

A *plan* turns one number, the level between 0 (keep all) and 1 (keep the least), into a count for every Dim; counts
only fall as the level rises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.graph import Graph
from regauge.passes.allocation.choices import Choice, Counts

Plan: TypeAlias = Callable[[float], Counts]
Wishes: TypeAlias = Callable[[float], Mapping[Dim, float]]


def uniform_plan(choices: Sequence[Choice]) -> Plan:
    """Every Dim keeps the same share of its indices: the level is the share that goes."""
    return _rounded(choices, uniform_wishes(choices))


def ranked_plan(choices: Sequence[Choice]) -> Plan:
    """Indices of all Dims are ranked together: the level is the share of them that goes, the lowest scores first."""
    return _rounded(choices, ranked_wishes(choices))


def _rounded(choices: Sequence[Choice], wishes: Wishes) -> Plan:
    def plan(level: float) -> Counts:
        wanted = wishes(level)
        return {choice.dim: choice.rounded(wanted[choice.dim]) for choice in choices}

    return plan


def uniform_wishes(choices: Sequence[Choice]) -> Wishes:
    """What :func:`uniform_plan` would keep if any count were allowed."""
    return lambda level: {choice.dim: (1 - level) * choice.size for choice in choices}


def ranked_wishes(choices: Sequence[Choice]) -> Wishes:
    """What :func:`ranked_plan` would keep if any count were allowed."""
    pooled = np.sort(np.concatenate([choice.scores for choice in choices])) if choices else np.zeros(0)
    ordered = {choice.dim: np.sort(choice.scores) for choice in choices}

    def wishes(level: float) -> dict[Dim, float]:
        gone = round(level * len(pooled))
        threshold = pooled[gone] if gone < len(pooled) else np.inf
        return {dim: len(own) - int(np.searchsorted(own, threshold, side="left")) for dim, own in ordered.items()}

    return wishes


def isomorphic_plan(choices: Sequence[Choice], classes: Mapping[Dim, Hashable]) -> Plan:
    """Indices are ranked among those of Dims of the same class: the level is the share of each class that goes."""
    return _rounded(choices, isomorphic_wishes(choices, classes))


def isomorphic_wishes(choices: Sequence[Choice], classes: Mapping[Dim, Hashable]) -> Wishes:
    """What :func:`isomorphic_plan` would keep if any count were allowed."""
    members: dict[Hashable, list[Choice]] = {}
    for choice in choices:
        members.setdefault(classes[choice.dim], []).append(choice)
    ranked = [ranked_wishes(alike) for alike in members.values()]

    def wishes(level: float) -> dict[Dim, float]:
        return {dim: count for part in ranked for dim, count in part(level).items()}

    return wishes


def signatures(graph: Graph, dims: Iterable[Dim]) -> dict[Dim, Hashable]:
    """What computes with each Dim: how often which operator gives it which role, and in how many weights it occurs.

    Dims of equal signatures are alike (isomorphic groups: Fang et al. 2024, Isomorphic Pruning for Vision Models, who
    compare the graphs of sub-structures; here operators and roles are counted, and edges between them are not).
    """
    found: dict[Dim, Counter[tuple[str, str]]] = {dim: Counter() for dim in dims}
    for node, call in graph.axes.calls.items():
        for role, extent in call.roles:
            for dim in leaves(extent):
                if dim in found:
                    found[dim][node.op, role] += 1
    for dim, counted in found.items():
        group = graph.axes.groups.get(dim)
        for member in group.members if group is not None else ():
            counted[member.parameter.kind, f"axis {member.axis} of {member.parameter.rank}"] += 1
    return {dim: frozenset(counted.items()) for dim, counted in found.items()}
