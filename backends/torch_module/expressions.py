"""One node as one Python expression, taken from its operator's own semantics.

The body of ``operator.evaluate`` is specialised to the call (see :mod:`regauge.backends.torch_module.folding`). What is
then a single expression is inlined; a longer body is copied into the emitted module once, as a function.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch

from regauge.backends.torch_module.arguments import tidy_calls
from regauge.backends.torch_module.folding import Folder, follows
from regauge.backends.torch_module.literals import is_literal, literal, literal_value, read_attribute, read_name
from regauge.ir.errors import EmitError
from regauge.ir.operator import Operator

LONGEST_INLINED = 180  # characters; a longer specialised body reads better as a function


@dataclass(frozen=True)
class Body:
    """The parsed semantics of an operator, and what its global and closure names mean."""

    function: ast.FunctionDef
    names: Mapping[str, Any]


@cache
def parse_body(function: Callable[..., Any]) -> Body:
    """Raises EmitError where the source is not a plain function."""
    found = [node for node in _functions_of(inspect.getsourcefile(function) or "") if node.name == function.__name__]
    if not found:
        raise EmitError(f"the source of {function.__name__} cannot be read: define the operator with def in a file")
    # By name, and by line only among equals: the file may have been edited since it was imported.
    first = function.__code__.co_firstlineno
    closest = min(found, key=lambda node: abs(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - first))
    closure = inspect.getclosurevars(function)
    return Body(closest, {**closure.builtins, **function.__globals__, **closure.nonlocals})


@cache
def _functions_of(filename: str) -> list[ast.FunctionDef]:
    source = "".join(linecache.getlines(filename))
    try:
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return []


class Helpers:
    """Functions copied into the emitted module because their bodies are longer than one expression."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self._functions: dict[str, Any] = {}

    def add(self, function: FunctionType) -> str:
        """The name under which the emitted module has the function."""
        name = function.__name__.lstrip("_")
        while name in self._functions and self._functions[name] is not function:
            name += "_"
        if name in self._functions:
            return name
        self._functions[name] = function
        self.sources[name] = ""  # keeps the place of a helper before those that call it
        self.sources[name] = self._copied(name, parse_body(function))
        self.sources[name] = self.sources.pop(name)
        return name

    def _copied(self, name: str, body: Body) -> str:
        tree = copy.deepcopy(body.function)
        tree.name, tree.decorator_list = name, []
        tree = Unannotated().visit(tree)
        self.resolve_names(tree, body.names, _local_names(tree))
        return ast.unparse(ast.fix_missing_locations(tree))

    def resolve_names(self, tree: ast.AST, names: Mapping[str, Any], local: set[str]) -> None:
        """Make every global name of the tree mean the same in the emitted module; raises EmitError where it cannot."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and not _is_stored(node) and node.id not in local:
                _become(node, self._meaning(node.id, names))

    def _meaning(self, name: str, names: Mapping[str, Any]) -> ast.expr:
        if name in ("torch", "F", "math", "nn"):
            return read_name(name)
        if name not in names:
            return read_name(name)
        value = names[name]
        if getattr(builtins, name, None) is value:
            return read_name(name)
        if isinstance(value, ModuleType):
            raise EmitError(f"an operator's body uses the module {value.__name__}: it may only use torch, F and math")
        found = _torch_name(value)
        if found is not None:
            return found
        if isinstance(value, FunctionType):
            return read_name(self.add(value))
        return literal(value)


class Unannotated(ast.NodeTransformer):
    """A function without type annotations: they name types that the emitted module does not import."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        self.generic_visit(node)
        return None if node.value is None else ast.Assign([node.target], node.value)


def _become(node: ast.Name, meaning: ast.expr) -> None:
    """Replace a name in place, so that no parent needs to be known."""
    if isinstance(meaning, ast.Name):
        node.id = meaning.id
        return
    node.__class__ = meaning.__class__  # type: ignore[assignment]
    node.__dict__.clear()
    node.__dict__.update(meaning.__dict__)


def _torch_name(value: Any) -> ast.expr | None:
    """``torch.sin`` or ``F.gelu`` for a function of torch, else None."""
    name = getattr(value, "__name__", "")
    for module, prefix in ((torch, "torch"), (torch.nn.functional, "F")):
        if name and getattr(module, name, None) is value:
            return read_attribute(read_name(prefix), name)
    return None


def _local_names(tree: ast.FunctionDef) -> set[str]:
    signatures = [node for node in ast.walk(tree) if isinstance(node, ast.arguments)]
    names = {argument.arg for signature in signatures for argument in _arguments(signature)}
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_stored(n)}
    return names | stored | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n is not tree}


