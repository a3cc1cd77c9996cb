"""Kernels of the gradient of a bias of scores (:func:`regauge.ir.fusion.attention_gradients.bias_gradient`).

    statistics   as for the other gradients of attention (:mod:`attention_gradient`), once more
    of_bias      for BLOCK_M queries and BLOCK_S places the derivative of the logits, added up in one pass over what the
                 bias lacks: the rest of the batch, heads, and tiles of queries or of places
    total        where tiles of the bias are too few to keep a device busy, PARTS programs share such a pass, and what
                 they leave is added up part by part

No two programs add to one entry, so that each time is alike. Tiles of which a causal mask leaves nothing are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regauge.backends.triton_kernels.attention_gradient import (
    STATISTICS,
    AttentionGradientKernel,
    GradientForm,
)
from regauge.backends.triton_kernels.expressions import outermost
from regauge.backends.triton_kernels.loops import Loop, Loops, Tensor, count
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.attention import causal_bound
from regauge.ir.fusion.attention_gradients import AttentionGradient

ENTRIES = 256
"""Entries of a bias of which a program adds up the parts."""


class Shares:
    """The loops of a bias: ``own`` ones of batch and heads, and ``lacking`` ones over which its gradient is a sum; it
    may go along the ``last`` loop of rows, and along places, of which programs have tiles."""

    def __init__(self, bias: Tensor, loops: Loops) -> None:
        outer = (*loops.batch, *loops.rows[:-1])
        self.last = loops.rows[-1:]
        self.own = bias.loops(outer)
        self.lacking = [loop for loop in outer if loop not in self.own]
        self.high, self.wide = bool(bias.loops(self.last)), bool(bias.loops(loops.source))
        self.all = bias.loops(loops.all)
        self.source = loops.source

    def counts(self, sizes: Mapping[Dim, int], high: int, wide: int) -> tuple[int, int]:
        """How many tiles a bias has, and how many steps lead to each, for tiles of these many rows and places."""
        along = [(self.high, -(-count(self.last, sizes) // high)), (self.wide, -(-count(self.source, sizes) // wide))]
        tiles, steps = count(self.own, sizes), count(self.lacking, sizes)
        for own, number in along:
            tiles, steps = (tiles * number, steps) if own else (tiles, steps * number)
        return tiles, steps


class BiasGradientKernel(AttentionGradientKernel):
    """The text of one kernel; see the module docstring."""

    scratch = (*STATISTICS, "parts_ptr")

    def __init__(self, gradient: AttentionGradient, name: str, form: GradientForm, *, contiguous: bool) -> None:
        super().__init__(gradient, name, form, contiguous=contiguous)
        (self.bias,) = self.writes
        self.shares = Shares(self.bias, self.loops)

    @property
    def constants(self) -> tuple[str, ...]:
        own = {"of_bias": (*super().constants, "PARTS"), "total": ("BLOCK", "PARTS")}
        return own.get(self.form, super().constants)

    def _body(self) -> None:
        if self.form == "statistics":
            super()._body()
            return
        self.line(f"entries = {self.joint_size(self.shares.all)}")
        if self.form == "of_bias":
            self._of_bias()
        else:
            self._total()

    def _total(self) -> None:
        self.line("place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
        self.line("ok = place < entries")
        self.line("found = tl.zeros([BLOCK], tl.float32)")
        self.line("for part in range(0, PARTS):")
        self.line("    found += tl.load(parts_ptr + part * entries + place, mask=ok, other=0)")
        self.line(f"tl.store({self.bias.name}_ptr + place, found, mask=ok)")

    def _of_bias(self) -> None:
        self._tile()
        self._pass()
        self.line("found = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)")
        self.line("for more in range(first, stop):")
        self.indent += "    "
        self._step()
        self._add()
        self.indent = self.indent[4:]
        self._leave()

    def _tile(self) -> None:
        """Which tile of the bias a program has, and which part of its sum."""
        self.line(f"tiles_m = tl.cdiv({self.joint_size(self.shares.last)}, BLOCK_M)")
        self.line(f"tiles_s = tl.cdiv({self.joint_size(self.loops.source)}, BLOCK_S)")
        self.line("part = tl.program_id(0) % PARTS")
        self.line("rest = (tl.program_id(0) // PARTS).to(tl.int64)")
        self._taken(self.shares.own, high=self.shares.high, wide=self.shares.wide)

    def _pass(self) -> None:
        """The steps of the part: none where a causal mask leaves nothing of the tile."""
        shares = self.shares
        steps = [f"size_{loop.name}" for loop in shares.lacking]
        steps += [] if shares.high else ["tiles_m"]
        steps += [] if shares.wide else ["tiles_s"]
        self.line(f"steps = {' * '.join(steps) or '1'}")
        self.line("share = tl.cdiv(steps, PARTS)")
        self.line("first = part * share")
        self.line("stop = tl.minimum(first + share, steps)")
        bound = causal_bound(self.parts)
        if shares.wide and bound is not None and bound.axes <= self.bias.axes:
            self.masked_behind(self.parts, self.joint_size(self.loops.source))
            self.line("stop = tl.where(begin_s < end, stop, first)")

    def _step(self) -> None:
        """Where a step is of what the bias lacks."""
        shares = self.shares
        self.line("rest = tl.cast(more, tl.int64)")
        self._taken(shares.lacking, high=not shares.high, wide=not shares.wide)
        text = "0"
        for loop in (*self.loops.batch, *self.loops.rows[:-1]):
            text = loop.name if text == "0" else f"({text} * size_{loop.name} + {loop.name})"
        size = self.joint_size(shares.last)
        self.line(f"place = {text} * {f'({size})' if ' ' in size else size} + {self.joint('m', shares.last)}")

    def _taken(self, loops: Sequence[Loop], *, high: bool, wide: bool) -> None:
        """Lines that take ``rest`` apart: into the tile of places, that of rows, and the index of each loop."""
        for there, axis in ((wide, "s"), (high, "m")):
            if there:
                self.line(f"begin_{axis} = rest % tiles_{axis} * BLOCK_{axis.upper()}")
                self.line(f"rest = rest // tiles_{axis}")
        for loop in loops[:0:-1]:
            self.line(f"{loop.name} = rest % size_{loop.name}")
            self.line(f"rest = rest // size_{loop.name}")
        for loop in loops[:1]:
            self.line(f"{loop.name} = rest")
        if high:
            self.axis("m", "(begin_m + tl.arange(0, BLOCK_M))[:, None]", self.shares.last)
        if wide:
            self.axis("s", "(begin_s + tl.arange(0, BLOCK_S))[None, :]", self.loops.source)

    def _add(self) -> None:
        """Lines that add the derivative at a step."""
        if self.in_parts:
            self._in_parts(self.scores, "k")
            of_weights = self._in_parts("of_weights", "n")
        else:
            of_weights = self._products()
        self._statistics_of_rows()
        self._logits()
        self.line("weights = tl.exp(logits - sums)")
        self.line(f"{self.slopes} = weights * ({of_weights} - delta)")
        self.line(f"found += tl.where(m_ok & s_ok, {outermost(self.text(self.gradient.slope))}, 0.0)")

    def _products(self) -> str:
        """Lines that read factors at once, and compute scores; what computes the gradients of weights."""
        self._head("[None, :]")
        queries = self._of_row("k")
        self._head("[:, None]")
        keys = self._of_place("k")
        self.line(f"{self.scores} = {self._dot(queries, keys)}")
        self._columns("[None, :]")
        given = self._of_row("n")
        self._columns("[:, None]")
        return self._dot(given, self._values())

    def _leave(self) -> None:
        """Lines that write the tile, or leave it as a part."""
        shares = self.shares
        for there, axis in ((shares.high, 0), (shares.wide, 1)):
            if not there:
                self.line(f"found = tl.sum(found, axis={axis}, keep_dims=True)")
        address, mask = self.entry(self.bias)
        pointer, _, place = address.partition(" + ")
        single = [] if shares.high or shares.wide else ["tl.zeros([1, 1], tl.int64)"]
        self.line(f"place = {' + '.join([*filter(None, [place]), *single])}")
        mask = f", mask={mask}" if mask else ""
        self.line("if PARTS == 1:")
        self.line(f"    tl.store({pointer} + place, found{mask})")
        self.line("else:")
        self.line(f"    tl.store(parts_ptr + part * entries + place, found{mask})")
