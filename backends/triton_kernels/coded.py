"""Keys and values of few bits in kernels of attention (:mod:`regauge.ir.fusion.coded`).

Bytes are read once and taken apart in registers: codes lie along rows of a tile as they do in memory, places by numbers
of a head. Scores are scaled and shifted by place on their tile, queries by number of a head before the loop; values are
scaled by place as they become floats, and the mixture by number of a head behind the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from regauge.backends.triton_kernels.expressions import TRITON_TYPES
from regauge.backends.triton_kernels.loops import Loop
from regauge.backends.triton_kernels.source import Rounding
from regauge.backends.triton_kernels.tiles import TileBase
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.coded import Coded, Shift, Terms
from regauge.ir.fusion.products import is_float8
from regauge.ir.fusion.region import Region, Term, terms_below


class CodedFactors(TileBase):
    """Lines for factors that are codes."""

    def __init__(self, region: Region, name: str, rounding: Rounding, *, contiguous: bool) -> None:
        super().__init__(region, name, rounding, contiguous=contiguous)
        self.here: set[Term] = set()  # terms that have a line since an index was changed

    def axis(self, axis: str, index: str, loops: Sequence[Loop]) -> None:
        super().axis(axis, index, loops)
        self.here.clear()

    def needed(self, wanted: Iterable[Term]) -> None:
        """Lines for terms, and for what these are computed from, at the indices that hold here."""
        found = {one for term in wanted for one in (term, *terms_below(term))} - self.here
        self.here |= found
        self.statements([term for term in self.region.terms if term in found], self.load)

    def product(self, first: str, factors: Sequence[Term]) -> str:
        return " * ".join([first, *map(self.text, factors)])

    # -- codes -------------------------------------------------------------------------------------------------------

    def bytes_axis(self, axis: str, block: str, coded: Coded, loops: Sequence[Loop]) -> None:
        """Indices of the bytes that hold the numbers of a head, along columns of a tile."""
        index = f"tl.arange(0, {_bytes_of(block, coded)}).to(tl.int64)[None, :]"
        self.axis(axis, index, _loops_of_bytes(coded, loops))

    def codes(
        self, name: str, coded: Coded, kind: torch.dtype, block: str, loops: Sequence[Loop], places: Terms = ()
    ) -> str:
        """The lines that read a tile of codes, places by ``block`` numbers of a head, which lie along ``loops``, times
        what ``places`` scale; its name."""
        load = coded.code.args[0] if coded.code.op == "digit" else coded.code
        self.needed(load.args)
        read, text, tensor = self.name(load), self.raw(load), self.of_load[load]
        if not (tensor.loops(self.loops.source) and tensor.loops(_loops_of_bytes(coded, loops))):
            text = f"tl.broadcast_to({text}, [BLOCK_S, {_bytes_of(block, coded)}])"  # an axis of one entry
        self.line(f"{read} = {text}")
        text = read
        if is_float8(load):
            text = self.of_bytes(self.of_load[load], read)
        if coded.digits > 1:
            text = _interleaved(read, coded.code.value.base, range(coded.digits))
            if coded.digits > 2:
                digits = self.names.unique("digits")
                self.line(f"{digits} = {text}")
                text = digits
        if coded.middle:
            text = f"({text}.to(tl.int16) - {coded.middle})"
        if places:
            text = f"({self.product(f'{text}.to(tl.float32)', places)})"
        self.line(f"{name} = {text}.to({TRITON_TYPES[kind]})")
        return name

    # -- scales ------------------------------------------------------------------------------------------------------

    def scaled_queries(self, queries: str, coded: Coded, kind: torch.dtype) -> tuple[str, list[str]]:
        """Queries times what scales numbers of a head, and for each shift their sum."""
        sums = []
        for shift in coded.shifts:
            self.needed(shift.heads)
            sums.append(self.names.unique("sums"))
            text = self.product(f"{queries}.to(tl.float32)", shift.heads)
            self.line(f"{sums[-1]} = tl.sum({text}, axis=1, keep_dims=True)")
        if coded.heads:
            self.needed(coded.heads)
            name = self.names.unique("queries")
            text = self.product(f"{queries}.to(tl.float32)", coded.heads)
            self.line(f"{name} = ({text}).to({TRITON_TYPES[kind]})")
            queries = name
        return queries, sums

    def shifted(self, shift: Shift) -> str:
        """What a shift adds by place, as a factor behind others."""
        self.needed(term for product in shift.places for term in product)
        texts = [" * ".join(map(self.text, product)) or "1.0" for product in shift.places]
        return "" if texts == ["1.0"] else f" * ({' + '.join(texts)})"

    def shifted_scores(self, scores: str, coded: Coded, sums: Sequence[str]) -> None:
        """Lines that make scores of products with codes."""
        if coded.places:
            self.needed(coded.places)
            self.line(f"{scores} = {self.product(scores, coded.places)}")
        for one, shift in zip(sums, coded.shifts, strict=True):
            self.line(f"{scores} += {one}{self.shifted(shift)}")


def of_places(shift: Shift, source: frozenset[Dim]) -> bool:
    """Whether what a shift adds differs from place to place."""
    return any(term.axes & source for product in shift.places for term in product)


def _bytes_of(block: str, coded: Coded) -> str:
    """How many bytes hold a block of numbers."""
    return f"{block} // {coded.digits}" if coded.digits > 1 else block


def _loops_of_bytes(coded: Coded, loops: Sequence[Loop]) -> list[Loop]:
    digit = coded.code.value.loop if coded.code.op == "digit" else None
    return [loop for loop in loops if loop.dims[0] is not digit]


def _interleaved(read: str, base: int, digits: Sequence[int]) -> str:
    """The digits of bytes, one behind the other along rows of a tile."""
    if len(digits) > 1:
        first, second = (_interleaved(read, base, digits[start::2]) for start in (0, 1))
        return f"tl.interleave({first}, {second})"
    (digit,) = digits
    bits = base.bit_length() - 1
    text = f"{read} >> {bits * digit}" if digit else read
    return text if bits * (digit + 1) == 8 else f"({text}) & {base - 1}" if digit else f"{text} & {base - 1}"
