"""Values that depend on weights alone: a scale as a number, as a parameter, or as a reshaped view of one.

A :class:`Fixed` is such a value as a function of the weights below it, so that rules can combine them on paper and have
the result computed once, in float64 (:func:`successor`, :func:`new_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.rewrite import refuse
from regauge.ir.storage.weights import DenseWeight

THROUGH = frozenset({"reshape", "permute", "unsqueeze", "squeeze", "expand", "add", "sub", "mul", "div", "neg"})
"""What may stand between a weight and its reader: never a cast, a rounding or a QDQ pair."""


@dataclass(frozen=True)
class Fixed:
    """``function`` of the float64 tensors of ``sources``."""

    sources: tuple[Parameter, ...]
    function: Callable[..., torch.Tensor]


def combined(function: Callable[..., torch.Tensor], *parts: Fixed) -> Fixed:
    """``function`` of fixed values, as a fixed value."""
    sources = tuple(source for part in parts for source in part.sources)

    def compute(*tensors: torch.Tensor) -> torch.Tensor:
        values, start = [], 0
        for part in parts:
            end = start + len(part.sources)
            values.append(part.function(*tensors[start:end]))
            start = end
        return function(*values)

    return Fixed(sources, compute)


def itself(weight: Parameter) -> Fixed:
    """A weight as a fixed value."""
    return Fixed((weight,), lambda tensor: tensor)


def number(value: float) -> Fixed:
    return Fixed((), lambda: torch.tensor(float(value), dtype=torch.float64))


def fixed(build: Builder, operand: Operand) -> Fixed | None:
    """An operand as a fixed value; None for what is computed from inputs, carried from run to run, or not numeric."""
    if isinstance(operand, bool | complex) or operand is None:
        return None
    if isinstance(operand, int | float):
        return number(operand)
    if not isinstance(operand, Value) or not _numeric(operand) or operand in build.held:
        return None
    if isinstance(operand, Parameter):
        return itself(operand)
    node = operand.producer
    if node is None or node.op not in THROUGH or not any(node.operands()):
        return None
    return _of_node(build, node)


def _of_node(build: Builder, node: Node) -> Fixed | None:
    if not is_real(node.output.dtype):
        return None  # integers wrap, which float64 does not
    parts = []
    for operand in node.inputs:
        part = fixed(build, operand)
        if part is None:
            return None
        parts.append(part)
    return combined(lambda *operands: node.operator.evaluate(*operands, **node.attributes), *parts)


def _numeric(value: Value) -> bool:
    if not isinstance(value.dtype, torch.dtype) or value.dtype.is_complex or value.dtype == torch.bool:
        return False
    return all(isinstance(size, int) for size in value.shape)


def successor(build: Builder, old: Parameter, value: Fixed, shape: Sequence[int] | None = None) -> Parameter:
    """A weight to read in place of ``old``, which it succeeds in the state_dict; refuses where it would overflow."""
    new = build.folded(old, lambda _, *tensors: value.function(*tensors), *value.sources, shape=shape)
    return _checked(new, (old, *value.sources))


def new_weight(build: Builder, name: str, like: Parameter, value: Fixed, shape: Sequence[int]) -> Parameter:
    """A weight of the type of ``like``; refuses where it would overflow."""
    new = build.computed(name, lambda _, *tensors: value.function(*tensors), like, *value.sources, shape=shape)
    return _checked(new, (like, *value.sources))


def _checked(new: Parameter, sources: Sequence[Parameter]) -> Parameter:
    """A product that only half precision cannot hold was fine as long as it was one of activations."""
    if isinstance(new.weight, DenseWeight) and not _finite(new) and all(map(_finite, sources)):
        return refuse(f"the new weight in place of {sources[0].name} would not be finite")
    return new


def _finite(parameter: Parameter) -> bool:
    finite: Any = torch.isfinite(parameter.tensor).all()
    return bool(finite)
