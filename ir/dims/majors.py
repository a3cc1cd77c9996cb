"""Finds the majors of a Dim: other Dims within which it may be cut, each of their indices keeping its own.

    q, k   (heads x head size)          a head's queries and keys are multiplied with each other: any order will do
    conv   n (g i), (g o) i -> n (g o)  a group reads its own channels, and gives its own
    rotary tables [position, size]      all heads read them: the same indices in all

A Dim lies within a major where nothing would notice if its indices were reordered in each index of the major by itself:

    every tensor that has the Dim has the major beside it, on the same axis or on another one, once;
    every node that reads or makes it lines up the majors of its operands with each other and with those of its results,
    moves no index of them, and brings none of them together, unless the Dim is brought together with it.

The second is asked of the node's rule, on extents of its own for each operand: those that the rule unifies line up.

Rows that are sorted by expert (``grouped_mm``) stand for the experts: each has one index of these, though no axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from regauge.ir.axis_rules.rules import ENDING_ROLES
from regauge.ir.dims.axes import Analysis
from regauge.ir.dims.extents import Concat, Dim, Extent, Product, leaves, resolve
from regauge.ir.dims.local_axes import LocalAxes, local_axes, unrelated
from regauge.ir.graph import Graph, Node, Operand, Value


def majors_of(graph: Graph, dims: Iterable[Dim]) -> dict[Dim, tuple[Dim, ...]]:
    """The majors of each of these Dims, in the order of their first tensor.

    The relation has no cycles: a Dim is never its own major, directly or through others.
    """
    analysis, asked = graph.axes, list(dims)
    _find(analysis, [dim for dim in asked if dim not in analysis.majors])
    return {dim: analysis.majors[dim] for dim in asked}


def _find(analysis: Analysis, dims: Sequence[Dim]) -> None:
    beside = {dim: _in_all_weights(analysis, dim) for dim in dims}
    values = _values_with(analysis, {other for dim, majors in beside.items() if majors for other in (dim, *majors)})
    place = {dim: at for at, dim in enumerate(analysis.groups)} if values else {}

    def may_be(major: Dim, dim: Dim) -> bool:
        """Of Dims that no value has without the others the smallest is a major of these, and they of no other."""
        own = set(values[dim])
        smaller = (int(major.size), place[major]) < (int(dim.size), place[dim])
        return smaller or any(value not in own for value in values[major])

    for dim, majors in beside.items():
        fits = (m for m in majors if may_be(m, dim) and _lies_within(analysis, values[dim], dim, m))
        analysis.majors[dim] = tuple(fits)


def _in_all_weights(analysis: Analysis, dim: Dim) -> list[Dim]:
    """Dims beside a Dim in each parameter that has it."""
    group = analysis.groups.get(dim)
    found: list[Dim] | None = None
    for parameter in dict.fromkeys(member.parameter for member in group.members) if group is not None else ():
        here = majors_beside(analysis.of[parameter], dim)
        found = [m for m in (here if found is None else found) if m in here]
        if not found:
            return []
    return found or []


def majors_beside(axes: Sequence[Extent], dim: Dim) -> list[Dim]:
    """Dims of which there is exactly one index wherever there is one of ``dim``, on any of the axes."""
    found: list[Dim] | None = None
    for beside, apart in _surroundings(resolve(Product(tuple(axes))), dim):
        once = [m for m, times in beside.items() if times == 1 and m not in apart and m is not dim]
        found = once if found is None else [m for m in found if m in once]
    return found or []


def _surroundings(
    extent: Extent, dim: Dim, beside: Counter[Dim] | None = None, apart: frozenset[Dim] = frozenset()
) -> Iterator[tuple[Counter[Dim], frozenset[Dim]]]:
    """For each place of a Dim the Dims it is multiplied with, and those in segments, some indices of which it meets."""
    beside = Counter() if beside is None else beside
    if isinstance(extent, Dim):
        if extent is dim:
            yield beside, apart
        return
    if isinstance(extent, Concat):
        for segment in extent.segments:
            yield from _surroundings(segment, dim, beside, apart)
        return
    for place, factor in enumerate(extent.factors):
        if dim in leaves(factor):
            others = [other for at, other in enumerate(extent.factors) if at != place]
            alone = Counter(other for other in others if isinstance(other, Dim))
            parts = {leaf for other in others if not isinstance(other, Dim) for leaf in leaves(other)}
            yield from _surroundings(factor, dim, beside + alone, apart | parts)


def _values_with(analysis: Analysis, dims: Iterable[Dim]) -> dict[Dim, list[Value]]:
    found: dict[Dim, list[Value]] = {dim: [] for dim in dims}
    for value, axes in analysis.of.items() if found else ():
        for dim in {leaf for extent in axes for leaf in leaves(extent)}:
            if dim in found:
                found[dim].append(value)
    return found


def _lies_within(analysis: Analysis, values: Sequence[Value], dim: Dim, major: Dim) -> bool:
    rows = rows_by(analysis, major)
    stands = {value: _standing(analysis.of[value], dim, major, rows) for value in values}
    nodes = dict.fromkeys(node for value in values for node in (*value.consumers(), value.producer) if node is not None)
    return all(stands.values()) and all(_all_keep_apart(node, analysis, dim, stands) for node in nodes)


def _standing(axes: Sequence[Extent], dim: Dim, major: Dim, rows: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The major, where it is beside the Dim, or the rows that stand for it; nothing where neither is."""
    beside = majors_beside(axes, dim)
    if major in beside:
        return (major,)
    return rows if all(row in beside for row in rows) else ()


