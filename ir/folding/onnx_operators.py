"""Symbolic shape arithmetic: what ONNX operators make of contents that are known when a model is loaded.

Nodes that are folded here never become nodes of our own; readers of the nodes behind them ask for sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import sympy

from regauge.ir.sizes.expressions import Size, floor_divide
from regauge.ir.sizes.numbers import numbers_tried
from regauge.ir.sizes.onnx_contents import LIMIT, Content, Unknown, as_type, content, equal, map_elements, negated

_INT64, _BOOL = onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL


@dataclass(frozen=True)
class Question:
    """One node to fold: contents of its inputs (None where absent) and its attributes."""

    op_type: str
    opset: int
    inputs: list[Content | None]
    attribute: Callable[..., Any]
    outputs: int = 1

    def array(self, index: int) -> np.ndarray:
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise Unknown
        return found.array

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def axes(self, index: int = 1) -> list[int] | None:
        """Axes given by an input (newer opsets) or by the attribute."""
        if self.has(index):
            return [int(a) for a in self.array(index).reshape(-1)]
        axes = self.attribute("axes")
        return None if axes is None else [int(a) for a in axes]


def fold(question: Question) -> list[Content]:
    """Contents of a node's outputs; raises Unknown where they cannot be told."""
    rule = _RULES.get(question.op_type)
    if rule is None:
        raise Unknown
    try:
        with np.errstate(all="ignore"):
            result = rule(question)
    except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise Unknown from error
    results = result if isinstance(result, list) else [result]
    if sum(r.array.size if isinstance(r, Content) else np.size(r) for r in results) > LIMIT:  # numpy gives scalars too
        raise Unknown
    first = next((c for c in question.inputs if c is not None), None)
    return [r if isinstance(r, Content) else content(r, first.data_type if first else _INT64) for r in results]


def _divide(question: Question) -> np.ndarray:
    x, y = question.array(0), question.array(1)
    integral = question.inputs[0] is not None and question.inputs[0].integral
    if not integral:
        return map_elements(lambda a, b: a / b, x, y) if object in (x.dtype, y.dtype) else x / y
    return map_elements(_truncated_quotient, x, y)


def _truncated_quotient(a: Any, b: Any) -> Size:
    """ONNX divides integers towards zero; sizes are not negative, so for expressions that is the floor."""
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return floor_divide(a, b)
    quotient = abs(int(a)) // abs(int(b))
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(question: Question) -> np.ndarray:
    x, y = question.array(0), question.array(1)
    if question.attribute("fmod", 0):
        if object in (x.dtype, y.dtype):
            raise Unknown
        return np.asarray(np.fmod(x, y))
    if object not in (x.dtype, y.dtype):
        return np.asarray(np.mod(x, y))
    return map_elements(lambda a, b: sympy.Mod(a, b), x, y)


def _decide(relation: Any) -> Any:
    """The truth of a relation between sizes where it holds for all of them or for none; else the relation itself."""
    if isinstance(relation, bool | np.bool_):
        return bool(relation)
    if relation not in (sympy.true, sympy.false):
        relation = relation if _varies(relation) else sympy.simplify(relation)
    return bool(relation) if relation in (sympy.true, sympy.false) else relation


def _varies(relation: Any) -> bool:
    """Whether it holds for some sizes and not for others, by a few of them: sympy takes long to find no proof."""
    found = set()
    for truth in numbers_tried(relation):
        found.add(truth)
        if {True, False} <= found:
            return True
    return False


def _compare(function: Callable[[Any, Any], Any]) -> Callable[[Question], Content]:
    def rule(question: Question) -> Content:
        return content(map_elements(lambda a, b: _decide(function(a, b)), question.array(0), question.array(1)), _BOOL)

    return rule


