"""Groups of adjacent attentions whose keys, or whose values, have latents in common, and how they are written.

    before   k_1 = W_1 x_1;    k_2 = W_2 x_2
    after    k_1 = B_1 c_1;    k_2 = B_2 [c_1, c_2];    c_1 = A_1 x_1, c_2 = A_2 x_2, of which one may be missing

While a graph is fitted, each layer reads what all layers of its group up to it read, side by side, with zeros in the
weight of the original (:func:`seated`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.bonds import keep_bond
from regauge.ir.cost import item_size
from regauge.ir.edit import Builder, record, remove_dead, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.attention.sites import Site
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.decoding.latent_parts import Part, forms_of
from regauge.passes.decoding.latent_rewrite import apart, put, weight_beside


@dataclass(eq=False)
class Group:
    """The keys, or the values, of adjacent attentions; ``seats`` are their layers while they are fitted."""

    parts: list[Part] = field(default_factory=list)
    seats: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        names = dict.fromkeys(own.heads.layer.weight.name for own in (self.parts[0], self.parts[-1]))
        return f"{' to '.join(names)}: {self.parts[0].kind}"

    @property
    def layers(self) -> list[Layer]:
        """The layers that read side by side what the group reads."""
        found = [layer_of(node) for node in self.seats]
        return [layer for layer in found if layer is not None]

    @property
    def whole(self) -> int:
        """The numbers that a cache has of them without latents."""
        return sum(part.most for part in self.parts)

    @property
    def entry(self) -> float:
        """The bytes of one of these."""
        return item_size(self.parts[0].heads.layer.weight.dtype)


def groups_of(sites: Sequence[Site], left: Counter[str], count: int) -> list[Group]:
    """Up to ``count`` adjacent attentions each, of those that read values with the same axes in front of the last.

    ``left`` counts the reasons why others can have no latent.
    """
    found: list[Group] = []
    last: dict[object, Group] = {}
    for part in _parts(sites, left):
        x = part.heads.x
        kind = part.kind, part.site.is_cross, x.shape[:-1], x.dtype, part.heads.layer.weight.dtype
        group = last.get(kind)
        if group is None or len(group.parts) == count:
            group = last[kind] = Group()
            found.append(group)
        group.parts.append(part)
    return found


def _parts(sites: Sequence[Site], left: Counter[str]) -> Iterator[Part]:
    for ways in forms_of(sites, left, joint=True):
        if ways[0].joint:
            yield ways[0]
        else:
            left[f"{ways[0].kind}: their layer makes something else, too"] += 1


def seated(graph: Graph, groups: Sequence[Group], *, by: str) -> None:
    """Let each layer read what the layers of its group up to it read, side by side: nothing changes."""
    build, wide = Builder(graph, by=by), dict[tuple[Value, ...], Value]()
    for group in groups:
        read = [part.heads.x for part in group.parts]
        for place, part in enumerate(group.parts):
            layer, own = part.heads.layer, tuple(read[: place + 1])
            matrix = layer.matrix(layer.weight.tensor.detach())
            before = matrix.new_zeros(len(matrix), sum(int(x.shape[-1]) for x in own[:-1]))
            with build.at(layer.node):
                if own not in wide:
                    wide[own] = own[0] if place == 0 else build.concat(*own, dim=own[0].rank - 1)
                weight = weight_beside(build, layer, "group", torch.cat([before, matrix], 1))
                made: Value = build.linear(wide[own], weight, layer.bias)
            replace_uses(graph, layer.node.output, made)
            assert made.producer is not None
            group.seats.append(made.producer)
    remove_dead(graph)


def write_group(
    graph: Graph, group: Group, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], *, by: str
) -> None:
    """Put latents in place of a group's seats.

    ``downs`` [rank, inputs] make what each layer adds to the latent; ``ups`` [outputs, ranks so far] are what it reads
    it by.
    """
    build, latents, joined = Builder(graph, by=by), list[Value](), dict[int, Value]()
    for part, seat, down, up in zip(group.parts, group.layers, downs, ups, strict=True):
        with build.at(seat.node):
            if len(down):
                latent = build.linear(apart(part.heads.x), weight_beside(build, part.heads.layer, "latent", down))
                keep_bond(latent, f"{group.name} in a cache")
                latents.append(latent)
            many = len(latents)
            if many not in joined:
                joined[many] = latents[0] if many == 1 else build.concat(*latents, dim=latents[0].rank - 1)
            whole = build.linear(joined[many], weight_beside(build, part.heads.layer, "heads", up), seat.bias)
            put(build, seat.node.output, whole)
    record(graph, by, f"{group.name} of ranks {' '.join(str(len(down)) for down in downs)}")
