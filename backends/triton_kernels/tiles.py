"""What kernels of tiles have in common: which tile a program has, where entries of it lie, and what is stored of it.

Programs that run together share rows and columns: GROUP rows of tiles are swept column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from regauge.backends.triton_kernels.loops import Loop, Tensor, loops_of
from regauge.backends.triton_kernels.source import Rounding, Writer
from regauge.ir.fusion.legality import terms_behind
from regauge.ir.fusion.products import Products, plain_products, products_of
from regauge.ir.fusion.region import Region, Term, terms_below

FLOAT8 = "FLOAT8"
"""The constant that says whether floats of 8 bits are multiplied as such, by an architecture that can."""

CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")


@dataclass(frozen=True)
class Tiling:
    """What decides how large tiles are: how many ``products`` have one, ``bytes`` of an entry of the widest factor,
    loops of ``groups`` with scales of their own, and of ``digits`` that share a byte; how many ``parts`` lie side by
    side, of which a program has one, but registers for what is computed ahead of all; whether there are products of two
    ``float8``, and whether a weight is found by a ``bitmap``."""

    products: int
    bytes: int
    groups: tuple[Loop, ...]
    digits: tuple[Loop, ...]
    parts: int = 1
    float8: bool = False
    bitmap: bool = False

    @property
    def plain(self) -> bool:
        """Whether this is one product of floats: what tables of configurations are made for."""
        apart = self.groups or self.digits or self.float8 or self.bitmap
        return self.products == 1 == self.parts and self.bytes > 1 and not apart


class TileBase(Writer):
    """Indices and addresses of tiles."""

    def __init__(self, region: Region, name: str, rounding: Rounding, *, contiguous: bool) -> None:
        super().__init__(region, rounding)
        self.kernel = name
        self.loops = loops_of(region, [*self.reads, *self.writes], contiguous=contiguous)
        self.inner = self.loops.contracted

    def all_loops(self) -> Sequence[Loop]:
        return self.loops.all

    def axis(self, axis: str, index: str, loops: Sequence[Loop]) -> None:
        joint = self.joint(axis, loops)
        self.line(f"{joint} = {index}")
        self.line(f"{axis}_ok = {joint} < {self.joint_size(loops)}")
        self.take_apart(axis, loops)

    def take_apart(self, axis: str, loops: Sequence[Loop]) -> None:
        """As of rows, but in 32 bits, in which joint sizes are computed, too (MOST_INDICES): a division of 64 bits is
        a call of many instructions, around which registers are spilled."""
        total, rest = axis, f"{axis}_rest"
        if len(loops) > 1:
            self.line(f"{rest} = {axis}.to(tl.int32)")
        for loop in loops[:0:-1]:
            size = self.bits.get(loop.dims, f"size_{loop.name}")
            self.line(f"{loop.name} = ({rest} % {size}).to(tl.int64)")
            self.line(f"{rest} = {rest} // {size}")
            total = f"{rest}.to(tl.int64)"
        if len(loops) > 1:
            self.line(f"{loops[0].name} = {total}")

    def entry(self, tensor: Tensor, picks: Sequence[Term] = ()) -> tuple[str, str]:
        """The address of an entry of a tile, and the mask."""
        loops = self.loops
        axes = {"m": loops.rows, "n": loops.columns, "k": self.inner, "s": loops.source, "r": loops.rank}
        axes["v"] = loops.value_rank
        masks = [f"{axis}_ok" for axis, loops in axes.items() if tensor.loops(loops)]
        return self.address(tensor, self.loops, picks), " & ".join(masks)

    def load(self, term: Term) -> str:
        return self.numbers(term, self.raw(term))

    def raw(self, term: Term) -> str:
        """What is read of a tensor, as it is stored."""
        address, mask = self.entry(self.of_load[term], term.args[: len(term.value.picked)])
        mask = " & ".join(filter(None, [mask, *self.guards(term)]))
        return f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"


class TileWriter(TileBase):
    """Indices of the tiles of contractions, and what stands behind these."""

    def __init__(self, region: Region, name: str, rounding: Rounding, *, contiguous: bool) -> None:
        super().__init__(region, name, rounding, contiguous=contiguous)
        how = partial(products_of, region) if rounding == "fused" else plain_products
        self.parts: list[Products] = list(map(how, region.parts))
        self.products = self.parts[0]
        apart = self.products.groups.union(self.products.digits)
        self.groups = tuple(loop for loop in self.loops.contracted if loop.dims[0] in self.products.groups)
        self.digits = tuple(loop for loop in self.loops.contracted if loop.dims[0] in self.products.digits)
        self.inner = tuple(loop for loop in self.loops.contracted if loop.dims[0] not in apart)
        self.over = region.contractions[0].over
        self.done: set[Term] = set()  # terms that have a line which holds for the whole tile

    # -- indices -----------------------------------------------------------------------------------------------------

    def tile(self) -> None:
        """Which tile of which product of the batch a program has."""
        self.line(f"tiles_m = tl.cdiv({self.joint_size(self.loops.rows)}, BLOCK_M)")
        counts = [f"tl.cdiv({self.joint_size(loops)}, BLOCK_N)" for loops in self.loops.parts or [self.loops.columns]]
        self.line(f"tiles_n = {' + '.join(counts)}")
        if self.loops.batch:
            batch = self.joint("batch", self.loops.batch)
            self.line(f"{batch} = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)")
            self.take_apart("batch", self.loops.batch)
        self.line("program = tl.program_id(0) % (tiles_m * tiles_n)")
        self.line("first = program // (GROUP * tiles_n) * GROUP  # of the rows of tiles that are swept together")
        self.line("high = tl.minimum(tiles_m - first, GROUP)")
        self.line("tile_m = first + program % (GROUP * tiles_n) % high")
        self.line("tile_n = program % (GROUP * tiles_n) // high")
        self.axis("m", "(tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]", self.loops.rows)
        if not self.loops.parts:
            self._columns(self.loops.columns)

    def _columns(self, loops: Sequence[Loop]) -> None:
        self.axis("n", "(tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]", loops)

    def each_part(self, body: Callable[[], None]) -> None:
        """The lines of a body: where several parts lie beside one another a branch for each."""
        if not self.loops.parts:
            body()
            return
        outer, tiles = self.indent, [f"tl.cdiv({self.joint_size(loops)}, BLOCK_N)" for loops in self.loops.parts]
        for place, loops in enumerate(self.loops.parts):
            self.products, self.done = self.parts[place], set()
            if place:
                self.line(f"tile_n -= {tiles[place - 1]}")
            inside = f"tile_n < {tiles[place]}"
            self.line(f"if (tile_n >= 0) & ({inside}):" if place else f"if {inside}:")
            self.indent += "    "
            self._columns(loops)
            body()
            self.indent = outer

    # -- what stands behind ------------------------------------------------------------------------------------------

    def once(self, wanted: Iterable[Term]) -> None:
        """Lines for what terms are computed from and has no contracted loops: they hold for the whole tile."""
        needed = {one for term in wanted for one in (term, *terms_below(term))}
        ready = [t for t in self.region.terms if t in needed and t not in self.done and not t.axes & self.over]
        self.done.update(ready)
        self.statements(ready, self.load)

    def behind(self) -> None:
        """What is computed of the sums, and stored."""
        for one in self.products.all:
            scales = [scale for scale in one.scales if not scale.axes & self.over]
            self.once(scales)
            name = self.name(one.contraction)
            factors = [f"{name}.to(tl.float32)" if one.whole and not self.groups else name, *map(self.text, scales)]
            if len(factors) > 1 or factors[0] != name:
                self.line(f"{name} = {' * '.join(factors)}")
            self.done.add(one.contraction)
        axes = self.products.all[0].contraction.axes
        writes = [tensor for tensor in self.writes if self.region.dims(tensor.value) == axes]
        rest = terms_behind(self.region, [tensor.value for tensor in writes]) - self.done
        self.statements([term for term in self.region.terms if term in rest], self.load)
        for tensor in writes:
            address, mask = self.entry(tensor)
            self.line(f"tl.store({address}, {self.stored(tensor)}, mask={mask})")
