"""Nodes that are not one expression: control flow with local functions, and torch operators kept verbatim."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from regauge.backends.torch_module.code import Line, variable
from regauge.backends.torch_module.expressions import expression
from regauge.backends.torch_module.literals import literal, read_name
from regauge.ir.cost import FUSED
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.operator import Symmetry
from regauge.ir.ops.torch_opaque import OPERAND, find_target, plain_numbers, replace_slots, written_arguments
from regauge.ir.roofline import VIEWS

if TYPE_CHECKING:
    from regauge.backends.torch_module.statements import Statements


def special_lines(statements: Statements, node: Node) -> list[Line] | None:
    """Lines of a node with regions or of an opaque node; None for every other node. Raises EmitError for onnx_call."""
    if node.op == "onnx_call":
        raise EmitError(f"{node.label} is an ONNX operator without a torch form: write this graph with to_onnx()")
    if node.op == "torch_call":
        return _torch_call(statements, node)
    if node.op == FUSED:
        arguments = ", ".join(statements.text(operand) for operand in node.inputs)
        text = f"{statements.forward.functions.name_of(node)}({arguments})"
        return [Line(statements.targets(node.outputs), text, unpacks=len(node.outputs) > 1)]
    if not node.regions:
        return None
    apart = node.op == "cond"
    functions = [_local_function(statements, region, f"branch_{i}", apart) for i, region in enumerate(node.regions)]
    names = [name for name, _ in functions]
    operands = [statements.reference(operand) for operand in node.inputs]
    if node.op == "cond":
        passed = ast.unparse(ast.Tuple(operands[1:], ast.Load()))
        text = f"torch.cond({ast.unparse(operands[0])}, {names[0]}, {names[1]}, {passed})"
    else:
        attributes: dict[str, Any] = {k: literal(v, statements.symbol) for k, v in node.attributes.items()}
        attributes["regions"] = ast.Tuple([read_name(name) for name in names], ast.Load())
        text = ast.unparse(expression(node.operator, operands, attributes, statements.forward.helpers))
    bodies = [line for _, lines in functions for line in lines]
    return [Line(statements.targets(node.outputs), text, unpacks=True, functions=bodies)]


def _local_function(statements: Statements, region: Graph, hint: str, apart: bool) -> tuple[str, list[str]]:
    """The name and the lines of a function inside forward that runs a region.

    Where results have to lie ``apart``, and in one order for all regions, as torch's operators of functions want it,
    what may lie in the memory of what the region reads is copied, and what may lie in another order.
    """
    name = variable(statements.fresh(hint))
    parameters = ", ".join(variable(statements.number(value)) for value in region.inputs)
    statements.forward.needed.update(output for output in region.outputs if isinstance(output, Value))
    outer, statements.code.lines = statements.code.lines, []
    for node in region.nodes:
        statements.node(node)
    inner, statements.code.lines = statements.code.lines, outer
    lines = [f"def {name}({parameters}):"]
    for line in inner:
        lines.extend(f"    {text}" for text in (*line.functions, line.text()))
    texts = [statements.text(output) for output in region.outputs]
    for i, output in enumerate(region.outputs):
        if apart and isinstance(output, Value):
            shared = _may_share(output) or output in region.outputs[:i]
            texts[i] += ".clone(memory_format=torch.contiguous_format)" if shared else ".contiguous()"
    results = ", ".join(texts)
    lines.append(f"    return ({results},)" if len(region.outputs) == 1 else f"    return {results}")
    return name, lines


def _may_share(value: Value) -> bool:
    """Whether a result of a region may lie in the memory of a weight or an operand: one of them, or a view."""
    node = value.producer
    return node is None or node.op in _VIEWS or node.operator.symmetry is Symmetry.LAYOUT


_VIEWS = VIEWS | {"cast"}


def _torch_call(statements: Statements, node: Node) -> list[Line]:
    """A call of ``torch.ops``; a tensor that the operator writes into is cloned first and the clone is a result."""
    target = node.attributes["target"]
    operator = find_target(target)
    functions = [_local_function(statements, region, f"branch_{i}", True) for i, region in enumerate(node.regions)]
    operands = [statements.reference(operand) for operand in node.inputs]
    schema = getattr(operator, "_schema", None)
    results = len(schema.returns) if schema is not None else len(node.outputs)
    listed = schema is None or any("[]" in str(r.type) for r in schema.returns)
    clones: list[Line] = []
    clone_names: list[str] = []
    arguments = node.attributes["arguments"]
    for place in written_arguments(operator):
        if place < len(arguments) and isinstance(arguments[place], str):
            clone = statements.fresh("updated")
            index = int(arguments[place][1:])
            clones.append(Line((clone,), f"{ast.unparse(operands[index])}.clone()"))
            operands[index] = read_name(variable(clone))
            clone_names.append(variable(clone))

    def fill(sign: str, index: int) -> Any:
        return _Marker(operands[index] if sign == OPERAND else read_name(functions[index][0]))

    numbers, fractions = plain_numbers(schema), _fractions(schema)

    def written(key: int | str, value: Any) -> str:
        return _written(replace_slots(value, fill), statements, key in numbers, key in fractions)

    positional = [written(place, value) for place, value in enumerate(arguments)]
    named = [f"{key}={written(key, value)}" for key, value in node.attributes["options"]]
    text = f"torch.ops.{target}({', '.join([*positional, *named])})"
    own = list(node.outputs[: len(node.outputs) - len(clone_names)])
    bodies = [line for _, lines in functions for line in lines]
    call = Line(statements.targets(own), text, unpacks=listed or results > 1, functions=bodies)
    copies = [
        Line(statements.targets([value]), name)
        for value, name in zip(node.outputs[len(own) :], clone_names, strict=True)
    ]
    return [*clones, call, *copies]


class _Marker:
    """An expression in the place of a value inside nested arguments."""

    def __init__(self, expression: ast.expr) -> None:
        self.expression = expression


def _fractions(schema: Any) -> set[int | str]:
    """Positions and names of the arguments that take numbers which are no sizes."""
    arguments = enumerate(schema.arguments if schema is not None else ())
    taken = [(at, given.name) for at, given in arguments if re.search("number|float", str(given.type))]
    return {key for place in taken for key in place}


def _written(value: Any, statements: Statements, as_number: bool, fraction: bool) -> str:
    """An argument as source; where the operator takes numbers, a computed one is read off its tensor."""
    if isinstance(value, _Marker):
        return ast.unparse(value.expression) + (".item()" if as_number else "")
    if isinstance(value, tuple):
        return "[" + ", ".join(_written(part, statements, as_number, fraction) for part in value) + "]"
    return ast.unparse(literal(value, statements.symbol, number=fraction))
