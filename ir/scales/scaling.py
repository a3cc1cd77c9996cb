"""Scales of operands that an operator passes on or joins, read off its record for one call.

A value is held as data times a scale, and the question is on which scales the operator may run on the data alone:

    pass      one operand, and the result has its scale                          reshape, relu, max_pool
    join      operands that share one scale, which the result has too            add, concat, where
    product   scales multiply: each operand has a power, the result theirs       matmul, mul, div, square, sqrt
    derived   a bias has the scale of the result, whatever that is
    break     an operand that is needed as it is, with the scale 1               exp, the input of gelu
    fixed     what comes out of a break; where its range is known the record says it: softmax, sigmoid, tanh

Nearly all follows from the symmetry of the record: what is linear, moves entries or is homogeneous joins, a product
multiplies, anything else breaks. ``Operator.scaling`` states what it does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regauge.ir.dtypes import is_real

if TYPE_CHECKING:
    from regauge.ir.graph import Node


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How an operator treats scales where its symmetry does not tell; a law checks it (:mod:`regauge.ir.laws.scales`).

    ``powers``   to which power the scale of a slot is in that of the results: ``{"x": 2}`` of a square. Slots in one
                 key share a scale: ``{"x mean": 1}``. Slots that are not named are needed as they are, but for a
                 ``bias``, which has the scale of the result
    ``opposed``  two slots of which one may be multiplied by what the other is divided by: queries and keys
    ``within``   the least and the greatest number that can come out, where that is known
    ``sums``     whether entries are added up, so that results grow with the root of their number
    """

    powers: Mapping[str, float] = field(default_factory=dict)
    opposed: tuple[str, str] | None = None
    within: tuple[float, float] | None = None
    sums: bool = False


@dataclass(frozen=True)
class Joint:
    """Operand slots that share a scale, and its power in the scale of the results."""

    slots: tuple[int, ...]
    power: float


@dataclass(frozen=True)
class NodeScaling:
    """What one node does with the scales of its real tensors.

    ``numbers`` are slots of Python numbers that join tensors, ``factors`` of those that multiply, with their powers.
    Every slot with a real tensor is in ``joints``, in ``opposed``, the ``bias``, or ``broken``.
    """

    joints: tuple[Joint, ...]
    bias: int | None
    broken: tuple[int, ...]
    opposed: tuple[int, int] | None
    within: tuple[float, float] | None
    sums: bool
    numbers: tuple[int, ...]
    factors: tuple[Joint, ...] = ()

    @property
    def starts(self) -> bool:
        """Whether the results have the scale 1, since none of an operand gets through."""
        return not any(joint.power for joint in self.joints)


def node_scaling(node: Node) -> NodeScaling:
    """What a node does with scales, by the record of its operator."""
    record = node.operator
    stated = record.scaling(node) if callable(record.scaling) else record.scaling
    names = _slot_names(node)
    real = [slot for slot, value in node.operands() if is_real(value.dtype)]
    bias = next((slot for slot in real if names[slot] == "bias"), None)
    if stated is None:
        return _by_symmetry(node, real, bias)
    joints, factors = [], []
    for key, power in stated.powers.items():
        slots = tuple(slot for slot in real if names[slot] in key.split())
        if slots:
            joints.append(Joint(slots, power))
        elif power:
            factors += [Joint((s,), power) for s, o in enumerate(node.inputs) if names[s] == key and _is_number(o)]
    pair = tuple(slot for slot in real if names[slot] in (stated.opposed or ()))
    opposed = (pair[0], pair[1]) if len(pair) == 2 else None
    used = {slot for joint in joints for slot in joint.slots} | set(opposed or ())
    joins = {name for key, power in stated.powers.items() if len(key.split()) > 1 for name in key.split()}
    bias = bias if bias not in used and any(joint.power for joint in joints) else None
    return NodeScaling(
        joints=tuple(joints),
        bias=bias,
        broken=tuple(slot for slot in real if slot not in used and slot != bias),
        opposed=opposed,
        within=stated.within,
        sums=stated.sums,
        numbers=tuple(slot for slot, o in enumerate(node.inputs) if names[slot] in joins and _is_number(o) and joints),
        factors=tuple(factors) if joints else (),
    )


def _by_symmetry(node: Node, real: list[int], bias: int | None) -> NodeScaling:
    from regauge.ir.operator import Symmetry, symmetry_of

    joints: tuple[Joint, ...] = ()
    numbers: tuple[int, ...] = ()
    factors: tuple[Joint, ...] = ()
    match symmetry := symmetry_of(node):
        case Symmetry.PRODUCT:
            joints = tuple(Joint((slot,), 1) for slot in real if slot != bias)
            factors = tuple(Joint((slot,), 1) for slot, operand in enumerate(node.inputs) if _is_number(operand))
        case Symmetry.LINEAR | Symmetry.LAYOUT | Symmetry.HOMOGENEOUS | Symmetry.INDEXWISE if real:
            joints, bias = (Joint(tuple(real), 1),), None
            if symmetry is not Symmetry.LAYOUT:  # there numbers are sizes
                numbers = tuple(slot for slot, operand in enumerate(node.inputs) if _is_number(operand))
    if not joints:
        return NodeScaling((), None, tuple(real), None, None, False, ())
    return NodeScaling(joints, bias, (), None, None, False, numbers, factors)


def _slot_names(node: Node) -> list[str]:
    """The name of each operand's slot; members of a variadic one all have its name."""
    slots = [slot.removeprefix("*") for slot in node.operator.slots]
    return [slots[min(place, len(slots) - 1)] for place in range(len(node.inputs))]


def _is_number(operand: Any) -> bool:
    """Whether an operand is a number that has a scale: no tensor, flag or absent operand."""
    from regauge.ir.graph import Value

    return operand is not None and not isinstance(operand, Value | bool)
