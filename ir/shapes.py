"""Shapes and dtypes of an operator's results, from the operator's own semantics.

Static calls are evaluated on meta tensors; calls with dynamic sizes on torch's fake tensors with symbolic sizes, so
that torch itself says what a convolution or an interpolation makes of a symbolic height.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher

from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.errors import OperatorError, RegaugeError, first_line
from regauge.ir.operator import Operator, Symmetry
from regauge.ir.sizes.expressions import (
    Size,
    evaluate,
    kinks_of,
    prime_hints,
    replaced,
    simplify,
    symbol,
    symbols_in,
    unclamped,
    without_limit,
)  # fmt: skip
from regauge.ir.sizes.symints import size_from_symint, traced_size

Result = tuple[tuple[Size, ...], torch.dtype]


_known: dict[Any, list[Result]] = {}  # calls seen before: networks repeat their blocks, so most nodes are
KNOWN_CALLS = 10_000


def infer_results(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result]:
    """Shape and dtype of each result; operands are Values, numbers, sizes or None. Raises OperatorError."""
    key = (
        operator.evaluate,
        tuple((o.shape, o.dtype) if hasattr(o, "shape") else (type(o), o) for o in operands),
        tuple((name, type(value), value) for name, value in attributes.items()),
    )
    try:
        known = _known.get(key)
    except TypeError:  # an attribute that is no plain value
        return _infer(operator, operands, attributes)
    if known is None:
        if len(_known) >= KNOWN_CALLS:
            _known.clear()
        known = _known[key] = _infer(operator, operands, attributes)
    return known


def _infer(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result]:
    found = infer_shortly(operator, operands, attributes)
    return infer_in_full(operator, operands, attributes) if found is None else found


def infer_shortly(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result] | None:
    """The result of an operator that is pointwise or says its shape; None where torch has to be asked."""
    tensors = [operand for operand in operands if hasattr(operand, "shape")]
    if not tensors:
        return None
    if operator.rule is broadcast_rule:
        return _infer_pointwise(operator, operands, attributes)
    if operator.shape is None:
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = dtypes.pop()
    plain = operator.symmetry is Symmetry.LAYOUT or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    if not isinstance(dtype, torch.dtype):
        return None
    try:
        shape = operator.shape(*operands, **attributes)
        if operator.gives is not None:
            dtype = operator.gives
        elif dtypes or not plain:  # a sum of integers is of another type, what was moved is not
            with torch.no_grad():
                dtype = operator.evaluate(*[_single(operand, 0) for operand in operands], **attributes).dtype
    except Exception:  # a call that is wrong, or not one of single elements: torch says more
        return None
    return None if shape is None else [(tuple(simplify(size) for size in shape), dtype)]


def _infer_pointwise(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result] | None:
    """The broadcast of the operands; torch says of single elements which dtype comes out."""
    others = [operand for operand in operands if not hasattr(operand, "shape")]
    if symbols_in([*others, *attributes.values()]):
        return None
    shape = common_shape([operand.shape for operand in operands if hasattr(operand, "shape")])
    if shape is None:
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=operator.random, devices=()):
            raw = operator.evaluate(*[_single(operand) for operand in operands], **attributes)
    except Exception:  # not every type is computed with on every device: meta tensors have the last word
        return None
    plain = isinstance(raw, torch.Tensor) and raw.shape == (1,) * len(shape)
    return [(shape, raw.dtype)] if plain else None


def _single(operand: Any, value: int = 1) -> Any:
    """A tensor of one element in place of an operand: 0 is a place in all others, by 1 can be divided."""
    if not hasattr(operand, "shape"):
        return operand
    return torch.full((1,) * len(operand.shape), value, dtype=_torch_dtype(operand.dtype))


def common_shape(shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...] | None:
    """The common shape, aligned at the last axis; None where two sizes of an axis are neither equal nor one."""
    result: list[Size] = []
    for place in range(1, max(map(len, shapes), default=0) + 1):
        sizes = {shape[-place] for shape in shapes if len(shape) >= place} - {1}
        size = sizes.pop() if sizes else 1
        for other in sizes:
            met = unclamped(size, other)
            if met is None:
                return None
            size = met
        result.insert(0, size)
    return tuple(result)


def infer_in_full(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result]:
    """The results as torch computes them on tensors without data."""
    symbols = symbols_in([getattr(o, "shape", o) for o in operands]) | symbols_in(list(attributes.values()))
    try:
        if not symbols:
            with torch.no_grad():
                raw = operator.evaluate(*[_meta(o) for o in operands], **attributes)
            return _results(raw, {})
        return _infer_kinked(operator, operands, attributes) or _infer_symbolic(symbols, operator, operands, attributes)
    except RegaugeError:
        raise
    except Exception as error:
        shown = ", ".join(repr(o) for o in operands)
        raise OperatorError(f"{operator.name}({shown}) cannot be evaluated: {first_line(error)}") from error


def _infer_kinked(operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result] | None:
    """The results where sizes are a Min or a Max, each taken for a size of its own; None where there is none.

    Torch would compare the numbers that stand for sizes, and be right for those numbers only: ``Min(3, N)`` is not 3.
    Where the operands do not fit then, limits are lifted: a table cut to ``Min(1024, seq)`` that has to fit ``seq`` is
    long enough wherever the model runs.
    """
    found = [operand.shape for operand in operands if hasattr(operand, "shape")]
    sizes = _expressions([*found, *(o for o in operands if not hasattr(o, "shape")), *attributes.values()])
    kinks = {kink for size in sizes if isinstance(size, sympy.Expr) for kink in kinks_of(size)}
    if not kinks:
        return None
    # names in front of all others: the stand-ins are the smallest, as what is cut out of an axis is shorter than it
    apart = {kink: symbol(f"!{place}") for place, kink in enumerate(sorted(kinks, key=str))}
    back = {own: kink for kink, own in apart.items()}
    try:
        shapes = _infer_replaced(apart, operator, operands, attributes)
        return [(tuple(replaced(size, back) for size in shape), dtype) for shape, dtype in shapes]
    except OperatorError:
        lifted = {kink: without_limit(kink) for kink in kinks}
        if any(kinks_of(size) for size in lifted.values()):
            raise
        return _infer_replaced(lifted, operator, operands, attributes)


def _infer_replaced(
    sizes: Mapping[Any, Size], operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]
) -> list[Result]:
    def other(value: Any) -> Any:
        if hasattr(value, "shape"):
            return _Shaped(other(value.shape), value.dtype)
        if isinstance(value, tuple | list):
            return type(value)(other(part) for part in value)
        return replaced(value, sizes)

    given = {name: other(value) for name, value in attributes.items()}
    operands = [other(operand) for operand in operands]
    symbols = symbols_in([getattr(o, "shape", o) for o in operands]) | symbols_in(list(given.values()))
    return _infer_symbolic(symbols, operator, operands, given)


@dataclass(frozen=True)
class _Shaped:
    """Stands for a tensor of other sizes."""

    shape: tuple[Size, ...]
    dtype: Any


HINTS = (64, 256, 1024, 4096, 16384, 131072)
"""Least stand-ins for dynamic sizes; larger ones where a window does not fit or a derived size comes out small."""


def _infer_symbolic(
    symbols: set[sympy.Symbol], operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]
) -> list[Result]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints the trace of every failed attempt
    sizes = _expressions([getattr(o, "shape", o) for o in operands]) | _expressions(list(attributes.values()))
    fitting = [least for least in HINTS if _telling(sizes, prime_hints(symbols, least))] or [HINTS[-1]]
    try:
        moved = _infer_from_numbers(symbols, operator, operands, attributes, sizes, fitting)
        if moved is not None:
            return moved
        for least in fitting[:-1]:
            try:
                return _SymbolicShapes(symbols, least).infer(operator, operands, attributes)
            except Exception:  # the last attempt says what is wrong
                continue
        return _SymbolicShapes(symbols, fitting[-1]).infer(operator, operands, attributes)
    finally:
        logger.setLevel(level)


def _infer_from_numbers(
    symbols: set[sympy.Symbol],
    operator: Operator,
    operands: Sequence[Any],
    attributes: Mapping[str, Any],
    sizes: set[Any],
    fitting: Sequence[int],
) -> list[Result] | None:
    """The results of an operator that only moves dynamic sizes around, which is most of them and costs little to see.

    It is evaluated with two sets of numbers for the symbols; where every size of the results is the number of the same
    expression both times, or the same number, that is the answer. None means that sizes are computed, or depend.
    """
    expressions = [size for size in sizes | symbols if isinstance(size, sympy.Expr)]
    found: list[list[Result]] = []
    for least in fitting:
        hints = prime_hints(symbols, least)
        names = {evaluate(expression, hints): expression for expression in expressions}
        if len(names) < len(expressions):
            return None
        try:
            with torch.no_grad():
                raw = operator.evaluate(
                    *[_meta_number(o, hints) for o in operands],
                    **{k: evaluate(v, hints) for k, v in attributes.items()},
                )
        except Exception:  # a window that does not fit: larger numbers may
            continue
        found.append([(tuple(names.get(s, s) for s in shape), dtype) for shape, dtype in _results(raw, {})])
        if len(found) == 2:
            return found[0] if found[0] == found[1] else None
    return None


def _meta_number(operand: Any, hints: Mapping[sympy.Symbol, int]) -> Any:
    if hasattr(operand, "shape"):
        return torch.empty(evaluate(operand.shape, hints), dtype=_torch_dtype(operand.dtype), device="meta")
    return evaluate(operand, hints)


def _expressions(value: Any) -> set[Any]:
    """The sizes inside operands' shapes and attributes, numbers included."""
    if isinstance(value, list | tuple):
        return set().union(*(_expressions(v) for v in value)) if value else set()
    return {value} if isinstance(value, sympy.Expr) or type(value) is int else set()


