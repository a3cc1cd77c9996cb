"""The gauge class of a Dim: which maps may be inserted on its index space and undone by those who read it.

For a producer ``y = W x`` and a consumer ``z = V f(y)`` over the Dim, a map T is in the gauge class when
``V T^-1 f(T W x)`` is the same function: cutting and sorting need only permutations, equalization positive scales,
rotations orthogonal maps, factorization all invertible ones. The class of a Dim is the meet over every node that
touches it, read off the node's role for the Dim and its operator's symmetry; ``tests/ir/test_gauge.py`` holds examples.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from regauge.ir.axes import Analysis
from regauge.ir.extents import Dim, Extent, leaves
from regauge.ir.graph import Graph, Node, Parameter
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.rules import Axes, Call


class Gauge(enum.Flag):
    """A set of maps of an index space. ``GENERAL`` implies all others, ``ORTHOGONAL`` signs and permutations."""

    FIXED = 0
    PERMUTE = enum.auto()
    SIGN = enum.auto()
    SCALE = enum.auto()  # positive diagonal maps
    ORTHOGONAL = enum.auto()
    GENERAL = enum.auto()

    def __str__(self) -> str:
        return gauge_in_words(self)


DIAGONAL = Gauge.PERMUTE | Gauge.SIGN | Gauge.SCALE
ROTATION = Gauge.PERMUTE | Gauge.SIGN | Gauge.ORTHOGONAL
ANY = DIAGONAL | Gauge.ORTHOGONAL | Gauge.GENERAL

_WORDS = {
    Gauge.PERMUTE: "permutation",
    Gauge.SIGN: "sign",
    Gauge.SCALE: "positive scale",
    Gauge.ORTHOGONAL: "orthogonal",
    Gauge.GENERAL: "general linear",
}


def gauge_in_words(gauge: Gauge) -> str:
    if Gauge.GENERAL in gauge:
        return "general linear"
    return ", ".join(word for flag, word in _WORDS.items() if flag in gauge) or "fixed"


def gauges(graph: Graph) -> Mapping[Dim, Gauge]:
    """The gauge class of every Dim of the graph; one walk over its nodes."""
    analysis = graph.axes
    found: dict[Dim, Gauge] = {}
    for node, call in analysis.calls.items():
        for dim, gauge in _node_gauges(node, call, analysis).items():
            found[dim] = found.get(dim, ANY) & gauge
    return {dim: Gauge.FIXED if dim.pins else gauge for dim, gauge in found.items()}


def _node_gauges(node: Node, call: Call, analysis: Analysis) -> dict[Dim, Gauge]:
    """What one node leaves of the gauge of each Dim that it touches."""
    roles: dict[Dim, set[str]] = {}
    for role, extent in call.roles:
        for dim in leaves(extent):
            roles.setdefault(dim, set()).add(role)
    operands = [set(_dims(axes)) if axes is not None else None for axes in call.axes]
    results = set(_dims([extent for value in node.outputs for extent in analysis.of[value]]))
    touched = set().union(results, *(dims for dims in operands if dims is not None))
    return {dim: _gauge_at(node, dim, roles.get(dim, set()), operands, dim in results) for dim in touched}


def _dims(axes: Axes | list[Extent]) -> list[Dim]:
    return [dim for extent in axes for dim in leaves(extent)]


def _gauge_at(node: Node, dim: Dim, roles: set[str], operands: list[set[Dim] | None], in_result: bool) -> Gauge:
    if "normalise" in roles:
        return _normaliser_gauge(node)
    if "reduce" in roles:
        return Gauge.PERMUTE
    holders = [slot for slot, dims in enumerate(operands) if dims is not None and dim in dims]
    if roles and roles <= {"contract", "produce"} and _one_place(roles, holders, in_result):
        return ANY
    return _mapped_gauge(node, symmetry_of(node), holders, operands)


def _one_place(roles: set[str], holders: list[int], in_result: bool) -> bool:
    """A contraction eats the Dim from both sides; a producer makes it from one."""
    return ("contract" in roles and not in_result) or ("produce" in roles and len(holders) >= 1)


def _normaliser_gauge(node: Node) -> Gauge:
    """A norm by length commutes with rotations unless a gain tells indices apart; the others with permutations."""
    if node.op in _LENGTH_NORMS and not any(isinstance(operand, Parameter) for operand in node.inputs[1:]):
        return ROTATION
    return Gauge.PERMUTE


_LENGTH_NORMS = {"rms_norm", "vector_norm"}


def _mapped_gauge(node: Node, symmetry: Symmetry, holders: list[int], operands: list[set[Dim] | None]) -> Gauge:
    """The gauge of a Dim that the node only maps over."""
    match symmetry:
        case Symmetry.HOMOGENEOUS:
            return Gauge.PERMUTE | Gauge.SCALE
        case Symmetry.ODD:
            return Gauge.PERMUTE | Gauge.SIGN
        case Symmetry.LINEAR:
            # A summand without the Dim is spread over it, and a spread number does not survive a map of the indices.
            spread = [
                s for s, dims in enumerate(operands) if dims is not None and s not in holders and not _zero(node, s)
            ]
            return Gauge.PERMUTE if spread else ANY
        case Symmetry.LAYOUT:
            return ANY if holders else Gauge.PERMUTE  # repeated and filled entries must stay equal
        case Symmetry.PRODUCT:
            if _bias_elsewhere(node, holders):
                return Gauge.PERMUTE
            if len(holders) <= 1:
                return ANY  # every index is multiplied by the same factor
            others = [slot for slot in holders if isinstance(node.inputs[slot], Parameter)]
            return DIAGONAL if len(others) == len(holders) - 1 else Gauge.PERMUTE
        case Symmetry.AFFINE:
            return DIAGONAL
    return Gauge.PERMUTE


def _bias_elsewhere(node: Node, holders: list[int]) -> bool:
    """Whether a contraction adds a bias that does not have the Dim, the same at each of its indices."""
    slots = node.operator.slots[: len(node.inputs)]
    return "bias" in slots and slots.index("bias") not in holders


def _zero(node: Node, slot: int) -> bool:
    operand = node.inputs[slot]
    return isinstance(operand, int | float) and operand == 0
