"""Which Dims a pruning pass may cut: free ones, filtered by name; and why the others stay. Which indices are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from regauge.ir.errors import PassError
from regauge.ir.groups import Group


def select(groups: Sequence[Group], include: Sequence[str], exclude: Sequence[str], left: Counter[str]) -> list[Group]:
    """Free groups that the patterns allow; ``left`` counts the others by reason.

    A pattern is a glob on names of Dims (``layer1.*:0``) or of parameters (``layer1.*``). A parameter that ``exclude``
    matches keeps its shape: every Dim in it stays. A Dim is included by its own name, or when all parameters it occurs
    in are, so that ``include`` never reaches beyond what it names. Raises PassError for a pattern that matches nothing.
    """
    names = {group.dim: _names(group) for group in groups}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            _check_pattern(option, pattern, {name for found in names.values() for name in found})
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


def _check_pattern(option: str, pattern: str, names: set[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    parts = {name.rpartition(".")[0] for name in names} | names  # modules count too: haed.* is near head
    close = get_close_matches(pattern.rstrip("*.:?"), sorted(parts - {""}), 2)
    hint = f"did you mean {' or '.join(close)}?" if close else "`regauge groups` lists the names"
    raise PassError(f"{option}={pattern} matches no parameter and no Dim: {hint}")


def _reason(group: Group, names: set[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a group is left alone: None when it is not, empty when there is nothing to cut in it."""
    if include and not _included(group, include):
        return "not included"
    if any(fnmatchcase(name, pattern) for name in names for pattern in exclude):
        return "excluded"
    if group.pins:
        return group.pins[0].reason
    return None if group.free else ""


def _included(group: Group, patterns: Sequence[str]) -> bool:
    if any(fnmatchcase(group.name, pattern) for pattern in patterns):
        return True
    members = [member.parameter.names for member in group.members]
    return all(any(fnmatchcase(name, pattern) for name in names for pattern in patterns) for names in members)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The sorted indices of the ``count`` highest scores; of equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