def _is_stored(name: ast.Name) -> bool:
    return isinstance(getattr(name, "ctx", None), ast.Store)  # names made here have no context: they are read


def _arguments(node: ast.arguments) -> list[ast.arg]:
    found = [*node.posonlyargs, *node.args, *node.kwonlyargs, node.vararg, node.kwarg]
    return [argument for argument in found if argument is not None]


def expression(
    operator: Operator, operands: Sequence[ast.expr], attributes: Mapping[str, ast.expr], helpers: Helpers
) -> ast.expr:
    """The call of an operator as an expression over the given operands and attributes."""
    body = parse_body(operator.evaluate)
    known = _arguments_by_name(operator, operands, attributes)
    inlined = _inlined(body, known)
    if inlined is not None:
        local = {n.id for value in known.values() for n in ast.walk(value) if isinstance(n, ast.Name)}
        bound = {n.id for n in ast.walk(inlined) if isinstance(n, ast.Name) and _is_stored(n)}
        bound |= {a.arg for n in ast.walk(inlined) if isinstance(n, ast.Lambda) for a in _arguments(n.args)}
        helpers.resolve_names(inlined, body.names, local | bound)
        return tidy_calls(inlined)
    name = helpers.add(operator.evaluate)  # type: ignore[arg-type]
    defaults = operator.attributes
    keywords = [
        ast.keyword(key, value) for key, value in attributes.items() if not _is_default(value, defaults.get(key))
    ]
    return tidy_calls(ast.Call(read_name(name), list(operands), keywords))


def _is_default(value: ast.expr, default: Any) -> bool:
    return (
        follows(value) is None
        and is_literal(value)
        and literal_value(value) == default
        and type(literal_value(value)) is type(default)
    )


def _arguments_by_name(
    operator: Operator, operands: Sequence[ast.expr], attributes: Mapping[str, ast.expr]
) -> dict[str, ast.expr]:
    known: dict[str, ast.expr] = dict(attributes)
    parameters = operator.signature.parameters
    for position, slot in enumerate(operator.slots):
        if slot.startswith("*"):
            known[slot[1:]] = ast.Tuple(list(operands[position:]), ast.Load())
        elif position < len(operands):
            known[slot] = operands[position]
        else:
            default = parameters[slot].default
            known[slot] = ast.Constant(None) if default is inspect.Parameter.empty else literal(default)
    return known


def _inlined(body: Body, known: Mapping[str, ast.expr]) -> ast.expr | None:
    """The value of a body as one expression, or None where it needs statements."""
    function = body.function
    simple = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    result = _reduced(simple, dict(known), body.names)
    if result is None:
        return None
    if len(simple) > 1 and len(ast.unparse(result)) > LONGEST_INLINED:
        return None
    return result


def _reduced(statements: Sequence[ast.stmt], known: dict[str, ast.expr], names: Mapping[str, Any]) -> ast.expr | None:
    """Run the statements as far as they are known: branches of known tests, assignments that can be put in."""
    pending = list(statements)
    reads: dict[str, int] = {}  # how often each local that is not a plain name or literal has been read
    while pending:
        statement = pending.pop(0)
        match statement:
            case ast.Return(value=value) if value is not None:
                return _folded(value, known, names) if _read_once(value, reads) else None
            case ast.If(test=test, body=body, orelse=other):
                found = _folded(test, known, names)
                if not is_literal(found):
                    return None
                pending = [*(body if literal_value(found) else other), *pending]
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if not _read_once(value, reads):
                    return None
                known[name] = _folded(value, known, names)
                reads[name] = 0
                if is_literal(known[name]) or isinstance(known[name], ast.Name):
                    del reads[name]
            case ast.Pass() | ast.Assert():
                continue
            case _:
                return None
    return None


def _read_once(value: ast.expr, reads: dict[str, int]) -> bool:
    """Count the reads of computed locals; False where one would be computed twice by substituting it."""
    found = [n.id for n in ast.walk(value) if isinstance(n, ast.Name) and n.id in reads]
    for name in found:
        reads[name] += 1
    repeated = any(isinstance(n, ast.ListComp | ast.GeneratorExp | ast.Lambda) for n in ast.walk(value))
    return all(count <= 1 for count in reads.values()) and not (found and repeated)


def _folded(value: ast.expr, known: Mapping[str, ast.expr], names: Mapping[str, Any]) -> ast.expr:
    folded: ast.expr = Folder(known, names).visit(copy.deepcopy(value))
    return folded
