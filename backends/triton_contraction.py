"""Kernels with a contraction: a program has a tile of BLOCK_M by BLOCK_N entries of the product.

It goes through the contracted loops BLOCK_K at a time. Factors are read in their own type, or computed from what is
read and rounded to it (a prologue); sums are in single precision; what stands behind the product is computed on the
tile.
Programs that run together share rows and columns: GROUP rows of tiles are swept column by column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.backends.triton_expressions import TRITON_TYPES, outermost
from regauge.backends.triton_loops import Loop, Tensor, loops_of
from regauge.backends.triton_source import Rounding, Writer
from regauge.ir.fusion.region import Region, Term, below_results, terms_below

CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")


class ContractionKernel(Writer):
    """The text of one kernel; see the module docstring."""

    def __init__(self, region: Region, name: str, rounding: Rounding, *, contiguous: bool) -> None:
        super().__init__(region, rounding)
        self.kernel = name
        self.loops = loops_of(region, [*self.reads, *self.writes], contiguous=contiguous)
        self.contraction = self._contracted_first()
        self.left, self.right = below_results(self.contraction.args[0]).args
        self.below = terms_below(self.contraction)

    def _contracted_first(self) -> Term:
        (contraction,) = self.region.contractions
        return contraction

    def all_loops(self) -> Sequence[Loop]:
        return self.loops.all

    def source(self) -> str:
        self._tile()
        self._product()
        self.statements([term for term in self.region.terms if term not in self.below], self.load)
        for tensor in self.writes:
            value = self.text(self.region.results[tensor.value])
            address, mask = self._place(tensor)
            self.line(f"tl.store({address}, {value}, mask={mask})")
        head = self.signature(self.kernel, self.arguments(self.loops.all), CONSTANTS)
        return self.finished([*head, *self.docstring(self.kernel, "contraction, in tiles", self.loops.all)])

    # -- indices -----------------------------------------------------------------------------------------------------

    def _tile(self) -> None:
        """Which tile of which product of the batch a program has."""
        self.line(f"tiles_m = tl.cdiv({self.joint_size(self.loops.rows)}, BLOCK_M)")
        self.line(f"tiles_n = tl.cdiv({self.joint_size(self.loops.columns)}, BLOCK_N)")
        if self.loops.batch:
            batch = self.joint("batch", self.loops.batch)
            self.line(f"{batch} = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)")
            self.take_apart("batch", self.loops.batch)
        self.line("program = tl.program_id(0) % (tiles_m * tiles_n)")
        self.line("first = program // (GROUP * tiles_n) * GROUP  # of the rows of tiles that are swept together")
        self.line("high = tl.minimum(tiles_m - first, GROUP)")
        self.line("tile_m = first + program % (GROUP * tiles_n) % high")
        self.line("tile_n = program % (GROUP * tiles_n) // high")
        self._axis("m", "(tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]", self.loops.rows)
        self._axis("n", "(tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]", self.loops.columns)

    def _axis(self, axis: str, index: str, loops: Sequence[Loop]) -> None:
        joint = self.joint(axis, loops)
        self.line(f"{joint} = {index}")
        self.line(f"{axis}_ok = {joint} < {self.joint_size(loops)}")
        self.take_apart(axis, loops)

    def _place(self, tensor: Tensor) -> tuple[str, str]:
        """The address of an entry of a tile, and the mask."""
        terms = [f"{loop.name} * {tensor.name}_{loop.name}" for loop in tensor.loops(self.loops.all)]
        axes = {"m": self.loops.rows, "n": self.loops.columns, "k": self.loops.contracted, "s": self.loops.source}
        masks = [f"{axis}_ok" for axis, loops in axes.items() if tensor.loops(loops)]
        masks += [f"{segment.name}_ok" for segment in tensor.loops(self.loops.segments)]
        return " + ".join([f"{tensor.name}_ptr", *terms]), " & ".join(masks)

    def load(self, tensor: Tensor) -> str:
        text = self._raw(tensor)
        return text if tensor.value.dtype == torch.bool else f"{text}.to(tl.float32)"

    def _raw(self, tensor: Tensor) -> str:
        address, mask = self._place(tensor)
        return f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"

    # -- the product -------------------------------------------------------------------------------------------------

    def _product(self) -> None:
        accumulated = self.name(self.contraction)
        self.line(f"{accumulated} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)")
        self.line(f"for start in range(0, {self.joint_size(self.loops.contracted)}, BLOCK_K):")
        self.indent += "    "
        kind = self._type()
        self._contracted("[None, :]")
        left = self._factor("left", self.left, kind, "m_ok & k_ok")
        self._contracted("[:, None]")
        right = self._factor("right", self.right, kind, "k_ok & n_ok")
        self.line(f'{accumulated} = tl.dot({left}, {right}, {accumulated}, input_precision="ieee")')
        self.indent = self.indent[4:]

    def _contracted(self, way: str) -> None:
        """The indices of what is contracted, along the tile of one factor."""
        self._axis("k", f"(start + tl.arange(0, BLOCK_K)).to(tl.int64){way}", self.loops.contracted)

    def _type(self) -> torch.dtype:
        """What factors are multiplied in: their type, or single precision where they have two."""
        types = {type_of(factor) for factor in (self.left, self.right)}
        return types.pop() if len(types) == 1 else torch.float32

    def _factor(self, side: str, factor: Term, kind: torch.dtype, mask: str) -> str:
        """The lines that read or compute a tile of a factor; returns its name."""
        below = below_results(factor)
        if below.op == "load" and (self.rounding == "fused" or factor is below or factor.args[0] is below):
            tensor = self.of_load[below]
            cast = "" if tensor.value.dtype == kind else f".to({TRITON_TYPES[kind]})"
            self.line(f"{self.name(below)} = {self._raw(tensor)}{cast}")
            return self.name(below)
        needed = {*terms_below(factor), factor}
        self.statements([term for term in self.region.terms if term in needed], self.load)
        text = f"tl.where({mask}, {outermost(self.text(factor))}, 0.0)"
        self.line(f"{side} = {text}" if kind == torch.float32 else f"{side} = {text}.to({TRITON_TYPES[kind]})")
        return side


def type_of(factor: Term) -> torch.dtype:
    """The type that a factor has in torch; what is no value there is computed in single precision."""
    value = factor.value.value if factor.op == "load" else factor.value if factor.op == "result" else None
    return torch.float32 if value is None else value.dtype
