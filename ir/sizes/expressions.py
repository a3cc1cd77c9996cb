"""Sizes of axes: ints, or sympy expressions over the dynamic sizes a user named (batch, sequence).

A size is an ``int`` wherever it can be: helpers have a fast path for ints and return an int when the result is one.
Symbols are created with :func:`symbol` so that two frontends that name a size alike mean the same sympy symbol.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any, TypeAlias

import sympy

from regauge.ir.errors import RegaugeError
from regauge.ir.sizes.numbers import fingerprint, number_at, takes_both_signs

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
    return _simplified(size)


@lru_cache(maxsize=1 << 14, typed=True)
def _simplified(size: Any) -> Size:
    """Sizes recur all over a graph, and those with limits take sympy milliseconds."""
    expression = sympy.expand(size)
    if expression.has(sympy.Min, sympy.Max):
        expression = _evaluated(expression)
        expression = _with_one_kink(sympy.expand(_over_kinks(expression)), expression)
    return int(expression) if expression.is_Integer else expression


def _evaluated(expression: Any) -> Any:
    """The same, made anew: sympy leaves a ``Max(1, 2)`` behind where it takes a common limit out of a Max."""
    parts = [_evaluated(part) for part in expression.args]
    return _made(expression.func, *parts) if parts else expression


@lru_cache(maxsize=1 << 12)
def _made(kind: Any, *parts: Any) -> Any:
    """An expression from its parts. Sympy takes milliseconds to find that neither side of a limit is always reached."""
    if kind in (sympy.Min, sympy.Max) and len(parts) == 2 and not any(part.has(sympy.Min, sympy.Max) for part in parts):
        return kind(*parts, evaluate=not takes_both_signs(parts[0] - parts[1]))
    return kind(*parts)


def _over_kinks(expression: Any) -> Any:
    """Each Min and Max of two sizes as a sum with ``Min(0, d)``: ``N - Min(2, N)`` and ``Max(0, N - 2)`` become one.

    The sign of ``d`` is that of its canonical form: ``Min(0, -d)`` is ``Min(0, d) - d``, and a Max is a negated Min.
    """
    if not expression.has(sympy.Min, sympy.Max):
        return expression
    parts = [sympy.expand(_over_kinks(part)) for part in expression.args]
    if not isinstance(expression, sympy.Min | sympy.Max) or len(parts) != 2:
        return _made(expression.func, *parts)
    first, difference = parts[0], sympy.expand(parts[1] - parts[0])
    if isinstance(expression, sympy.Max):
        return first + difference - _below_zero(difference)
    return first + _below_zero(difference)


def _below_zero(difference: Any) -> Any:
    if difference.could_extract_minus_sign():
        return difference + _made(sympy.Min, sympy.Integer(0), sympy.expand(-difference))
    return _made(sympy.Min, sympy.Integer(0), difference)


def _with_one_kink(expression: Any, otherwise: Any) -> Any:
    """A sum with at most one ``Min(0, d)`` as the Min or Max that people would write; other sums stay as they were."""
    kinks = [term for term in sympy.Add.make_args(expression) if term.has(sympy.Min)]
    if not kinks:
        return expression
    kink, rest = kinks[0], expression - kinks[0]
    if len(kinks) == 1 and isinstance(kink, sympy.Min):
        return _made(sympy.Min, *(sympy.expand(rest + part) for part in kink.args))
    if len(kinks) == 1 and isinstance(-kink, sympy.Min):
        return _made(sympy.Max, *(sympy.expand(rest - part) for part in (-kink).args))
    return otherwise


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
    return a == b or not _plainly_differ(a, b) and simplify(a - b) == 0


def _plainly_differ(a: Size, b: Size) -> bool:
    """Whether sizes differ for some values of their symbols, by a few of them."""
    one, other = fingerprint(sympy.sympify(a)), fingerprint(sympy.sympify(b))
    return one is not None and other is not None and one != other


def symbols_in(value: Any) -> set[sympy.Symbol]:
    """The symbols of the sizes inside (nested lists and tuples of) attributes."""
    if isinstance(value, sympy.Basic):
        return set(value.free_symbols)
    if isinstance(value, list | tuple):
        return set().union(*(symbols_in(v) for v in value)) if value else set()
    return set()


def kinks_of(size: Any) -> set[Any]:
    """The outermost Min and Max in a size."""
    if isinstance(size, sympy.Min | sympy.Max):
        return {size}
    return set().union(*map(kinks_of, size.args)) if size.args else set()


def replaced(value: Any, parts: Mapping[Any, Size]) -> Any:
    """A size with other sizes in the place of parts of it; what is no expression stays."""
    return simplify(value.subs(dict(parts), simultaneous=True)) if isinstance(value, sympy.Basic) else value


def without_limit(size: Any) -> Any:
    """A size with each limit of it, a number, lifted: of ``Min(1024, seq)`` that is ``seq``."""
    if isinstance(size, int) or not size.args:
        return size
    parts = [without_limit(part) for part in size.args]
    if isinstance(size, sympy.Min) and len(parts) == 2 and parts[0].is_Integer and parts[0] > 1:
        return parts[1]
    return size.func(*parts)


def unclamped(a: Size, b: Size) -> Size | None:
    """The common size of two axes that have to fit each other, where one is the other up to a limit; else None.

    Wherever ``Min(1024, seq)`` fits ``seq``, by being equal to it or 1, the limit is not reached (or nothing is left of
    what was limited, which no model is made for).
    """
    for size, other in ((a, b), (b, a)):
        if not isinstance(other, int) and same(size, simplify(without_limit(other))):
            return size
    return None


def at_least(size: Size, least: int) -> bool:
    """True when the size is at least so large for every value of its symbols, as far as can be told."""
    if isinstance(size, int):
        return size >= least
    numbers = fingerprint(size)
    return (numbers is None or min(numbers) >= least) and bool(sympy.sympify(size - least).is_nonnegative)


def may_be_same(a: Size, b: Size) -> bool:
    """True when the sizes are equal for some values of their symbols, as far as can be told."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    one, other = fingerprint(sympy.sympify(a)), fingerprint(sympy.sympify(b))
    if one is not None and other is not None and any(map(operator.eq, one, other)):
        return True
    difference = sympy.sympify(simplify(a - b))
    return difference == 0 or not (difference.is_number or difference.is_positive or difference.is_negative)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` when that is an integer for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return None if isinstance(b, int) and b == 0 else _quotient(a, b)


@lru_cache(maxsize=1 << 12, typed=True)
def _quotient(a: Any, b: Any) -> Size | None:
    if b == 1:
        return simplify(a)
    terms = _plain_terms(a) if isinstance(b, int) else None
    if terms is None:
        quotient = sympy.cancel(sympy.sympify(a) / b)
        if quotient.as_numer_denom()[1] != 1:
            return None
    elif any(factor % b for factor, _ in terms):
        return None
    else:
        quotient = sympy.Add(*(factor // b * rest for factor, rest in terms))
    if any(number.q != 1 for number in quotient.atoms(sympy.Rational)):
        return None
    return simplify(quotient)


_PLAIN = (sympy.Symbol, sympy.floor, sympy.ceiling, sympy.Min, sympy.Max, sympy.Mod)


def _plain_terms(size: Any) -> list[tuple[int, Any]] | None:
    """A size as a sum of integers times products of integers (symbols, floors, limits); None where it is no such sum.

    To take one apart is faster by far than to let sympy simplify a quotient of it.
    """
    found = []
    for term in sympy.Add.make_args(sympy.sympify(size)):
        factor, rest = term.as_coeff_Mul()
        if not factor.is_Integer or not (
            rest == 1 or all(isinstance(part, _PLAIN) for part in sympy.Mul.make_args(rest))
        ):
            return None
        found.append((int(factor), rest))
    return found


def floor_divide(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide(a, b)
    return exact if exact is not None else _floor(a, b)


@lru_cache(maxsize=1 << 12, typed=True)
def _floor(a: Any, b: Any) -> Size:
    """The floor of a quotient that is no integer: what is divisible stands in front of it."""
    terms = _plain_terms(a) if isinstance(b, int) and b > 0 else None
    if terms is None:
        found: Size = sympy.floor(sympy.sympify(a) / b)
        return found
    whole: list[Any] = []
    parts: list[Any] = []
    for factor, rest in terms:
        quotient = sympy.Rational(factor, b)
        (whole if _divides(int(quotient.q), rest) else parts).append(quotient * rest)
    if all(part.is_number for part in parts):
        return simplify(sympy.Add(*whole, *(part.p // part.q for part in parts)))
    return sympy.Add(*whole) + sympy.floor(sympy.Add(*parts), evaluate=False)


def _divides(number: int, size: Any) -> bool:
    """Whether a number plainly divides a product of plain parts: of a limit it divides both sides."""
    if number == 1:
        return True
    limits = [part.args for part in sympy.Mul.make_args(size) if isinstance(part, sympy.Min | sympy.Max)]
    sides = [[_plain_terms(side) for side in limit] for limit in limits]
    return any(all(side and all(factor % number == 0 for factor, _ in side) for side in limit) for limit in sides)


def is_static(size: Size) -> bool:
    return isinstance(size, int)


_WHOLE = frozenset({int, bool, float, str, type(None)})  # types of what holds no size


def evaluate(value: Any, bindings: Bindings) -> Any:
    """Replace every size expression inside (nested tuples and lists of) attributes by its value.

    That is an integer, or a float for a number computed from sizes such as ``seq**0.5``.
    """
    kind = type(value)
    if kind in _WHOLE or (kind is tuple and all(type(each) in _WHOLE for each in value)):
        return value  # nearly always: this runs for every attribute of every node of every run
    if isinstance(value, sympy.Basic):
        number = number_at(value, bindings)
        if number is not None:
            return number if isinstance(number, int) else float(number)
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


@lru_cache(maxsize=1 << 14)
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
