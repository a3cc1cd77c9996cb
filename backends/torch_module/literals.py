"""Attribute values as Python source: numbers, tuples, types, and sizes that are expressions."""

from __future__ import annotations

import ast
import math
from typing import Any

import sympy
import torch

from regauge.backends.torch_module.sizes import Read, number_expression, size_expression
from regauge.ir.errors import EmitError


def parse_expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def read_name(identifier: str) -> ast.Name:
    return ast.Name(identifier, ast.Load())


def read_attribute(owner: ast.expr, name: str) -> ast.Attribute:
    return ast.Attribute(owner, name, ast.Load())


def literal(value: Any, read: Read | None = None, *, number: bool = False) -> ast.expr:
    """The expression of an attribute; ``read`` spells the symbols of sizes. Raises EmitError for other objects.

    An expression of sizes is a size itself, an integer, or a ``number``, which may have a fraction.
    """
    if isinstance(value, sympy.Basic):
        if read is None:
            raise EmitError(f"the dynamic size {value} stands where only a fixed size can")
        return number_expression(value, read) if number else size_expression(value, read)
    if value is None or value is Ellipsis or isinstance(value, bool | int | str | bytes):
        return _signed(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, complex):
        return ast.Call(read_name("complex"), [_number(value.real), _number(value.imag)], [])
    if isinstance(value, tuple):
        return ast.Tuple([literal(part, read) for part in value], ast.Load())
    if isinstance(value, list):
        return ast.List([literal(part, read) for part in value], ast.Load())
    if isinstance(value, dict):
        return ast.Dict([literal(key) for key in value], [literal(part, read) for part in value.values()])
    if isinstance(value, slice):
        return ast.Call(read_name("slice"), [literal(v, read) for v in (value.start, value.stop, value.step)], [])
    return _torch_object(value)


def _signed(value: Any) -> ast.expr:
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def _number(value: float) -> ast.expr:
    if math.isfinite(value):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)
    if math.isnan(value):
        return read_attribute(read_name("math"), "nan")
    infinity = read_attribute(read_name("math"), "inf")
    return ast.UnaryOp(ast.USub(), infinity) if value < 0 else infinity


def _torch_object(value: Any) -> ast.expr:
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return read_attribute(read_name("torch"), str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return ast.Call(read_attribute(read_name("torch"), "device"), [ast.Constant(str(value))], [])
    raise EmitError(f"{value!r} of type {type(value).__name__} cannot be written as source: use a plain Python value")


def is_literal(expression: ast.expr) -> bool:
    """True where the expression reads no variable: numbers, strings, tuples, ``torch.float32``, ``-math.inf``."""
    match expression:
        case ast.Constant():
            return True
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return is_literal(operand)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return all(is_literal(part) for part in parts)
        case ast.Attribute(value=ast.Name(id="torch" | "math"), attr=name):
            return name in ("inf", "nan", "pi") or isinstance(getattr(torch, name, None), torch.dtype)
    return False


def literal_value(expression: ast.expr) -> Any:
    """The value of an expression for which :func:`is_literal` holds."""
    code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<literal>", "eval")
    return eval(code, {"torch": torch, "math": math})
