"""Applying an axis rule to the extents of a node's operands.

A rule is a string in the notation of :mod:`regauge.ir.axis_rules.notation`, or a function of a :class:`Call` that
returns such a string (when attributes decide) or the extents of the results (the layout primitives: reshape, concat,
slice ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from regauge.ir.axis_rules.application import Application
from regauge.ir.axis_rules.notation import PINNING_ROLES, parse_rule
from regauge.ir.axis_rules.plan import plan_of
from regauge.ir.dims import extents as ext
from regauge.ir.dims import unify as algebra
from regauge.ir.dims.extents import ONE, Extent, fresh, is_one, size_of
from regauge.ir.dims.unify import unify
from regauge.ir.errors import AxisError
from regauge.ir.sizes.expressions import Size, same, unclamped

if TYPE_CHECKING:
    from regauge.ir.graph import Node

Axes: TypeAlias = list[Extent]


@dataclass(slots=True, eq=False)
class Call:
    """One node being analysed: what its rule may read, and the verbs with which it states what it knows.

    ``axes[i]`` are the extents of operand i: a list with one extent per axis, ``[]`` for a number, None when absent.
    ``stated`` are the roles as they were stated, one by one or all those of a rule together (read ``roles``);
    ``derived`` the attributes that are sizes of extents.
    """

    node: Node
    axes: list[Axes | None]
    stated: tuple[tuple[Sequence[str | None], Sequence[Extent]], ...] = ()
    derived: dict[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> list[tuple[str, Extent]]:
        """What the node does to axes: each with its role there."""
        stated = [pair for roles, extents in self.stated for pair in zip(roles, extents, strict=True)]
        return [(role, extent) for role, extent in stated if role is not None]

    @property
    def where(self) -> str:
        return self.node.label

    def __getitem__(self, attribute: str) -> Any:
        return self.node.attributes[attribute]

    def operand(self, index: int) -> Axes:
        """Extents of an operand that must be there."""
        found = self.axes[index] if index < len(self.axes) else None
        if found is None:
            raise AxisError(f"{self.where}: operand {index} is missing")
        return found

    def has(self, index: int) -> bool:
        return index < len(self.axes) and self.axes[index] is not None

    def rank(self, index: int) -> int:
        return len(self.operand(index))

    def constant(self, index: int) -> Any:
        """The tensor of an operand that is a constant of the graph, else None; for rules that read index tables."""
        from regauge.ir.graph import Parameter

        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return value.tensor if isinstance(value, Parameter) and value.kind == "constant" else None

    def normal(self, axis: int, rank: int) -> int:
        """A non-negative axis number; raises AxisError outside the rank."""
        if not -rank <= axis < rank:
            raise AxisError(f"{self.where}: axis {axis} does not exist in a tensor of rank {rank}")
        return axis % rank

    # -- what a rule states ------------------------------------------------------------------------------------------

    def unify(self, a: Extent, b: Extent) -> None:
        unify(a, b)

    def pin(self, extent: Extent, reason: str) -> None:
        ext.pin(extent, reason, self.where)

    def role(self, role: str, extent: Extent) -> None:
        """State what the node does to an axis; ``window``, ``indexed``, ``whole`` and ``scan`` also pin it."""
        self.state_roles((role,), (extent,))

    def state_roles(self, roles: Sequence[str | None], extents: Sequence[Extent]) -> None:
        """State what the node does to several axes, nothing (None) to some; the sequences are kept, not copied."""
        self.stated = (*self.stated, (roles, extents))
        for role, extent in zip(roles, extents, strict=True):
            if role in PINNING_ROLES:
                self.pin(extent, PINNING_ROLES[role].format(operator=self.node.op))

    def linear(self, *extents: Extent) -> None:
        """State that the node is linear along axes, whatever its symmetry says of others: linear in the operands that
        have what the results have too (the values of attention), a bilinear form of what it contracts (its queries).
        """
        self.state_roles(("linear",) * len(extents), extents)

    def derive(self, **attributes: Any) -> None:
        """State that attributes are the sizes of extents (nested tuples allowed): they follow when a Dim is cut."""
        self.derived.update(attributes)

    def fresh(self, size: Size) -> Extent:
        return fresh(size)

    def reshape(self, axes: Sequence[Extent], sizes: Sequence[Size]) -> Axes:
        return algebra.reshape(axes, sizes, self.pin)

    def split(self, extent: Extent, sizes: Sequence[Size]) -> Axes:
        """Cut an extent into segments of the given sizes; where it has no such layout, pinned fresh Dims."""
        parts: Axes = []
        rest = extent
        for size in sizes:
            cut = algebra.split_at(rest, size)
            if cut is None:
                self.pin(extent, "it is cut where it has no boundary (entangled)")
                parts = [fresh(s) for s in sizes]
                for part in parts:
                    self.pin(part, "it is cut out of an axis that has no boundary there (entangled)")
                return parts
            parts.append(cut[0])
            rest = cut[1]
        return parts

    def broadcast(self, operands: Sequence[Axes]) -> Axes:
        """Extents of the broadcast of several runs of axes, as numpy aligns them."""
        rank = max((len(axes) for axes in operands), default=0)
        result: Axes = [ONE] * rank
        for axes in operands:
            offset = rank - len(axes)
            for position, extent in enumerate(axes, offset):
                current = result[position]
                if extent is current or is_one(extent):
                    continue
                if current is ONE or is_one(current):
                    result[position] = extent
                else:
                    unify(current, extent)
                    before, size = size_of(current), size_of(extent)
                    if before != size and same(size, unclamped(before, size) or before):
                        result[position] = extent
        return result

    def pointwise(self) -> Axes:
        """The broadcast of all operands: the rule of every elementwise operator."""
        operands = [axes for axes in self.axes if axes]
        return operands[0] if len(operands) == 1 else self.broadcast(operands)

    def opaque(self, reason: str) -> list[Axes]:
        """The rule of what has no rule: everything it touches keeps its indices."""
        for axes in self.axes:
            for extent in axes or ():
                self.pin(extent, reason)
        results: list[Axes] = []
        for value in self.node.outputs:
            axes = [fresh(size) for size in value.shape]
            for extent in axes:
                self.pin(extent, reason)
            results.append(axes)
        return results

    def apply(self, rule: str, **sizes: Size) -> list[Axes]:
        """Apply a rule in notation; ``sizes`` gives the sizes of names that no operand fixes."""
        parsed = parse_rule(rule)
        plan = None if sizes else plan_of(parsed, tuple([None if axes is None else len(axes) for axes in self.axes]))
        return Application(self, parsed, sizes).run() if plan is None else plan.run(self)


def broadcast_rule(call: Call) -> list[Axes]:
    """The axes of all operands, broadcast."""
    return [call.pointwise()]


def is_pointwise(node: Node) -> bool:
    """Whether every result entry depends on the same entry of each operand, the same way each time it runs."""
    return node.operator.rule is broadcast_rule and not node.operator.random and not node.regions


ENDING_ROLES = frozenset({"contract", "reduce", "normalise"})
