"""Keys and values of an attention written as pairs that are rotated, beside one latent that all heads read."""

from __future__ import annotations

import torch

from regauge.ir.bonds import keep_bond
from regauge.ir.edit import record, replace_uses
from regauge.ir.graph import Graph, Operand, Value
from regauge.passes.attention.sites import Heads
from regauge.passes.decoding.elite_seats import Seat
from regauge.passes.decoding.latent_rewrite import SiteRewrite, weight_beside


def write_elite(graph: Graph, seat: Seat, kept: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, by: str) -> None:
    """Put the latent of a seat into the graph, in whose weights the product stands.

    ``kept`` [heads, pairs] are the pairs that are rotated; ``up`` [rows, rank] makes the other channels of keys, head
    by head, and then those of values; ``down`` [rank, inputs] the latent.
    """
    _EliteRewrite(graph, seat, kept, by).run(up, down)
    record(graph, by, f"{seat.name}: {kept.shape[1]} pairs rotated, latent of rank {len(down)}")


class _EliteRewrite:
    def __init__(self, graph: Graph, seat: Seat, kept: torch.Tensor, by: str) -> None:
        self.graph, self.seat, self.kept = graph, seat, kept
        self.site = SiteRewrite(graph, seat.site, by)
        self.build = self.site.build
        self.mask = seat.rotated(kept)

    def run(self, up: torch.Tensor, down: torch.Tensor) -> None:
        query, key, value, _ = self.seat.site.parts
        node, sizes = self.seat.site.node, (~self.mask).sum(1).tolist()
        of_keys = torch.zeros(key.count, key.size, up.shape[1], dtype=up.dtype)  # zero where a pair is rotated
        of_keys[~self.mask] = up[: sum(sizes)]
        of_values = torch.empty(value.channels.numel(), up.shape[1], dtype=up.dtype)
        of_values = up[sum(sizes) :].reshape(value.count, value.size, -1)
        asking = of_keys[key.head_of]  # [query heads, size, rank]
        bias = None if query.bias is None else torch.einsum("hd,hdr->hr", query.bias, asking)
        read = self.site.heads(query, torch.einsum("hdr,hdc->hrc", asking, query.weight), bias, "latent_queries")
        latent = self._latent(down)
        turned = [self._turned(slot, part) for slot, part in enumerate((query, key))] if self.kept.numel() else []
        with self.build.at(node):
            keys = latent
            if turned:
                read = self.build.concat(turned[0], read, dim=latent.rank - 1)
                keys = self.build.concat(turned[1], latent, dim=latent.rank - 1)
            operands: list[Operand] = [read, self._repeated(keys), self._repeated(latent), *node.inputs[3:]]
            result: Value = self.build("attention", *operands, name=node.name, **node.attributes)
        assert result.producer is not None
        result.producer.metadata.update(node.metadata)
        maps = [(own, own) for own in of_values]
        self.site.output([result], maps, [list(range(value.count))])

    def _latent(self, down: torch.Tensor) -> Value:
        """[..., heads of keys, length, rank], the same for all heads."""
        key, like = self.seat.key, self.seat.site.node.inputs[1]
        assert isinstance(like, Value)
        with self.build.at(key.layer.node):
            made = self.build.linear(key.x, weight_beside(self.build, key.layer, "latent", down))
        keep_bond(made, f"{self.seat.name} in a cache")
        *batch, _, length, _ = like.shape
        with self.build.at(self.seat.site.node):
            one = self.build.reshape(made, shape=(*batch, 1, length, len(down)))
            return self.build.expand(one, shape=(*batch, key.count, length, len(down)))  # type: ignore[no-any-return]

    def _repeated(self, value: Value) -> Value:
        key = self.seat.key
        if self.site.shared or key.count == len(key.head_of):
            return value
        repeats = len(key.head_of) // key.count
        return self.build.repeat_interleave(value, repeats=repeats, dim=value.rank - 3)  # type: ignore[no-any-return]

    def _turned(self, slot: int, part: Heads) -> Value:
        """[..., heads, length, 2 pairs]: what is rotated, by the nodes that rotate the whole heads.

        The layer makes the channels of these pairs alone; zeros stand for the others until they are rotated.
        """
        turned = self.seat.turned[slot]
        owners = self.seat.key.head_of if slot == 0 else torch.arange(part.count)
        pairs = part.pairs[self.kept[owners]].mT.flatten(1)  # [heads, 2 pairs]: first indices, then second ones
        rows = part.channels.gather(1, pairs).flatten()
        self._narrowed(part, rows)
        with self.build.at(self.seat.site.node):
            if turned.shape[-3] != part.count:  # keys that are repeated: each of them once
                heads = torch.arange(0, turned.shape[-3], turned.shape[-3] // part.count)
                turned = self.build.index_select(turned, self.build.constant(heads, "heads"), dim=turned.rank - 3)
            picks = torch.zeros(part.count, part.size, pairs.shape[1], dtype=torch.float64)
            picks.scatter_(1, pairs[:, None], 1)
            return self.build.matmul(turned, self.build.constant(picks.to(turned.dtype), "pairs"))  # type: ignore[no-any-return]

    def _narrowed(self, part: Heads, rows: torch.Tensor) -> None:
        """Let a layer make these channels only, and zeros in place of the others."""
        layer = part.layer
        matrix = layer.matrix(layer.weight.tensor.detach())[rows]
        bias = None if layer.bias is None else layer.bias.tensor.detach()[rows]
        places = torch.full((layer.outputs,), len(rows))
        places[rows] = torch.arange(len(rows))
        with self.build.at(layer.node):
            made = self.build.linear(
                layer.node.inputs[0],
                weight_beside(self.build, layer, "rotated", matrix),
                None if bias is None else weight_beside(self.build, layer, "rotated", bias, "bias"),
            )
            wider = self.build.pad(made, pads=(*((0, 0),) * (made.rank - 1), (0, 1)), mode="constant", value=0)
            whole = self.build.index_select(wider, self.build.constant(places, "channels"), dim=made.rank - 1)
        replace_uses(self.graph, layer.node.output, whole)
