"""The sizes of a traced program: torch's SymInts as our sympy sizes under the user's names, and back.

A program exported by torch knows a batch axis as ``s77``; the graph calls it ``batch``. Shapes of intermediate results
are inferred in the program's own fake-tensor world, so that everything torch learnt about its symbols holds there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher

from regauge.ir.edit import Builder, Results
from regauge.ir.graph import Graph, Operand, Value
from regauge.ir.operator import Operator
from regauge.ir.shapes import infer_results
from regauge.ir.sizes.expressions import Size, symbol
from regauge.ir.sizes.symints import size_from_symint, traced_size

Shape = tuple[Size, ...]


class TracedSizes:
    """Two-way map between one program's SymInts and sizes; ``names`` gives the user's symbol for torch's own."""

    def __init__(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> None:
        self.names = dict(names)
        self._of: dict[Any, Size] = {}
        self._symints: dict[sympy.Symbol, Any] = {}
        self._expressions: dict[Size, Any] = {}

    def of(self, size: Any) -> Size:
        """A SymInt (or an int) as one of our sizes; symbols nobody named keep torch's name."""
        if isinstance(size, int):
            return int(size)
        expression = size.node.expr
        found = self._of.get(expression)
        if found is None:
            self._learn(size, expression)
            found = self._of[expression] = size_from_symint(size, self.names)
        return found

    def _learn(self, size: Any, expression: Any) -> None:
        for inner in expression.free_symbols:
            self.names.setdefault(inner, symbol(str(inner)))
        if isinstance(expression, sympy.Symbol):
            self._symints.setdefault(self.names[expression], size)

    def shape(self, tensor: torch.Tensor) -> Shape:
        return tuple(self.of(size) for size in tensor.shape)

    def known(self, expression: sympy.Basic) -> bool:
        """Whether every symbol of an expression stands for a SymInt of the program."""
        return all(name in self._symints for name in expression.free_symbols)

    def symint(self, value: Any) -> Any:
        """Sizes inside (nested tuples of) attributes as SymInts of the program."""
        if isinstance(value, sympy.Basic):
            if value not in self._expressions:
                self._expressions[value] = traced_size(value, self._symints)
            return self._expressions[value]
        if isinstance(value, tuple | list):
            return type(value)(self.symint(part) for part in value)
        return value


class TracedBuilder(Builder):
    """A Builder that infers dynamic shapes in the traced program's own fake-tensor world."""

    def __init__(self, graph: Graph, sizes: TracedSizes, mode: Any) -> None:
        super().__init__(graph)
        self.sizes = sizes
        self.mode = mode
        self._fakes: dict[Value, torch.Tensor] = {}

    def region(self, graph: Graph) -> TracedBuilder:
        inner = TracedBuilder(graph, self.sizes, self.mode)
        self._taken |= inner._taken
        inner._taken, inner._counters = self._taken, self._counters
        return inner

    def remember(self, value: Value, fake: torch.Tensor) -> None:
        """Torch's own stand-in for a value, which saves making one when a shape has to be inferred from it."""
        self._fakes[value] = fake

    def infer(self, operator: Operator, operands: Sequence[Operand], attributes: Mapping[str, Any]) -> Results:
        found = list(_expressions([getattr(o, "shape", o) for o in operands], attributes.values()))
        if self.mode is None or not found or not all(self.sizes.known(expression) for expression in found):
            return infer_results(operator, operands, attributes)
        with self.mode, enable_python_dispatcher(), torch.no_grad():  # C++ kernels would fix symbolic sizes
            arguments = [self._fake(operand) for operand in operands]
            raw = operator.evaluate(*arguments, **{name: self.sizes.symint(v) for name, v in attributes.items()})
        tensors = raw if isinstance(raw, tuple | list) else (raw,)
        return [(self.sizes.shape(tensor), tensor.dtype) for tensor in tensors]

    def _fake(self, operand: Operand) -> Any:
        if not isinstance(operand, Value):
            return self.sizes.symint(operand)
        if operand not in self._fakes:
            shape = self.sizes.symint(operand.shape)
            self._fakes[operand] = torch.empty(shape, dtype=operand.dtype)  # type: ignore[arg-type]
        return self._fakes[operand]


def _expressions(*values: Any) -> Any:
    for value in values:
        if isinstance(value, sympy.Basic):
            yield value
        elif isinstance(value, tuple | list) or type(value).__name__ == "dict_values":
            for part in value:
                yield from _expressions(part)
