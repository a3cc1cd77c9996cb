"""Arithmetic on equal or broadcast shapes: every result index depends on the same index of each operand.

The rule of all of them is the numpy broadcast of the operands' extents; an axis of size one spreads over a Dim and
leaves it as it is. A Python number may stand in any operand slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, rand, randint, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import Adapter, OnnxForm, Operator, Sample, Symmetry, register_operator, sample
from regauge.ir.ops import spell_arithmetic as spelling
from regauge.ir.scales.scaling import Scaling

Function = TypeVar("Function", bound=Callable[..., Any])
Samples = Callable[[], list[Sample]]


def pointwise(
    *,
    samples: Samples,
    aten: Mapping[str, Adapter | None] | Sequence[str] = (),
    onnx: Mapping[str, Adapter | OnnxForm | None] | Sequence[str] = (),
    **fields: Any,
) -> Callable[[Function], Function]:
    """Register the decorated function as a pointwise operator; plain name lists mean direct mappings.

    An underscore at the end of its name, which keeps Python's own name usable in the module, is not part of the name.
    """

    def register(evaluate: Function) -> Function:
        register_operator(
            Operator(
                name=evaluate.__name__.rstrip("_"),
                evaluate=evaluate,
                rule=broadcast_rule,
                aten=_mapping(aten),
                onnx=_mapping(onnx),
                samples=samples,
                **fields,
            )
        )
        return evaluate

    return register


def _mapping(names: Mapping[str, Any] | Sequence[str]) -> Mapping[str, Any]:
    return names if isinstance(names, Mapping) else dict.fromkeys(names)


# -- two operands ------------------------------------------------------------------------------------------------------


def aten_binary(op: str) -> Adapter:
    """The adapter of ATen overloads ``op(x, y)`` in which either side may be a number."""

    def adapter(build: Any, x: Any, y: Any) -> Any:
        return build(op, x, y)

    return adapter


def onnx_binary(op: str, *, numbers: bool = True) -> OnnxForm:
    """``Op(A, B)``: opset 6 broadcasting is made explicit, and constants without axes become numbers, unless torch's
    function takes tensors only."""

    def reader(build: Any, call: Any) -> Any:
        return build(op, *(onnx_pair(build, call) if numbers else _onnx_tensors(build, call)))

    return OnnxForm(read=reader, direct=True)


def _onnx_tensors(build: Any, call: Any) -> tuple[Value, Value]:
    x, y = call.operand(0), call.operand(1)
    if call.opset < 7 and call.attribute("broadcast", 0):
        y = _aligned(build, x, y, call.attribute("axis"))
    return x, y


def onnx_pair(build: Any, call: Any) -> tuple[Any, Any]:
    x, y = _onnx_tensors(build, call)
    left, right = _number(call, 0), _number(call, 1)
    if right is not None:
        return x, right
    return (x, y) if left is None else (left, y)


def _number(call: Any, slot: int) -> Any:
    """An operand as a number where it is a constant without axes, which then cannot change the result's rank."""
    return call.number(slot) if call.operand(slot).rank == 0 and call.constant(slot) is not None else None


def _aligned(build: Any, x: Value, y: Value, axis: int | None) -> Value:
    """Before opset 7 ``axis`` says where the axes of ``y`` stand in ``x``; trailing axes of size one say the same."""
    if axis is None:
        return y
    for _ in range(x.rank - axis % x.rank - y.rank):
        y = build.unsqueeze(y, dim=y.rank)
    return y


def _pairs(left: Callable[..., Tensor], right: Callable[..., Tensor], *numbers: tuple[Any, Any]) -> Samples:
    """Samples of a binary operator: equal shapes, axes of size one on either side, missing axes, numbers."""

    def draw() -> list[Sample]:
        shapes = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((4,), (2, 3, 4)), ((2, 1, 4), (3, 1)), ((3,), (1,))]
        calls = [sample(left(*a), right(*b)) for a, b in shapes]
        return calls + [sample(left(2, 3) if a is None else a, right(2, 3) if b is None else b) for a, b in numbers]

    return draw


def positive(*shape: int) -> Tensor:
    return rand(*shape) + 0.5


def integers(*shape: int) -> Tensor:
    return randint(1, 9, shape)