def _all_keep_apart(node: Node, analysis: Analysis, dim: Dim, stands: Mapping[Value, tuple[Dim, ...]]) -> bool:
    met = {stands[value] for value in (*node.inputs, *node.outputs) if isinstance(value, Value) and value in stands}
    if len(met) > 1:  # rows on one side and matrices of experts on the other, which meet nowhere else
        return node.op == "grouped_mm"
    return not node.regions and all(keeps_apart(node, analysis, dim, major) for major in next(iter(met)))


def rows_by(analysis: Analysis, major: Dim) -> tuple[Dim, ...]:
    """The Dims of rows that are sorted by the indices of a Dim wherever they are multiplied, by the same offsets."""
    found: dict[tuple[Dim, ...], set[tuple[Extent, Operand]]] = {}
    for node in analysis.calls:
        if node.op == "grouped_mm":
            x, weight, offsets = node.inputs
            rows, experts = (resolve(analysis.of[value][0]) for value in (x, weight))  # type: ignore[index]
            found.setdefault(tuple(leaves(rows)), set()).add((experts, offsets))
    sorted_by = [rows for rows, by in found.items() if len(by) == 1 and next(iter(by))[0] is major]
    return sorted_by[0] if len(sorted_by) == 1 else ()


def keeps_apart(node: Node, analysis: Analysis, dim: Dim, major: Dim) -> bool:
    """Whether a node commutes with reordering ``dim`` in each index of ``major`` by itself, by its rule."""
    copies: dict[int, dict[Dim, Dim]] = {slot: {} for slot, _ in node.operands()}
    own = {slot: unrelated(analysis.of[operand], copies[slot]) for slot, operand in node.operands()}
    local = local_axes(node, own)
    if local is None:
        return False
    pairs = [(resolve(made[dim]), resolve(made[major])) for made in copies.values() if dim in made]
    if not all(isinstance(part, Dim) and not part.pins for pair in pairs for part in pair):
        return False  # its indices are moved, or looked up, or are not one Dim here
    return _line_up(pairs) and all(_goes_through(local, d, m) for d, m in pairs)  # type: ignore[arg-type]


def _line_up(pairs: Sequence[tuple[Extent, Extent]]) -> bool:
    """Whether operands whose minors are unified have unified majors too."""
    return all(b is d and a is not b for a, b in pairs for c, d in pairs if a is c)


def _goes_through(local: LocalAxes, dim: Dim, major: Dim) -> bool:
    """Whether the results have the major beside the Dim, and the two end together if the major ends."""
    for axes in local.results:
        if any(dim in leaves(extent) for extent in axes) and major not in majors_beside(axes, dim):
            return False
    roles = local.call.roles
    ends = {role for role, extent in roles if role in ENDING_ROLES and major in leaves(extent)}
    return ends <= {role for role, extent in roles if dim in leaves(extent)}
