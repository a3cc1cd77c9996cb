"""Creation: tensors made from sizes. Filled tensors have free axes; what is counted or drawn keeps all its entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, operator, sample
from regauge.ir.ops.broadcasting import expand_to
from regauge.ir.ops.conversion import as_dtype, onnx_dtype
from regauge.ir.ops.layout import holds_no_sizes
from regauge.ir.scalars import Scalar
from regauge.ir.sizes.expressions import Size, is_static

LARGEST_TABLE = 1_000_000  # larger tables stay operators: a constant would be written into every emitted file

# -- filled tensors ----------------------------------------------------------------------------------------------------


def _fresh_rule(call: Call) -> Axes:
    axes = [call.fresh(size) for size in call["shape"]]
    call.derive(shape=tuple(axes))
    return axes


def _dtype_of(value: Any) -> torch.dtype:
    """torch's choice for a number: bool and int keep their kind, floats get the default type."""
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, complex):
        return torch.complex64
    return torch.get_default_dtype() if isinstance(value, float) else torch.int64


def filled(build: Builder, shape: Sequence[Size], value: Any, dtype: Any) -> Any:
    """A tensor of one number; an empty or absent ``dtype`` follows the number."""
    if isinstance(value, Value):
        return expand_to(build, as_dtype(build, value, dtype), shape)
    dtype = _dtype_of(value) if dtype is None else dtype
    return build.full(shape=tuple(shape), value=value, dtype=dtype)


def _factory(value: float) -> Any:
    """``zeros(size)``, ``ones(size)``, ``empty(size)``: what an empty tensor holds is unspecified, so zeros will do."""

    def adapt(build: Builder, size: Sequence[Size], *_: Any, dtype: Any = None, **_options: Any) -> Any:
        return filled(build, size, value, dtype or torch.get_default_dtype())

    return adapt


def _like(value: float) -> Any:
    def adapt(build: Builder, x: Value, *, dtype: Any = None, **_options: Any) -> Any:
        return filled(build, x.shape, value, dtype or x.dtype)

    return adapt


def _new(value: float) -> Any:
    def adapt(build: Builder, x: Value, size: Sequence[Size], *_: Any, dtype: Any = None, **_options: Any) -> Any:
        return filled(build, size, value, dtype or x.dtype)

    return adapt


def _full(build: Builder, size: Sequence[Size], fill_value: Any, *, dtype: Any = None, **_options: Any) -> Any:
    return filled(build, size, fill_value, dtype)


def _full_like(build: Builder, x: Value, fill_value: Any, *, dtype: Any = None, **_options: Any) -> Any:
    return filled(build, x.shape, fill_value, dtype or x.dtype)


def _new_full(
    build: Builder, x: Value, size: Sequence[Size], fill_value: Any, *, dtype: Any = None, **_options: Any
) -> Any:
    return filled(build, size, fill_value, dtype or x.dtype)


def _scalar_tensor(build: Builder, s: Any, *, dtype: Any = None, **_options: Any) -> Any:
    return filled(build, (), s, dtype or torch.get_default_dtype())


def _onnx_constant_of_shape(build: Builder, call: Any) -> Any:
    shape = call.sizes(0)
    if shape is None:
        raise OperatorError("the shape of ConstantOfShape is computed from data")
    value = call.attribute("value")
    value = torch.zeros(1) if value is None else torch.as_tensor(value)
    return build.full(shape=tuple(shape), value=value.reshape(-1)[0].item(), dtype=value.dtype)


def _write_constant_of_shape(nodes: Sequence[Node], patch: Any) -> None:
    patch.set_sizes(0, nodes[0].attributes["shape"])


def _spell_full(onnx: Any, node: Node) -> Any:
    """One number, expanded; it may be a dynamic size."""
    value, shape, dtype = (node.attributes[name] for name in ("value", "shape", "dtype"))
    if isinstance(value, sympy.Basic):
        number = onnx.cast(onnx.squeeze(onnx.sizes([value]), 0), dtype)
    else:
        number = onnx.constant(torch.tensor(value), dtype)
    return onnx.Expand(number, onnx.sizes(shape)) if shape else onnx.Identity(number)


