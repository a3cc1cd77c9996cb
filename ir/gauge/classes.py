"""The gauge class of a Dim: which maps may be inserted on its index space and undone by those who read it.

For a producer ``y = W x`` and a consumer ``z = V f(y)`` over the Dim, a map T is in the gauge class when
``V T^-1 f(T W x)`` is the same function: cutting and sorting need only permutations, equalization positive scales,
rotations orthogonal maps, factorization all invertible ones. The class of a Dim is the meet over every node that
touches it, read off the node's role for the Dim and its operator's symmetry; ``tests/ir/gauge/test_classes.py`` holds
examples.

What T means at one node, and what the law of symmetry (:mod:`regauge.ir.laws.operators`) checks of every record:

    the results have the Dim      operands take T on each axis that has it, and the results then take T
    the node contracts it         one side takes T, the other its inverse transpose, and nothing else changes
    it is reduced or normalised   operands take T; the results do too where they have the Dim, else nothing changes

An operand that is computed takes T, because what computes it does. A parameter may also stay as it is, whichever undoes
the map: under a scale a bias takes it, a gain stays. A permutation is taken by all.

What is claimed follows from the symmetry alone: general maps where it is linear (a product with one factor that has the
Dim, a contraction of two sides), or where the rule says so of single axes (``Call.linear``). That a name is contracted
or produced by its place in a rule says nothing about linearity: ``tanh(w @ x)`` is written ``s t, t c -> s c`` too.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.axes import Analysis
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dtypes import is_real
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of


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
    for node in analysis.calls:
        for dim, gauge in node_gauges(node, analysis).items():
            found[dim] = found.get(dim, ANY) & gauge
    return {dim: Gauge.FIXED if dim.pins else gauge for dim, gauge in found.items()}


def node_gauges(node: Node, analysis: Analysis) -> dict[Dim, Gauge]:
    """What one node leaves of the gauge of each Dim that it touches."""
    results = [analysis.of[value] for value in node.outputs]
    return {dim: at.gauge for dim, at in dims_at(analysis.calls[node], results).items()}


def dims_at(call: Call, results: Sequence[Axes]) -> dict[Dim, DimAt]:
    """Each Dim that a node touches, as it stands there; the extents may be those of a graph or the node's own."""
    roles: dict[Dim, list[str]] = {}
    for role, extent in call.roles:
        for dim in set(leaves(extent)):
            roles.setdefault(dim, []).append(role)
    operands = [_dims(axes) if axes is not None else [] for axes in call.axes]
    made = set(_dims([extent for axes in results for extent in axes]))
    touched = made.union(*operands)
    return {dim: DimAt(call.node, dim, roles.get(dim, []), operands, dim in made) for dim in touched}


def _dims(axes: Axes) -> list[Dim]:
    """The Dims of each axis in turn; one comes as often as there are axes that have it."""
    return [dim for extent in axes for dim in dict.fromkeys(leaves(extent))]


@dataclass(frozen=True)
class DimAt:
    """A Dim at a node: its roles there (one per name that has it), and which operands have it."""

    node: Node
    dim: Dim
    roles: list[str]
    operands: list[list[Dim]]
    in_result: bool

    @cached_property
    def gauge(self) -> Gauge:
        """The maps that the node lets through where all that is computed takes the same one."""
        return _gauge_at(self)

    @cached_property
    def holders(self) -> list[int]:
        return [slot for slot, dims in enumerate(self.operands) if self.dim in dims]

    @property
    def others(self) -> list[Any]:
        """The operands without the Dim: numbers and values, absent ones left out."""
        return [o for slot, o in enumerate(self.node.inputs) if slot not in self.holders and o is not None]

    @property
    def one_is_computed(self) -> bool:
        """Whether all operands with the Dim are parameters but one."""
        return sum(not isinstance(self.node.inputs[slot], Parameter) for slot in self.holders) == 1

    @property
    def bias(self) -> int | None:
        """The slot of a bias that is given."""
        slots = self.node.operator.slots[: len(self.node.inputs)]
        slot = slots.index("bias") if "bias" in slots else None
        return slot if slot is None or self.node.inputs[slot] is not None else None

    @property
    def factors(self) -> int:
        """How many axes of a product's factors have the Dim, without the two sides of each contraction."""
        held = sum(self.operands[slot].count(self.dim) for slot in self.holders if slot != self.bias)
        return held - 2 * self.roles.count("contract")


def _gauge_at(place: DimAt) -> Gauge:
    if "normalise" in place.roles:
        return _normaliser_gauge(place)
    if "reduce" in place.roles:
        return Gauge.PERMUTE
    if "linear" in place.roles and "map" not in place.roles:
        # One Dim on both sides of a form and in its result: the sides cannot take different maps.
        return ROTATION if "contract" in place.roles and place.in_result else ANY
    symmetry = symmetry_of(place.node)
    if "contract" in place.roles and symmetry is not Symmetry.PRODUCT:
        return Gauge.PERMUTE
    return _gauge_by_symmetry(place, symmetry)


def _normaliser_gauge(place: DimAt) -> Gauge:
    """A norm by length commutes with rotations unless a gain tells indices apart; the others with permutations."""
    if place.node.op in _LENGTH_NORMS and len(place.holders) == 1:
        return ROTATION
    return Gauge.PERMUTE


_LENGTH_NORMS = {"rms_norm"}


def _gauge_by_symmetry(place: DimAt, symmetry: Symmetry) -> Gauge:
    """The gauge of a Dim that goes through the node index by index, or that two factors contract."""
    holders, inputs = place.holders, place.node.inputs
    match symmetry:
        case _ if not holders:
            return Gauge.PERMUTE  # repeated and filled entries must stay equal
        case Symmetry.HOMOGENEOUS:
            return Gauge.PERMUTE | Gauge.SCALE
        case Symmetry.ODD:
            return Gauge.PERMUTE | Gauge.SIGN
        case Symmetry.LINEAR:
            # A summand without the Dim is spread over it, and neither that nor a whole number survives a map.
            whole = any(not _adds(inputs[slot]) for slot in holders)
            return Gauge.PERMUTE if whole or any(not _zero(o) for o in place.others) else ANY
        case Symmetry.LAYOUT:
            return ANY
        case Symmetry.INDEXWISE:
            return Gauge.PERMUTE if any(_adds(o) for o in place.others) else DIAGONAL
        case Symmetry.PRODUCT:
            return _product_gauge(place)
        case Symmetry.AFFINE:  # the gain and the shift have the Dim, and are weights
            spread = any(_adds(o) for o in place.others)
            weights = all(isinstance(inputs[slot], Parameter) for slot in holders[1:])
            return DIAGONAL if holders[0] == 0 and weights and not spread else Gauge.PERMUTE
    return Gauge.PERMUTE


def _product_gauge(place: DimAt) -> Gauge:
    if not place.in_result:
        return ANY if place.factors == 0 else Gauge.PERMUTE
    if place.bias is not None and place.bias not in place.holders:
        return Gauge.PERMUTE  # the bias is the same at each index
    if place.factors == 1:
        return ANY  # every index is multiplied by the same factor
    return DIAGONAL if place.one_is_computed and "contract" not in place.roles else Gauge.PERMUTE


def _zero(operand: Any) -> bool:
    return isinstance(operand, int | float) and operand == 0


def _adds(operand: Any) -> bool:
    """Whether an operand is a number other than zero, or a tensor of such: no table of indices."""
    return is_real(operand.dtype) if isinstance(operand, Value) else not _zero(operand)
