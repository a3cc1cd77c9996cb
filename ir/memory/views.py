"""Finds values of a graph that share memory: what torch gives as a view of an operand has none of its own.

Whether a reshape is a view depends on what came before it: behind a permute it mostly copies. So operators that only
move entries are run on tensors without data (``device="meta"``), and torch tells. What other operators give counts as
contiguous; of an ONNX runtime, which copies at a permute or a slice, this says too little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regauge.ir.graph import Graph, Node, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.roofline import VIEWS
from regauge.ir.sizes.expressions import Size, evaluate, symbols_in


def storages(graph: Graph, bound: Callable[[Size], int]) -> dict[Value, Value]:
    """For each value of a graph and of its regions the one whose memory it lies in: itself, where it has its own.

    ``bound`` gives each size as a number.
    """
    found = _Storages(bound)
    for value in graph.inputs:
        found.owner[value] = value
    for inner, node in graph.walk():
        for value in (*inner.inputs, *inner.parameters.values()):
            found.owner.setdefault(value, value)
        found.visit(node)
    for parameter in graph.parameters.values():
        found.owner.setdefault(parameter, parameter)
    return found.owner


class _Storages:
    def __init__(self, bound: Callable[[Size], int]) -> None:
        self.bound = bound
        self.owner: dict[Value, Value] = {}
        self._tensors: dict[Value, torch.Tensor] = {}

    def visit(self, node: Node) -> None:
        source = _may_be_viewed(node)
        results = None if source is None else self._results(node, source)
        for place, value in enumerate(node.outputs):
            self.owner[value] = value
            if results is not None and source is not None and _same_memory(results[place], self._tensors[source]):
                self.owner[value] = self.owner.get(source, source)
                self._tensors[value] = results[place]

    def _results(self, node: Node, source: Value) -> tuple[torch.Tensor, ...] | None:
        """What a node gives for an operand without data; None where torch cannot tell."""
        operand = self._tensor(source)
        if operand is None:
            return None
        given = [operand if entry is source else self._number(entry) for entry in node.inputs]
        try:
            raw = node.operator.evaluate(*given, **{k: self._number(v) for k, v in node.attributes.items()})
        except Exception:  # of another type than declared, or with data it would need: then it is no view that we know
            return None
        results = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
        return results if len(results) >= len(node.outputs) else None

    def _number(self, value: Any) -> Any:
        return evaluate(value, {symbol: self.bound(symbol) for symbol in symbols_in(value)})

    def _tensor(self, value: Value) -> torch.Tensor | None:
        if value not in self._tensors:
            if not isinstance(value.dtype, torch.dtype) or not value.ranked:
                return None
            sizes = [self.bound(size) for size in value.shape]
            self._tensors[value] = torch.empty(sizes, dtype=value.dtype, device="meta")
        return self._tensors[value]


def _may_be_viewed(node: Node) -> Value | None:
    """The only tensor that a node reads, where all it does is to move entries."""
    operands = [value for _, value in node.operands()]
    moves = node.op in VIEWS or symmetry_of(node) is Symmetry.LAYOUT
    return operands[0] if moves and len(operands) == 1 and not node.regions else None


def _same_memory(result: torch.Tensor, source: torch.Tensor) -> bool:
    return bool(result.untyped_storage()._cdata == source.untyped_storage()._cdata)
