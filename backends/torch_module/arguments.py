"""Arguments of torch calls as people write them: defaults left out, options by keyword.

before   F.conv2d(x, self.weight, None, (2, 2), (1, 1), (1, 1), 4)
after    F.conv2d(x, self.weight, stride=(2, 2), padding=(1, 1), groups=4)
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from typing import Any

import torch

from regauge.backends.torch_module.folding import follows
from regauge.backends.torch_module.literals import is_literal, literal_value, parse_expression

_EMPTY = inspect.Parameter.empty


def tidy_calls(expression: ast.expr) -> ast.expr:
    """Tidy every call of a ``torch.`` or ``F.`` function inside an expression, in place."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call):
            _tidy(node)
        elif isinstance(node, ast.Subscript):
            node.slice = _as_slices(node.slice)
    return _Following().visit(expression)  # type: ignore[no-any-return]


_MAKERS = frozenset(
    {"full", "arange", "linspace", "eye", "zeros", "ones", "empty", "rand", "randn", "randint", "tensor"}
)


def place_new_tensors(expression: ast.expr, device: str | None) -> ast.expr:
    """Let tensors that are made from nothing be made where the module runs; ``device`` is source."""
    if device is None:
        return expression
    for node in ast.walk(expression):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in _MAKERS:
                if not any(keyword.arg == "device" for keyword in node.keywords):
                    node.keywords.append(ast.keyword("device", parse_expression(device)))
    return expression


class _Following(ast.NodeTransformer):
    """Writes flags that follow the module, such as ``self.training``, as what they follow."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        source = follows(node)
        return node if source is None else parse_expression(source)


def _as_slices(index: ast.expr) -> ast.expr:
    """``x[(slice(None, None, None), slice(0, 8, 1))]`` is ``x[:, :8]``."""
    match index:
        case ast.Tuple(elts=parts):
            slices = [_as_slices(part) for part in parts]
            # ``x[:3,]`` is ``x[:3]``
            return slices[0] if len(slices) == 1 and isinstance(slices[0], ast.Slice) else ast.Tuple(slices, ast.Load())
        case ast.Call(func=ast.Name(id="slice"), args=[start, stop, step], keywords=[]):
            bounds = [None if isinstance(b, ast.Constant) and b.value is None else b for b in (start, stop, step)]
            if isinstance(step, ast.Constant) and step.value == 1:
                bounds[2] = None
                if isinstance(start, ast.Constant) and start.value == 0:
                    bounds[0] = None
            return ast.Slice(*bounds)
    return index


_SPREAD = frozenset({"reshape", "permute", "expand", "repeat", "view", "tile", "flip"})


def _tidy(call: ast.Call) -> None:
    match call:
        case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[ast.Tuple(elts=sizes)], keywords=[]):
            if sizes and _is_method(owner, name):
                call.args = sizes  # x.reshape((2, 3)) is x.reshape(2, 3)
                return
    match call.func:
        case ast.Attribute(value=ast.Name(id="torch" | "F" | "nn" as module), attr=name):
            parameters = _parameters(module, name, len(call.args))
        case _:
            return
    if parameters is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    while call.args and _is_default(call.args[-1], parameters[len(call.args) - 1][1]):
        call.args.pop()
    defaults = dict(parameters)
    _name_options(call, parameters)
    call.keywords = [k for k in call.keywords if k.arg is None or not _is_default(k.value, defaults.get(k.arg, _EMPTY))]


def _is_method(owner: ast.expr, name: str) -> bool:
    """True for a method of a value, not a function of the torch modules."""
    return name in _SPREAD and not (isinstance(owner, ast.Name) and owner.id in ("torch", "F"))


def _name_options(call: ast.Call, parameters: list[tuple[str, Any]]) -> None:
    """Flags, literal arguments from the fourth on, and those after an absent one are given by keyword."""
    for position, argument in enumerate(call.args):
        if parameters[position][1] is _EMPTY or not is_literal(argument):
            continue
        is_flag = isinstance(argument, ast.Constant) and isinstance(argument.value, bool)
        if position < 3 and not is_flag and not _is_default(argument, parameters[position][1]):
            continue
        rest = zip(parameters[position:], call.args[position:], strict=False)
        named = [ast.keyword(name, value) for (name, _), value in rest]
        if not all(keyword.arg for keyword in named):
            return  # overloads call them differently
        call.args, call.keywords = call.args[:position], [*named, *call.keywords]
        return


def _is_default(argument: ast.expr, default: Any) -> bool:
    if default is _EMPTY or not is_literal(argument) or follows(argument) is not None:
        return False
    value = literal_value(argument)
    if isinstance(default, list | tuple):
        default = tuple(default)
    if isinstance(value, list | tuple) and not isinstance(default, tuple):
        return bool(value) and all(type(part) is type(default) and part == default for part in value)
    return type(value) is type(default) and bool(value == default)


@cache
def _parameters(module: str, name: str, given: int) -> list[tuple[str, Any]] | None:
    """Parameter names and defaults of a torch function that gets so many arguments by position, where they are known.

    They are read off its Python signature, or off its ATen schemas.
    """
    function = getattr({"torch": torch, "F": torch.nn.functional, "nn": torch.nn}[module], name, None)
    if function is None:
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return _schema_parameters(name, given)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
        return _schema_parameters(name, given)
    found = [(parameter.name, parameter.default) for parameter in signature.parameters.values()]
    return found if given <= len(found) else None


def _schema_parameters(name: str, given: int) -> list[tuple[str, Any]] | None:
    """Those of the default overload; of what all overloads agree on where that one takes fewer arguments."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    if "default" in packet.overloads():
        arguments = packet.default._schema.arguments
        if given <= sum(not argument.kwarg_only for argument in arguments):
            return [_name_and_default(argument) for argument in arguments]
    schemas = [getattr(packet, overload)._schema.arguments for overload in packet.overloads()]
    candidates = [found for found in ([a for a in s if not a.kwarg_only] for s in schemas) if len(found) >= given]
    alike = [{_name_and_default(a) for a in place} for place in zip(*candidates, strict=False)]
    return [place.pop() if len(place) == 1 else ("", _EMPTY) for place in alike] if len(alike) >= given else None


def _name_and_default(argument: Any) -> tuple[str, Any]:
    default = argument.default_value if argument.has_default_value() else _EMPTY
    return "input" if argument.name == "self" else argument.name, tuple(default) if isinstance(
        default, list
    ) else default
