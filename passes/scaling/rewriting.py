"""Rewriting a graph into pairs of data and scale, node by node, by what records say of scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder, dead_nodes, remove_dead, remove_node, set_input
from regauge.ir.folding.purity import OPAQUE, is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Cost
from regauge.ir.scales.scaling import Joint, NodeScaling, node_scaling
from regauge.ir.sizes.expressions import count, divide
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.scaling.factors import ONE, Factor, exponent_below
from regauge.passes.scaling.held import WIDE, Held, Holder, Plan

_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}

_LARGER, _SMALLER = 8, 2  # powers of two by which the data of a weight may leave its norm of 1, or of 1 / sqrt(terms)


def fan_in(node: Node, scaling: NodeScaling) -> int:
    """How many products or entries an entry of the result adds up; 1 where it adds none, or sizes do not tell."""
    if not node.outputs or not (scaling.sums or is_layer(node, scaling)):
        return 1
    results = count(node.outputs[0].shape)
    if scaling.sums:
        operand = node.inputs[scaling.joints[0].slots[0]] if scaling.joints else None
        terms = count(operand.shape) if isinstance(operand, Value) else results
    else:
        assert node.operator.macs is not None
        terms = node.operator.macs(Cost(node))
    found = divide(terms, results)
    return found if isinstance(found, int) else 1


def is_layer(node: Node, scaling: NodeScaling) -> bool:
    """Whether a node adds up products of its operands."""
    return len(scaling.joints) > 1 and node.operator.macs is not None


def stays_as_it_is(node: Node, scaling: NodeScaling, narrow: torch.dtype | None) -> bool:
    """Whether a node is computed on values as they were.

    That is where scales do not get through; in a narrow type also where only some operands are data.
    """
    values = [value for value in (*node.inputs, *node.outputs) if isinstance(value, Value)]
    types = {value.dtype for value in values if is_real(value.dtype)}
    if not scaling.joints or node.regions or node.op in OPAQUE or is_fixed(node) or types & _COMPLEX:
        return True
    if any(not isinstance(node.inputs[slot], int | float) for slot in scaling.numbers):
        return True  # a dynamic size among them
    return narrow is not None and (bool(scaling.broken or scaling.opposed) or not types.issubset(WIDE))


class Scaler:
    """Rewrites one graph in place; ``left`` counts the nodes that are computed as they were."""

    def __init__(self, graph: Graph, plan: Plan, left: Counter[str], *, by: str) -> None:
        self.graph, self.plan, self.left = graph, plan, left
        self.build = Builder(graph, by=by)
        self.holder = Holder(graph, self.build, plan)
        self.factors = self.holder.factors
        self._plain: dict[Value, Value] = {}  # integers and truths, where the node that gives them was written anew

    def run(self) -> None:
        names = [output.name if isinstance(output, Value) else "" for output in self.graph.outputs]
        for node in list(self.graph.nodes):
            with self.build.at(node):
                self._visit(node)
        outputs = self.graph.outputs
        self.graph.outputs = [self._returned(output, name) for output, name in zip(outputs, names, strict=True)]
        now: dict[Any, Any] = dict(zip(outputs, self.graph.outputs, strict=True))
        self.graph.states = [
            replace(s, after=now[s.after] if s.returned else self._as_it_was(s.after)) for s in self.graph.states
        ]
        self.graph.version += 1
        for node in dead_nodes(self.graph):
            remove_node(self.graph, node)
        settle_successors(self.graph, self.build)
        remove_dead(self.graph)

    def _returned(self, output: Any, name: str) -> Any:
        """What a graph output is now, under its old name."""
        if not isinstance(output, Value):
            return output
        producer = output.producer
        found = self._as_it_was(output) if producer is None else self._made_behind(producer, output)
        if found is not output and not isinstance(found, Parameter) and found not in self.graph.inputs:
            for other in self.graph.values():
                if other.name == name:
                    other.name = self.build.unique(f"{name}_data")
            found.name = name
        return found

    def _made_behind(self, producer: Node, value: Value) -> Value:
        with self.build.at(producer):
            return self._as_it_was(value)

    def _as_it_was(self, value: Value) -> Value:
        return self.holder.true(value) if is_real(value.dtype) else self._plain.get(value, value)

    def _visit(self, node: Node) -> None:
        scaling = node_scaling(node)
        if stays_as_it_is(node, scaling, self.plan.narrow) or not self._scaled(node, scaling):
            self._keep(node)

    # -- nodes that need values as they were -------------------------------------------------------------------------

    def _keep(self, node: Node) -> None:
        if any(is_real(value.dtype) for _, value in node.operands()):
            self.left[f"{node.op} is computed on values as they were"] += 1
        for slot, value in list(node.operands()):
            self._set(node, slot, self._as_it_was(value), self.graph)
        for region in node.regions:
            self._keep_outer(region)
        for value in node.outputs:
            if is_real(value.dtype):
                self.holder.put(value, Held(true=value))

    def _keep_outer(self, region: Graph) -> None:
        """Let a region read values of the graph around it as they were."""
        own = {value for part in region.nested() for value in part.values()}
        for part, node in region.walk():
            for slot, value in list(node.operands()):
                if value not in own:
                    self._set(node, slot, self._as_it_was(value), part)
        for part in region.nested():
            part.outputs = [self._as_it_was(o) if isinstance(o, Value) and o not in own else o for o in part.outputs]

    def _set(self, node: Node, slot: int, operand: Any, graph: Graph) -> None:
        if node.inputs[slot] is not operand:
            set_input(node, slot, operand, graph)

    # -- nodes that run on data --------------------------------------------------------------------------------------

    def _scaled(self, node: Node, scaling: NodeScaling) -> bool:
        """Let a node run on data; False where no scale of the result would be a power of two."""
        operands: list[Any] = [
            self._plain.get(o, o) if isinstance(o, Value) and not is_real(o.dtype) else o for o in node.inputs
        ]
        layer = is_layer(node, scaling)
        weight = self._weight_to_fit(node, scaling) if layer else None
        base = ONE
        for joint in scaling.joints:
            if joint.slots == (weight,):
                continue
            scale = self._joint(node, scaling, joint, operands, layer)
            if scale is None:
                return False
            base = self.factors.times(base, scale)
        for slot in (*scaling.broken, *(scaling.opposed or ())):
            operands[slot] = self._as_it_was(operands[slot])
        for factor in scaling.factors:
            base = self._take_from_number(factor, operands, base)
        if scaling.factors and all(abs(operands[f.slots[0]]) == 1 for f in scaling.factors):
            if self._only_scales(node, scaling, operands, base):
                return True
        shift = exponent_below(fan_in(node, scaling) ** 0.5)
        if weight is not None:
            wanted = self._wanted(node, base, self.holder.natural(node.inputs[weight]), shift)  # type: ignore[arg-type]
            operands[weight] = self.holder.at(node.inputs[weight], Factor(wanted))  # type: ignore[arg-type]
            base, shift = self.factors.times(base, Factor(wanted)), 0
        if scaling.bias is not None:
            operands[scaling.bias] = self.holder.at(operands[scaling.bias], base)
        for old, new in zip(node.outputs, self._emitted(node, operands), strict=True):
            self._put(old, new, base, shift, layer)
        return True

    def _joint(self, node: Node, scaling: NodeScaling, joint: Joint, operands: list[Any], layer: bool) -> Factor | None:
        """Bring the operands of a joint to one scale; returns it to the joint's power."""
        if layer and self.plan.float8 is not None and len(joint.slots) == 1:
            operands[joint.slots[0]], scale = self.holder.rounded(node.inputs[joint.slots[0]])  # type: ignore[arg-type]
            return self.factors.power(scale, Fraction(joint.power))
        values = [node.inputs[slot] for slot in joint.slots]
        numbers = [operands[slot] for slot in scaling.numbers]
        scale = self._common(values, numbers)
        power = Fraction(joint.power)
        while scale.value is None and (scale.exponent * power).denominator != 1:
            if power.denominator > 2:
                return None
            scale = Factor(scale.exponent + 1)
        result = self.factors.power(scale, power)
        if result is None:
            return None
        for slot in joint.slots:
            operands[slot] = self.holder.at(operands[slot], scale)
        for slot in scaling.numbers:
            operands[slot] = self.holder.number(operands[slot], scale)
        return result

    def _common(self, values: Sequence[Any], numbers: Sequence[Any]) -> Factor:
        """The greatest scale of those that have one."""
        found = [self.holder.natural(value) for value in values if not self.holder.of(value).any_scale]
        found += [Factor(exponent_below(abs(float(n)))) for n in numbers if 0 < abs(n) < 2.0**100]
        return self.factors.greatest(found) if found else ONE

    def _take_from_number(self, factor: Joint, operands: list[Any], base: Factor) -> Factor:
        """Leave the mantissa of a number that multiplies; its power of two goes into the scale."""
        (slot,) = factor.slots
        number = operands[slot]
        if not isinstance(number, int | float) or not 0 < abs(number) < 2.0**100:
            return base
        exponent = exponent_below(abs(float(number)))
        operands[slot] = number * 2.0**-exponent
        return self.factors.times(base, Factor(int(exponent * factor.power)))

    def _only_scales(self, node: Node, scaling: NodeScaling, operands: Sequence[Any], base: Factor) -> bool:
        """Leave out a product with a power of two, which is all in the scale now."""
        data = operands[scaling.joints[0].slots[0]]
        alone = len(scaling.joints) == 1 and scaling.joints[0].power == 1 and scaling.bias is None
        if not alone or node.output.shape != data.shape or any(operands[f.slots[0]] < 0 for f in scaling.factors):
            return False
        self.holder.put(node.output, Held(data=data, scale=base))
        return True

    def _weight_to_fit(self, node: Node, scaling: NodeScaling) -> int | None:
        """The slot of a weight that nobody else reads, which takes up the scale that the result is to have."""
        if self.plan.float8 is not None:
            return None
        for joint in scaling.joints:
            value = node.inputs[joint.slots[0]]
            if joint.power == 1 and len(joint.slots) == 1 and isinstance(value, Parameter):
                held = self.holder.of(value)
                if held.sole and held.data is None and not held.any_scale:
                    return joint.slots[0]
        return None

    def _wanted(self, node: Node, others: Factor, natural: Factor, shift: int) -> int:
        """The exponent of a weight such that the result has the scale that it is to have, as far as the data of the
        weight then stays well inside of a narrow type: what is left is multiplied behind the node."""
        value = node.outputs[0]
        if value in self.plan.points and value in self.plan.measured and others.value is None:
            wanted = (self.plan.measured[value].exponent(self.plan.norm) or 0) - others.exponent
            return min(max(wanted, natural.exponent - _LARGER), natural.exponent + shift + _SMALLER)
        return natural.exponent + shift

    def _emitted(self, node: Node, operands: Sequence[Any]) -> Sequence[Value]:
        """The results of the node on new operands: itself, or one like it where types change."""
        before = [o.dtype for o in node.inputs if isinstance(o, Value)]
        after = [o.dtype for o in operands if isinstance(o, Value)]
        if before == after or self.plan.narrow is None:
            for slot, operand in enumerate(operands):
                self._set(node, slot, operand, self.graph)
            return node.outputs
        results = [(value.shape, self.holder.narrowed_type(value.dtype)) for value in node.outputs]
        attributes = dict(node.attributes)
        if node.op == "cast":
            attributes["dtype"] = results[0][1]
        self.build.release([value.name for value in node.outputs])
        found = self.build(node.op, *operands, name=node.name, results=results, **attributes)
        return found if isinstance(found, tuple) else (found,)

    def _put(self, old: Value, new: Value, base: Factor, shift: int, layer: bool) -> None:
        """Note what a result is held as, brought to the scale that it is to have."""
        if not is_real(new.dtype):
            self._plain[old] = new
            return
        scale = self.factors.times(base, Factor(shift))
        point = layer and old in self.plan.points
        if point and old in self.plan.measured and scale.value is None:
            scale = Factor(self.plan.measured[old].exponent(self.plan.norm) or 0)
        data = self.factors.multiplied(new, self.factors.times(base, self.factors.inverse(scale)))
        if point and old not in self.plan.measured:
            norm = self.holder.norm_of(old, data)
            data = self.factors.multiplied(data, self.factors.inverse(norm))
            scale = self.factors.times(scale, norm)
        if layer and self.plan.gradients is not None:
            data = self.build.gradient_cast(
                data, dtype=self.plan.gradients, margin=self.plan.margin, bias=self.plan.bias
            )
        self.holder.put(old, Held(data=data, scale=scale))
