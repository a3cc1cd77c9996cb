"""Kernels without a contraction: pointwise ones, and reductions of rows, in one piece or in a loop over their columns.

A program has ROWS rows and BLOCK columns. Pointwise, the columns are shared out among programs. Where rows are
reduced, a program has all columns of its rows: at once (``rows``), or BLOCK after BLOCK, once for each reduction that
has to wait for another one, and once more for what comes behind (``looped``). The sum of a softmax does not wait for
the greatest number: it is brought to a greater one when that is met (:mod:`regauge.ir.fusion.online`). Windows are
swept: columns are shared out as pointwise, and a program goes through the windows of all its entries, one index after
the other (``swept``). Where sums over rows stand beside what each row has, a program goes through several blocks of
rows, adds up what it met, and leaves it for a sum over programs (``summed``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from regauge.backends.triton_kernels.expressions import outermost
from regauge.backends.triton_kernels.loops import Loop, Tensor, loops_of
from regauge.backends.triton_kernels.source import Rounding, Writer
from regauge.ir.fusion.online import online_sums, passes
from regauge.ir.fusion.region import Region, Term, below_results, terms_below

RowForm = Literal["pointwise", "rows", "looped", "swept", "summed"]
ROW_FORMS: tuple[RowForm, ...] = get_args(RowForm)
CONSTANTS = ("ROWS", "BLOCK")

_TITLE: dict[RowForm, str] = {
    "pointwise": "pointwise",
    "rows": "reduction of rows, all columns at once",
    "looped": "reduction of rows, in a loop over columns",
    "swept": "reduction of windows, in a loop over their indices",
    "summed": "rows with all columns at once, and sums over the rows of each program",
}
_START = {"sum": "0.0", "amax": 'float("-inf")', "amin": 'float("inf")'}
_JOIN = {
    "sum": "{0} += tl.where(ok, {1}, 0.0)",
    "amax": '{0} = maximum({0}, tl.where(ok, {1}, float("-inf")))',
    "amin": '{0} = minimum({0}, tl.where(ok, {1}, float("inf")))',
}
_SWEEP = {"sum": "{0} += {1}", "amax": "{0} = maximum({0}, {1})", "amin": "{0} = minimum({0}, {1})"}
_STEP = {"amax": "maximum", "amin": "minimum"}
"""Functions that reductions are written with."""
_REDUCE = {
    "sum": "tl.sum({}, axis=1, keep_dims=True)",
    "amax": "tl.reduce({}, 1, maximum, keep_dims=True)",
    "amin": "tl.reduce({}, 1, minimum, keep_dims=True)",
}


class RowKernel(Writer):
    """The text of one kernel; see the module docstring."""

    def __init__(self, region: Region, name: str, form: RowForm, rounding: Rounding, *, contiguous: bool) -> None:
        super().__init__(region, rounding)
        self.kernel, self.form = name, form
        self.totals = [t for t in self.writes if below_results(region.results[t.value]) in region.totals]
        self.writes = [tensor for tensor in self.writes if tensor not in self.totals]
        self.loops = loops_of(region, [*self.reads, *self.writes], contiguous=contiguous, sweep=form == "swept")
        self.shared_out = form in ("pointwise", "swept")
        self.flat = self.shared_out and not self.loops.rows  # one index for all: tiles have one axis

    def all_loops(self) -> Sequence[Loop]:
        return self.loops.all

    def source(self) -> str:
        if self.form == "summed":
            self._summed()
            return self._finished()
        self._rows()
        if self.form == "looped":
            self._looped()
        elif self.form == "swept":
            self._columns("")
            self._swept()
        else:
            self._columns("tl.arange(0, BLOCK)")
            self._at_once()
        return self._finished()

    def _finished(self) -> str:
        arguments = self.arguments(self.loops, [f"{tensor.name}_of_programs_ptr" for tensor in self.totals])
        constants = CONSTANTS[1:] if self.flat else CONSTANTS
        head = self.signature(self.kernel, arguments, constants)
        return self.finished([*head, *self.docstring(self.kernel, _TITLE[self.form], self.loops.all)])

    # -- indices -----------------------------------------------------------------------------------------------------

    def _rows(self, first: str = "") -> None:
        if self.flat:
            return
        program = "tl.program_id(0).to(tl.int64)"
        if self.shared_out:
            self.line(f"blocks = tl.cdiv({self.joint_size(self.loops.columns)}, BLOCK)  # shared out among programs")
            program = f"({program} // blocks)"
        row = self.joint("row", self.loops.rows)
        self.line(f"{row} = {first or f'{program} * ROWS'} + tl.arange(0, ROWS)[:, None]")
        self.line(f"row_ok = {row} < {self.joint_size(self.loops.rows)}")
        self.take_apart("row", self.loops.rows)

    def _columns(self, block: str) -> None:
        if self.flat:
            block = "tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)"
        elif self.shared_out:
            block = "(tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]"
        else:
            block = f"({block}).to(tl.int64)[None, :]" if " " in block else f"{block}.to(tl.int64)[None, :]"
        column = self.joint("col", self.loops.columns)
        self.line(f"{column} = {block}")
        self.line(f"{'ok' if self.flat else 'col_ok'} = {column} < {self.joint_size(self.loops.columns)}")
        if not self.flat and self.form != "summed":
            self.line("ok = row_ok & col_ok")
        self.take_apart("col", self.loops.columns)

    def _has_columns(self, term: Term) -> bool:
        return any(loop.dims[0] in term.axes for loop in self.loops.columns)

    def _place(self, tensor: Tensor, picks: Sequence[Term] = ()) -> tuple[str, str]:
        """The address of an entry, and the mask."""
        rows, columns = tensor.loops(self.loops.rows), tensor.loops(self.loops.columns)
        mask = "ok" if columns and (rows or self.flat) else "col_ok" if columns else "row_ok" if rows else ""
        return self.address(tensor, self.loops, picks), mask

    def load(self, term: Term) -> str:
        tensor = self.of_load[term]
        address, mask = self._place(tensor, term.args[: len(tensor.picked)])
        mask = " & ".join(filter(None, [mask, *self.guards(term)]))
        text = f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"
        return self.numbers(term, text)

    def store(self, tensor: Tensor) -> None:
        address, mask = self._place(tensor)
        if not mask:  # one number: a tile of one entry stores it
            address, mask = (f"{address} + col * 0", "ok") if self.flat else (f"{address} + row * 0", "row_ok")
        self.line(f"tl.store({address}, {self.stored(tensor)}, mask={mask})")

    # -- bodies ------------------------------------------------------------------------------------------------------

    def _at_once(self) -> None:
        for term in self.region.terms:
            if below_results(term) in self.region.totals:
                continue
            if term.reduces:
                self._reduce(term, f"tl.where(ok, {outermost(self.text(term.args[0]))}, {_START[term.op]})")
            else:
                self.statements([term], self.load)
        for tensor in self.writes:
            self.store(tensor)

    def _summed(self) -> None:
        """One loop over blocks of rows; each program leaves the sums of those that it went through."""
        self.line("program = tl.program_id(0).to(tl.int64)")
        self._columns("tl.arange(0, BLOCK)")
        for tensor in self.totals:
            self.line(f"{tensor.name} = tl.zeros([1, BLOCK], tl.float32)")
        rows = self.joint_size(self.loops.rows)
        self.line(f"for first in range(program * ROWS, {rows}, tl.num_programs(0) * ROWS):")
        self.indent += "    "
        self._rows("first")
        self.line("ok = row_ok & col_ok")
        self._at_once()
        for tensor in self.totals:
            part = outermost(self.text(below_results(self.region.results[tensor.value]).args[0]))
            self.line(f"{tensor.name} += tl.sum(tl.where(ok, {part}, 0.0), axis=0, keep_dims=True)")
        self.indent = self.indent[4:]
        columns = self.joint_size(self.loops.columns)
        for tensor in self.totals:
            address = f"{tensor.name}_of_programs_ptr + program * ({columns}) + {self.joint('col', self.loops.columns)}"
            self.line(f"tl.store({address}, {tensor.name}, mask=col_ok)")

    def _reduce(self, term: Term, tile: str) -> None:
        if term.op in _STEP:
            self.functions[_STEP[term.op]] = None
        self.line(f"{self.name(term)} = {_REDUCE[term.op].format(tile)}")

    def _looped(self) -> None:
        self.online = online_sums(self.region, each_rounded=self.rounding == "eager")
        self.before = passes(self.region, self.online)
        done: set[Term] = set()
        for number in range(max(self.before.values()) + 1):
            wanted = [term for term in self.region.reductions if self.before[term] == number + 1]
            written = [
                tensor
                for tensor in self.writes
                if self._has_columns(term := self.region.results[tensor.value]) and self.before[term] == number
            ]
            self._once(number, done)
            if wanted or written:
                self._pass(wanted, written)
            done.update(wanted)
        self._once(max(self.before.values()), done)
        for tensor in self.writes:
            if not self._has_columns(self.region.results[tensor.value]):
                self.store(tensor)

    def _once(self, number: int, done: set[Term]) -> None:
        """What has no columns and can be computed by now."""
        ready = [
            term
            for term in self.region.terms
            if not self._has_columns(term) and not term.reduces and self.before[term] <= number and term not in done
        ]
        done.update(ready)
        self.statements(ready, self.load)

    def _partial(self, term: Term) -> str:
        return f"{self.name(term)}_in_columns"

    def _pass(self, wanted: Sequence[Term], written: Sequence[Tensor]) -> None:
        """One loop over the columns of the rows."""
        peaks = {peak: [term for term in wanted if self.online.get(term) is peak] for peak in self.online.values()}
        peaks = {peak: sums for peak, sums in peaks.items() if sums}
        others = [term for term in wanted if term not in peaks and term not in self.online]
        for term in wanted:
            name, width = (self._partial(term), "BLOCK") if term in others else (self.name(term), "1")
            self.line(f"{name} = tl.full([ROWS, {width}], {_START[term.op]}, tl.float32)")
        self.line(f"for start in range(0, {self.joint_size(self.loops.columns)}, BLOCK):")
        self.indent += "    "
        self._columns("start + tl.arange(0, BLOCK)")
        ends: Iterable[Term] = [*others, *peaks, *(self.region.results[tensor.value] for tensor in written)]
        needed = {below for end in ends for below in terms_below(end)} | {end for end in ends if not end.reduces}
        self.statements([t for t in self.region.terms if t in needed and self._has_columns(t)], self.load)
        for peak, sums in peaks.items():
            self._online(peak, sums)
        for term in others:
            self.line(_JOIN[term.op].format(self._partial(term), outermost(self.text(term.args[0]))))
        for tensor in written:
            self.store(tensor)
        self.indent = self.indent[4:]
        for term in others:
            self._reduce(term, self._partial(term))

    def _online(self, peak: Term, sums: Sequence[Term]) -> None:
        """The lines that take the greatest number, and sums that are shifted by it, through a tile."""
        self.line(f'x_or_less = tl.where(ok, {outermost(self.text(peak.args[0]))}, float("-inf"))')
        self.raise_peak(self.name(peak), "tl.reduce(x_or_less, 1, maximum, keep_dims=True)")
        for term in sums:
            of_tile = "tl.sum(tl.exp(x_or_less - shift), axis=1, keep_dims=True)"
            self.line(f"{self.name(term)} = {self.name(term)} * kept + {of_tile}")
        self.line(f"{self.name(peak)} = highest")

    def _swept(self) -> None:
        """What has no index of a window, then all windows at once, as often as a reduction waits for another one."""
        reduced, stages = self.region.reduced, passes(self.region, {})
        done: set[Term] = set()
        for stage in range(max(stages.values()) + 1):
            ready = [t for t in self.region.terms if stages[t] <= stage and not t.reduces and not t.axes & reduced]
            self.statements([term for term in ready if term not in done], self.load)
            done.update(ready)
            wanted = [term for term in self.region.reductions if stages[term] == stage + 1]
            if wanted:
                self._sweep(wanted)
        for tensor in self.writes:
            self.store(tensor)

    def _sweep(self, wanted: Sequence[Term]) -> None:
        """One loop over the indices of windows."""
        tile = "[BLOCK]" if self.flat else "[ROWS, BLOCK]"
        for term in wanted:
            if term.op in _STEP:
                self.functions[_STEP[term.op]] = None
            self.line(f"{self.name(term)} = tl.full({tile}, {_START[term.op]}, tl.float32)")
        inner = self.loops.contracted
        self.line(f"for {self.joint('window', inner)} in range(0, {self.joint_size(inner)}):")
        self.indent += "    "
        self.take_apart("window", inner)
        needed = {below for term in wanted for below in terms_below(term)}
        self.statements([t for t in self.region.terms if t in needed and t.axes & self.region.reduced], self.load)
        for term in wanted:
            self.line(_SWEEP[term.op].format(self.name(term), outermost(self.text(term.args[0]))))
        self.indent = self.indent[4:]