@operator(
    rule=_fresh_rule,
    spell=_spell_full,
    aten={
        "zeros": _factory(0), "ones": _factory(1), "empty": _factory(0), "empty_permuted": _factory(0),
        "empty_strided": _factory(0), "zeros_like": _like(0), "ones_like": _like(1), "empty_like": _like(0),
        "zero": _like(0), "new_zeros": _new(0), "new_ones": _new(1), "new_empty": _new(0), "new_empty_strided": _new(0),
        "full": _full, "full_like": _full_like, "fill": _full_like, "new_full": _new_full,
        "scalar_tensor": _scalar_tensor,
    },
    onnx={"ConstantOfShape": OnnxForm(read=_onnx_constant_of_shape, write=_write_constant_of_shape)},
    samples=lambda: [
        sample(shape=(2, 3), value=1.5, dtype=torch.float32),
        sample(shape=(4,), value=7, dtype=torch.int64),
        sample(shape=(), value=True, dtype=torch.bool),
    ],
)  # fmt: skip
def full(*, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(build: Builder, tensor: torch.Tensor, name: str) -> Any:
    return build.constant(tensor, name)


def _counted_rule(call: Call) -> list[Axes]:
    """Axes whose entries are numbered: they keep their number."""
    axes = [call.fresh(size) for size in call.node.outputs[0].shape]
    for extent in axes:
        call.role("scan", extent)
    return [axes]


def numbers_from(build: Builder, start: Any, end: Any, step: Any, dtype: Any) -> Any:
    """``arange``: a constant where its bounds are known and it is not large."""
    if isinstance(start, Value) or isinstance(end, Value) or isinstance(step, Value):
        raise OperatorError("a range with computed bounds has a size that depends on data")
    if dtype is None:
        floats = any(isinstance(number, float) for number in (start, end, step))
        dtype = torch.get_default_dtype() if floats else torch.int64
    numbers = all(isinstance(number, int | float) for number in (start, end, step))
    if numbers and step != 0 and math.ceil((end - start) / step) <= LARGEST_TABLE:
        return _table(build, torch.arange(start, end, step, dtype=dtype), "arange")
    return build.arange(start=start, end=end, step=step, dtype=dtype)


def _arange(build: Builder, *bounds: Any, dtype: Any = None, **_options: Any) -> Any:
    """``arange(end)``, ``arange(start, end)`` and ``arange(start, end, step)``."""
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return numbers_from(build, start, end, step, dtype)


def _onnx_range(build: Builder, call: Any) -> Any:
    numbers = [call.number(i) for i in range(3)]
    if any(number is None for number in numbers):
        raise OperatorError("the bounds of Range are computed from data")
    known = [tensor.dtype for tensor in map(call.constant, range(3)) if tensor is not None]
    start, limit, delta = numbers
    return numbers_from(build, start, limit, delta, known[0] if known else torch.int64)


def _arange_element(*, end: Any, start: Any = 0, step: Any = 1, dtype: torch.dtype = torch.int64) -> Scalar | None:
    return scalars.index((None, 0)) if start == 0 and step == 1 and dtype == torch.int64 else None


@operator(
    rule=_counted_rule,
    element=_arange_element,
    aten={"arange": _arange},
    onnx={"Range": _onnx_range},
    samples=lambda: [sample(end=5), sample(start=2, end=9, step=3, dtype=torch.float32)],
)
def arange(*, end: float, start: float = 0, step: float = 1, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.arange(start, end, step, dtype=dtype)


def _linspace(build: Builder, start: Any, end: Any, steps: Size, *, dtype: Any = None, **_options: Any) -> Any:
    if isinstance(start, Value) or isinstance(end, Value):
        raise OperatorError("linspace between computed bounds has no rule")
    dtype = dtype or torch.get_default_dtype()
    if isinstance(steps, int) and steps <= LARGEST_TABLE and is_number(start) and is_number(end):
        return _table(build, torch.linspace(start, end, steps, dtype=dtype), "linspace")
    return build.linspace(start=start, end=end, steps=steps, dtype=dtype)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@operator(
    rule=_counted_rule,
    aten={"linspace": _linspace},
    samples=lambda: [sample(start=0.0, end=1.0, steps=5), sample(start=2, end=-2, steps=3)],
)
def linspace(*, start: float, end: float, steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(start, end, steps, dtype=dtype)


def _eye(build: Builder, n: Size, m: Size | None = None, *, dtype: Any = None, **_options: Any) -> Any:
    m, dtype = n if m is None else m, dtype or torch.get_default_dtype()
    if isinstance(n, int) and isinstance(m, int) and n * m <= LARGEST_TABLE:
        return _table(build, torch.eye(n, m, dtype=dtype), "eye")
    return build.eye(n=n, m=m, dtype=dtype)


def _onnx_eye_like(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    code = call.attribute("dtype")
    dtype = x.dtype if code is None else onnx_dtype(code)
    rows, columns = x.shape
    offset = call.attribute("k", 0)
    if offset == 0:
        return _eye(build, rows, columns, dtype=dtype)
    if not is_static(rows) or not is_static(columns):
        raise OperatorError("EyeLike off the main diagonal of a tensor of dynamic size has no rule")
    ones = torch.ones(rows, columns)
    return _table(build, (ones.tril(offset) - ones.tril(offset - 1)).to(dtype), "eye")


@operator(
    rule=_counted_rule,
    aten={"eye": _eye},
    onnx={"EyeLike": OnnxForm(read=_onnx_eye_like, write=holds_no_sizes)},
    samples=lambda: [sample(n=3, m=3), sample(n=2, m=4, dtype=torch.int64)],
)
def eye(*, n: int, m: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(n, m, dtype=dtype)