def _pointwise(numeric: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[[Question], np.ndarray]:
    def rule(question: Question) -> np.ndarray:
        arrays = [question.array(i) for i in range(len(question.inputs))]
        if any(a.dtype == object for a in arrays):
            return map_elements(symbolic, *arrays)
        result = arrays[0] if len(arrays) > 1 else numeric(arrays[0])
        for other in arrays[1:]:
            result = numeric(result, other)
        return np.asarray(result)

    return rule


def _cast(question: Question) -> Content:
    target = onnx_ir.DataType(question.attribute("to"))
    return as_type(question.inputs[0], target)


def _gather(question: Question) -> np.ndarray:
    indices = question.array(1)
    if indices.dtype == object:
        raise Unknown
    return np.asarray(np.take(question.array(0), indices.astype(np.int64), axis=question.attribute("axis", 0)))


def _concat(question: Question) -> np.ndarray:
    arrays = [question.array(i) for i in range(len(question.inputs))]
    return np.concatenate(arrays, axis=question.attribute("axis", 0))


def _slice(question: Question) -> np.ndarray:
    data = question.array(0)
    if question.has(1):
        starts, ends = question.array(1).reshape(-1), question.array(2).reshape(-1)
        steps = question.array(4).reshape(-1) if question.has(4) else [1] * len(starts)
        axes = question.axes(3)
    else:
        starts, ends, axes = question.attribute("starts"), question.attribute("ends"), question.axes(3)
        steps = [1] * len(starts)
    index: list[slice] = [slice(None)] * data.ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        index[axis] = slice(_plain(starts[i]), _plain(ends[i]), _plain(steps[i]))
    return data[tuple(index)]


def _plain(size: Any) -> int:
    if isinstance(size, sympy.Basic):
        raise Unknown
    return int(size)


def _squeeze(question: Question) -> np.ndarray:
    axes = question.axes()
    return np.squeeze(question.array(0), axis=None if axes is None else tuple(axes))


def _unsqueeze(question: Question) -> np.ndarray:
    data = question.array(0)
    axes = question.axes() or []
    rank = data.ndim + len(axes)
    return np.asarray(np.expand_dims(data, tuple(a % rank for a in axes)))


def _reshape(question: Question) -> np.ndarray:
    data = question.array(0)
    target = [_plain(s) for s in question.array(1).reshape(-1)]
    if not question.attribute("allowzero", 0):
        target = [data.shape[i] if s == 0 else s for i, s in enumerate(target)]
    return data.reshape(target)


def _expand(question: Question) -> np.ndarray:
    target = tuple(_plain(s) for s in question.array(1).reshape(-1))
    data = question.array(0)
    shape = np.broadcast_shapes(data.shape, target)
    if math.prod(shape) > LIMIT:
        raise Unknown
    return np.broadcast_to(data, shape).copy()


def _tile(question: Question) -> np.ndarray:
    repeats = [_plain(s) for s in question.array(1).reshape(-1)]
    if math.prod(repeats) * question.array(0).size > LIMIT:
        raise Unknown
    return np.tile(question.array(0), repeats)


def _constant_of_shape(question: Question) -> Content:
    shape = tuple(_plain(s) for s in question.array(0).reshape(-1))
    if math.prod(shape) > LIMIT:
        raise Unknown
    fill = question.attribute("value")
    if fill is None:
        return Content(np.zeros(shape, np.float32), onnx_ir.DataType.FLOAT)
    array = np.asarray(fill)
    return Content(np.full(shape, array.reshape(-1)[0]), onnx_ir.DataType.from_numpy(array.dtype))


def _range(question: Question) -> np.ndarray:
    start, limit, step = (_plain_number(question.array(i)) for i in range(3))
    if math.ceil((limit - start) / step) > LIMIT:
        raise Unknown
    return np.arange(start, limit, step)


def _plain_number(array: np.ndarray) -> Any:
    if array.dtype == object:
        raise Unknown
    return array.reshape(-1)[0]


def _reduce(numeric: Callable[..., Any], symbolic: Callable[[Sequence[Any]], Any]) -> Callable[[Question], np.ndarray]:
    def rule(question: Question) -> np.ndarray:
        data, axes = question.array(0), question.axes()
        keep = bool(question.attribute("keepdims", 1))
        if not axes and question.attribute("noop_with_empty_axes", 0):
            return data
        if data.dtype != object:
            return np.asarray(numeric(data, axis=tuple(axes) if axes else None, keepdims=keep))
        if axes and len(axes) < data.ndim:
            raise Unknown
        result = np.empty((), dtype=object)
        result[()] = symbolic(data.reshape(-1).tolist())
        return result.reshape((1,) * data.ndim) if keep else result

    return rule


def _where(question: Question) -> np.ndarray:
    condition = question.array(0)
    if condition.dtype == object:
        raise Unknown
    if np.size(condition) == 0:
        return question.array(1)
    return np.where(condition, question.array(1), question.array(2))


def _where_typed(question: Question) -> Content:
    branch = question.inputs[1]
    assert branch is not None
    return content(_where(question), branch.data_type)


def _split(question: Question) -> list[np.ndarray]:
    data, axis = question.array(0), question.attribute("axis", 0)
    sizes = question.array(1).reshape(-1) if question.has(1) else question.attribute("split")
    if sizes is None:
        part = -(-data.shape[axis] // question.outputs)
        bounds = [part * i for i in range(1, question.outputs)]
    else:
        bounds = list(np.cumsum([_plain(s) for s in sizes])[:-1])
    return np.split(data, bounds, axis=axis)


def _gather_nd(question: Question) -> np.ndarray:
    indices = question.array(1)
    if indices.dtype == object or question.attribute("batch_dims", 0):
        raise Unknown
    return np.asarray(question.array(0)[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))])


