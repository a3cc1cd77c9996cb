"""The forward code of one frame: statements over numbered variables, and what flows in and out.

Variables are written ``v__3__`` here; :mod:`regauge.backends.torch_module.naming` gives them names. Two calls of one
module, and two equal blocks, have equal code in this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy

from regauge.backends.torch_module.sizes import symbols_in
from regauge.ir.graph import Node, Value

VARIABLE = re.compile(r"\bv__(\d+)__")
Flowing: TypeAlias = "Value | sympy.Symbol"
"""What a frame may get as an argument: a tensor, or a dynamic size it cannot read off its tensors."""


@dataclass
class Line:
    """One statement: ``targets = expression``. Region bodies come before it as lines of local functions."""

    targets: tuple[int | None, ...]  # None for a result that nobody reads
    expression: str
    unpacks: bool = False  # the expression is a sequence, even if there is one target
    renews: bool = False  # the result is a new version of its only operand, and may take over its name
    functions: list[str] = field(default_factory=list)
    hint: str = ""
    nested: bool = False  # the second and third result come as a pair

    def reads(self) -> list[int]:
        text = "\n".join([*self.functions, self.expression])
        return [int(number) for number in VARIABLE.findall(text)]

    def text(self) -> str:
        if not self.targets:
            return self.expression
        names = ["_" if target is None else variable(target) for target in self.targets]
        return f"{self.left(names)} = {self.expression}"

    def left(self, names: Sequence[str]) -> str:
        """The left side of the statement with these names for the targets."""
        if self.nested:
            return f"{names[0]}, _" if set(names[1:]) == {"_"} else f"{names[0]}, ({', '.join(names[1:])})"
        return ", ".join(names) + ("," if self.unpacks and len(names) == 1 else "")


def variable(number: int) -> str:
    return f"v__{number}__"


@dataclass(eq=False)
class Code:
    """One frame ready to be written: a module class with this forward, or a standard layer."""

    path: str
    class_name: str
    items: list[Node | Code]
    arguments: list[Flowing | None]
    results: list[Value]
    layer: str | None = None
    recurrent: bool = False  # a layer that takes and gives its states as one tuple where there are two
    lines: list[Line] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    hints: dict[int, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # paths of the modules it calls, in order
    chain: bool = False  # only calls, each on the result of the one before

    def key(self) -> str:
        """Equal for codes that do the same, whatever their variables are called."""
        if self.layer is not None:
            return f"{self.layer} {len(self.arguments)} {len(self.results)}"
        lines = ["\n".join([*line.functions, line.text()]) for line in self.lines]
        return "\n".join([str(len(self.arguments)), *lines, "return " + ", ".join(self.returned)])


def operands_of(node: Node) -> Iterator[Value]:
    """Tensors a node reads, those that only its regions read included."""
    for _, value in node.operands():
        yield value
    for region in node.regions:
        inner = {value for inside_node in region.nodes for value in inside_node.outputs} | set(region.inputs)
        for inside_node in region.nodes:
            yield from (value for value in operands_of(inside_node) if value not in inner)
        yield from (o for o in region.outputs if isinstance(o, Value) and o not in inner)


def symbols_of(item: Node | Code) -> list[sympy.Symbol]:
    """Dynamic sizes that an item's source mentions."""
    if isinstance(item, Code):
        return [value for value in item.arguments if isinstance(value, sympy.Symbol)]
    found = symbols_in((*item.inputs, *item.attributes.values()))
    for region in item.regions:
        for node in region.nodes:
            found.extend(symbols_of(node))
    return list(dict.fromkeys(found))
