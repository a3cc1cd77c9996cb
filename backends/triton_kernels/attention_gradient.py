"""Kernels of the gradients of attention (:mod:`regauge.ir.fusion.attention_gradients`), three of them.

    statistics   for BLOCK_M queries, in one pass over keys and values, the logarithm of the sum of exp(logits), and the
                 sum of weights times their gradients
    of_queries   for BLOCK_M queries the gradient of these, in one pass over keys and values
    of_keys      for BLOCK_S places the gradients of their keys and values, in one pass over the queries that read them

Weights are computed again, of what the statistics say. Each program has its own entries of a gradient, also where
several heads of queries share keys: nothing is added up in memory, and each time alike. With a causal mask what it
leaves nothing of is skipped on both ways (Dao 2023, FlashAttention-2, algorithm 2 and section 3.2).

Of heads of more than 256 numbers scores, and gradients of weights, are added up BLOCK_D numbers at a time. Keys and
values have a kernel each (``of_values``), so that a program keeps one gradient in registers: BLOCK_K numbers of a head,
or BLOCK_N of values. Where these are not all, several programs compute the same scores, which
:mod:`regauge.ir.fusion.wide_gradients` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from regauge.backends.triton_kernels.contraction import type_of
from regauge.backends.triton_kernels.expressions import TRITON_TYPES, outermost
from regauge.backends.triton_kernels.latent import LatentFactors
from regauge.backends.triton_kernels.loops import Loop, Tensor, loops_of
from regauge.ir.affine import index_of
from regauge.ir.fusion.attention import causal_bound
from regauge.ir.fusion.attention_gradients import AttentionGradient
from regauge.ir.fusion.region import Layout, Term, terms_below
from regauge.ir.graph import Value

GradientForm = Literal["statistics", "of_queries", "of_keys", "of_values", "of_bias", "total"]
GRADIENT_FORMS: tuple[GradientForm, ...] = ("statistics", "of_queries", "of_keys")
WIDE_FORMS: tuple[GradientForm, ...] = (*GRADIENT_FORMS, "of_values")
BIAS_FORMS: tuple[GradientForm, ...] = ("statistics", "of_bias", "total")
"""The kernels of the gradients of factors, also of wide heads, and of that of a bias (:mod:`bias_gradient`), one after
the other."""

STATISTICS = ("sums_ptr", "deltas_ptr")
"""What the first kernel hands on: two numbers for each row, in single precision."""

_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S")
_TITLES: Mapping[GradientForm, str] = {
    "statistics": "what gradients of attention need of each row",
    "of_queries": "the gradient of queries",
    "of_keys": "the gradients of keys and values",
    "of_values": "the gradient of values",
    "of_bias": "the gradient of a bias",
    "total": "the sums of all parts of the gradient of a bias",
}


class AttentionGradientKernel(LatentFactors):
    """The text of one kernel; see the module docstring."""

    scratch: tuple[str, ...] = STATISTICS

    def __init__(self, gradient: AttentionGradient, name: str, form: GradientForm, *, contiguous: bool) -> None:
        super().__init__(gradient.region, name, "fused", contiguous=contiguous)
        self.form, self.gradient, self.parts = form, gradient, gradient.parts
        layout = gradient.region.layouts[gradient.region.outputs[0]]
        *_, given = gradient.graph.inputs
        (written,) = self.writes
        self.given = self._own(f"{written.name}_gradient", given, layout)
        loads = [load.value for load in gradient.of]
        outputs = [value for value in gradient.graph.outputs if isinstance(value, Value)]
        self.reads = [*self.reads, self.given]
        self.writes = [
            self._own(f"{self.of_load[own].name}_gradient", value, load.layout)
            for own, load, value in zip(gradient.of, loads, outputs, strict=True)
        ]
        self.loops = loops_of(self.region, [*self.reads, *self.writes], contiguous=contiguous)
        self.inner = self.loops.contracted
        self.known[self.parts.scores] = self.names.unique("scores")
        self.known[gradient.seed] = self.names.unique("slopes")
        self.scores, self.slopes = self.known[self.parts.scores], self.known[gradient.seed]
        self.kind = type_of(self.parts.queries)
        self.in_parts = self.parts.wide_head or self.parts.wide_columns
        self.has_block = self.in_parts and form in ("of_queries", "of_keys", "of_values")
        self.program = "program" if self.has_block else "tl.program_id(0)"

    def _own(self, name: str, value: Value, layout: Layout) -> Tensor:
        places = {dim: index_of(dim) for axis in layout for dim in axis}
        return Tensor(self.names.unique(name), value, layout, places)

    @property
    def name_of_kernel(self) -> str:
        return f"{self.kernel}_{self.form}"

    def source(self) -> str:
        self.line(f"batches = {self.joint_size(self.loops.batch)}")
        self._body()
        head = self.signature(self.name_of_kernel, self.arguments(self.loops, self.scratch), self.constants)
        return self.finished([*head, *self.docstring(self.name_of_kernel, _TITLES[self.form], self.loops.all)])

    def _body(self) -> None:
        if self.form == "statistics":
            self._statistics()
        elif self.form == "of_queries":
            self._of_queries()
        elif self.in_parts:
            self._of_places_in_parts()
        else:
            self._of_keys()

    @property
    def constants(self) -> tuple[str, ...]:
        return (*_CONSTANTS, "BLOCK_D") if self.in_parts else _CONSTANTS

    def text(self, term: Term) -> str:
        return self.slopes if term is self.gradient.seed else super().text(term)

    # -- indices -----------------------------------------------------------------------------------------------------

    def joint(self, axis: str, loops: Sequence[Loop]) -> str:
        return super().joint(axis, loops) if loops else axis

    def _batch(self, tiles: str) -> None:
        if self.has_block:
            size, block = self.joint_size(self.loops.contracted), "BLOCK_K"
            if self.form == "of_values":
                size, block = self.joint_size(self.loops.columns), "BLOCK_N"
            self.line(f"blocks = tl.cdiv({size}, {block})  # of numbers of a head")
            self.line("program = tl.program_id(0) // blocks")
            self.line("block = (tl.program_id(0) % blocks).to(tl.int64)")
        self.line(f"tiles = {tiles}")
        batch = self.joint("batch", self.loops.batch)
        self.line(f"{batch} = ({self.program} // tiles).to(tl.int64)")
        self.take_apart("batch", self.loops.batch)

    def _rows(self) -> None:
        """A program has a tile of rows."""
        self._batch(f"tl.cdiv({self.joint_size(self.loops.rows)}, BLOCK_M)")
        tile = f"({self.program} % tiles).to(tl.int64)"
        self.axis("m", f"({tile} * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]", self.loops.rows)
        self._place(self.joint("m", self.loops.rows))

    def _place(self, row: str) -> None:
        """Where the statistics of rows lie."""
        batch, size = self.joint("batch", self.loops.batch), self.joint_size(self.loops.rows)
        self.line(f"place = {batch} * {f'({size})' if ' ' in size else size} + {row}")

    def _along(self, axis: str, block: str, way: str, loops: Sequence[Loop]) -> None:
        index = f"tl.arange(0, {block}).to(tl.int64)"
        index = f"(block * {block} + {index})" if self.has_block else index
        self.axis(axis, f"{index}{way}", loops)

    def _head(self, way: str) -> None:
        self._along("k", "BLOCK_K", way, self.loops.contracted)

    def _columns(self, way: str) -> None:
        self._along("n", "BLOCK_N", way, self.loops.columns)

    def _source(self, way: str) -> None:
        self.axis("s", f"(start + tl.arange(0, BLOCK_S)).to(tl.int64){way}", self.loops.source)

    def entry(self, tensor: Tensor, picks: Sequence[Term] = ()) -> tuple[str, str]:
        """As of all tiles, but that programs of places, and of a bias, go through all rows but the last one by one."""
        address, mask = super().entry(tensor, picks)
        if self.form in ("of_keys", "of_values", "of_bias") and not tensor.loops(self.loops.rows[-1:]):
            mask = " & ".join(one for one in mask.split(" & ") if one != "m_ok")
        return address, mask

    # -- tiles -------------------------------------------------------------------------------------------------------

    def _tile_of(self, tensor: Tensor) -> str:
        """The lines that read a tile of the gradient of the result; its name."""
        address, mask = self.entry(tensor)
        absent = [] if self.loops.rows else ["m * 0"]
        absent += [] if self.loops.columns else ["n * 0"]
        self.line(f"{tensor.name} = tl.load({' + '.join([address, *absent])}, mask={mask or 'm_ok & n_ok'}, other=0)")
        return tensor.name

    def _statistics_of_rows(self) -> None:
        self.line('sums = tl.load(sums_ptr + place, mask=m_ok, other=float("inf"))')
        self.line("delta = tl.load(deltas_ptr + place, mask=m_ok, other=0)")

    def _logits(self) -> None:
        """Lines that make logits of scores, on a tile in which indices lie one way or the other."""
        logits = self.parts.logits
        wanted = {*terms_below(logits), logits} - {self.parts.scores, *terms_below(self.parts.scores)}
        self.statements([term for term in self.region.terms if term in wanted], self.load)
        self.line(f'logits = tl.where(s_ok, {outermost(self.text(logits))}, float("-inf"))')

    def _slopes(self, of_weights: str) -> str:
        """The gradient of the scores, of what that of the weights is; its name, rounded to the type of queries."""
        self.line(f"{self.slopes} = weights * ({of_weights} - delta)")
        text = outermost(self.text(self.gradient.slope))
        self.line(f"steep = ({text}).to({TRITON_TYPES[self.kind]})")
        return "steep"

    def _dot(self, first: str, second: str, total: str = "") -> str:
        return f'tl.dot({first}, {second}{f", {total}" if total else ""}, input_precision="ieee")'

    def _in_parts(self, name: str, axis: Literal["k", "n"], *, turned: bool = False) -> str:
        """Lines that add up scores (``k``), or gradients of weights (``n``), BLOCK_D numbers of a head at a time, as
        rows by places, or with ``turned`` the other way; their name."""
        loops = self.loops.contracted if axis == "k" else self.loops.columns
        self.line(f"{name} = tl.zeros([{'BLOCK_S, BLOCK_M' if turned else 'BLOCK_M, BLOCK_S'}], tl.float32)")
        self.line(f"for low in range(0, {self.joint_size(loops)}, BLOCK_D):")
        outer, self.indent = self.indent, self.indent + "    "
        index = "(low + tl.arange(0, BLOCK_D)).to(tl.int64)"
        self.axis(axis, f"{index}[None, :]", loops)
        first = self._of_place(axis) if turned else self._of_row(axis)
        self.axis(axis, f"{index}[:, None]", loops)
        second = self._of_row(axis) if turned else self._of_place(axis)
        self.line(f"{name} = {self._dot(first, second, name)}")
        self.indent = outer
        return name

    def _of_row(self, axis: Literal["k", "n"]) -> str:
        """Lines that read a tile of queries, or of the gradient of their result; its name."""
        if axis == "n":
            return self._tile_of(self.given)
        return self.factor("queries", self.parts.queries, self.kind, "m_ok & k_ok")

    def _of_place(self, axis: Literal["k", "n"]) -> str:
        """Lines that read a tile of keys, or of values; its name."""
        if axis == "n":
            return self._values()
        return self.factor("keys", self.parts.keys, self.kind, "k_ok & s_ok")

    def _places(self) -> None:
        """The head of the loop over keys."""
        end = self.joint_size(self.loops.source)
        if self.masked_behind(self.parts, end):
            end = "end"
        self.line(f"for start in range(0, {end}, BLOCK_S):")
        self.indent += "    "
        self._source("[None, :]")

    # -- the kernels -------------------------------------------------------------------------------------------------

    def _statistics(self) -> None:
        queries, given = self._of_rows()
        self.line('peak = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
        self.line("total = tl.zeros([BLOCK_M, 1], tl.float32)")
        self.line("mixed = tl.zeros([BLOCK_M, 1], tl.float32)")
        self._places()
        self._scores_of(queries)
        self._logits()
        self.raise_peak("peak", "tl.reduce(logits, 1, maximum, keep_dims=True)")
        self.line("powers = tl.exp(logits - shift)")
        self.line("total = total * kept + tl.sum(powers, axis=1, keep_dims=True)")
        of_weights = self._of_weights(given)
        self.line(f"mixed = mixed * kept + tl.sum(powers * {of_weights}, axis=1, keep_dims=True)")
        self.line("peak = highest")
        self.indent = self.indent[4:]
        sums, delta = "peak + tl.log(total)", "mixed / total"
        if self.gradient.guarded:  # no weight is left of exp(logits - infinity)
            none = 'peak == float("-inf")'
            sums, delta = f'tl.where({none}, float("inf"), {sums})', f"tl.where({none}, 0.0, {delta})"
        self.line(f"tl.store(sums_ptr + place, {sums}, mask=m_ok)")
        self.line(f"tl.store(deltas_ptr + place, {delta}, mask=m_ok)")

    def _of_rows(self) -> tuple[str, str]:
        """Lines that read a tile of queries and of the gradient of their result, and lay what keys and values are
        contracted over across; their names. In parts they are read with keys and values."""
        self._rows()
        if self.in_parts:
            return "", ""
        self._head("[None, :]")
        queries = self.factor("queries", self.parts.queries, self.kind, "m_ok & k_ok")
        self._columns("[None, :]")
        given = self._tile_of(self.given)
        self._head("[:, None]")
        self._columns("[:, None]")
        return queries, given

    def _scores_of(self, queries: str) -> str:
        """Lines that read keys and compute scores, rows by places; the name of the keys, if they are read at once."""
        if self.in_parts:
            self._in_parts(self.scores, "k")
            return ""
        keys = self._of_place("k")
        self.line(f"{self.scores} = {self._dot(queries, keys)}")
        return keys

    def _of_weights(self, given: str) -> str:
        """Lines that read values; what computes the gradients of weights."""
        return self._in_parts("of_weights", "n") if self.in_parts else self._dot(given, self._values())

    def _values(self) -> str:
        kind = self.given.value.dtype
        return self.factor("values", self.parts.values, kind, "n_ok & s_ok")  # type: ignore[arg-type]

    def _of_queries(self) -> None:
        queries, given = self._of_rows()
        self._statistics_of_rows()
        self.line("found = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)")
        self._places()
        keys = self._scores_of(queries)
        self._logits()
        self.line("weights = tl.exp(logits - sums)")
        steep = self._slopes(self._of_weights(given))
        if self.in_parts:
            self._head("[:, None]")
            keys = self._of_place("k")
        self.line(f"found = {self._dot(steep, f'tl.trans({keys})', 'found')}")
        self.indent = self.indent[4:]
        self._head("[None, :]")
        self._store(self.writes[0], "found", "m_ok & k_ok")

    def _tile_of_places(self) -> None:
        """A program has a tile of places."""
        self._batch(f"tl.cdiv({self.joint_size(self.loops.source)}, BLOCK_S)")
        self.line(f"begin = ({self.program} % tiles) * BLOCK_S")
        self.axis("s", "(begin + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]", self.loops.source)

    def _of_keys(self) -> None:
        self._tile_of_places()
        self._head("[None, :]")
        self._columns("[None, :]")
        kind = self.given.value.dtype
        keys = self.factor("keys", self.parts.keys, self.kind, "s_ok & k_ok")
        values = self.factor("values", self.parts.values, kind, "s_ok & n_ok")  # type: ignore[arg-type]
        self.line("of_keys = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)")
        self.line("of_values = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)")
        self._row_loops()
        self._rows_from_start("[:, None]")
        queries, given = self._of_row("k"), self._of_row("n")
        self._rows_from_start("[None, :]")
        self._statistics_of_rows()
        self.line(f"{self.scores} = {self._dot(keys, f'tl.trans({queries})')}")
        self._logits()
        self.line("weights = tl.exp(logits - sums)")
        self.line(f"of_values = {self._dot(self._rounded_weights(), given, 'of_values')}")
        steep = self._slopes(self._dot(values, f"tl.trans({given})"))
        self.line(f"of_keys = {self._dot(steep, queries, 'of_keys')}")
        self.indent = "    "
        self._store(self.writes[1], "of_keys", "s_ok & k_ok")
        self._store(self.writes[2], "of_values", "s_ok & n_ok")

    def _of_places_in_parts(self) -> None:
        """The gradient of keys, or that of values."""
        keys = self.form == "of_keys"
        self._tile_of_places()
        self.line(f"found = tl.zeros([BLOCK_S, {'BLOCK_K' if keys else 'BLOCK_N'}], tl.float32)")
        self._row_loops()
        self._rows_from_start("[None, :]")
        self._statistics_of_rows()
        self._in_parts(self.scores, "k", turned=True)
        self._logits()
        self.line("weights = tl.exp(logits - sums)")
        own = self._slopes(self._in_parts("of_weights", "n", turned=True)) if keys else self._rounded_weights()
        self._rows_from_start("[:, None]")
        along = self._head if keys else self._columns
        along("[None, :]")
        self.line(f"found = {self._dot(own, self._of_row('k' if keys else 'n'), 'found')}")
        self.indent = "    "
        along("[None, :]")
        self._store(self.writes[1 if keys else 2], "found", "s_ok & k_ok" if keys else "s_ok & n_ok")

    def _rounded_weights(self) -> str:
        return f"weights.to({TRITON_TYPES[self.given.value.dtype]})"  # type: ignore[index]

    def _row_loops(self) -> None:
        """The heads of the loops over rows: the last of them BLOCK_M at a time, from the first one that a causal mask
        leaves something of."""
        *outer, _ = self.loops.rows or (None,)
        if outer:
            self.line(f"for head in range(0, {self.joint_size(outer)}):")
            self.indent += "    "
            self.line(f"{self.joint('outer', outer)} = tl.cast(head, tl.int64)")
            self.take_apart("outer", outer)
        last = self.loops.rows[-1:]
        bound, first = causal_bound(self.parts), "0"
        if bound is not None and last and tuple(bound.value) == last[0].dims and len(self.loops.source) == 1:
            place = "begin"
            if bound.op == "from_end":
                rows, places = self.joint_size(last), self.joint_size(self.loops.source)
                place = f"tl.maximum(begin + {rows} - {places}, 0)"
            first = f"{place} // BLOCK_M * BLOCK_M"  # before it all is masked
        self.line(f"for start in range({first}, {self.joint_size(last)}, BLOCK_M):")
        self.indent += "    "

    def _rows_from_start(self, way: str) -> None:
        *outer, _ = self.loops.rows or (None,)
        last = self.loops.rows[-1:]
        self.axis("m", f"(start + tl.arange(0, BLOCK_M)).to(tl.int64){way}", last)
        row = self.joint("m", last)
        if outer:
            row = f"{self.joint('outer', outer)} * {self.joint_size(last)} + {row}"
        if way == "[None, :]":
            self._place(row)

    def _store(self, tensor: Tensor, text: str, mask: str) -> None:
        address, _ = self.entry(tensor)
        axes = {"m": self.loops.rows, "s": self.loops.source, "k": self.loops.contracted, "n": self.loops.columns}
        absent = [f"{axis} * 0" for axis, loops in axes.items() if not loops and f"{axis}_ok" in mask]
        self.line(f"tl.store({' + '.join([address, *absent])}, {text}, mask={mask})")
