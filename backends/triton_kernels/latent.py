"""Keys and values that are made of latents in kernels of attention (:mod:`regauge.ir.fusion.latent`).

For each tile of places latents are read BLOCK_R numbers at a time and multiplied by the same part of each weight; the
products are scaled where they are summed, and keys are rounded to the type of queries as if they had been stored. Of
values the latents are mixed, and their mean is multiplied by the weight behind the loop.
"""

from __future__ import annotations

import torch

from regauge.backends.triton_kernels.coded import CodedFactors
from regauge.backends.triton_kernels.contraction import type_of
from regauge.backends.triton_kernels.expressions import TRITON_TYPES, outermost
from regauge.ir.fusion.attention import Attention, causal_bound
from regauge.ir.fusion.latent import Latents, Mixed
from regauge.ir.fusion.region import Term, below_results, terms_below


class LatentFactors(CodedFactors):
    """Lines for factors, and for keys that are products; and where a causal mask ends."""

    def masked_behind(self, parts: Attention, places: str) -> bool:
        """Where behind some place all is masked, the line that says where these end, of so many places."""
        bound = causal_bound(parts)
        if bound is None:
            return False
        last = f"tl.max({outermost(self.text(bound))})" if bound.axes else self.text(bound)
        last = f"{last} + {places}" if bound.op == "from_end" else last
        self.line(f"end = tl.minimum({places}, {last} + 1)  # behind it all is masked")
        return True

    def factor(self, side: str, factor: Term, kind: torch.dtype, mask: str) -> str:
        """The lines that read or compute a tile of a factor; returns its name. What lacks one of the axes of the tile
        is repeated along it."""
        name = self._given(side, factor, kind, mask)
        axes = {axis.partition("_")[0] for axis in mask.split(" & ")}
        if name == side or axes <= {self.region.names[dim][0] for dim in factor.axes}:
            return name
        self.line(f"{side} = tl.where({mask}, {name}, 0.0).to({TRITON_TYPES[kind]})")
        return side

    def _given(self, side: str, factor: Term, kind: torch.dtype, mask: str) -> str:
        below = below_results(factor)
        if below.op == "load":
            tensor = self.of_load[below]
            self.statements(below.args, self.load)
            cast = "" if tensor.value.dtype == kind else f".to({TRITON_TYPES[kind]})"
            self.line(f"{self.name(below)} = {self.of_bytes(tensor, self.raw(below))}{cast}")
            return self.name(below)
        needed = {*terms_below(factor), factor}
        self.statements([term for term in self.region.terms if term in needed], self.load)
        text = f"tl.where({mask}, {outermost(self.text(factor))}, 0.0)"
        self.line(f"{side} = {text}" if kind == torch.float32 else f"{side} = {text}.to({TRITON_TYPES[kind]})")
        return side

    def keys_of_latents(self, latent: Latents, kind: torch.dtype) -> str:
        """The lines that compute a tile of keys, numbers of a head by places; its name."""
        weights = [part.weight for part in latent.parts if part.weight is not None]
        types = {type_of(latent.latents), *(self._stored(weight) for weight in weights)}
        inner = types.pop() if len(types) == 1 else torch.float32
        names = [self.names.unique("product") for _ in weights]
        for name in names:
            self.line(f"{name} = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)")
        self.line(f"for low in range(0, {self.joint_size(self.loops.rank)}, BLOCK_R):")
        self.indent += "    "
        index = "(low + tl.arange(0, BLOCK_R)).to(tl.int64)"
        self.axis("r", f"{index}[:, None]", self.loops.rank)
        latents = self.factor("latents", latent.latents, inner, "r_ok & s_ok")
        self.axis("r", f"{index}[None, :]", self.loops.rank)
        for name, weight in zip(names, weights, strict=True):
            text = self.factor("factor", weight, inner, "k_ok & r_ok")
            self.line(f'{name} = tl.dot({text}, {latents}, {name}, input_precision="ieee")')
        self.indent = self.indent[4:]
        self.here.clear()
        texts = []
        for part in latent.parts:
            self.needed(part.scales)
            first = [] if part.weight is None else [names.pop(0)]
            texts.append(" * ".join([*first, *map(self.text, part.scales)]))
        self.line(f"keys = tl.where(k_ok & s_ok, {' + '.join(texts)}, 0.0).to({TRITON_TYPES[kind]})")
        return "keys"

    def latents_of_values(self, latent: Mixed, kind: torch.dtype) -> str:
        """The lines that read or compute a tile of latents, places by their rank; its name."""
        self._rank("[None, :]")
        return self.factor("values", latent.latents, kind, "s_ok & v_ok")

    def values_of_latents(self, latent: Mixed, mixture: str, total: str, mixed: str) -> None:
        """Lines that make of a mixture of latents that of values. Its mean is what is rounded for the product: no
        number of places brings it out of the range of the latents."""
        types = {type_of(latent.latents), self._stored(latent.weight)}
        kind = types.pop() if len(types) == 1 else torch.float32
        self._rank("[:, None]")
        weight = self.factor("weight", latent.weight, kind, "v_ok & n_ok")
        self.line(f"{mixture} = {mixture} / tl.where({total} == 0.0, 1.0, {total})")
        cast = "" if kind == torch.float32 else f".to({TRITON_TYPES[kind]})"
        self.line(f'{mixed} = tl.dot({mixture}{cast}, {weight}, input_precision="ieee")')
        self.here.clear()
        self.needed([*latent.scales, *(term for shift in latent.shifts for term in shift)])
        texts = [self.product(mixed, latent.scales), *(" * ".join(map(self.text, shift)) for shift in latent.shifts)]
        self.line(f"{mixed} = ({' + '.join(texts)}) * {total}")

    def _rank(self, way: str) -> None:
        self.axis("v", f"tl.arange(0, BLOCK_V).to(tl.int64){way}", self.loops.value_rank)

    def _stored(self, weight: Term) -> torch.dtype:
        """The type of what a weight is chosen from, if it is one, else that of its sum: swapped and negated entries
        are as exact as they were."""
        moved = below_results(weight)
        if moved.op == "where":
            kinds = {self._stored(arg) for arg in moved.args[1:] if arg.op != "number"}
            return kinds.pop() if len(kinds) == 1 else torch.float32
        return self._stored(moved.args[0]) if moved.op == "neg" else type_of(weight)