def scaled_by_alpha(op: str) -> Adapter:
    """ATen's ``x + alpha * y`` and ``x - alpha * y``."""

    def adapter(build: Any, x: Any, y: Any, alpha: Any = 1) -> Any:
        if alpha != 1:
            y = build.mul(y, alpha) if isinstance(y, Value) else y * alpha
        return build(op, x, y)

    return adapter


def _reversed_subtraction(build: Any, x: Any, y: Any, alpha: Any = 1) -> Any:
    return build.sub(y, x if alpha == 1 else build.mul(x, alpha))


def _folded(op: str) -> Adapter:
    """Sum, Max and Min of ONNX take any number of operands."""

    def reader(build: Any, call: Any) -> Any:
        result = call.operand(0)
        for i in range(1, len(call.inputs)):
            result = build(op, result, call.operand(i))
        return result

    return reader


def _add_many(build: Any, call: Any) -> Any:
    return _folded("add")(build, call)


def _mean_of_many(build: Any, call: Any) -> Any:
    return build.div(_add_many(build, call), len(call.inputs))


@pointwise(
    aten={"add": scaled_by_alpha("add")},
    onnx={"Add": onnx_binary("add"), "Sum": _add_many},
    samples=_pairs(randn, randn, (None, 2.5), (1, None)),
    symmetry=Symmetry.LINEAR,
    commutative=True,
    element=lambda x, y: x + y,
)
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@pointwise(
    aten={
        "sub": scaled_by_alpha("sub"),
        "subtract": scaled_by_alpha("sub"),
        "rsub": _reversed_subtraction,
    },
    onnx={"Sub": onnx_binary("sub")},
    samples=_pairs(randn, randn, (None, 2.5), (1, None)),
    symmetry=Symmetry.LINEAR,
    element=lambda x, y: x - y,
)
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def _addcmul(build: Any, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    product = build.mul(a, b)
    return build.add(x, product if value == 1 else build.mul(product, value))


def _addcdiv(build: Any, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    quotient = build.div(a, b)
    return build.add(x, quotient if value == 1 else build.mul(quotient, value))


@pointwise(
    aten={"mul": aten_binary("mul"), "multiply": aten_binary("mul"), "addcmul": _addcmul},
    onnx={"Mul": onnx_binary("mul")},
    samples=_pairs(randn, randn, (None, 2.5), (3, None)),
    symmetry=Symmetry.PRODUCT,
    commutative=True,
    element=lambda x, y: x * y,
)
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def _divide(build: Any, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    return build.div(x, y, rounding_mode=rounding_mode)


def _floor_divide(build: Any, x: Any, y: Any) -> Any:
    return build.div(x, y, rounding_mode="floor")


def _onnx_divide(build: Any, call: Any) -> Any:
    """Div of ONNX cuts off towards zero where its operands are integers."""
    x, y = onnx_pair(build, call)
    whole = not (call.operand(0).dtype.is_floating_point or call.operand(0).dtype.is_complex)
    if whole and isinstance(x, int):
        x = call.operand(0)  # torch rounds only where the dividend is a tensor
    return build.div(x, y, rounding_mode="trunc" if whole else None)


def _division_scaling(node: Node) -> Scaling | None:
    return Scaling(powers={"x": 1, "y": -1}) if node.attributes["rounding_mode"] is None else None


def _division_symmetry(node: Node) -> Symmetry:
    """Linear in the dividend; a Dim that the divisor alone holds is inverted, which nothing commutes with."""
    x, y = node.inputs
    if node.attributes["rounding_mode"] is not None or not isinstance(x, Value) or isinstance(x, Parameter):
        return Symmetry.POINTWISE
    if isinstance(y, Value) and x.shape != node.output.shape:
        return Symmetry.POINTWISE
    return Symmetry.PRODUCT


@pointwise(
    aten={
        "div": _divide,
        "divide": _divide,
        "true_divide": aten_binary("div"),
        "floor_divide": _floor_divide,
        "addcdiv": _addcdiv,
    },
    onnx={"Div": _onnx_divide, "Mean": _mean_of_many},
    spell=spelling.divide,
    samples=lambda: [
        *_pairs(randn, positive, (None, 2.5), (1, None))(),
        sample(randn(2, 3), positive(3), rounding_mode="floor"),
        sample(randn(2, 3), 0.7, rounding_mode="trunc"),
        sample(integers(2, 3), integers(3), rounding_mode="floor"),
    ],
    symmetry=_division_symmetry,
    scaling=_division_scaling,
    element=lambda x, y, rounding_mode: x / y if rounding_mode is None else None,
)
def div(x: Tensor, y: Tensor, *, rounding_mode: str | None = None) -> Tensor:
    return x / y if rounding_mode is None else torch.div(x, y, rounding_mode=rounding_mode)


def power_scaling(node: Node) -> Scaling | None:
    """Of a power whose exponent is a number."""
    exponent = node.inputs[1]
    return Scaling(powers={"x": float(exponent)}) if isinstance(exponent, int | float) else None


def _onnx_pow(build: Any, call: Any) -> Any:
    """Pow of ONNX has the type of its base, whatever the exponent is."""
    dtype, exponents = call.operand(0).dtype, call.constant(1)
    whole = isinstance(dtype, torch.dtype) and not dtype.is_floating_point
    if whole and exponents is not None and bool((exponents < 0).any()):
        raise OperatorError("what integers to negative powers are is for each runtime to say")
    x, y = onnx_pair(build, call)
    result = build.pow(x, y)
    return result if result.dtype == dtype else build.cast(result, dtype=dtype)


def _square(build: Any, x: Any) -> Any:
    return build.pow(x, 2)


@pointwise(
    aten={"pow": aten_binary("pow"), "square": _square},
    onnx={"Pow": _onnx_pow},
    spell=spelling.power,
    samples=_pairs(positive, randn, (None, 2), (2, None), (None, 0.5)),
    scaling=power_scaling,
    element=scalars.power,
)
def pow_(x: Tensor, y: Tensor) -> Tensor:
    return x**y


def _onnx_mod(build: Any, call: Any) -> Any:
    """Mod has the sign of the divisor, or of the dividend where ``fmod`` is set."""
    x, y = onnx_pair(build, call)
    if not call.attribute("fmod", 0):
        return build.remainder(x, y)
    return build.fmod(x if isinstance(x, Value) else call.operand(0), y)


@pointwise(
    aten={"remainder": aten_binary("remainder")},
    onnx={"Mod": _onnx_mod},
    spell=spelling.remainder,
    samples=_pairs(randn, positive, (None, 0.7), (2.0, None)),
    scaling=Scaling(powers={"x y": 1}),
)
def remainder(x: Tensor, y: Tensor) -> Tensor:
    return x % y


@pointwise(
    aten={"fmod": aten_binary("fmod")},
    samples=_pairs(randn, positive, (None, 0.7)),
    spell=lambda onnx, node: onnx.Mod(*onnx.operands(2, onnx.common_type), fmod=1),
    scaling=Scaling(powers={"x y": 1}),
)
def fmod(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y)


def _like_shapes(node: Node) -> Symmetry:
    """A larger or smaller of two values scales with both; a value that is spread over a Dim does not."""
    x, y = node.inputs[:2]
    alike = isinstance(x, Value) and isinstance(y, Value) and x.shape == y.shape
    return Symmetry.HOMOGENEOUS if alike else Symmetry.POINTWISE


@pointwise(
    aten={"maximum": aten_binary("maximum"), "max.other": aten_binary("maximum")},
    onnx={"Max": OnnxForm(read=_folded("maximum"), direct=True)},
    samples=_pairs(randn, randn),
    symmetry=_like_shapes,
    commutative=True,
    element=scalars.maximum,
)
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@pointwise(
    aten={"minimum": aten_binary("minimum"), "min.other": aten_binary("minimum")},
    onnx={"Min": OnnxForm(read=_folded("minimum"), direct=True)},
    samples=_pairs(randn, randn),
    symmetry=_like_shapes,
    commutative=True,
    element=scalars.minimum,
)
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@pointwise(
    aten={"atan2": aten_binary("atan2"), "arctan2": aten_binary("atan2")},
    samples=_pairs(randn, randn),
    scaling=Scaling(powers={"x y": 0}, within=(-math.pi, math.pi)),
)
def atan2(x: Tensor, y: Tensor) -> Tensor:
    return torch.atan2(x, y)


@pointwise(
    aten={"logaddexp": aten_binary("logaddexp")},
    samples=_pairs(randn, randn),
    spell=spelling.log_add_exp,
    commutative=True,
)
def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    return torch.logaddexp(x, y)


@pointwise(
    aten={"hypot": aten_binary("hypot")},
    samples=_pairs(randn, randn),
    spell=spelling.hypotenuse,
    commutative=True,
    scaling=Scaling(powers={"x y": 1}),
)
def hypot(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y)
