"""Sizes of axes: ints, or sympy expressions over the dynamic sizes a user named (batch, sequence).

A size is an ``int`` wherever it can be: helpers have a fast path for ints and return an int when the result is one.
Symbols are created with :func:`symbol` so that two frontends that name a size alike mean the same sympy symbol.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeAlias

import sympy

from regauge.ir.errors import RegaugeError

Size: TypeAlias = int | sympy.Expr
Bindings: TypeAlias = Mapping[sympy.Symbol, int]


class UnknownRank(tuple[Size, ...]):
    """The shape of a value whose number of axes nobody knows before the model runs; it has none to look at.

    Only nodes that are kept as they are read or give such values. It is no scalar, and no other shape equals it.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownRank)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, UnknownRank)

    __hash__ = tuple.__hash__


UNKNOWN_RANK = UnknownRank()


@cache
def symbol(name: str) -> sympy.Symbol:
    """The symbol of a dynamic size; sizes are positive integers."""
    return sympy.Symbol(name, integer=True, positive=True)


def simplify(size: Any) -> Size:
    """An int where the value is one, else an expanded sympy expression (so that equal sizes are structurally equal)."""
    if isinstance(size, int):
        return int(size)
    expression = sympy.expand(size)
    return int(expression) if expression.is_Integer else expression


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total if isinstance(total, int) else simplify(total)


def total(sizes: Iterable[Size]) -> Size:
    result: Size = 0
    for size in sizes:
        result = result + size
    return result if isinstance(result, int) else simplify(result)


def same(a: Size, b: Size) -> bool:
    """True when the sizes are equal for every value of their symbols; what cannot be decided is not the same."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or simplify(a - b) == 0


def may_be_same(a: Size, b: Size) -> bool:
    """True when the sizes are equal for some values of their symbols, as far as can be told."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = sympy.sympify(simplify(a - b))
    return difference == 0 or not (difference.is_number or difference.is_positive or difference.is_negative)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` when that is an integer for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(b, int) and b == 0:
        return None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if quotient.as_numer_denom()[1] != 1:
        return None
    if any(number.q != 1 for number in quotient.atoms(sympy.Rational)):
        return None
    return simplify(quotient)


def floor_divide(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide(a, b)
    return exact if exact is not None else sympy.floor(sympy.sympify(a) / b)


def is_static(size: Size) -> bool:
    return isinstance(size, int)


def evaluate(value: Any, bindings: Bindings) -> Any:
    """Replace every size expression inside (nested tuples and lists of) attributes by its value.

    That is an integer, or a float for a number computed from sizes such as ``seq**0.5``.
    """
    if isinstance(value, sympy.Basic):
        result = value.subs(dict(bindings))
        if result.is_real and result.is_number and not result.is_Integer:
            return float(result)
        if not result.is_Integer:
            missing = ", ".join(sorted(str(s) for s in result.free_symbols)) or str(result)
            raise RegaugeError(f"size {value} has no value: bind {missing} (give inputs whose shapes fix it)")
        return int(result)
    if isinstance(value, tuple):
        return tuple(evaluate(v, bindings) for v in value)
    if isinstance(value, list):
        return [evaluate(v, bindings) for v in value]
    return value


def solve_bindings(shape: Iterable[Size], actual: Iterable[int], bindings: dict[sympy.Symbol, int]) -> None:
    """Read the values of symbols off an actual shape; only bare symbols bind, expressions are checked later."""
    for size, number in zip(shape, actual, strict=True):
        if isinstance(size, sympy.Symbol):
            bindings.setdefault(size, int(number))


_FUNCTIONS: dict[str, Any] = {"Min": sympy.Min, "Max": sympy.Max, "floor": sympy.floor, "ceiling": sympy.ceiling,
                              "ceil": sympy.ceiling, "Mod": sympy.Mod}  # fmt: skip


def parse_size(text: str | int) -> Size:
    """Parse a size expression such as ``((s53 - 1)//2) + 1`` or ``seq*batch``; never evaluates code.

    Raises RegaugeError when the text is not an arithmetic expression over names and integers.
    """
    if isinstance(text, int):
        return text
    try:
        size = simplify(_parse_node(ast.parse(text, mode="eval").body))
        if isinstance(size, int) or size.free_symbols:  # a number computed from sizes may be a fraction, a size not
            return size
    except (SyntaxError, KeyError, RecursionError, ValueError):
        pass
    raise RegaugeError(f"{text!r} is not a size: expected integers, names, + - * //, Min, Max, floor, Mod")


def _parse_node(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return sympy.Integer(number)
        case ast.Constant(value=float(number)):
            return sympy.Float(number)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse_node(operand)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _parse_node(left), _parse_node(right)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return sympy.floor(a / b)
                case ast.Div():
                    return a / b
                case ast.Mod():
                    return sympy.Mod(a, b)
                case ast.Pow() if b.is_Float or (b.is_Integer and 0 <= b <= 8):
                    return a**b
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _FUNCTIONS[name](*[_parse_node(arg) for arg in args])
    raise ValueError("not a size")


def format_size(size: Size) -> str:
    """Text that :func:`parse_size` reads back."""
    return str(size).replace(" ", "")


def hint(size: Size, bindings: Bindings) -> int:
    """A concrete stand-in for a size, for meta evaluation."""
    return size if isinstance(size, int) else int(evaluate(size, bindings))


def prime_hints(symbols: Iterable[sympy.Symbol], avoid: int = 64) -> dict[sympy.Symbol, int]:
    """Distinct primes for symbols, so that coincidences of sizes cannot hide in a meta evaluation."""
    hints: dict[sympy.Symbol, int] = {}
    candidate = avoid
    for name in sorted(symbols, key=str):
        candidate = int(sympy.nextprime(candidate))
        hints[name] = candidate
    return hints


def count(shape: Iterable[Size]) -> Size:
    """Number of elements of a shape."""
    return product(shape)
