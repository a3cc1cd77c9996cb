"""Kernels with contractions: a program has a tile of BLOCK_M by BLOCK_N entries of each product.

It goes through the contracted loops BLOCK_K at a time. Factors are read in their own type, or computed from what is
read and rounded to it (a prologue); sums are in single precision; what stands behind the product is computed on the
tile. Products of the same left factor read its tiles once.

Factors of few bits (:mod:`regauge.ir.fusion.products`) are multiplied as integers where both have 8 bits, and else as
floats of the type of the other one, which hold them exactly. Bytes that hold several digits are read once for all of
these. Scales multiply sums: those of groups the sum of each step, others the sum at the end. Two floats of 8 bits are
multiplied as such where tensor cores do (from sm_90 on), with what they sum up added in single precision after each
step, for they keep fewer bits than that (DeepSeek-V3, section 3.3.2), and else in half precision, which holds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.backends.triton_kernels.expressions import NATIVE8, TRITON_TYPES, outermost
from regauge.backends.triton_kernels.loops import Loop
from regauge.backends.triton_kernels.tiles import CONSTANTS, FLOAT8, TileWriter, Tiling
from regauge.ir.fusion.legality import FLOATS
from regauge.ir.fusion.products import Product, Side, codes_of, is_compact, is_float8
from regauge.ir.fusion.region import Term, below_results, terms_below

_LEFT, _RIGHT = "[None, :]", "[:, None]"
"""How indices of what is contracted are laid along a tile of the left and of the right factor."""


class ContractionKernel(TileWriter):
    """The text of one kernel; see the module docstring."""

    @property
    def float8(self) -> bool:
        """Whether there are products of two floats of 8 bits, which tensor cores of some architectures multiply."""
        return self.rounding == "fused" and any(map(_both_float8, (one for part in self.parts for one in part.all)))

    @property
    def constants(self) -> list[str]:
        return [*CONSTANTS, *[FLOAT8] * self.float8]

    @property
    def tiling(self) -> Tiling:
        kinds = [self.kind(product) for part in self.parts for product in part.all]
        most = max(len(part.all) for part in self.parts)
        widest, bitmap = max(kind.itemsize for kind in kinds), any(term.op == "rank" for term in self.region.terms)
        return Tiling(most, widest, self.groups, self.digits, len(self.parts), self.float8, bitmap)

    def source(self) -> str:
        self.tile()
        self.each_part(self._body)
        head = self.signature(self.kernel, self.arguments(self.loops), self.constants)
        return self.finished([*head, *self.docstring(self.kernel, "contraction, in tiles", self.loops.all)])

    def _body(self) -> None:
        self.sums()
        self.behind()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def sums(self) -> None:
        """The sums of products, by a loop over what is contracted."""
        for product in self.products.all:
            kind = "tl.int32" if product.whole and not self.groups else "tl.float32"
            self.line(f"{self.name(product.contraction)} = tl.zeros([BLOCK_M, BLOCK_N], {kind})")
            self.once(scale for scale in product.scales if scale.axes & self.over)
        self.begin()
        self._step()
        self.indent = self.indent[4:]

    def begin(self) -> None:
        """The head of the loop: ``start`` is the first index of a step, in its group."""
        if not self.groups:
            self.line(f"for start in range(0, {self.joint_size(self.inner)}, BLOCK_K):")
            self.indent += "    "
            return
        steps = self.steps()
        self.line(f"for step in range(0, {steps}):")
        self.indent += "    "
        self.start()

    def steps(self) -> str:
        """How many steps there are in all groups."""
        self.line(f"steps = tl.cdiv({self.joint_size(self.inner)}, BLOCK_K){'  # in each group' * bool(self.groups)}")
        return f"{self.joint_size(self.groups)} * steps" if self.groups else "steps"

    def start(self) -> None:
        """The group of a step, and its first index there."""
        if not self.groups:
            self.line("start = step * BLOCK_K")
            return
        self.line(f"{self.joint('group', self.groups)} = tl.cast(step // steps, tl.int64)")
        self.take_apart("group", self.groups)
        self.line("start = step % steps * BLOCK_K")

    def _step(self) -> None:
        """One step: tiles of both factors of each product, multiplied and added."""
        products, outer = self.products.all, self.indent
        self._read: set[Term] = set()
        self._tiles: dict[tuple[Term, torch.dtype, bool], str] = {}
        for product in products if self.groups else ():
            kind = "tl.int32" if product.whole else "tl.float32"
            self.line(f"{self._partial(product)} = tl.zeros([BLOCK_M, BLOCK_N], {kind})")
        rights = [product.right for product in products]
        lefts = list(dict.fromkeys(product.left for product in products))
        for place, loop in enumerate(self.digits):
            self._codes(rights, _RIGHT, ahead=self.digits[place:])
            self._codes(lefts, _LEFT, ahead=self.digits[place:])
            self.line(f"for {loop.name} in tl.static_range({loop.dims[0].size}):")
            self.indent += "    "
        self._codes(lefts, _LEFT)
        left = [self._factor(product, "left") for product in products]
        self._codes(rights, _RIGHT)
        for product, first in zip(products, left, strict=True):
            second = self._factor(product, "right")
            total = self._partial(product) if self.groups else self.name(product.contraction)
            how = "out_dtype=tl.int32" if product.whole else 'input_precision="ieee"'
            if self.float8 and _both_float8(product):
                how += ", max_num_imprecise_acc=BLOCK_K"
            self.line(f"{total} = tl.dot({first}, {second}, {total}, {how})")
        self.indent = outer
        for product in products if self.groups else ():
            self._scale(product)

    def _partial(self, product: Product) -> str:
        return f"{self.name(product.contraction)}_of_step"

    def _scale(self, product: Product) -> None:
        """Add the sum of a step times the scales of its group."""
        scales = [scale for scale in product.scales if scale.axes & self.over]
        needed = {one for scale in scales for one in (scale, *terms_below(scale))} - self._read - self.done
        self.statements([term for term in self.region.terms if term in needed], self.load)
        self._read |= needed
        factors = " * ".join([self._partial(product), *map(self.text, scales)])
        self.line(f"{self.name(product.contraction)} += {factors}")

    # -- factors -----------------------------------------------------------------------------------------------------

    def kind(self, product: Product) -> torch.dtype:
        """What factors are multiplied in: their type, or single precision where they have two. What has few bits goes
        along with the other factor, and half precision holds it; what is stored of a weight with zeros has its type."""
        if product.whole:
            return torch.int8
        types = _types(product.left) | _types(product.right)
        if not types:
            return torch.float16
        return types.pop() if len(types) == 1 else torch.float32

    def _contracted(self, way: str) -> None:
        """The indices of what is contracted, along the tile of one factor."""
        self.axis("k", f"(start + tl.arange(0, BLOCK_K)).to(tl.int64){way}", self.inner)

    def _codes(self, sides: Sequence[Side], way: str, *, ahead: Sequence[Loop] = ()) -> None:
        """Read what factors are made of, as it is stored, and has none of the loops over digits that are still ahead.
        The indices are those of a tile of such factors from here on."""
        later = frozenset(loop.dims[0] for loop in ahead)
        cores = [side.core for side in sides if side.few_bits]
        below = {one for core in cores for one in (core, *terms_below(core))} - self._read
        loads = [load for load in self.region.loads if load in below and not load.axes & later]
        if loads or not ahead and (way == _LEFT or not all(side.few_bits for side in sides)):
            self._contracted(way)
        for load in loads:
            self.statements([arg for arg in load.args if arg.op != "load"], self.load)
            self.line(f"{self.name(load)} = {self.raw(load)}")
        self._read.update(loads)

    def _factor(self, product: Product, name: str) -> str:
        """The lines that make a tile of a factor of what is read; returns its name."""
        side, kind = product.left if name == "left" else product.right, self.kind(product)
        native = self.float8 and _both_float8(product)
        key = side.core, kind, native
        if key not in self._tiles:
            few = side.few_bits
            made = self._few_bits(side, kind, name, native=native) if few else self._plain(side, kind, name)
            self._tiles[key] = made
        return self._tiles[key]

    def _few_bits(self, side: Side, kind: torch.dtype, name: str, *, native: bool = False) -> str:
        core = codes_of(side.core)
        if kind == torch.int8:
            return self.name(core)
        text = self._stored(core)
        text = f"{text}.to({TRITON_TYPES[kind]})"
        if native:
            text = f"{self.name(core)}.to({NATIVE8[core.value.value.dtype]}, bitcast=True) if {FLOAT8} else {text}"
        if name == "left" and core.op in ("add", "sub"):  # what is read beyond the end is 0, but not what is made of it
            text = f"tl.where(k_ok, {text}, 0.0)"
        name = self.names.unique(name)
        self.line(f"{name} = {text}")
        return name

    def _stored(self, term: Term) -> str:
        """What is computed from codes, or from values of a weight with zeros, before these are real numbers."""
        term = codes_of(term)
        if term.op == "load":
            return self.of_bytes(self.of_load[term], self.name(term))
        if term.op == "spread":
            mask, *values = map(self._stored, term.args)
            bits, place = self.names.unique("bits"), self.region.names[term.value.loop]
            self.line(f"{bits} = {outermost(mask)}")
            if values[1:]:
                rank, chosen = self.names.unique("rank"), self.names.unique("chosen")
                self.line(f"{rank} = {self.bits_below(bits, place)}")
                self.line(f"{chosen} = {self.kept(values, rank)}")
                values = [chosen]
            return self.spread(bits, values, place)
        if term.op == "number":
            return str(int(term.value))
        if term.op == "digit":
            return self.digit(term, self._stored(term.args[0]), self.region.names[term.value.loop])
        first, second = (
            self._stored(arg) if codes_of(arg).op == "number" else f"{self._stored(arg)}.to(tl.int32)"
            for arg in term.args
        )
        return f"({first} {'+' if term.op == 'add' else '-'} {second})"

    def _plain(self, side: Side, kind: torch.dtype, name: str) -> str:
        factor = side.core
        below = below_results(factor)
        if below.op == "load" and (self.rounding == "fused" or factor is below or factor.args[0] is below):
            tensor, needed = self.of_load[below], terms_below(below) - self.done
            self.statements([term for term in self.region.terms if term in needed], self.load)
            text = self.of_bytes(tensor, self.raw(below))
            cast = "" if tensor.value.dtype == kind else f".to({TRITON_TYPES[kind]})"
            self.line(f"{self.name(below)} = {text}{cast}")
            return self.name(below)
        needed = {*terms_below(factor), factor} - self.done
        self.statements([term for term in self.region.terms if term in needed], self.load)
        mask = "m_ok & k_ok" if name == "left" else "k_ok & n_ok"
        name = self.names.unique(name)
        text = f"tl.where({mask}, {outermost(self.text(factor))}, 0.0)"
        self.line(f"{name} = {text}" if kind == torch.float32 else f"{name} = {text}.to({TRITON_TYPES[kind]})")
        return name


def type_of(factor: Term) -> torch.dtype:
    """The type that a factor has in torch; what is no value there is computed in single precision."""
    value = factor.value.value if factor.op == "load" else factor.value if factor.op == "result" else None
    return torch.float32 if value is None else value.dtype


def _both_float8(product: Product) -> bool:
    """Whether both factors are floats of 8 bits of which tensor cores know how to multiply them."""
    return all(
        side.few_bits and is_float8(side.core) and codes_of(side.core).value.value.dtype in NATIVE8
        for side in (product.left, product.right)
    )


def _types(side: Side) -> set[torch.dtype]:
    """The types of floats with more than 8 bits that a factor is made of."""
    if not side.few_bits:
        return {type_of(side.core)}
    core = codes_of(side.core)
    stored = core.args[1:] if core.op == "spread" else [core] if is_compact(core) else []
    return {type_of(codes_of(value)) for value in stored} & set(FLOATS)
