"""Pins for Dims whose removed indices would be felt: no weights set to zero make the rest behave as if they were gone.

Cutting index j of a Dim is right where it equals *masking* it: zero in every weight that has the Dim. So each place
where a Dim ends must see zeros at j: a contraction in one of its factors, a sum or a normaliser in what it adds up
(that it then counts fewer entries is said in the report). Weights are zero there by definition; this module follows
the zeros through the graph, by what operators make of them.

    linear o -> gelu -> linear i        gelu(0) = 0, and the weights that contract it are zero anyway: free
    q -> elu -> + 1 -> q k'             two factors, both 1 at j: the scores of the others would change, so it stays
    softmax(scores) -> mean over heads  a masked head still attends, evenly
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch

from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.dims.extents import ONE, Dim, leaves, pin
from regauge.ir.dtypes import is_real
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, get_operator, symmetry_of

if TYPE_CHECKING:
    from regauge.ir.dims.axes import Analysis

_PROBES = (0.7, -1.3, 2.1, -0.4)
_WHOLE = (1, -2, 3, -4)


def pin_felt(analysis: Analysis) -> None:
    """Pin those Dims of trained weights whose masked indices something would feel."""
    zeros = _Zeros(analysis)
    for dim, ends in zeros.open_ends().items():
        for node, role in ends:
            culprit = zeros.felt_by(dim, node, role)
            if culprit is not None:
                reason = f"zero weights would not silence it: {culprit} makes other numbers of zeros"
                pin(dim, f"{reason}, and this sums them", node.label)
                break


def zeroing_slots(node: Node) -> Sequence[int]:
    """Operand slots of which one, zero at an index of an axis, makes the result zero there (a bias aside)."""
    record = node.operator
    if record.zeroed_by is None:
        bias = record.slots.index("bias") if "bias" in record.slots else -1
        product = symmetry_of(node) is Symmetry.PRODUCT
        return [slot for slot in range(len(node.inputs)) if slot != bias] if product else ()
    return [slot for slot, name in enumerate(record.slots[: len(node.inputs)]) if name in record.zeroed_by]


class _Zeros:
    """Which values are zero at the masked indices of a Dim, found out on demand."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.weights: dict[Dim, set[Parameter]] = {}
        self.order: dict[Node, int] = {}
        self.culprits: dict[tuple[Value, Dim], str | None] = {}  # None: zero; else what makes it another number

    def has(self, value: Value, dim: Dim) -> bool:
        for extent in self.analysis.of[value]:
            if isinstance(extent, Dim) and extent.bound is None:
                if extent is dim:
                    return True
            elif extent is not ONE and dim in leaves(extent):
                return True
        return False

    def open_ends(self) -> dict[Dim, list[tuple[Node, str]]]:
        """Where free Dims of weights end, with their role there, unless a weight that has the Dim silences the end."""
        free = {dim for dim in self.analysis.held if not dim.pins}
        ends: dict[Dim, list[tuple[Node, str]]] = {}
        for node, role, dims in self.analysis.ends:
            for dim in dims:
                if dim in free and not self._weighed(node, role, dim):
                    ends.setdefault(dim, []).append((node, role))
        return ends

    def _weighed(self, node: Node, role: str, dim: Dim) -> bool:
        """Whether a trained weight silences an end of the Dim."""
        weights = self.weights.get(dim)
        if weights is None:
            members = self.analysis.groups[dim].members
            weights = self.weights[dim] = {m.parameter for m in members if m.parameter.kind != "constant"}
        slots = [slot for slot, operand in enumerate(node.inputs) if operand in weights]
        if not slots or role == "contract":
            return bool(slots)
        silencing = self._silencing_slots(node, role, dim)
        return any(slot in silencing for slot in slots)

    def _silencing_slots(self, node: Node, role: str, dim: Dim) -> Sequence[int]:
        """Slots of which one is enough: a factor of a contraction; what is summed or normalised, or the gain behind."""
        if role == "contract":
            return range(len(node.inputs))
        first = next((slot for slot, value in node.operands() if self.has(value, dim)), 0)
        gained = any(self.has(value, dim) for value in node.outputs)
        return [first, *(zeroing_slots(node) if gained else ())]

    def felt_by(self, dim: Dim, node: Node, role: str) -> str | None:
        """What keeps the end of the Dim at ``node`` from seeing zeros, in words; None where it sees them."""
        culprits = []
        for slot in self._silencing_slots(node, role, dim):
            value = node.inputs[slot]
            if isinstance(value, Value) and self.has(value, dim):
                self._settle(dim, value)
                culprits.append(self.culprits[value, dim])
                if culprits[-1] is None:
                    return None
        return culprits[0] if culprits else None

    def _holders(self, node: Node, dim: Dim) -> list[tuple[int, Value]]:
        return [(slot, value) for slot, value in node.operands() if self.has(value, dim)]

    def _settle(self, dim: Dim, value: Value) -> None:
        """Decide the value and all that it depends on, producers first."""
        self.order = self.order or {node: position for position, node in enumerate(self.analysis.calls)}
        pending: dict[Node, list[tuple[int, Value]]] = {}
        stack = [value] if (value, dim) not in self.culprits else []
        while stack:
            value = stack.pop()
            node = value.producer
            if (value, dim) in self.culprits:
                continue
            if node is None and not isinstance(value, Parameter) and value in self._owners:
                self._enter(dim, *self._owners[value])
            elif node is None or node not in self.order:
                self.culprits[value, dim] = _source(value)
            elif node not in pending:
                pending[node] = self._holders(node, dim)
                stack.extend(v for _, v in pending[node] if (v, dim) not in self.culprits)
                stack.extend(v for v in self._outputs(node.regions, dim) if (v, dim) not in self.culprits)
        for node in sorted(pending, key=self.order.__getitem__):
            for value in node.outputs:
                if self.has(value, dim):
                    self.culprits[value, dim] = self._result(dim, node, value, pending[node])

    def _result(self, dim: Dim, node: Node, value: Value, holders: list[tuple[int, Value]]) -> str | None:
        loud = {slot: culprit for slot, v in holders if (culprit := self.culprits[v, dim]) is not None}
        silent = frozenset(slot for slot, _ in holders if slot not in loud)
        if node.regions:
            given = [*loud.values(), *(self.culprits[v, dim] for v in self._outputs(node.regions, dim))]
            return next((culprit for culprit in given if culprit is not None), None)
        if node.operator.coding and holders:
            return loud.get(holders[0][0])
        if gives_zero(node, value, silent, frozenset(loud)):
            return None
        if node.op == "softmax" and not loud and ("normalise", dim) in self._roles(node):
            return None  # computed over what was kept, it gives the others no share
        return next(iter(loud.values()), f"%{value.name} = {node.op}")

    @cached_property
    def _owners(self) -> dict[Value, tuple[Node, Graph]]:
        """The node and region that each input of a region belongs to."""
        return {
            value: (node, region) for node in self.analysis.calls for region in node.regions for value in region.inputs
        }

    def _outputs(self, regions: Iterable[Graph], dim: Dim) -> list[Value]:
        return [v for region in regions for v in region.outputs if isinstance(v, Value) and self.has(v, dim)]

    def _enter(self, dim: Dim, node: Node, region: Graph) -> None:
        """Decide the inputs of a region: zero where the operands are, if a turn of a loop then gives zeros again."""
        inputs = [value for value in region.inputs if self.has(value, dim)]
        for _, value in self._holders(node, dim):
            self._settle(dim, value)
        culprits = [self.culprits[value, dim] for _, value in self._holders(node, dim)]
        self.culprits.update({(value, dim): None for value in inputs})
        before = set(self.culprits)
        if not any(culprits):
            for value in self._outputs([region], dim):
                self._settle(dim, value)
                culprits.append(self.culprits[value, dim])
        culprit = next((culprit for culprit in culprits if culprit is not None), None)
        if culprit is not None:
            for key in set(self.culprits) - before:  # what was found out on the wrong assumption
                del self.culprits[key]
        self.culprits.update({(value, dim): culprit for value in inputs})

    def _roles(self, node: Node) -> set[tuple[str, Dim]]:
        return {(role, leaf) for role, extent in self.analysis.calls[node].roles for leaf in leaves(extent)}


