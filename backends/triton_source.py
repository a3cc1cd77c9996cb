"""What all kernels have in common: names, arguments, the docstring, and terms written line by line."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from textwrap import wrap
from typing import Literal, TypeAlias

import torch

from regauge.backends.triton_expressions import (
    FUNCTIONS,
    ROUNDED,
    TEXT,
    TRITON_TYPES,
    constant,
    is_truth,
    literal,
    outermost,
)
from regauge.backends.triton_loops import Loop, Tensor
from regauge.ir.dtypes import dtype_name
from regauge.ir.extents import Dim
from regauge.ir.fusion.region import Region, Term
from regauge.ir.graph import Node, Value

Rounding: TypeAlias = Literal["fused", "eager"]
"""``fused``: single precision inside, results are rounded once. ``eager``: what each node gives is rounded to its type,
as torch does it node by node."""

HEAD = "import triton\nimport triton.language as tl\n"
_TAKEN = {
    "tl",
    "triton",
    "row",
    "col",
    "ok",
    "row_ok",
    "col_ok",
    "start",
    "blocks",
    "program",
    "first",
    "high",
    "batch",
    "m",
    "n",
    "k",
    "s",
    "tiles",
    "part",
    "share",
    "end",
    "highest",
    "shift",
    "kept",
    "weights",
    "logits",
    "place",
    "places",
    "float",
    "range",
    *FUNCTIONS,
}
_WIDTH = 112
_LONGEST = 119
_INLINE = 80


class Names:
    """Python names for values: their own, with what cannot be in a name left out, and a number where one is taken.

    Numbers that values have at the end are not taken over: the same region elsewhere in a graph has the same text.
    """

    def __init__(self, taken: Collection[str] = ()) -> None:
        self.taken = {*_TAKEN, *taken}

    def unique(self, name: str) -> str:
        stem = re.sub(r"(?<=\D)_?\d+$", "", re.sub(r"\W", "_", name.rpartition(".")[2]))
        stem = f"v_{stem}" if not stem or stem[0].isdigit() or keyword.iskeyword(stem) else stem
        found, number = stem, 1
        while found in self.taken:
            found, number = f"{stem}_{number}", number + 1
        self.taken.add(found)
        return found


class Writer:
    """The text of one kernel in the making.

    Lines are made for loads, results, reductions and what is read twice; other terms stand where they are read.
    """

    def __init__(self, region: Region, rounding: Rounding) -> None:
        self.region, self.rounding = region, rounding
        self.names = Names({f"size_{name}" for name in region.names.values()} | set(region.names.values()))
        self.reads = [self._tensor(load.value.value, load.value.layout) for load in region.loads]
        self.writes = [self._tensor(value, region.layouts[value]) for value in region.outputs]
        self.of_load = dict(zip(region.loads, self.reads, strict=True))
        self.long: set[Term] = set()
        self.lines: list[str] = []
        self.indent = "    "
        self.known: dict[Term, str] = {load: tensor.name for load, tensor in self.of_load.items()}
        self.uses: dict[Term, int] = {}
        for term in region.terms:
            for arg in term.args:
                self.uses[arg] = self.uses.get(arg, 0) + 1
        self.functions: dict[str, None] = {}
        self.long = self._too_long()

    def _too_long(self) -> set[Term]:
        """Terms that are read once, but whose text is so long that it has a line of its own."""
        lengths: dict[Term, int] = {}
        long: set[Term] = set()
        for term in self.region.terms:
            inside = sum(10 if arg in long or self.is_line(arg) else lengths[arg] for arg in term.args)
            lengths[term] = inside + len(TEXT.get(term.op, ""))
            if lengths[term] > _INLINE and term.args:
                long.add(term)
        return long

    def _tensor(self, value: Value, layout: Sequence[Sequence[Dim]]) -> Tensor:
        axes = tuple(tuple(axis) for axis in layout)
        return Tensor(self.names.unique(value.name), value, axes, frozenset(dim for axis in axes for dim in axis))

    # -- lines -------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """A line; a long one goes on behind a comma, or a plus, in parentheses."""
        rest, indent, depth = text, self.indent, 0
        while len(indent) + len(rest) > _LONGEST:
            head = rest[: _LONGEST - len(indent)]
            end = max(head.rfind(", "), head.rfind(" + ") + 1) + 1
            depth += head[:end].count("(") - head[:end].count(")")
            if end < 2 or not depth:
                break
            self.lines.append(indent + rest[:end])
            rest, indent = rest[end + 1 :], self.indent + "    "
        self.lines.append(indent + rest)

    def joint(self, axis: str, loops: Sequence[Loop]) -> str:
        """The name of the index of several loops, or of the only one."""
        return loops[0].name if len(loops) == 1 else axis

    def joint_size(self, loops: Sequence[Loop]) -> str:
        return " * ".join(f"size_{loop.name}" for loop in loops) or "1"

    def take_apart(self, axis: str, loops: Sequence[Loop]) -> None:
        """Indices of several loops from their joint one; the last is the fastest."""
        total = axis
        for loop in loops[:0:-1]:
            self.line(f"{loop.name} = {total} % size_{loop.name}")
            self.line(f"{axis}_rest = {total} // size_{loop.name}")
            total = f"{axis}_rest"
        if len(loops) > 1:
            self.line(f"{loops[0].name} = {total}")

    def segments(self, loops: Iterable[Loop]) -> None:
        """Indices in the segments of loops: of one that is not at its turn it is below zero, or too great."""
        for loop in loops:
            self.line(f"{loop.name} = {' - '.join([loop.joint, *(f'size_{name}' for name in loop.before)])}")
            self.line(f"{loop.name}_ok = ({loop.name} >= 0) & ({loop.name} < size_{loop.name})")

    def is_line(self, term: Term) -> bool:
        return term.op in ("load", "result") or term.reduces or term in self.long or self._again(term)

    def _again(self, term: Term) -> bool:
        return self.uses.get(term, 0) > 1 and bool(term.args)

    def name(self, term: Term) -> str:
        """The name of a term that has a line of its own."""
        if term not in self.known:
            if term.op == "result":
                written = [tensor.name for tensor in self.writes if tensor.value is term.value]
                self.known[term] = written[0] if written else self.names.unique(term.value.name)
            else:
                self.known[term] = self.names.unique(term.op if term.reduces else "t")
        return self.known[term]

    def text(self, term: Term) -> str:
        """A term where it is read."""
        number = constant(term)
        if number is not None:
            return literal(number)
        if self.is_line(term):
            return self.name(term)
        return self.expression(term)

    def expression(self, term: Term) -> str:
        """A term in terms of its arguments."""
        if term.op == "count":
            loops = [loop for loop in self.all_loops() if loop.dims[0] in term.over]
            return f"(1.0 * {self.joint_size(loops)})"  # a float: div_rn takes no integers
        if term.op == "index":
            return self._index(term)
        if term.op == "result":
            return self._result(term)
        if term.op == "joined":
            return self._joined(term)
        if term.op not in TEXT:  # a reduction over nothing
            return self.text(term.args[0])
        if term.op in FUNCTIONS:
            self.functions[term.op] = None
        form = ROUNDED.get(term.op, TEXT[term.op]) if self.rounding == "eager" else TEXT[term.op]
        texts = [self.text(arg) for arg in term.args]
        return form.format(*([outermost(text) for text in texts] if "{}, {}" in form or "({})" in form else texts))

    def _joined(self, term: Term) -> str:
        """The argument in whose segment the index lies."""
        *parts, last = map(self.text, term.args)
        names = [self.region.names[part] for part in self.region.joints[term.value]]
        for name, part in reversed(list(zip(names, parts, strict=False))):
            last = f"tl.where({name}_ok, {outermost(part)}, {outermost(last)})"
        return last

    def _index(self, term: Term) -> str:
        """The place along an axis that is made of loops."""
        loops = [loop for dim in term.value for loop in self.all_loops() if loop.dims[0] is dim]
        text = loops[0].name if loops else "0"
        for loop in loops[1:]:
            text = f"({text} * size_{loop.name} + {loop.name})"
        return text

    def all_loops(self) -> Sequence[Loop]:
        raise NotImplementedError

    def _result(self, term: Term) -> str:
        """What a node gives: as a float where it was a truth value, and rounded to its type where that is wanted."""
        (arg,) = term.args
        text = self.text(arg)
        if term.value.dtype == torch.bool:
            return text
        if is_truth(arg):
            text = f"{text}.to(tl.float32)"
        if self.rounding == "eager" and term.value.dtype != torch.float32:
            return f"({outermost(text)}).to({TRITON_TYPES[term.value.dtype]}).to(tl.float32)"
        return text

    def statements(self, terms: Iterable[Term], load: Callable[[Tensor], str]) -> None:
        """A line for each term that has one, in order."""
        for term in terms:
            if not self.is_line(term) or constant(term) is not None:
                continue
            if term.op == "load":
                self.line(f"{self.name(term)} = {load(self.of_load[term])}")
            elif not term.reduces:
                text = outermost(self.expression(term))
                if text != self.name(term):
                    self.line(f"{self.name(term)} = {text}")

    def raise_peak(self, peak: str, found: str) -> None:
        """Lines that take a peak to what was found above it: ``highest`` is the new one, ``shift`` what is subtracted
        from exponents, and ``kept`` what sums that were begun with the old one are multiplied by."""
        self.functions["maximum"] = None
        self.line(f"highest = maximum({peak}, {found})")
        self.line('shift = tl.where(highest == float("-inf"), 0.0, highest)')
        self.line(f"kept = tl.exp({peak} - shift)")

    # -- head --------------------------------------------------------------------------------------------------------

    def arguments(self, loops: Sequence[Loop]) -> list[str]:
        """Pointers, then sizes of loops, then steps of each tensor along its loops."""
        tensors = [*self.reads, *self.writes]
        pointers = [f"{tensor.name}_ptr" for tensor in tensors]
        sizes = [f"size_{loop.name}" for loop in loops]
        steps = [f"{tensor.name}_{loop.name}" for tensor in tensors for loop in tensor.loops(loops)]
        return [*pointers, *sizes, *steps]

    def signature(self, name: str, arguments: Sequence[str], constants: Sequence[str]) -> list[str]:
        lines, current = [], f"def {name}("
        parts = [*arguments, *(f"{constant}: tl.constexpr" for constant in constants)]
        for place, part in enumerate(parts):
            end = "):" if place == len(parts) - 1 else ", "
            if len(current) + len(part) + len(end) > _WIDTH:
                lines.append(current.rstrip())
                current = "        "
            current += part + end
        return ["@triton.jit", *lines, current]

    def docstring(self, name: str, form: str, loops: Sequence[Loop]) -> list[str]:
        names = {dim: loop.name for loop in loops for dim in loop.dims[:1]}

        def shown(tensor: Tensor) -> str:
            inside = [names[dim] for axis in tensor.layout for dim in axis if dim in names]
            return f"{tensor.name}[{', '.join(inside)}] {dtype_name(tensor.value.dtype)}"

        reduced = [loop.name for loop in loops if loop.dims[0] in self.region.reduced]
        lines = [f'    """{name}: {form}', ""]
        lines.append(f"    loops     {', '.join(loop.name for loop in loops) or 'none'}")
        for joint, parts in self.region.joints.items():
            joined = " + ".join(self.region.names[part] for part in parts)
            lines.append(f"    joins     {self.region.names[joint]} = {joined}")
        if reduced:
            lines.append(f"    over      {', '.join(reduced)}")
        lines += [f"    {'reads' if not place else '':9} {shown(t)}" for place, t in enumerate(self.reads)]
        lines += [f"    {'writes' if not place else '':9} {shown(t)}" for place, t in enumerate(self.writes)]
        for place, node in enumerate(self.region.nodes):
            title = f"    {'computes' if not place else '':9} "
            lines += wrap(self.shown_node(node), _WIDTH, initial_indent=title, subsequent_indent=" " * 16)
        inside = "single precision, results rounded once"
        each = "single precision, what each node gives is rounded to its type"
        lines += [f"    rounding  {self.rounding}: {inside if self.rounding == 'fused' else each}", '    """']
        return lines

    def shown_node(self, node: Node) -> str:
        operands = [
            self.known.get(self._term(operand), operand.name) if isinstance(operand, Value) else str(operand)
            for operand in node.inputs
        ]
        attributes = [f"{key}={value}" for key, value in node.attributes.items()]
        return f"{self.name(self.region.results[node.output])} = {node.op}({', '.join([*operands, *attributes])})"

    def _term(self, value: Value) -> Term:
        if value in self.region.results:
            return self.region.results[value]
        return next(load for load in self.region.loads if load.value.value is value)

    def finished(self, head: Sequence[str]) -> str:
        """The whole file: what is imported, functions that Triton lacks, and the kernel."""
        parts = [HEAD, *(FUNCTIONS[name] for name in self.functions), "\n".join([*head, *self.lines]) + "\n"]
        return "\n\n".join(parts)
