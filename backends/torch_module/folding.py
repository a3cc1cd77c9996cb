"""Partial evaluation of an operator's Python body for one call: ranks, types, sizes and attributes are known there.

before   (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, stride, padding, dilation, groups)
after    F.conv2d(x, self.weight, None, (2, 2), (1, 1), (1, 1), 1)
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.backends.torch_module.literals import is_literal, literal, literal_value
from regauge.ir.errors import EmitError
from regauge.ir.graph import Value

_LIBRARIES = ("torch", "F", "nn")
_FOLDED = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Subscript, ast.Call, ast.ListComp)


def following(value: bool | float, source: str) -> ast.expr:
    """A flag that is known while folding, and that is written as ``source`` where it survives."""
    flag = ast.Constant(value)
    flag.source = source  # type: ignore[attr-defined]
    return flag


def follows(expression: ast.AST) -> str | None:
    return getattr(expression, "source", None)


def tensor(expression: ast.expr, value: Value) -> ast.expr:
    """Remember which Value an expression stands for, so that its rank, type and sizes can be folded."""
    expression.tensor = value  # type: ignore[attr-defined]
    return expression


def tensor_of(expression: ast.AST) -> Value | None:
    return getattr(expression, "tensor", None)


class Folder(ast.NodeTransformer):
    """Substitutes the parameters of a body and evaluates what is known; works bottom-up, in place."""

    def __init__(self, known: Mapping[str, ast.expr], scope: Mapping[str, Any]) -> None:
        self.known = dict(known)
        self.scope = scope  # global names of the body: modules, functions, tables

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(getattr(node, "ctx", None), ast.Store) or node.id not in self.known:
            return node
        return self.known[node.id]

    def visit(self, node: ast.AST) -> Any:
        if tensor_of(node) is not None:
            return node
        found = super().visit(node)
        if isinstance(found, ast.Call):
            found = _splat(found)
        if isinstance(found, ast.expr):
            found = _known_of_tensor(found) or _none_test(found) or _choice(found) or found
        if isinstance(found, _FOLDED) and not is_literal(found) and self._is_pure(found):
            return self._evaluated(found)
        return found

    def _is_pure(self, node: ast.AST) -> bool:
        if tensor_of(node) is not None or isinstance(node, ast.Lambda):
            return False
        if is_literal(node):  # type: ignore[arg-type]
            return True
        if isinstance(node, ast.Name):
            return node.id not in _LIBRARIES and not node.id.startswith("self")
        return all(self._is_pure(child) for child in ast.iter_child_nodes(node))

    def _evaluated(self, node: ast.expr) -> ast.expr:
        try:
            code = compile(ast.fix_missing_locations(ast.Expression(node)), "<folded>", "eval")
            return literal(eval(code, {**self.scope, "__builtins__": builtins.__dict__}))
        except (EmitError, NameError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, SyntaxError):
            return node  # it depends on something only a run knows


def _known_of_tensor(node: ast.expr) -> ast.expr | None:
    """``x.dim()``, ``x.shape[1]``, ``x.dtype == torch.bool``, ``isinstance(x, torch.Tensor)`` where they are known."""
    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr="dim" | "ndimension"), args=[]) if value := tensor_of(owner):
            return ast.Constant(value.rank)
        case ast.Attribute(value=owner, attr="ndim") if value := tensor_of(owner):
            return ast.Constant(value.rank)
        case ast.Call(func=ast.Attribute(value=owner, attr="is_floating_point" | "is_complex" as test), args=[]):
            return _dtype_flag(tensor_of(owner), test)
        case ast.Attribute(
            value=ast.Attribute(value=owner, attr="dtype"), attr="is_floating_point" | "is_complex" as test
        ):
            return _dtype_flag(tensor_of(owner), test)
        case ast.Call(func=ast.Name(id="isinstance"), args=[subject, ast.Attribute(attr="Tensor")]):
            if tensor_of(subject) is not None or is_literal(subject):
                return ast.Constant(tensor_of(subject) is not None)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Attribute(value=owner, attr="shape")]):
            return ast.Constant(value.rank) if (value := tensor_of(owner)) else None
        case ast.Call(func=ast.Attribute(value=owner, attr="size"), args=[index]) if value := tensor_of(owner):
            return _static_size(value, index)
        case ast.Subscript(value=ast.Attribute(value=owner, attr="shape"), slice=index) if value := tensor_of(owner):
            return _static_size(value, index)
        case ast.Compare(left=ast.Attribute(value=owner, attr="dtype"), ops=[operator], comparators=[right]):
            return _dtype_test(tensor_of(owner), operator, right)
    return None


def _dtype_flag(value: Value | None, test: str) -> ast.expr | None:
    if value is None or not isinstance(value.dtype, torch.dtype):
        return None
    return ast.Constant(bool(getattr(value.dtype, test)))


def _dtype_test(value: Value | None, operator: ast.cmpop, right: ast.expr) -> ast.expr | None:
    other: Any = None
    if (peer := getattr(right, "value", None)) is not None and getattr(right, "attr", "") == "dtype":
        other = getattr(tensor_of(peer), "dtype", None)
    elif is_literal(right):
        other = literal_value(right)
    if value is None or other is None:
        return None
    match operator:
        case ast.Eq() | ast.Is():
            return ast.Constant(value.dtype == other)
        case ast.NotEq() | ast.IsNot():
            return ast.Constant(value.dtype != other)
        case ast.In():
            return ast.Constant(value.dtype in other)
        case ast.NotIn():
            return ast.Constant(value.dtype not in other)
    return None


def _static_size(value: Value, index: ast.expr) -> ast.expr | None:
    """The size, or the run of sizes, that an index of a shape picks, where it is the same in every run."""
    if isinstance(index, ast.Slice):
        bounds = (index.lower, index.upper, index.step)
        if not all(bound is None or is_literal(bound) for bound in bounds):
            return None
        picked = value.shape[slice(*(None if bound is None else literal_value(bound) for bound in bounds))]
        return literal(tuple(picked)) if all(isinstance(size, int) for size in picked) else None
    if not is_literal(index):
        return None
    size = value.shape[literal_value(index)]
    return ast.Constant(size) if isinstance(size, int) else None


def _none_test(node: ast.expr) -> ast.expr | None:
    match node:
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as operator], comparators=[ast.Constant(value=None)]):
            if isinstance(left, ast.Name) and tensor_of(left) is None:
                return None  # a local of the body: not known here
            absent = isinstance(left, ast.Constant) and left.value is None
            return ast.Constant(absent == isinstance(operator, ast.Is))
    return None


def _choice(node: ast.expr) -> ast.expr | None:
    """The branch taken by a conditional whose test is known, and the item picked from a written tuple."""
    match node:
        case ast.IfExp(test=test, body=body, orelse=other) if is_literal(test):
            return body if literal_value(test) else other
        case ast.Subscript(value=ast.Tuple(elts=parts) | ast.List(elts=parts), slice=index):
            if is_literal(index) and not any(isinstance(part, ast.Starred) for part in parts):
                picked: ast.expr = parts[literal_value(index)]
                return picked
        case ast.BoolOp(op=operator, values=values):
            return _shortened(operator, values)
        case ast.BinOp(left=ast.Tuple(elts=first), op=ast.Add(), right=ast.Tuple(elts=second)):
            return ast.Tuple([*first, *second], ast.Load())
        case ast.BinOp(left=ast.Tuple(elts=parts), op=ast.Mult(), right=ast.Constant(value=int(count))):
            return ast.Tuple(parts * count, ast.Load())
        case ast.Call(func=ast.Name(id="len"), args=[ast.Tuple(elts=parts) | ast.List(elts=parts)]):
            return ast.Constant(len(parts))
        case ast.Call(func=ast.Name(id="list"), args=[ast.Tuple(elts=parts)], keywords=[]):
            return ast.List(parts, ast.Load())
        case ast.Call(func=ast.Name(id="tuple"), args=[ast.Tuple(elts=parts) | ast.List(elts=parts)], keywords=[]):
            return ast.Tuple(parts, ast.Load())
    return None


def _shortened(operator: ast.boolop, values: Sequence[ast.expr]) -> ast.expr | None:
    """``and`` / ``or`` without the operands that are known not to decide."""
    decisive = isinstance(operator, ast.Or)
    rest: list[ast.expr] = []
    for value in values:
        if not is_literal(value):
            rest.append(value)
        elif bool(literal_value(value)) == decisive or value is values[-1]:
            rest.append(value)
            break
    if len(rest) == len(values):
        return None
    return rest[0] if len(rest) == 1 else ast.BoolOp(operator, rest)


def _splat(call: ast.Call) -> ast.Call:
    """``f(*(a, b))`` is ``f(a, b)``."""
    arguments: list[ast.expr] = []
    for argument in call.args:
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List):
            arguments.extend(argument.value.elts)
        else:
            arguments.append(argument)
    call.args = arguments
    return call
