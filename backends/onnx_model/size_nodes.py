"""Dynamic sizes as ONNX nodes: a sympy expression becomes Shape, Gather and integer arithmetic on 1-element vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir
import sympy

from regauge.backends.onnx_model.carrier import Carrier
from regauge.ir.errors import EmitError
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size


@dataclass
class SizeSource:
    """The present shapes of values of the carried model, by their copies; ``inputs`` are visible outside functions."""

    carrier: Carrier
    shapes: dict[onnx_ir.Value, tuple[Size, ...]] = field(default_factory=dict)
    inputs: list[onnx_ir.Value] = field(default_factory=list)

    @classmethod
    def of(cls, carrier: Carrier, values: Iterable[Value], inputs: Iterable[Value]) -> SizeSource:
        source = cls(carrier)
        for value in values:
            copied = carrier.copy_of(value.origin)
            if copied is not None:
                source.shapes[copied] = value.shape
        source.inputs = [copied for value in inputs if (copied := carrier.copy_of(value.origin)) is not None]
        return source

    def shape_of(self, value: onnx_ir.Value | None) -> tuple[Size, ...]:
        return self.shapes.get(value, ()) if value is not None else ()

    def find(self, node: onnx_ir.Node, size: Size) -> tuple[onnx_ir.Value, int] | None:
        """A value and an axis of exactly this size, among what the node reads and the inputs of the graph."""
        readable = [v for v in node.inputs if v is not None]
        outer = [] if node.graph in self.carrier.function_graphs else self.inputs
        for value in readable + outer:
            for axis, found in enumerate(self.shape_of(value)):
                if found == size:
                    return value, axis
        return None


def build_vector(
    carrier: Carrier, node: onnx_ir.Node, sizes: Sequence[Size], base: str, sources: SizeSource, dtype: np.dtype[Any]
) -> onnx_ir.Value:
    """An integer vector of sizes, computed in front of ``node``; raises EmitError when a size cannot be found."""
    emit = _Emitter(carrier, node, base, sources)
    parts: list[onnx_ir.Value] = []
    numbers: list[int] = []
    for size in sizes:
        if isinstance(size, int):
            numbers.append(size)
            continue
        if numbers:
            parts.append(emit.constant(numbers))
        numbers = []
        parts.append(emit.size(sympy.sympify(size)))
    if numbers:
        parts.append(emit.constant(numbers))
    vector = parts[0] if len(parts) == 1 else emit.node("Concat", parts, onnx_ir.AttrInt64("axis", 0))
    if dtype != np.int64:
        vector = emit.node("Cast", [vector], onnx_ir.AttrInt64("to", int(onnx_ir.DataType.INT32)))
    return vector


@dataclass
class _Emitter:
    carrier: Carrier
    before: onnx_ir.Node
    base: str
    sources: SizeSource

    def node(self, op_type: str, inputs: Sequence[onnx_ir.Value], *attributes: onnx_ir.Attr) -> onnx_ir.Value:
        return self.carrier.insert(self.before, op_type, inputs, f"{self.base}_{op_type.lower()}", attributes)

    def constant(self, numbers: Sequence[int]) -> onnx_ir.Value:
        return self.carrier.insert_constant(self.before, np.array(numbers, dtype=np.int64), f"{self.base}_constant")

    def size(self, expression: Any) -> onnx_ir.Value:
        """A vector of one element that holds the value of a size expression."""
        if expression.is_Integer:
            return self.constant([int(expression)])
        found = self.sources.find(self.before, expression)
        if found is not None:
            shape = self.node("Shape", [found[0]])
            return self.node("Gather", [shape, self.constant([found[1]])], onnx_ir.AttrInt64("axis", 0))
        build = _FORMS.get(type(expression).__name__)
        if build is None:
            name = self.before.name or self.before.op_type
            raise EmitError(f"{name}: the size {expression} cannot be computed from the graph's inputs, keep that axis")
        return build(self, expression)

    def fold(self, op_type: str, expressions: Iterable[Any]) -> onnx_ir.Value:
        return reduce(lambda a, b: self.node(op_type, [a, b]), [self.size(e) for e in expressions])


def _add(emit: _Emitter, expression: Any) -> onnx_ir.Value:
    numerator, denominator = sympy.together(expression).as_numer_denom()
    if denominator != 1:
        return emit.node("Div", [emit.size(sympy.expand(numerator)), emit.size(denominator)])
    positive = [t for t in expression.args if not t.could_extract_minus_sign()]
    negative = [-t for t in expression.args if t.could_extract_minus_sign()]
    total = emit.fold("Add", positive) if positive else emit.constant([0])
    return emit.node("Sub", [total, emit.fold("Add", negative)]) if negative else total


def _mul(emit: _Emitter, expression: Any) -> onnx_ir.Value:
    numerator, denominator = expression.as_numer_denom()
    if denominator != 1:  # sizes are integers: what remains divides without a rest
        return emit.node("Div", [emit.size(numerator), emit.size(denominator)])
    return emit.fold("Mul", expression.args)


def _power(emit: _Emitter, expression: Any) -> onnx_ir.Value:
    base, exponent = expression.args
    if not exponent.is_Integer or not 1 <= int(exponent) <= 8:
        raise EmitError(f"{emit.before.name or emit.before.op_type}: the size {expression} is no integer arithmetic")
    return emit.fold("Mul", [base] * int(exponent))


def _floor(emit: _Emitter, expression: Any) -> onnx_ir.Value:
    numerator, denominator = sympy.together(expression.args[0]).as_numer_denom()
    return emit.node("Div", [emit.size(sympy.expand(numerator)), emit.size(denominator)])


def _ceiling(emit: _Emitter, expression: Any) -> onnx_ir.Value:
    numerator, denominator = sympy.together(expression.args[0]).as_numer_denom()
    return emit.node("Div", [emit.size(sympy.expand(numerator + denominator - 1)), emit.size(denominator)])


_FORMS: dict[str, Callable[[_Emitter, Any], onnx_ir.Value]] = {
    "Add": _add,
    "Mul": _mul,
    "Pow": _power,
    "floor": _floor,
    "ceiling": _ceiling,
    "Mod": lambda emit, e: emit.fold("Mod", e.args),
    "Min": lambda emit, e: emit.fold("Min", e.args),
    "Max": lambda emit, e: emit.fold("Max", e.args),
}