def _scatter_nd(question: Question) -> np.ndarray:
    indices = question.array(1)
    if indices.dtype == object or question.attribute("reduction", "none") != "none":
        raise Unknown
    updates = question.array(2)
    result = question.array(0).astype(object if updates.dtype == object else question.array(0).dtype)
    result[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))] = updates
    return result


_RULES: dict[str, Callable[[Question], Any]] = {
    "Identity": lambda q: q.array(0),
    "Cast": _cast,
    "Add": _pointwise(np.add, lambda a, b: a + b),
    "Sub": _pointwise(np.subtract, lambda a, b: a - b),
    "Mul": _pointwise(np.multiply, lambda a, b: a * b),
    "Div": _divide,
    "Mod": _remainder,
    "Min": _pointwise(np.minimum, lambda *e: sympy.Min(*e)),
    "Max": _pointwise(np.maximum, lambda *e: sympy.Max(*e)),
    "Neg": _pointwise(np.negative, lambda a: -a),
    "Abs": _pointwise(np.abs, lambda a: sympy.Abs(a)),
    "Floor": _pointwise(np.floor, lambda a: sympy.floor(a)),
    "Ceil": _pointwise(np.ceil, lambda a: sympy.ceiling(a)),
    "Sqrt": _pointwise(np.sqrt, lambda a: sympy.sqrt(a)),
    "Pow": _pointwise(np.power, lambda a, b: sympy.sympify(a) ** b),
    "Reciprocal": _pointwise(np.reciprocal, lambda a: 1 / a),
    "Exp": _pointwise(np.exp, lambda a: sympy.exp(a)),
    "Log": _pointwise(np.log, lambda a: sympy.log(a)),
    "Equal": _compare(equal),
    "Less": _compare(lambda a, b: a < b),
    "LessOrEqual": _compare(lambda a, b: a <= b),
    "Greater": _compare(lambda a, b: a > b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b),
    "Not": _pointwise(np.logical_not, negated),
    "And": _pointwise(np.logical_and, lambda a, b: _decide(sympy.And(a, b))),
    "Or": _pointwise(np.logical_or, lambda a, b: _decide(sympy.Or(a, b))),
    "Where": _where_typed,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": lambda q: q.array(0).reshape(math.prod(q.array(0).shape[: q.attribute("axis", 1)]), -1),
    "Reshape": _reshape,
    "Transpose": lambda q: np.transpose(q.array(0), q.attribute("perm")),
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "ReduceProd": _reduce(np.prod, lambda e: sympy.Mul(*e)),
    "ReduceSum": _reduce(np.sum, lambda e: sympy.Add(*e)),
    "ReduceMax": _reduce(np.max, lambda e: sympy.Max(*e)),
    "ReduceMin": _reduce(np.min, lambda e: sympy.Min(*e)),
}
