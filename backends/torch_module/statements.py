"""The statements of one forward: a line per node and per call of a child module."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch

from regauge.backends.torch_module.arguments import place_new_tensors
from regauge.backends.torch_module.code import Code, Flowing, Line, symbols_of, variable
from regauge.backends.torch_module.expressions import expression
from regauge.backends.torch_module.folding import following, tensor
from regauge.backends.torch_module.literals import literal, parse_expression, read_attribute, read_name
from regauge.backends.torch_module.results import gives_sequence
from regauge.backends.torch_module.sizes import SIZE, size_expression, solve_for
from regauge.ir.errors import EmitError
from regauge.ir.graph import Node, Operand, Parameter, State, Value
from regauge.ir.ops.attention import SCALED_BY
from regauge.ir.sizes.expressions import Size
from regauge.ir.training_notes import DROPOUT, TRACKED

if TYPE_CHECKING:
    from regauge.backends.torch_module.forward import Forward


class Statements:
    """Writes the lines of one :class:`Code` into it; one ``of_module`` knows whether its module is training."""

    def __init__(self, forward: Forward, code: Code, *, of_module: bool = True) -> None:
        self.forward = forward
        self.code = code
        self.of_module = of_module
        self.numbers: dict[Flowing, int] = {}
        self.alias: dict[Value, ast.expr] = {}
        self.training = bool(forward.graph.metadata.get("torch", {}).get("training", False))

    def write(self, results: Sequence[Operand]) -> None:
        """Write all lines, then what is returned."""
        self._number_arguments()  # first of all: parameters are named by their number
        self._add_symbol_arguments()
        self._number_arguments()
        live = self._live_items(results)
        for item in self.code.items:
            if id(item) not in live:
                continue
            if isinstance(item, Code):
                self._call(item)
            else:
                self.node(item)
        for state in self.forward.states if not self.code.path else ():
            buffer = ast.unparse(self._own(state.before) or self.reference(state.before))
            self.code.lines.append(Line((), f"{buffer}.copy_({self.text(state.after)}{_kept(state)})"))
        self.code.returned = [self.text(result) for result in results]
        self.code.chain = self._is_chain()

    def _number_arguments(self) -> None:
        for argument in self.code.arguments:
            if argument is not None:
                self.number(argument)

    def _live_items(self, results: Sequence[Operand]) -> set[int]:
        """Items that a result, a state or a later live item needs; dead code is not written."""
        needed = {result for result in results if isinstance(result, Value)} | self.forward.needed
        live: set[int] = set()
        for item in reversed(self.code.items):
            outputs = item.results if isinstance(item, Code) else item.outputs
            if any(value in needed for value in outputs):
                live.add(id(item))
                needed.update(v for v in self.forward.reads(item, self.code.path) if isinstance(v, Value))
        return live

    def _is_chain(self) -> bool:
        """Only calls of direct children, one tensor passed along: what nn.Sequential does."""
        if len(self.code.arguments) != 1 or not self.code.lines or len(self.code.calls) != len(self.code.lines):
            return False
        current = variable(0)
        for line in self.code.lines:
            if not line.expression.endswith(f"({current})") or len(line.targets) != 1 or line.targets[0] is None:
                return False
            current = variable(line.targets[0])
        return self.code.returned == [current]

    # Variables -----------------------------------------------------------------------------------------------

    def number(self, value: Flowing) -> int:
        number = self.numbers.setdefault(value, len(self.numbers))
        self.code.hints.setdefault(number, _hint(getattr(value, "name", "")))
        return number

    def fresh(self, hint: str) -> int:
        """A variable that stands for no value, such as a local function."""
        return self.number(sympy.Dummy(hint))

    def reference(self, operand: Operand) -> ast.expr:
        """The expression of an operand: a variable, a tensor of the module, a number or a size."""
        if not isinstance(operand, Value):
            return literal(operand, self.symbol, number=True)
        if operand in self.alias:
            return self.alias[operand]
        own = self._own(operand)
        if own is not None:
            if self.training and operand in self.forward.written and _is_floating(operand):
                # a backward pass reads it again, after it was written
                own = parse_expression(f"{ast.unparse(own)}.clone()")
            return tensor(own, operand)
        if operand not in self.numbers:
            raise EmitError(f"{operand} is read in {self.code.path or 'the root'} before it is computed")
        return tensor(read_name(variable(self.numbers[operand])), operand)

    def _own(self, value: Value) -> ast.expr | None:
        """How this forward reads a tensor of the module itself or of one inside it; None for other values."""
        name = self.forward.places.name_under(value, self.code.path) if isinstance(value, Parameter) else None
        return None if name is None else parse_expression(self.forward.places.access(self.code.path, name))

    def text(self, operand: Operand) -> str:
        return ast.unparse(self.reference(operand))

    # Dynamic sizes -------------------------------------------------------------------------------------------

    def _add_symbol_arguments(self) -> None:
        """Sizes that neither an argument nor an earlier result of this frame shows are passed in as numbers."""
        seen: list[Flowing | None] = list(self.code.arguments)
        for item in self.code.items if self.code.path else ():
            for symbol in symbols_of(item):
                if symbol not in self.code.arguments and _showing(symbol, seen) is None:
                    self.code.arguments.append(symbol)
            seen.extend(v for v in (item.results if isinstance(item, Code) else item.outputs) if self._is_kept(v))

    def symbol(self, symbol: sympy.Symbol) -> ast.expr:
        """How this forward reads a dynamic size, such as ``x.shape[0]``."""
        if symbol in self.numbers:
            return read_name(variable(self.numbers[symbol]))
        found = self._shown(symbol, self.code.arguments) or self._shown(symbol, list(self.numbers))
        if found is None:
            raise EmitError(f"the dynamic size {symbol} cannot be read off any input: make it static at capture")
        return found

    def _shown(self, symbol: sympy.Symbol, values: Sequence[Flowing | None]) -> ast.expr | None:
        found = _showing(symbol, values)
        return None if found is None else size_expression(found[2], lambda _: self._axis(found[0], found[1]))

    def _axis(self, value: Value, axis: int) -> ast.expr:
        shape = read_attribute(tensor(read_name(variable(self.number(value))), value), "shape")
        return ast.Subscript(shape, ast.Constant(axis), ast.Load())

    def _device(self) -> str | None:
        """Where this forward runs, read off its first tensor argument or its first own tensor."""
        for argument in self.code.arguments:
            if isinstance(argument, Value):
                return f"{variable(self.number(argument))}.device"
        places, path = self.forward.places, self.code.path
        own = next(iter(places.below(path)), None)
        return None if own is None else f"{places.access(path, f'{path}.{own}'.lstrip('.'))}.device"

    # Lines ---------------------------------------------------------------------------------------------------

    def _is_kept(self, value: Value) -> bool:
        """Whether a result gets a variable: somebody reads it."""
        return bool(value.uses) or value in self.forward.needed

    def targets(self, outputs: Sequence[Value]) -> tuple[int | None, ...]:
        return tuple(self.number(v) if self._is_kept(v) else None for v in outputs)

    def _call(self, child: Code) -> None:
        places = self.forward.places
        arguments = ["None" if a is None else ast.unparse(self._argument(a)) for a in child.arguments]
        if child.recurrent and len(arguments) == 3:
            arguments = [arguments[0], f"({arguments[1]}, {arguments[2]})"]
        callee = places.access(self.code.path, child.path)
        self.code.calls.append(child.path)
        line = Line(self.targets(child.results), f"{callee}({', '.join(arguments)})", hint=_call_hint(child))
        line.nested = child.recurrent and len(child.results) == 3
        self.code.lines.append(line)

    def _argument(self, argument: Flowing) -> ast.expr:
        return self.symbol(argument) if isinstance(argument, sympy.Symbol) else self.reference(argument)

    def node(self, node: Node) -> None:
        from regauge.backends.torch_module.regions import special_lines

        lines = special_lines(self, node)
        if lines is not None:
            self.code.lines.extend(lines)
            return
        found = self.expression(node)
        results = self.forward.results_of(node)
        if isinstance(found, ast.Name | ast.Attribute) and len(results) == 1:
            self.alias[results[0]] = tensor(_copy_of(found), results[0])
            return
        unpacks = len(results) > 1 or (node not in self.forward.norms and gives_sequence(node))
        flowing = [v for _, v in node.operands() if not self.forward.is_reachable(v, self.code.path)]
        renews = len(flowing) == 1 and len(results) == 1
        line = Line(self.targets(results), ast.unparse(found), unpacks, renews)
        if node in self.forward.rescaled:
            line.functions.append(f"# scale: 1/sqrt({node.metadata[SCALED_BY]}), of the head size before the cut")
        self.code.lines.append(line)

    def _follows(self, node: Node) -> bool:
        """Whether a node does what its module does, training or not."""
        same = node.attributes.get("training", None) == self.training and TRACKED not in node.metadata
        return self.of_module and same

    def expression(self, node: Node) -> ast.expr:
        """The node's own expression over this frame's variables; raises EmitError naming the node."""
        try:
            if node.op == "dropout" and node.attributes.get("p") == 0:
                return self.reference(node.inputs[0])
            operands = [self.reference(operand) for operand in node.inputs]
            attributes: dict[str, Any] = {
                k: literal(v, self.symbol, number=_is_number(node, k)) for k, v in node.attributes.items()
            }
            if node in self.forward.norms:
                attributes["training"] = following(False, "self.training")
            elif self._follows(node):
                attributes["training"] = following(self.training, "self.training")
            share = node.metadata.get(DROPOUT)
            if share and node.op == "attention":
                attributes["dropout_p"] = following(node.attributes["dropout_p"], f"{share} if self.training else 0.0")
            found = expression(node.operator, operands, attributes, self.forward.helpers)
            if share and node.op == "softmax":
                found = parse_expression(f"F.dropout({ast.unparse(found)}, {share}, self.training)")
            return place_new_tensors(found, self._device())
        except EmitError as error:
            raise EmitError(f"{node.label} cannot be written as torch source: {error}") from error


def _is_number(node: Node, attribute: str) -> bool:
    """Whether an attribute may have a fraction, as its operator's signature says."""
    parameter = inspect.signature(node.operator.evaluate).parameters.get(attribute)
    return parameter is not None and "float" in str(parameter.annotation)


