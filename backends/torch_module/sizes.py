"""Size expressions as Python expressions: ``floor((s - 1)/2) + 1`` becomes ``(s - 1) // 2 + 1``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import sympy

from regauge.ir.errors import EmitError
from regauge.ir.sizes.expressions import Size

Read = Callable[[sympy.Symbol], ast.expr]
"""How the code at hand reads a symbol, such as ``x.shape[0]``."""


def size_expression(size: Size, read: Read) -> ast.expr:
    """The Python expression of a size; raises EmitError for a function that Python integers do not have."""
    if isinstance(size, int):
        return ast.Constant(int(size))
    if isinstance(size, sympy.Integer):
        return ast.Constant(int(size))
    if isinstance(size, sympy.Symbol):
        return read(size)
    if isinstance(size, sympy.Add):
        return _sum(size, read)
    if isinstance(size, sympy.Mul):
        return _product(size, read)
    if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
        return ast.BinOp(size_expression(size.base, read), ast.Pow(), ast.Constant(int(size.exp)))
    return _function(size, read)


def number_expression(number: Size, read: Read) -> ast.expr:
    """The Python expression of a number computed from sizes: ``s/2`` is ``s / 2``, where a size is ``s // 2``."""
    if isinstance(number, int) or number.is_integer:
        return size_expression(number, read)
    if isinstance(number, sympy.Float):
        return ast.Constant(float(number)) if number >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-float(number)))
    if isinstance(number, sympy.Pow) and not number.exp.is_negative:
        return ast.BinOp(number_expression(number.base, read), ast.Pow(), number_expression(number.exp, read))
    if isinstance(number, sympy.Add):
        return _joined(ast.Add(), number.args, read)
    above, below = number.as_numer_denom()
    if below != 1:
        return ast.BinOp(number_expression(above, read), ast.Div(), number_expression(below, read))
    if isinstance(number, sympy.Mul):
        return _joined(ast.Mult(), number.args, read)
    return size_expression(number, read)


def _joined(operator: ast.operator, parts: Sequence[sympy.Expr], read: Read) -> ast.expr:
    result = number_expression(parts[0], read)
    for part in parts[1:]:
        result = ast.BinOp(result, operator, number_expression(part, read))
    return result


def _rounded(function: str, number: sympy.Expr, read: Read) -> ast.expr:
    """``math.floor`` or ``math.ceil`` of a number that is no quotient of integers, as behind a scale of 1.7."""
    name = ast.Attribute(ast.Name("math", ast.Load()), function, ast.Load())
    return ast.Call(name, [number_expression(number, read)], [])


def _sum(size: sympy.Add, read: Read) -> ast.expr:
    denominator = size.as_numer_denom()[1]
    if denominator != 1:  # an integer all the same: s/2 + t/2 is written (s + t) // 2
        return _quotient(size, read)
    # Symbols first and the constant last, as people write them: x.shape[1] - 1.
    terms = sorted(size.args, key=lambda term: (term.is_number, term.could_extract_minus_sign()))
    result = size_expression(terms[0], read)
    for term in terms[1:]:
        negative = bool(term.could_extract_minus_sign())
        operator: ast.operator = ast.Sub() if negative else ast.Add()
        result = ast.BinOp(result, operator, size_expression(-term if negative else term, read))
    return result


def _product(size: sympy.Mul, read: Read) -> ast.expr:
    if size.as_numer_denom()[1] != 1:
        return _quotient(size, read)
    factors = list(size.args)
    result = size_expression(factors[0], read)
    for factor in factors[1:]:
        result = ast.BinOp(result, ast.Mult(), size_expression(factor, read))
    return result


def _quotient(size: sympy.Expr, read: Read) -> ast.expr:
    numerator, denominator = size.as_numer_denom()
    return ast.BinOp(size_expression(numerator, read), ast.FloorDiv(), size_expression(denominator, read))


def _function(size: sympy.Expr, read: Read) -> ast.expr:
    match size:
        case sympy.floor() if size.has(sympy.Float):
            return _rounded("floor", size.args[0], read)
        case sympy.ceiling() if size.has(sympy.Float):
            return _rounded("ceil", size.args[0], read)
        case sympy.floor():
            return _quotient(size.args[0], read)
        case sympy.ceiling():
            return ast.UnaryOp(ast.USub(), _quotient(-size.args[0], read))
        case sympy.Mod():
            return ast.BinOp(size_expression(size.args[0], read), ast.Mod(), size_expression(size.args[1], read))
        case sympy.Min() | sympy.Max():
            name = "min" if isinstance(size, sympy.Min) else "max"
            return ast.Call(ast.Name(name, ast.Load()), [size_expression(a, read) for a in size.args], [])
    raise EmitError(f"the size {size} has no Python spelling: make the dynamic size it depends on static at capture")


def symbols_in(value: object) -> list[sympy.Symbol]:
    """Symbols of the size expressions inside (nested tuples of) attributes, in a stable order."""
    if isinstance(value, sympy.Basic):
        return sorted(value.free_symbols, key=str)
    if isinstance(value, tuple | list):
        return list(dict.fromkeys(s for part in value for s in symbols_in(part)))
    return []


def solve_for(symbol: sympy.Symbol, size: Size) -> Size | None:
    """``symbol`` in terms of one number ``__size__`` where ``size`` is linear in it and in nothing else, else None."""
    if isinstance(size, int) or size.free_symbols != {symbol}:
        return None
    polynomial = sympy.Poly(size, symbol) if size.is_polynomial(symbol) else None
    if polynomial is None or polynomial.degree() != 1:
        return None
    slope, offset = polynomial.all_coeffs()
    return (SIZE - offset) / slope


SIZE = sympy.Symbol("__size__", integer=True, positive=True)
