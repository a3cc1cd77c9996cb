"""Which weights of a block are zero where it passes on what it reads: those that write into its residual stream.

y = x + proj(attention(qkv(norm(x))))     proj's weight and bias
y = relu(x + norm(conv2(...)))            the norm's gain and shift, where x has been through a relu
y = x + scale * mlp(norm(x))              the scale
"""

from __future__ import annotations

from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.passes.calibration.layers import layer_of
from regauge.passes.depth.branches import is_sum
from regauge.passes.depth.parts import Part
from regauge.passes.depth.removal import IDEMPOTENT

_PASSED = ("dropout", "identity")  # what gives a value as it is


def silenced(part: Part) -> set[Parameter] | str:
    """The parameters that are zero in a copy of a block behind its result that gives what it gets; or why it cannot."""
    found = _Silence(part)
    if not found.leads_to_source(part.result):
        return "it does more than to add to what it reads, as where a norm stands behind the sum"
    if not found.weights:
        return "what it adds is not written by weights that can be zero"
    return found.weights


class _Silence:
    def __init__(self, part: Part) -> None:
        self.part, self.inside = part, set(part.nodes)
        self.weights: set[Parameter] = set()

    def leads_to_source(self, value: Value) -> bool:
        """Whether a value is the source but for addends that can be zero, whose weights are noted."""
        if value is self.part.source:
            return True
        node = value.producer
        if node is None or node not in self.inside:
            return False
        first = node.inputs[0] if node.inputs else None
        if is_sum(node):
            return any(self._is_silent(other) and self.leads_to_source(stream) for stream, other in _ways(node))
        if node.op in _PASSED or self._changes_nothing(node):
            return isinstance(first, Value) and self.leads_to_source(first)
        return False

    def _changes_nothing(self, node: Node) -> bool:
        """Whether it computes what stands at the end of the block, and so of what the copy reads, a second time."""
        end = self.part.result.producer
        return node.op in IDEMPOTENT and end is not None and end.op == node.op

    def _is_silent(self, value: Value) -> bool:
        weights = self._writing(value)
        self.weights |= weights or set()
        return weights is not None

    def _writing(self, value: Value) -> set[Parameter] | None:
        """The weights of which a value is nothing but zeros where they are zero; None where there are none such."""
        node = value.producer
        if node is None or node not in self.inside:
            return None
        own = _own(node)
        if own is not None and node.op != "add":
            return own
        scales = node.op in ("mul", "div") or own is not None
        read = [operand for operand in node.inputs if isinstance(operand, Value)]
        through = [operand for operand in read if not (scales and _parameter_of(operand) is not None)]
        if not (node.op in _PASSED or scales or symmetry_of(node) in (Symmetry.LAYOUT, Symmetry.LINEAR)):
            return None
        if not through or (scales and (len(through) > 1 or node.op == "div" and through[0] is not node.inputs[0])):
            return None
        parts = [self._writing(operand) for operand in through]
        return None if None in parts else set(own or ()).union(*(part or () for part in parts))


def _ways(node: Node) -> list[tuple[Value, Value]]:
    first, second = node.inputs
    assert isinstance(first, Value) and isinstance(second, Value)
    return [(first, second), (second, first)]


def _own(node: Node) -> set[Parameter] | None:
    """The trained weights by which a node's result is multiplied, or which are added to it."""
    layer = layer_of(node, blocks=True, shared=True, turned=True)
    found: list[Parameter | None] = []
    if layer is not None:
        found = [layer.weight, *([layer.bias] if layer.bias is not None else [])]
    elif node.op == "batch_norm" and not node.attributes["training"]:
        found = [own if isinstance(own, Parameter) else None for own in (*node.inputs[1:3], None)[:2]]
    elif node.op in ("mul", "add"):
        found = [own for operand in node.inputs if (own := _parameter_of(operand)) is not None]
    weights = {own for own in found if own is not None and own.kind == "parameter"}
    return weights if weights and len(weights) == len(found) else None


def _parameter_of(operand: Operand) -> Parameter | None:
    """A parameter that an operand is, in whatever shape it is laid out."""
    while isinstance(operand, Value) and not isinstance(operand, Parameter):
        node = operand.producer
        if node is None or len(node.inputs) != 1 or symmetry_of(node) is not Symmetry.LAYOUT:
            return None
        operand = node.inputs[0]
    return operand if isinstance(operand, Parameter) else None
