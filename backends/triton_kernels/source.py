"""What all kernels have in common: names, arguments, the docstring, and terms written line by line."""

from __future__ import annotations

import keyword
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from regauge.backends.triton_kernels.expressions import (
    BITS8,
    FLOAT8,
    FUNCTIONS,
    ROUNDED,
    TEXT,
    TRITON_TYPES,
    constant,
    is_truth,
    literal,
    outermost,
)
from regauge.backends.triton_kernels.loops import Loop, Loops, Tensor
from regauge.ir.affine import Affine, index_of
from regauge.ir.dtypes import dtype_name
from regauge.ir.fusion.fused import Rounding as Rounding
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.terms import BITS, PLACES, Load, Term, below_results
from regauge.ir.graph import Node, Value
from regauge.ir.scalars import ROUNDED_8
from regauge.ir.sizes.expressions import format_size

HEAD = "import triton\nimport triton.language as tl\n"
_TAKEN = {
    "tl", "triton", "row", "col", "ok", "row_ok", "col_ok", "start", "window", "step", "steps", "group", "split",
    "begin", "end", "part", "entries", "partials", "each", "blocks", "program", "first", "high", "batch", "m", "n",
    "k", "s", "r", "low", "tiles", "share", "highest", "shift", "kept", "weights", "logits", "place", "places", "float",
    "range", "sums", "deltas", "delta", "found", "steep", "of_keys", "of_values", "more", "rest", "stop", "parts",
    "begin_m", "begin_s", "tiles_m", "tiles_s", "block", "of_weights",
    *FUNCTIONS,
}  # fmt: skip
_WIDTH = 112
_INLINE = 80
_BROKEN: dict[str, Any] = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}


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


def _is_call(text: str) -> bool:
    """Whether a line is one call, or names the result of one: all of it behind the first parenthesis is within."""
    value = text.partition(" = ")[2] if re.match(r"\w+ = ", text) else text
    body = value[max(value.find("("), 0) :].removesuffix(".to(tl.float32)")
    return outermost(body) != body


def _rounded(region: Region) -> set[Term]:
    """What becomes codes: the arguments of roundings, and what bounds between them let through."""
    found = set[Term]()
    roundings = ("round", "power_of_two", *ROUNDED_8.values())
    stack = [arg for term in region.terms if term.op in roundings for arg in term.args]
    while stack:
        one = stack.pop()
        found.add(one)
        stack += one.args if one.op in ("maximum", "minimum", "real") else ()
    return found