def _telling(sizes: set[Any], hints: Mapping[sympy.Symbol, int]) -> bool:
    """Whether no size comes out so small, or equal to a fixed one, that it would be taken for special."""
    fixed = {size for size in sizes if isinstance(size, int)}
    found = [size.subs(hints) for size in sizes if isinstance(size, sympy.Expr)]
    return all(not number.is_Integer or number > 4 and int(number) not in fixed for number in found)


def _torch_dtype(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise OperatorError(f"tensors of type {dtype} cannot be computed with")
    return dtype


def _meta(operand: Any) -> Any:
    if hasattr(operand, "shape"):
        return torch.empty(operand.shape, dtype=_torch_dtype(operand.dtype), device="meta")
    return operand


def _results(raw: Any, back: Mapping[sympy.Symbol, sympy.Symbol]) -> list[Result]:
    tensors = raw if isinstance(raw, tuple | list) else (raw,)
    return [(tuple(_size(s, back) for s in t.shape), t.dtype) for t in tensors]


def _size(size: Any, back: Mapping[sympy.Symbol, sympy.Symbol]) -> Size:
    if isinstance(size, int):
        return size
    return size_from_symint(size, back)


class _SymbolicShapes:
    """A fake-tensor world in which each of our symbols is a torch SymInt."""

    def __init__(self, symbols: set[sympy.Symbol], least: int) -> None:
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        self.sizes: dict[sympy.Symbol, Any] = {}
        self.back: dict[sympy.Symbol, sympy.Symbol] = {}
        for name, hint in prime_hints(symbols, least).items():
            source = ConstantSource(str(name))
            inner = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self.sizes[name] = environment.create_symintnode(inner, hint=hint, source=source)
            if isinstance(inner, sympy.Symbol):
                self.back[inner] = name

    def infer(self, operator: Operator, operands: Sequence[Any], attributes: Mapping[str, Any]) -> list[Result]:
        with self.mode, enable_python_dispatcher(), torch.no_grad():  # C++ kernels would fix symbolic sizes
            arguments = [self._fake(o) for o in operands]
            raw = operator.evaluate(*arguments, **{k: self.symint(v) for k, v in attributes.items()})
        return _results(raw, self.back)

    def _fake(self, operand: Any) -> Any:
        if hasattr(operand, "shape"):
            return torch.empty([self.symint(s) for s in operand.shape], dtype=_torch_dtype(operand.dtype))
        return self.symint(operand)

    def symint(self, value: Any) -> Any:
        if isinstance(value, sympy.Basic):
            return traced_size(value, self.sizes)
        if isinstance(value, tuple | list):
            return type(value)(self.symint(v) for v in value)
        return value
