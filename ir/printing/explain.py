"""Explains in words a Dim, a parameter axis, a parameter or a value: what it is, and why it may or may not be cut."""

from __future__ import annotations

from difflib import get_close_matches

from regauge.ir.dims.extents import Dim, format_extent, leaves
from regauge.ir.dims.groups import Group
from regauge.ir.dims.majors import majors_of
from regauge.ir.errors import ExplainError, GraphError
from regauge.ir.gauge.classes import Gauge, gauge_in_words, gauges
from regauge.ir.graph import Graph, Parameter, Value

MAX_LISTED = 12


def explain(graph: Graph, what: str) -> str:
    """Explain a Dim (``conv1.weight:0``, ``attn.qkv.weight:0.1``), an axis, a parameter or a value by its name.

    Raises ExplainError when nothing has that name.
    """
    groups = {group.name: group for group in graph.groups()}
    if what in groups:
        return explain_group(graph, groups[what])
    name, _, axis = what.rpartition(":")
    value = _value(graph, name) if name and axis.isdigit() else None
    if value is not None:
        return _explain_axis(graph, value, int(axis), groups)
    value = _value(graph, what)
    if value is None:
        raise _unknown(graph, what, groups)
    return _explain_value(graph, value, groups)


def _unknown(graph: Graph, what: str, groups: dict[str, Group]) -> ExplainError:
    close = get_close_matches(what, dict.fromkeys([*groups, *(value.name for value in graph.values())]), 3)
    others = "`regauge groups` lists Dims, `regauge inspect --text` values"
    hint = f"did you mean {' or '.join(close)}?" if close else others
    return ExplainError(f"no Dim, parameter axis, parameter or value is called {what!r}; {hint}")


def _value(graph: Graph, name: str) -> Value | None:
    try:
        return graph.find(name)
    except GraphError:
        return None


def _explain_axis(graph: Graph, value: Value, axis: int, groups: dict[str, Group]) -> str:
    axes = graph.axes.axes(value)
    if axis >= len(axes):
        raise ExplainError(f"{value.name}:{axis} does not exist: {value} has the axes 0 to {len(axes) - 1}")
    head = f"axis {axis} of {value} is {format_extent(axes[axis])}"
    return "\n".join([head, *_dim_texts(graph, list(dict.fromkeys(leaves(axes[axis]))), groups)])


def _explain_value(graph: Graph, value: Value, groups: dict[str, Group]) -> str:
    kind = value.kind if isinstance(value, Parameter) else "result" if value.producer else "input"
    lines = [f"{value} is a {kind} with the axes {graph.axes.describe(value)}"]
    if isinstance(value, Parameter) and value.aliases:
        lines.append(f"  tied: also called {', '.join(value.aliases)}")
    if value.producer is not None:
        lines.append(f"  computed by {value.producer.label}" + _called_at(value.producer.source))
    dims = dict.fromkeys(dim for extent in graph.axes.axes(value) for dim in leaves(extent))
    return "\n".join([*lines, *_dim_texts(graph, list(dims), groups)])


def _called_at(source: str) -> str:
    return f", called at {source}" if source else ""


def _dim_texts(graph: Graph, dims: list[Dim], groups: dict[str, Group]) -> list[str]:
    return [explain_group(graph, groups.get(dim.name, Group(dim))) for dim in dims]


def explain_group(graph: Graph, group: Group) -> str:
    """Whether a Dim is free, why not, what is cut with it, and what may be done to it."""
    dim = group.dim
    lines = []
    if dim.pins:
        lines.append(f"{dim.name} ({dim.size} indices) is pinned: none of its indices can be removed, because")
        lines += [f"  - {pin}" for pin in dim.pins]
    else:
        majors = majors_of(graph, [dim])[dim]
        within = f", other ones in each of {' and '.join(major.name for major in majors)}" if majors else ""
        lines.append(f"{dim.name} ({dim.size} indices) is free: indices of it can be removed{within}")
    lines += _members(group)
    lines += _roles(graph, dim)
    if not dim.pins:
        lines.append(f"  gauge: {gauge_in_words(gauges(graph).get(dim, Gauge.FIXED))}")
    return "\n".join(lines)


def _members(group: Group) -> list[str]:
    if not group.members:
        return ["  in no parameter"]
    shown = [str(member) for member in group.members[:MAX_LISTED]]
    more = f" and {len(group.members) - MAX_LISTED} more" if len(group.members) > MAX_LISTED else ""
    return [f"  in {', '.join(shown)}{more}"]


_PHRASES = {
    "produce": "produced by",
    "contract": "contracted by",
    "normalise": "normalised by",
    "reduce": "reduced by",
    "window": "under a window of",
    "indexed": "looked up in by",
    "whole": "needed whole by",
    "scan": "run along by",
}


def _roles(graph: Graph, dim: Dim) -> list[str]:
    by_role: dict[str, list[str]] = {}
    for node, call in graph.axes.calls.items():
        for role in dict.fromkeys(role for role, extent in call.roles if dim in set(leaves(extent))):
            by_role.setdefault(role, []).append(node.label)
    lines = []
    for role, phrase in _PHRASES.items():
        labels = by_role.get(role, [])
        if labels:
            more = f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else ""
            lines.append(f"  {phrase} {'; '.join(labels[:MAX_LISTED])}{more}")
    return lines