class Writer:
    """The text of one kernel in the making.

    Lines are made for loads, results, reductions and what is read twice; other terms stand where they are read.
    """

    def __init__(self, region: Region, rounding: Rounding) -> None:
        self.region, self.rounding = region, rounding
        self.names = Names({f"size_{name}" for name in region.names.values()} | set(region.names.values()))
        self.reads = [self._tensor(load.value) for load in region.loads]
        self.writes = [self._tensor(Load(value, region.layouts[value])) for value in region.outputs]
        self.totals: list[Tensor] = []
        self.of_load = dict(zip(region.loads, self.reads, strict=True))
        self.picks = {number for load in region.loads for number in load.args[: len(load.value.picked)]} | region.whole
        self.bits: dict[tuple[Any, ...], str] = {
            (term.value.loop,): str(term.value.count) for term in region.terms if term.op in BITS
        }
        self.long: set[Term] = set()
        self.lines: list[str] = []
        self.indent = "    "
        self.known: dict[Term, str] = {load: tensor.name for load, tensor in self.of_load.items()}
        self.uses: dict[Term, int] = {}
        for term in region.terms:
            for arg in term.args:
                self.uses[arg] = self.uses.get(arg, 0) + 1
        self.functions: dict[str, None] = {}
        # a quotient that is off by a place would be another code where it is half way between two, or another power
        self.exact = _rounded(region)
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

    def _tensor(self, load: Load) -> Tensor:
        return Tensor(self.names.unique(load.value.name), load.value, load.layout, load.places, load.picked)

    # -- lines -------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """A line of the body; calls that are too long are broken between their arguments."""
        within = _WIDTH - len(self.indent)
        whole = text.replace(" * ", "\0*\0")  # products stay together
        parts = textwrap.wrap(whole, within, **_BROKEN) if _is_call(text) else [text]
        self.lines.extend(self.indent + part.replace("\0", " ") for part in parts)

    def joint(self, axis: str, loops: Sequence[Loop]) -> str:
        """The name of the index of several loops, or of the only one."""
        return loops[0].name if len(loops) == 1 else axis

    def joint_size(self, loops: Sequence[Loop]) -> str:
        return " * ".join(f"size_{loop.name}" for loop in loops) or "1"

    def take_apart(self, axis: str, loops: Sequence[Loop]) -> None:
        """Indices of several loops from their joint one; the last is the fastest."""
        total = axis
        for loop in loops[:0:-1]:
            size = self.bits.get(loop.dims, f"size_{loop.name}")
            self.line(f"{loop.name} = {total} % {size}")
            self.line(f"{axis}_rest = {total} // {size}")
            total = f"{axis}_rest"
        if len(loops) > 1:
            self.line(f"{loops[0].name} = {total}")

    def is_line(self, term: Term) -> bool:
        return term.op in ("load", "result", "inside") or term.reduces or term in self.long or self._again(term)

    def _again(self, term: Term) -> bool:
        return self.uses.get(term, 0) > 1 and bool(term.args)

    def name(self, term: Term) -> str:
        """The name of a term that has a line of its own."""
        if term not in self.known:
            if term.op == "result":
                same = self.region.results[term.value] is term  # and not what the node gives at another place
                written = [t.name for t in (*self.writes, *self.totals) if t.value is term.value and same]
                self.known[term] = written[0] if written else self.names.unique(term.value.name)
            else:
                self.known[term] = self.names.unique(term.op if term.reduces or term.op == "inside" else "t")
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
        if term.op in PLACES:
            return self._index(term)
        if term.op == "result":
            return self._result(term)
        if term.op == "inside":
            return self._inside(*term.value)
        if term.op == "logical_and" and all(map(is_truth, term.args)):
            return "({} & {})".format(*map(self.text, term.args))
        if term.op == "digit":
            place = f"{self.region.names[term.value.loop]}.to(tl.int32)"
            return f"{self.digit(term, f'{self.text(term.args[0])}.to(tl.int32)', place)}.to(tl.float32)"
        if term.op == "spread":
            place = f"{self.region.names[term.value.loop]}.to(tl.int32)"
            mask, *values = map(self.text, term.args)
            return self.spread(f"{mask}.to(tl.int32)", values, place)
        if term.op in BITS:
            return self._of_mask(term)
        if term.op not in TEXT:  # a reduction over nothing
            return self.text(term.args[0])
        if term.op in FUNCTIONS:
            self.functions[term.op] = None
        form = ROUNDED.get(term.op, TEXT[term.op]) if self.rounding == "eager" or term in self.exact else TEXT[term.op]
        whole = any(below_results(arg) in self.region.whole for arg in term.args)
        texts = [str(int(arg.value)) if whole and arg.op == "number" else self.text(arg) for arg in term.args]
        return form.format(*([outermost(text) for text in texts] if "{}, {}" in form or "({})" in form else texts))

    def _inside(self, place: Affine, length: Affine) -> str:
        """Whether a place is on an axis; it is not below zero where all that it is made of counts upwards."""
        at = self.place(place)
        parts = [*place.steps, *place.sizes, (None, place.offset)]
        above = "" if all(number >= 0 for _, number in parts) else f"({at} >= 0) & "
        return f"({above}({at} < {self.place(length)}))"

    def place(self, place: Affine) -> str:
        """A place, as it is computed from the indices of loops; sizes that the kernel is not told are numbers."""
        names = self.region.names
        parts = [(names[dim], step) for dim, step in place.steps]
        parts += [(f"size_{names[dim]}" if dim in names else format_size(dim.size), n) for dim, n in place.sizes]
        text = " + ".join(name if step == 1 else f"{name} * {step}" for name, step in parts if step > 0)
        text += "".join(f" - {name}" if step == -1 else f" - {name} * {-step}" for name, step in parts if step < 0)
        if place.offset or not text:
            text += f" {'-' if place.offset < 0 else '+'} {abs(place.offset)}" if text else str(place.offset)
        return text.strip()

    def digit(self, term: Term, text: str, place: str) -> str:
        """A digit of an integer: some of its bits."""
        bits = term.value.base.bit_length() - 1
        return f"(({text} >> {place if bits == 1 else f'{bits} * {place}'}) & {term.value.base - 1})"

    def spread(self, mask: str, values: Sequence[str], place: str) -> str:
        """Of values the one that belongs to a place whose bit is set in a mask, else zero."""
        found = self.kept(values, self.bits_below(mask, place) if values[1:] else "")
        return f"tl.where((({mask} >> {place}) & 1) != 0, {found}, 0)"

    def bits_below(self, mask: str, place: str) -> str:
        """How many bits of a mask are set below a place."""
        self.functions["bits_below"] = None
        return f"bits_below({mask}, {place})"

    def kept(self, values: Sequence[str], rank: str) -> str:
        """The value whose number is ``rank``, which is that of one."""
        found = values[-1]
        for number in reversed(range(len(values) - 1)):
            found = f"tl.where({rank} == {number}, {values[number]}, {found})"
        return found

    def _of_mask(self, term: Term) -> str:
        """A bit of a mask, or the number of the entry that it stands for; places of bits have 32 bits, as masks do."""
        *starts, mask = map(self.text, term.args)
        place = f"{self.region.names[term.value.loop]}.to(tl.int32)"
        if term.op == "bit":
            return f"((({mask} >> {place}) & 1) != 0)"
        self.functions["set_below"] = None
        return f"({starts[0]}.to(tl.int64) + set_below({mask}, {place}))"

    def numbers(self, term: Term, text: str) -> str:
        """What was read as numbers in single precision; truth values stay, and so do numbers of entries."""
        tensor = self.of_load[term]
        if tensor.value.dtype == torch.bool:
            return text
        return f"{text}.to(tl.int64)" if term in self.picks else f"{self.of_bytes(tensor, text)}.to(tl.float32)"

    def of_bytes(self, tensor: Tensor, text: str) -> str:
        """What was read of a tensor as numbers: floats of 8 bits are read as bytes."""
        function = FLOAT8.get(tensor.value.dtype)
        if function is None:
            return text
        self.functions[function] = None
        return f"{function}({text})"

    def stored(self, tensor: Tensor) -> str:
        """A result as it is written: floats of 8 bits as bytes."""
        term = self.region.results[tensor.value]
        function, number = BITS8.get(tensor.value.dtype), constant(term)
        if function is None:
            return self.text(term)
        if number is not None:
            return str(int(torch.tensor(number).to(tensor.value.dtype).view(torch.uint8)))
        self.functions[function] = None
        return f"{function}({outermost(self.text(term))})"

    def _index(self, term: Term) -> str:
        """The place along an axis that is made of loops."""
        loops = [loop for dim in term.value for loop in self.all_loops() if loop.dims[0] is dim]
        text = loops[0].name if loops else "0"
        for loop in loops[1:]:
            text = f"({text} * size_{loop.name} + {loop.name})"
        return text if term.op == "index" else f"({text} - {self.joint_size(loops)})"

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
        if self.rounding == "eager" and term.value.dtype in (torch.float16, torch.bfloat16):
            return f"({outermost(text)}).to({TRITON_TYPES[term.value.dtype]}).to(tl.float32)"
        return text

    def guards(self, term: Term) -> list[str]:
        """What has to hold where a tensor is read: a number that picks an entry must be that of one."""
        load: Load = term.value
        numbers, guards = term.args[: len(load.picked)], term.args[len(load.picked) :]
        texts = [
            f"({self.text(number)} >= 0) & ({self.text(number)} < size_{self.region.names[dim]})"
            for number, dim in zip(numbers, load.picked, strict=True)
            if number.op != "rank"  # where its bit is set, there is an entry
        ]
        return [*texts, *map(self.text, guards)]

    def statements(self, terms: Iterable[Term], load: Callable[[Term], str]) -> None:
        """A line for each term that has one, in order."""
        for term in terms:
            if not self.is_line(term) or constant(term) is not None:
                continue
            if term.op == "load":
                self.line(f"{self.name(term)} = {load(term)}")
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

    def arguments(self, loops: Loops, more: Sequence[str] = ()) -> list[str]:
        """Pointers, with ``more`` of them, sizes of loops, where tensors begin, then their steps along their loops."""
        tensors = [*self.reads, *self.writes]
        pointers = [*(f"{tensor.name}_ptr" for tensor in tensors), *more]
        sizes = [f"size_{loop.name}" for loop in loops.sized]
        starts = [f"{tensor.name}_start" for tensor in tensors if tensor.shifts]
        steps = [f"{tensor.name}_{name}" for tensor in tensors for name in self._stepped(tensor, loops)]
        return [*pointers, *sizes, *starts, *steps]

    def _stepped(self, tensor: Tensor, loops: Loops) -> list[str]:
        """What a tensor has a step for: loops, and what is picked."""
        return [*(loop.name for loop in tensor.loops(loops.all)), *(self.region.names[dim] for dim in tensor.picked)]

    def address(self, tensor: Tensor, loops: Loops, picks: Sequence[Term] = ()) -> str:
        """Where an entry lies; ``picks`` are the numbers of what is picked."""
        places = [*(loop.name for loop in tensor.loops(loops.all)), *map(self.text, picks)]
        terms = [f"{at} * {tensor.name}_{name}" for at, name in zip(places, self._stepped(tensor, loops), strict=True)]
        return " + ".join([f"{tensor.name}_ptr", *[f"{tensor.name}_start"] * tensor.shifts, *terms])

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
            places = [
                names.get(dim) if place == index_of(dim) else self.place(place) for dim, place in tensor.places.items()
            ]
            return f"{tensor.name}[{', '.join(filter(None, places))}] {dtype_name(tensor.value.dtype)}"

        reduced = [loop.name for loop in loops if loop.dims[0] in self.region.reduced]
        lines = [f'    """{name}: {form}', ""]
        lines.append(f"    loops     {', '.join(loop.name for loop in loops) or 'none'}")
        if reduced:
            lines.append(f"    over      {', '.join(reduced)}")
        lines += [f"    {'reads' if not place else '':9} {shown(t)}" for place, t in enumerate(self.reads)]
        lines += [f"    {'writes' if not place else '':9} {shown(t)}" for place, t in enumerate(self.writes)]
        lines += [f"    {'adds up' if not place else '':9} {shown(t)}" for place, t in enumerate(self.totals)]
        shown_nodes = [
            line for node in self.region.nodes for line in textwrap.wrap(self.shown_node(node), _WIDTH - 14, **_BROKEN)
        ]
        lines += [f"    {'computes' if not place else '':9} {line}" for place, line in enumerate(shown_nodes)]
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

    def finished(self, head: Sequence[str], before: Sequence[str] = ()) -> str:
        """The whole file: what is imported, functions that Triton lacks, other kernels ``before``, and the kernel."""
        functions = [FUNCTIONS[name] for name in self.functions]
        parts = [HEAD, *functions, *before, "\n".join([*head, *self.lines]) + "\n"]
        return "\n\n".join(parts)
