"""Contents of ONNX values that follow from shapes and small constants.

Exporters spell a reshape target as Shape, Gather, Concat; a softmax scale as Shape, Gather, Cast, Sqrt. Such values are
known when a model is loaded, up to the dynamic sizes in them: they are arrays of numbers or sympy expressions (numpy
arrays of objects where an expression is in them). :mod:`regauge.ir.folding.onnx_operators` computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import sympy

from regauge.ir.sizes.expressions import Size, simplify
from regauge.ir.sizes.numbers import takes_zero_and_more

_INT64, _BOOL = onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL
LIMIT = 8192  # elements; larger contents stay nodes, so that no file grows by folding


class Unknown(Exception):
    """The content cannot be told: it depends on data, or on how a dynamic size compares with another."""


@dataclass(frozen=True)
class Content:
    """What is known of a value: its elements, and its ONNX element type."""

    array: np.ndarray
    data_type: onnx_ir.DataType

    @property
    def static(self) -> bool:
        """Whether no dynamic size occurs in it."""
        return self.array.dtype != object

    @property
    def integral(self) -> bool:
        return self.data_type.is_integer() or self.data_type == onnx_ir.DataType.BOOL

    @property
    def undecided(self) -> bool:
        """Whether it is a truth that holds for some dynamic sizes and not for others."""
        return self.data_type == onnx_ir.DataType.BOOL and not self.static

    def sizes(self) -> tuple[Size, ...]:
        """The elements in row-major order, as sizes."""
        return tuple(simplify(e) if isinstance(e, sympy.Basic) else int(e) for e in self.array.reshape(-1).tolist())


def constant_tensor(value: onnx_ir.Value) -> Any:
    """The onnx_ir tensor of an initializer or of a Constant node's output; None for any other value.

    (onnx_ir's own ``get_const_tensor`` renames the tensor it finds, and with it the model that is only to be read.)
    """
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attributes) != 1:
        return None
    ((name, attribute),) = node.attributes.items()
    if attribute.is_ref() or name == "sparse_value":
        return None
    if name == "value":
        return attribute.value
    if name.startswith("value_string"):
        return onnx_ir.tensor(attribute.value)
    return onnx_ir.Tensor(np.array(attribute.value, dtype=np.float32 if name.startswith("value_float") else np.int64))


def content(elements: Any, data_type: onnx_ir.DataType) -> Content:
    """Content from elements of any kind: a plain numpy array where all are numbers."""
    array = np.asarray(elements)
    if array.dtype == object:
        flat = [_number(element) for element in array.reshape(-1)]
        if not any(isinstance(element, sympy.Basic) for element in flat):
            array = np.asarray(flat, dtype=data_type.numpy()).reshape(array.shape)
        else:
            boxed = np.empty(len(flat), dtype=object)
            boxed[:] = flat
            return Content(boxed.reshape(array.shape), data_type)
    return Content(array.astype(data_type.numpy(), copy=False), data_type)


def of_shape(shape: Sequence[Size]) -> Content:
    array = np.empty(len(shape), dtype=object)
    array[:] = list(shape)
    return content(array, onnx_ir.DataType.INT64)


def _number(element: Any) -> Any:
    if not isinstance(element, sympy.Basic):
        return element
    if element in (sympy.true, sympy.false):
        return bool(element)
    if isinstance(element, sympy.logic.boolalg.Boolean) and not isinstance(element, sympy.Symbol):
        return element
    expression = sympy.expand(element)
    if expression.is_Integer:
        return int(expression)
    return float(expression) if expression.is_number else expression


def map_elements(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """A function of elements, broadcast; used where expressions are among them."""
    broadcast = np.broadcast_arrays(*arrays)
    if broadcast[0].size > LIMIT:
        raise Unknown
    flat = [function(*elements) for elements in zip(*[a.reshape(-1).tolist() for a in broadcast], strict=True)]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(broadcast[0].shape)


def equal(a: Any, b: Any) -> Any:
    if not isinstance(a, sympy.Basic) and not isinstance(b, sympy.Basic):
        return bool(a == b)
    difference = sympy.expand(sympy.sympify(a) - b)
    if difference == 0:
        return True
    if takes_zero_and_more(difference):
        return sympy.Eq(difference, 0, evaluate=False)
    if difference.is_number or difference.is_positive or difference.is_negative:
        return False
    return sympy.Eq(difference, 0)


def negated(truth: Any) -> Any:
    return sympy.Not(truth) if isinstance(truth, sympy.Basic) else not truth


def as_type(found: Content | None, target: onnx_ir.DataType) -> Content:
    if found is None or target == onnx_ir.DataType.STRING or found.data_type == onnx_ir.DataType.STRING:
        raise Unknown
    if found.static:
        array = found.array
        if target.is_integer() and not found.integral:
            array = np.trunc(array)
        return Content(array.astype(target.numpy()), target)
    if target.is_integer() and not found.integral:
        return content(
            map_elements(lambda e: e if getattr(e, "is_integer", False) else sympy.floor(e), found.array), target
        )
    if target == _BOOL and found.data_type != _BOOL:
        return content(map_elements(lambda e: negated(equal(e, 0)), found.array), _BOOL)
    if found.data_type == _BOOL and target != _BOOL:
        raise Unknown
    return Content(found.array, target)