def _source(value: Value) -> str | None:
    """A trained weight is zero at its masked indices; of other sources only zeros are."""
    if isinstance(value, Parameter) and (value.kind != "constant" or not bool(value.tensor.any())):
        return None
    return f"%{value.name}"


def gives_zero(node: Node, result: Value, silent: frozenset[int], loud: frozenset[int]) -> bool:
    """Whether a result is zero at an index of an axis where the operands in the ``silent`` slots are zero.

    ``loud`` are the slots of other operands that have the axis.
    """
    record = node.operator
    if record.rule is broadcast_rule:
        return _probe(node, result, silent)
    if not is_real(result.dtype) and record.symmetry is not Symmetry.LAYOUT:
        return False  # positions and truths, which zeros do not make zero
    if not silent:
        return record.name == "full" and node.attributes["value"] == 0
    if "bias" in record.slots[: len(node.inputs)]:
        slot = record.slots.index("bias")
        if node.inputs[slot] is not None and slot not in silent:
            return False
    if any(slot in silent for slot in zeroing_slots(node)):
        return True
    symmetry = symmetry_of(node)
    if symmetry is Symmetry.POINTWISE and record.zeroed_by is None:
        return False
    parts = loud if symmetry is Symmetry.LAYOUT else {slot for slot, _ in node.operands()} - silent
    return not any(slot in parts and is_real(operand.dtype) for slot, operand in node.operands())


def _probe(node: Node, result: Value, silent: frozenset[int]) -> bool:
    """Run a pointwise operator on zeros in the silent slots and on several numbers in the others."""
    kinds = tuple(
        "0" if slot in silent else _kind(operand) if isinstance(operand, Value) or operand is None else operand
        for slot, operand in enumerate(node.inputs)
    )
    try:
        # what is compared may be zero too; what is divided by may not, else no quotient were ever silent
        return _probed(node.op, kinds, tuple(node.attributes.items()), None if is_real(result.dtype) else 0)
    except TypeError:  # an attribute that cannot be hashed, or a size expression that torch cannot take
        return False


def _kind(operand: Value | None) -> str:
    if operand is None:
        return "none"
    if operand.dtype is torch.bool:
        return "bool"
    return "real" if is_real(operand.dtype) else "whole"


@cache
def _probed(op: str, kinds: tuple[Any, ...], attributes: tuple[tuple[str, Any], ...], also: int | None) -> bool:
    more = () if also is None else (also,)
    drawn = {
        "0": torch.zeros(len(_PROBES + more), dtype=torch.float64),
        "real": torch.tensor(_PROBES + more, dtype=torch.float64),
        "whole": torch.tensor(_WHOLE + more),
        "bool": torch.tensor([True, False, True, False, True][: len(_PROBES + more)]),
        "none": None,
    }
    operands = [drawn.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    try:
        result = get_operator(op).evaluate(*operands, **dict(attributes))
    except (RuntimeError, ValueError):  # such a call fails when it runs too
        return False
    return isinstance(result, torch.Tensor) and not bool(result.to(torch.complex128).abs().nan_to_num(1.0).any())
