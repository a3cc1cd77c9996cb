"""Kernels of attention: a program has BLOCK_M queries of one head, and goes through keys and values once.

    scores    BLOCK_M by BLOCK_S at a time, in single precision, scaled, masked and biased on the tile
    peak      the greatest score that a query has met, total the sum of exp(scores - peak), mixed that of the values

Where a greater score is met, total and mixed are brought to it by exp(old peak - new peak) (Dao et al. 2022,
FlashAttention, algorithm 1; Dao 2023, FlashAttention-2, with the division at the end). Queries that share keys are rows
of the same program. Behind the last place that a causal mask leaves to a tile nothing is read.

Keys and values of few bits are multiplied as codes (:mod:`triton_coded`), keys that are products with latents computed
tile by tile (:mod:`triton_latent`). Where values are, latents are mixed, and the mixture multiplied behind the loop.

Heads of more than 256 numbers are read in parts: scores are added up, and each part of values has programs of its own.

With few queries the places are shared out among SPLITS programs (``split``), whose peaks, totals and mixtures a second
kernel joins (``combine``; Dao et al. 2023, Flash-Decoding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from regauge.backends.triton_kernels.coded import of_places
from regauge.backends.triton_kernels.contraction import type_of
from regauge.backends.triton_kernels.expressions import TRITON_TYPES, outermost
from regauge.backends.triton_kernels.latent import LatentFactors
from regauge.backends.triton_kernels.loops import Loop
from regauge.ir.fusion.region import Region, terms_below

AttentionForm = Literal["attention", "split", "combine"]
_TITLES: Mapping[AttentionForm, str] = {
    "attention": "attention, one pass over keys and values",
    "split": "attention of a part of the keys and values",
    "combine": "attention, joined from its parts",
}
_CONSTANTS: Mapping[AttentionForm, tuple[str, ...]] = {
    "attention": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S"),
    "split": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S", "SPLITS"),
    "combine": ("BLOCK_M", "BLOCK_N", "SPLITS"),
}
SCRATCH = ("peaks_ptr", "totals_ptr", "mixtures_ptr")
"""What parts hand on: for each part and row a peak, a total, and a mixture of all columns, in single precision."""


class AttentionKernel(LatentFactors):
    """The text of one kernel; see the module docstring."""

    def __init__(self, region: Region, name: str, form: AttentionForm, *, contiguous: bool) -> None:
        super().__init__(region, name, "fused", contiguous=contiguous)
        assert region.attention is not None
        self.form, self.parts = form, region.attention
        for own in ("peak", "total", "mixed", "scores"):
            self.known[getattr(self.parts, own)] = self.names.unique(own)
        self.peak, self.total = self.known[self.parts.peak], self.known[self.parts.total]
        self.mixed = self.known[self.parts.mixed]
        self.mixture = self.names.unique("mixture")
        self.sums: list[str] = []  # of queries, for shifts of keys
        self.shifts: list[str] = []  # of values, mixed

    @property
    def name_of_kernel(self) -> str:
        return self.kernel if self.form == "attention" else f"{self.kernel}_{self.form}"

    @property
    def scratch(self) -> tuple[str, ...]:
        return () if self.form == "attention" else SCRATCH

    def source(self) -> str:
        self._tile()
        if self.form == "combine":
            self._join()
        else:
            self._queries()
            self._places()
        if self.form == "split":
            self._hand_on()
        else:
            self._results()
        name = self.name_of_kernel
        constants = _CONSTANTS[self.form]
        if self.loops.rank and self.form != "combine":
            constants = (*constants, "BLOCK_R")
        if self.loops.value_rank and self.form != "combine":
            constants = (*constants, "BLOCK_V")
        head = self.signature(name, self.arguments(self.loops, self.scratch), constants)
        return self.finished([*head, *self.docstring(name, _TITLES[self.form], self.loops.all)])

    # -- indices -----------------------------------------------------------------------------------------------------

    def _tile(self) -> None:
        """Which queries of which head a program has, and which part of the places."""
        self.line(f"tiles = tl.cdiv({self.joint_size(self.loops.rows)}, BLOCK_M)")
        program = "tl.program_id(0)"
        if self.parts.wide_columns:
            self.line(f"blocks = tl.cdiv({self.joint_size(self.loops.columns)}, BLOCK_N)  # of columns")
            self.line("program = tl.program_id(0) // blocks")
            program = "program"
        whole = program
        if self.form != "attention":
            self.line(f"batches = {self.joint_size(self.loops.batch)}")
        if self.form == "split":
            self.line(f"part = ({program} // (tiles * batches)).to(tl.int64)")
            program = f"{program} % (tiles * batches)"
        if self.loops.batch or self.form != "attention":
            batch = self.joint("batch", self.loops.batch)
            self.line(f"{batch} = ({program} // tiles).to(tl.int64)")
            self.take_apart("batch", self.loops.batch)
        tile = f"({whole} % tiles).to(tl.int64)"
        self.axis("m", f"({tile} * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]", self.loops.rows)
        self._columns()

    def _columns(self) -> None:
        index = "tl.arange(0, BLOCK_N).to(tl.int64)"
        if self.parts.wide_columns:
            index = f"((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + {index})"
        self.axis("n", f"{index}[None, :]", self.loops.columns)

    def _head(self, way: str) -> None:
        index = "tl.arange(0, BLOCK_K)"
        index = f"(low + {index})" if self.parts.wide_head else index
        self.axis("k", f"{index}.to(tl.int64){way}", self.loops.contracted)

    def _source(self, way: str) -> None:
        self.axis("s", f"(start + tl.arange(0, BLOCK_S)).to(tl.int64){way}", self.loops.source)

    def joint(self, axis: str, loops: Sequence[Loop]) -> str:
        return super().joint(axis, loops) if loops else axis

    # -- the pass ----------------------------------------------------------------------------------------------------

    def _queries(self) -> None:
        if self.parts.wide_head:  # they are read in parts, with keys
            self._start()
            return
        self._head("[None, :]")
        kind, coded = self._type(), self.parts.coded_keys
        self.queries = self.factor("queries", self.parts.queries, kind, "m_ok & k_ok")
        if coded is None:
            self._head("[:, None]")
        else:
            self.queries, self.sums = self.scaled_queries(self.queries, coded, kind)
            self.bytes_axis("k", "BLOCK_K", coded, self.loops.contracted)
        if self.parts.coded_values is not None:
            self.bytes_axis("n", "BLOCK_N", self.parts.coded_values, self.loops.columns)
        self._start()

    def _start(self) -> None:
        self.line(f'{self.peak} = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
        self.line(f"{self.total} = tl.zeros([BLOCK_M, 1], tl.float32)")
        if self.parts.latent_values is None or self.form == "combine":
            self.line(f"{self.mixed} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)")
        else:
            self.line(f"{self.mixture} = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)  # of latents")
        coded = self.parts.coded_values if self.form != "combine" else None
        for shift in coded.shifts if coded is not None else ():
            if of_places(shift, self.parts.source):
                self.shifts.append(self.names.unique("shifted"))
                self.line(f"{self.shifts[-1]} = tl.zeros([BLOCK_M, 1], tl.float32)")
            else:
                self.shifts.append("")

    def _places(self) -> None:
        """The loop over keys and values."""
        first, end = "0", self.joint_size(self.loops.source)
        if self.masked_behind(self.parts, end):
            end = "end"
        if self.form == "split":
            self.line(f"share = tl.cdiv(tl.cdiv({end}, BLOCK_S), SPLITS) * BLOCK_S")
            first, end = "part * share", f"tl.minimum((part + 1) * share, {end})"
        self.line(f"for start in range({first}, {end}, BLOCK_S):")
        self.indent += "    "
        if self.parts.coded_keys is None:
            self._source("[None, :]")
        logits = self._logits()
        self.raise_peak(self.peak, f"tl.reduce({logits}, 1, maximum, keep_dims=True)")
        self.line(f"weights = tl.exp({logits} - shift)")
        self.line(f"{self.total} = {self.total} * kept + tl.sum(weights, axis=1, keep_dims=True)")
        latents = self.parts.latent_values
        kind = type_of(self.parts.values if latents is None else latents.latents)
        values = self._values(kind)
        weights, mixed = f"weights.to({TRITON_TYPES[kind]})", self.mixed if latents is None else self.mixture
        self.line(f'{mixed} = tl.dot({weights}, {values}, {mixed} * kept, input_precision="ieee")')
        self.line(f"{self.peak} = highest")
        self.indent = self.indent[4:]
        if latents is not None:
            self.values_of_latents(latents, self.mixture, self.total, self.mixed)
        if self.parts.coded_values is not None:
            self._shift()

    def _values(self, kind: torch.dtype) -> str:
        """The lines that read or compute a tile of values; returns its name."""
        coded = self.parts.coded_values
        for name, shift in zip(self.shifts, coded.shifts if coded is not None else (), strict=True):
            if name:
                text = f"weights{self.shifted(shift)}"
                self.line(f"{name} = {name} * kept + tl.sum({text}, axis=1, keep_dims=True)")
        self._source("[:, None]")
        if self.parts.latent_values is not None:
            return self.latents_of_values(self.parts.latent_values, kind)
        if coded is None:
            return self.factor("values", self.parts.values, kind, "s_ok & n_ok")
        self.needed(coded.places)
        return self.codes("values", coded, kind, "BLOCK_N", self.loops.columns, coded.places)

    def _shift(self) -> None:
        """Lines that make the mixture of values of that of codes."""
        coded = self.parts.coded_values
        assert coded is not None
        self._columns()
        if coded.heads:
            self.needed(coded.heads)
            self.line(f"{self.mixed} = {self.product(self.mixed, coded.heads)}")
        for name, shift in zip(self.shifts, coded.shifts, strict=True):
            self.needed(shift.heads)
            text = name or f"{self.total}{self.shifted(shift)}"
            self.line(f"{self.mixed} += {self.product(text, shift.heads)}")

    def _logits(self) -> str:
        """The lines that compute a tile of what the softmax is of; returns its name."""
        scores, coded = self.name(self.parts.scores), self.parts.coded_keys
        if self.parts.wide_head:
            self._scores_in_parts(scores)
            return self._of_scores()
        if self.parts.latent_keys is not None:
            keys = self.keys_of_latents(self.parts.latent_keys, self._type())
        elif coded is None:
            keys = self.factor("keys", self.parts.keys, self._type(), "k_ok & s_ok")
        else:
            self._source("[:, None]")
            codes = self.codes("keys", coded, self._type(), "BLOCK_K", self.loops.contracted)
            keys = f"tl.trans({codes})"
            self._source("[None, :]")
        self.line(f'{scores} = tl.dot({self.queries}, {keys}, input_precision="ieee")')
        if coded is not None:
            self.shifted_scores(scores, coded, self.sums)
        return self._of_scores()

    def _scores_in_parts(self, scores: str) -> None:
        """Lines that add up scores, BLOCK_K numbers of a head at a time."""
        self.line(f"{scores} = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)")
        self.line(f"for low in range(0, {self.joint_size(self.loops.contracted)}, BLOCK_K):")
        self.indent += "    "
        self._head("[None, :]")
        queries = self.factor("queries", self.parts.queries, self._type(), "m_ok & k_ok")
        self._head("[:, None]")
        keys = self.factor("keys", self.parts.keys, self._type(), "k_ok & s_ok")
        self.line(f'{scores} = tl.dot({queries}, {keys}, {scores}, input_precision="ieee")')
        self.indent = self.indent[4:]

    def _of_scores(self) -> str:
        """The lines that compute what the softmax is of; its name."""
        logits = self.parts.logits
        wanted = {*terms_below(logits), logits} - {self.parts.scores, *terms_below(self.parts.scores)}
        self.statements([term for term in self.region.terms if term in wanted], self.load)
        self.line(f'logits = tl.where(s_ok, {outermost(self.text(logits))}, float("-inf"))')
        return "logits"

    def _type(self) -> torch.dtype:
        """What scores are multiplied in: the type of queries and keys, or single precision where they have two."""
        factors = (self.parts.queries, *([] if self.parts.coded_keys is not None else [self.parts.keys]))
        types = {type_of(factor) for factor in factors}
        return types.pop() if len(types) == 1 else torch.float32

    # -- parts -------------------------------------------------------------------------------------------------------

    def _part(self, part: str) -> None:
        batch, row = self.joint("batch", self.loops.batch), self.joint("m", self.loops.rows)
        self.line(f"place = ({part} * batches + {batch}) * {self._grouped(self.loops.rows)} + {row}")
        column = self.joint("n", self.loops.columns)
        self.line(f"places = place * {self._grouped(self.loops.columns)} + {column}")

    def _grouped(self, loops: Sequence[Loop]) -> str:
        size = self.joint_size(loops)
        return f"({size})" if " " in size else size

    def _hand_on(self) -> None:
        self._part("part")
        self.line(f"tl.store(peaks_ptr + place, {self.peak}, mask=m_ok)")
        self.line(f"tl.store(totals_ptr + place, {self.total}, mask=m_ok)")
        self.line(f"tl.store(mixtures_ptr + places, {self.mixed}, mask=m_ok & n_ok)")

    def _join(self) -> None:
        self._start()
        self.line("for part in range(0, SPLITS):")
        self.indent += "    "
        self._part("part")
        self.line('peak_of_part = tl.load(peaks_ptr + place, mask=m_ok, other=float("-inf"))')
        self.raise_peak(self.peak, "peak_of_part")
        self.line("weight = tl.exp(peak_of_part - shift)")
        for own, mask in ((self.total, "m_ok"), (self.mixed, "m_ok & n_ok")):
            pointer = "totals_ptr + place" if own is self.total else "mixtures_ptr + places"
            self.line(f"{own} = {own} * kept + tl.load({pointer}, mask={mask}, other=0) * weight")
        self.line(f"{self.peak} = highest")
        self.indent = self.indent[4:]

    # -- results -----------------------------------------------------------------------------------------------------

    def _results(self) -> None:
        """What is computed behind the loop: what commutes with the last sum, and what stands behind it."""
        behind = self.parts.behind(self.region)
        needed = {term for factor, _ in self.parts.factors for term in (*terms_below(factor), factor)}
        self.statements([term for term in behind if term in needed], self.load)
        if self.parts.factors:
            steps = [f" {'/' if divided else '*'} {self.text(factor)}" for factor, divided in self.parts.factors]
            self.line(f"{self.mixed} = {self.mixed}{''.join(steps)}")
        self.statements([term for term in behind if term not in needed], self.load)
        for tensor in self.writes:
            address = self.address(tensor, self.loops)
            absent = [] if self.loops.rows else ["m * 0"]
            absent += [] if self.loops.columns else ["n * 0"]
            self.line(f"tl.store({' + '.join([address, *absent])}, {self.stored(tensor)}, mask=m_ok & n_ok)")
