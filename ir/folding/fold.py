"""Constant folding at import: what depends on no input and no weight is computed once, into constants.

    %arange = arange(end=16): i64[16]
    %le = le(%arange, %mask)             ->   constant %le: bool[16,16]

Position and mask tables are half the operators of a transformer by name and touch only batch and sequence axes. Integer
and boolean buffers nobody writes count as constants too: they are tables. Anything with a dynamic size stays.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import sympy
import torch

from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Node, Parameter, Value

MAX_ELEMENTS = 1 << 22
# A filled tensor alone is no table: it stays a node, whose sizes follow when an axis is cut.
_FILLS = {"full", "expand"}


def fold_constants(graph: Graph) -> int:
    """Replace constant sub-graphs by constants, in place; returns how many nodes went."""
    before = len(graph)
    known: dict[Value, torch.Tensor] = {}
    states = {state.before for state in graph.states}
    folded: list[Node] = []
    for node in graph.nodes:
        results = computed(node, known, states)
        if results is not None:
            known.update(zip(node.outputs, results, strict=True))
            folded.append(node)
    if folded:
        _replace(graph, folded, known)
        remove_dead(graph, parameters=False)
    return before - len(graph)


def computed(
    node: Node,
    known: Mapping[Value, torch.Tensor],
    states: Container[Value],
    is_known: Callable[[Parameter, Container[Value]], bool] | None = None,
) -> list[torch.Tensor] | None:
    """The results of a node whose operands are all known; None where it must stay.

    Of parameters those are known that :func:`is_table` says, or ``is_known``.
    """
    is_known = is_known or is_table
    if node.regions or node.operator.expands or not is_pure(node) or _varies(node.attributes) or not node.outputs:
        return None
    if any(not _small(value) for value in node.outputs):
        return None
    operands: list[Any] = []
    for operand in node.inputs:
        if isinstance(operand, Value):
            tensor = known.get(operand)
            if tensor is None and isinstance(operand, Parameter) and is_known(operand, states):
                tensor = operand.tensor
            if tensor is None:
                return None
            operands.append(tensor)
        elif isinstance(operand, sympy.Basic):
            return None
        else:
            operands.append(operand)
    try:
        with torch.no_grad():
            raw = node.operator.evaluate(*operands, **node.attributes)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it fails when the model runs too, and then says where
        return None
    results = list(raw) if isinstance(raw, tuple | list) else [raw]
    return None if _is_contested(node.op, operands, results) else results[: len(node.outputs)]


def _is_contested(op: str, operands: list[Any], results: list[Any]) -> bool:
    """Whether runtimes give different results: a NaN that is made of numbers, an integer to a negative power."""
    if op == "pow" and not results[0].is_floating_point() and not results[0].is_complex():
        return bool((torch.as_tensor(operands[1]) < 0).any())
    if not any(isinstance(operand, torch.Tensor) for operand in operands):
        return False
    return any(_has_nan(result) for result in results) and not any(_has_nan(operand) for operand in operands)


def _has_nan(operand: Any) -> bool:
    return isinstance(operand, torch.Tensor | float) and bool(torch.as_tensor(operand).isnan().any())


def is_table(parameter: Parameter, states: Container[Value]) -> bool:
    """Whether a parameter is a constant of the graph: a constant, or an integer buffer that nobody writes."""
    if parameter in states or not isinstance(parameter.dtype, torch.dtype):
        return False
    if parameter.kind == "constant":
        return not parameter.trainable
    whole = not parameter.dtype.is_floating_point and not parameter.dtype.is_complex
    return parameter.kind == "buffer" and whole


def is_fill(node: Node) -> bool:
    """Whether a node fills a tensor with one number."""
    return node.op in _FILLS and not any(isinstance(operand, Value) for operand in node.inputs)


def _small(value: Value) -> bool:
    count = 1
    for size in value.shape:
        if not isinstance(size, int):
            return False
        count *= size
    return count <= MAX_ELEMENTS


def _varies(attributes: Any) -> bool:
    if isinstance(attributes, sympy.Basic):
        return True
    if isinstance(attributes, dict):
        return any(_varies(v) for v in attributes.values())
    return isinstance(attributes, tuple | list) and any(_varies(v) for v in attributes)


def _replace(graph: Graph, folded: list[Node], known: dict[Value, torch.Tensor]) -> None:
    """Constants for the folded results that something unfolded reads."""
    inside = set(folded)
    outputs = {value for value in graph.outputs if isinstance(value, Value)}
    build = Builder(graph)
    for node in folded:
        if is_fill(node):
            continue
        for value in node.outputs:
            read = any(user not in inside for user, _ in value.uses) or value in outputs
            if read:
                replace_uses(graph, value, build.constant(known[value].contiguous(), value.name))
