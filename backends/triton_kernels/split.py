"""Contractions with few tiles, shared out: SPLIT programs have a tile together, each a part of what is contracted.

Where a tile has few rows, there are too few of them to keep a device busy, and a weight is read once all the same: by
many programs, a part each. The first kernel leaves the sums of its part in ``partials``, a second one adds these up, in
order, and computes what stands behind the product: the result is the same each time.
"""

from __future__ import annotations

from regauge.backends.triton_kernels.contraction import ContractionKernel

TOTAL = "_total"
"""What the name of the second kernel ends with."""
_ENTRIES = "entries = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # of a tile"


class SplitKernel(ContractionKernel):
    """The text of two kernels with the same arguments; see the module docstring."""

    def source(self) -> str:
        arguments = self.arguments(self.loops, ["partials_ptr"])
        constants = [*self.constants, "SPLIT"]
        self.tile()
        self.each_part(self._partials)
        head = self.signature(self.kernel, arguments, constants)
        head += self.docstring(self.kernel, "contraction, in tiles, a part of the sums", self.loops.all)
        first = "\n".join([*head, *self.lines]) + "\n"
        self.lines, self.done = [], set()
        self.tile()
        self.each_part(self._total)
        head = self.signature(f"{self.kernel}{TOTAL}", arguments, constants)
        return self.finished(
            [*head, f'    """{self.kernel}: the sums of all parts, and what stands behind them"""'], [first]
        )

    def _partials(self) -> None:
        self.sums()
        self._store()

    def _total(self) -> None:
        self._add()
        self.behind()

    def begin(self) -> None:
        """The steps of the part that a program has."""
        steps = self.steps()
        self.line(f"each = tl.cdiv({steps}, SPLIT)")
        self.line("begin = tl.program_id(1) * each")
        self.line(f"end = tl.minimum(begin + each, {steps})")
        self.line("for step in range(begin, end):")
        self.indent += "    "
        self.start()

    def _part(self, place: int, split: str) -> str:
        """Where the sums of one product for a part lie: tile after tile."""
        count = self.tiling.products
        split = split if count == 1 else f"({split} * {count} + {place})"
        return f"({split} * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BLOCK_M * BLOCK_N)"

    def _store(self) -> None:
        self.line(_ENTRIES)
        for place, product in enumerate(self.products.all):
            self.line(f"part = {self._part(place, 'tl.program_id(1)')}")
            self.line(f"tl.store(partials_ptr + part + entries, {self.name(product.contraction)}.to(tl.float32))")

    def _add(self) -> None:
        products = self.products.all
        for product in products:
            self.line(f"{self.name(product.contraction)} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)")
        self.line(_ENTRIES)
        self.line("for split in range(SPLIT):")
        for place, product in enumerate(products):
            self.line(f"    part = {self._part(place, 'split')}")
            self.line(f"    {self.name(product.contraction)} += tl.load(partials_ptr + part + entries)")
