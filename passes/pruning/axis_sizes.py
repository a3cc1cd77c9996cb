"""How the report shows an axis of several Dims: ``conv.weight:0: 16 -> 4  (4 x 4 -> 2 x 2)``."""

from __future__ import annotations

from regauge.ir.dims.extents import Concat, Dim, Extent, resolve
from regauge.ir.dims.groups import Group
from regauge.ir.dims.kept import Keep, size_after
from regauge.ir.graph import Graph


def axis_change(graph: Graph, group: Group, keep: Keep) -> str:
    """The axis in which a Dim first occurs, before and after the cut; empty where it is all of that axis."""
    member = group.members[0]
    extent = resolve(graph.axes.of[member.parameter][member.axis])
    if isinstance(extent, Dim):
        return ""
    sizes = f"{size_after(extent, {})} -> {size_after(extent, keep)}"
    return f"{member}: {sizes}  ({_parts(extent, {})} -> {_parts(extent, keep)})"


def _parts(extent: Extent, keep: Keep, inside: bool = False) -> str:
    if isinstance(extent, Dim):
        return str(size_after(extent, keep))
    sign, parts = (" + ", extent.segments) if isinstance(extent, Concat) else (" x ", extent.factors)
    text = sign.join(_parts(part, keep, inside=True) for part in parts) or "1"
    return f"({text})" if inside and len(parts) > 1 else text
