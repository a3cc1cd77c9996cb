"""Our sizes as torch's SymInts, and SymInts as our sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import sympy
import torch

from regauge.ir.errors import OperatorError
from regauge.ir.sizes.expressions import Size, simplify


def size_from_symint(size: Any, back: Mapping[sympy.Symbol, sympy.Symbol]) -> Size:
    """A torch SymInt as one of our sizes: torch's own function classes become sympy's, its symbols ours."""
    if isinstance(size, int):
        return int(size)
    return simplify(plain_sympy(size.node.expr).subs(dict(back), simultaneous=True))


def plain_sympy(expression: Any) -> Any:
    """Replace torch's integer functions (FloorDiv, CleanDiv, ModularIndexing ...) by sympy's floor and Mod."""
    if not isinstance(expression, sympy.Basic) or not expression.args:
        return expression
    args = [plain_sympy(a) for a in expression.args]
    match type(expression).__name__:
        case "FloorDiv":
            return sympy.floor(args[0] / args[1])
        case "CleanDiv" | "IntTrueDiv":
            return args[0] / args[1]
        case "CeilDiv":
            return sympy.ceiling(args[0] / args[1])
        case "PythonMod" | "Mod":
            return sympy.Mod(args[0], args[1])
        case "ModularIndexing":
            return sympy.Mod(sympy.floor(args[0] / args[1]), args[2])
        case "FloorToInt" | "TruncToInt":
            return sympy.floor(args[0])
        case "CeilToInt":
            return sympy.ceiling(args[0])
        case "ToFloat" | "Identity":
            return args[0]
        case "FloatTrueDiv":
            return args[0] / args[1]
        case "FloatPow" | "PowByNatural":
            return args[0] ** args[1]
        case "OpaqueUnaryFn_sqrt":
            return args[0] ** sympy.Float(0.5)
        case "Max":
            return sympy.Max(*args)
        case "Min":
            return sympy.Min(*args)
    return expression.func(*args)


def traced_size(value: Any, sizes: Mapping[sympy.Symbol, Any]) -> Any:
    """A size over the SymInts of its symbols, without leaving the integers: torch's algebra loses track of floats."""

    def of(part: Any) -> Any:
        return traced_size(part, sizes)

    if isinstance(value, sympy.Symbol):
        return sizes[value]
    if value.is_Integer:
        return int(value)
    if value.is_Float:
        return float(value)
    parts = value.args
    match type(value).__name__:
        case "floor":
            top, bottom = sympy.together(parts[0]).as_numer_denom()
            return of(sympy.expand(top)) // of(bottom)
        case "ceiling":
            top, bottom = sympy.together(parts[0]).as_numer_denom()
            return -(-of(sympy.expand(top)) // of(bottom))
        case "Mod":
            return of(parts[0]) % of(parts[1])
        case "Min":
            return reduce(torch.sym_min, [of(p) for p in parts])
        case "Max":
            return reduce(torch.sym_max, [of(p) for p in parts])
    top, bottom = sympy.together(value).as_numer_denom()
    if bottom != 1:
        return of(sympy.expand(top)) // of(bottom)
    if value.is_Add:
        return sum(of(p) for p in parts)
    if value.is_Mul:
        return math.prod(of(p) for p in parts)
    if value.is_Pow and (parts[1].is_Float or (parts[1].is_Integer and parts[1] > 0)):
        return of(parts[0]) ** of(parts[1])
    raise OperatorError(f"the size {value} is no integer arithmetic")
