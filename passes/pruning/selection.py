"""Which Dims a pruning pass may cut: free ones, filtered by name; and why the others stay. Which indices are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from regauge.ir.dims.groups import Group
from regauge.ir.dims.kept import KeptWithin
from regauge.passes.name_patterns import check_patterns, matches

_WHERE = "`regauge groups` lists the names"


def select(groups: Sequence[Group], include: Sequence[str], exclude: Sequence[str], left: Counter[str]) -> list[Group]:
    """Free groups that the patterns allow; ``left`` counts the others by reason.

    A pattern is a glob on names of Dims (``layer1.*:0``) or of parameters (``layer1.*``). A parameter that ``exclude``
    matches keeps its shape: every Dim in it stays. A Dim is included by its own name, or when all parameters it occurs
    in are, so that ``include`` never reaches beyond what it names. Raises PassError for a pattern that matches nothing.
    """
    names = {group.dim: _names(group) for group in groups}
    for option, patterns in (("include", include), ("exclude", exclude)):
        every = {name for found in names.values() for name in found}
        check_patterns(option, patterns, every, what="parameter and no Dim", otherwise=_WHERE)
    chosen = []
    for group in groups:
        reason = _reason(group, names[group.dim], include, exclude)
        if reason is None:
            chosen.append(group)
        elif reason:
            left[reason] += 1
    return chosen


def _names(group: Group) -> set[str]:
    parameters = {name for member in group.members for name in member.parameter.names}
    axes = {f"{name}:{member.axis}" for member in group.members for name in member.parameter.names}
    return {group.name} | parameters | axes


def _reason(group: Group, names: set[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a group is left alone: None when it is not, empty when there is nothing to cut in it."""
    if include and not _included(group, include):
        return "not included"
    if matches(names, exclude):
        return "excluded"
    if group.pins:
        return group.pins[0].reason
    return None if group.free else ""


def _included(group: Group, patterns: Sequence[str]) -> bool:
    return matches([group.name], patterns) or all(matches(m.parameter.names, patterns) for m in group.members)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The sorted indices of the ``count`` highest scores, in each index of the majors; of equals the first."""
    return np.sort(np.argsort(-scores, -1, kind="stable")[..., :count], -1)


def kept(group: Group, scores: np.ndarray, count: int) -> np.ndarray | KeptWithin:
    """What a group keeps, by scores as :func:`regauge.passes.pruning.score_table.score` gives them."""
    found = best(scores, count)
    return KeptWithin(group.majors, found) if found.ndim > 1 else found