def _showing(symbol: sympy.Symbol, values: Sequence[Flowing | None]) -> tuple[Value, int, Size] | None:
    """A tensor and its axis that show a dynamic size, and the size in terms of that axis' own (``SIZE``)."""
    tensors = [value for value in values if isinstance(value, Value)]
    for value in tensors:
        if symbol in value.shape:
            return value, value.shape.index(symbol), SIZE
    for value in tensors:
        for axis, size in enumerate(value.shape):
            solved = solve_for(symbol, size)
            if solved is not None:
                return value, axis, solved
    return None


def _kept(state: State) -> str:
    """A buffer keeps numbers, not how they were computed: else the next backward pass would run through this one."""
    return ".detach()" if _is_floating(state.after) else ""


def _is_floating(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def _copy_of(found: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(found), mode="eval").body


def _hint(name: str) -> str:
    """A readable base for a local name: ``layer1.0/relu_3`` gives ``relu``."""
    base = re.sub(r"\W", "_", re.split(r"[./:]", re.sub(r"\.\d+$", "", name))[-1])
    return re.sub(r"(_?\d+)+$", "", base).strip("_").lower()


def _call_hint(child: Code) -> str:
    """``query = self.query(x)``, but ``x = self.conv1(x)``: convolutions and norms only pass a tensor along."""
    name = child.path.rpartition(".")[2]
    if child.layer is not None and not child.layer.startswith(("nn.Linear", "nn.Embedding")):
        return ""
    return name if name.isidentifier() else ""
