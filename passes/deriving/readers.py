"""How nodes are read as sums of products of their operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from regauge.ir.graph import Node, Value
from regauge.ir.ops.einsum import DOTS, explicit_equation, terms_of
from regauge.ir.sizes.expressions import same
from regauge.passes.deriving.expressions import (
    Axes,
    Axis,
    Expression,
    Outside,
    Read,
    aligned,
    broadcast,
    in_range,
    plus,
    regrouped,
    summed,
    times,
    unified,
)
from regauge.passes.deriving.windows import convolution, transposed_convolution


def _number(operand: Any) -> float:
    if isinstance(operand, Value) or isinstance(operand, bool) or not isinstance(operand, int | float):
        raise Outside("not a number")
    return float(operand)


def _matmul(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    if len(x.axes) < 2 or len(y.axes) < 2:
        raise Outside("a vector")
    x, y = unified(x, y, lambda a, b: [(a[-1], b[-2]), *aligned(a[:-2], b[:-2])])
    return times(x, y, (*broadcast(x.axes[:-2], y.axes[:-2]), x.axes[-2], y.axes[-1]))


def _linear(node: Node, read: Read) -> Expression:
    x, weight = read(node.inputs[0]), read(node.inputs[1])
    x, weight = unified(x, weight, lambda a, b: [(a[-1], b[-1])])
    result = times(x, weight, (*x.axes[:-1], weight.axes[0]))
    return plus(result, read(node.inputs[2])) if len(node.inputs) > 2 and node.inputs[2] is not None else result


def _einsum(node: Node, read: Read) -> Expression:
    operands, result = terms_of(explicit_equation(node.attributes["equation"]))
    if any(DOTS in term or len(set(term)) < len(term) for term in (*operands, result)):
        raise Outside("an einsum with an ellipsis or a diagonal")
    known, letters = read(node.inputs[0]), operands[0]
    for operand, term in zip(node.inputs[1:], operands[1:], strict=True):
        other = read(operand)

        def shared(a: Axes, b: Axes, letters: str = letters, term: str = term) -> list[tuple[Axis, Axis]]:
            return [(a[letters.index(letter)], b[term.index(letter)]) for letter in term if letter in letters]

        known, other = unified(known, other, shared)
        axes = {**dict(zip(term, other.axes, strict=True))}
        axes |= {letter: axis or axes.get(letter, ()) for letter, axis in zip(letters, known.axes, strict=True)}
        letters = "".join(dict.fromkeys(letters + term))
        known = times(known, other, tuple(axes[letter] for letter in letters))
    given = dict(zip(letters, known.axes, strict=True))
    before = {index for axis in known.axes for index in axis}
    return summed(replace(known, axes=tuple(given[letter] for letter in result)), before)


def _mul(node: Node, read: Read) -> Expression:
    x, y = node.inputs
    if not isinstance(x, Value) or not isinstance(y, Value):
        return read(x).scaled(_number(y)) if isinstance(x, Value) else read(y).scaled(_number(x))
    a, b = unified(read(x), read(y), aligned)
    return times(a, b, broadcast(a.axes, b.axes))


def _add(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    return plus(x, y)


def _sub(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    return plus(x, y.scaled(-1.0))


def _reduced(node: Node, read: Read) -> Expression:
    x, dims = read(node.inputs[0]), node.attributes["dims"]
    rank = len(x.axes)
    gone = set(range(rank)) if dims is None else {dim % rank for dim in dims}
    keep = node.attributes["keepdim"]
    axes = [() if i in gone else axis for i, axis in enumerate(x.axes) if keep or i not in gone]
    return summed(replace(x, axes=tuple(axes)), {index for axis in x.axes for index in axis})


def _shaped(node: Node, read: Read) -> Expression:
    return regrouped(read(node.inputs[0]), node.output.shape)


def _permuted(node: Node, read: Read) -> Expression:
    x = read(node.inputs[0])
    return replace(x, axes=tuple(x.axes[dim] for dim in node.attributes["dims"]))


def _padded(node: Node, read: Read) -> Expression:
    """Zeros around a tensor: a sum over the narrow range of each axis."""
    pads, x = node.attributes["pads"], read(node.inputs[0])
    if node.attributes["mode"] != "constant" or node.attributes["value"] != 0:
        raise Outside("what is around a tensor is not zero")
    for dim, (before, after) in enumerate(pads):
        if before or after:
            x = in_range(x, dim, before, node.output.shape[dim], wider=True)
    return x


def _sliced(node: Node, read: Read) -> Expression:
    """A part of a tensor: a sum over the wide range, in which all else is multiplied by zero."""
    dim, start, step = (node.attributes[name] for name in ("dim", "start", "step"))
    if step != 1:
        raise Outside("a slice with steps")
    return in_range(read(node.inputs[0]), dim, start, node.output.shape[dim], wider=False)


RANGES: Mapping[str, Callable[[Node, Read], Expression]] = {"pad": _padded, "slice": _sliced}
"""What is one of its operand with other ranges of indices."""

READERS: Mapping[str, Callable[[Node, Read], Expression]] = {
    "matmul": _matmul,
    "linear": _linear,
    "conv": convolution,
    "conv_transpose": transposed_convolution,
    "einsum": _einsum,
    "mul": _mul,
    "add": _add,
    "sub": _sub,
    "neg": lambda node, read: read(node.inputs[0]).scaled(-1.0),
    "div": lambda node, read: read(node.inputs[0]).scaled(1.0 / _number(node.inputs[1])),
    "sum": _reduced,
    "reshape": _shaped,
    "unsqueeze": _shaped,
    "squeeze": _shaped,
    "permute": _permuted,
    "identity": lambda node, read: read(node.inputs[0]),
    **RANGES,
}
"""What is a sum of products of its operands, and how it is read."""


PRODUCTS = frozenset({"matmul", "linear", "conv", "conv_transpose", "einsum"})
"""What sums products, rather than to lay out or add up what others give."""


def has_ranges(node: Node) -> bool:
    """Whether a node reads or gives other ranges of indices than its operand has: zeros, slices, windows."""
    return node.op in RANGES or (is_moved_kernel(node) and not _is_pointwise(node))


def is_moved_kernel(node: Node) -> bool:
    """Whether a node is a convolution that is no product of matrices: of several taps, or several groups."""
    return node.op in ("conv", "conv_transpose") and (node.attributes["groups"] != 1 or not _is_pointwise(node))


def _is_pointwise(node: Node) -> bool:
    weight = node.inputs[1]
    return isinstance(weight, Value) and all(same(size, 1) for size in weight.shape[2:])
