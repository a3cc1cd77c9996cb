"""EliteKV: attentions that rotate only some pairs of each head, and keep one latent for all else of keys and values.

    k = [R (E x), B_k c]      v = B_v c      c = A x        E: the channels of the pairs that a head still rotates
    scores = (R (E_q x))' (R (E x)) + (B_k' Q x)' c         y = (W_o B_v) (weights c)

Here are the places in a graph where this can be done (:class:`Seat`). While it is fitted, a graph has the nodes of the
original: what attention reads becomes m k_rotated + (1 - m) k, with m = 1 in the original, and m = 0 in the changed
graph for pairs that are not rotated any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regauge.ir.cost import item_size
from regauge.ir.edit import Builder, set_input, set_weight
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.decoding.latent_parts import fills_layer, is_absorbed


@dataclass(eq=False)
class Seat:
    """An attention whose keys and values can have one latent.

    ``turned`` and ``plain`` are its queries and keys as they are rotated, and without; ``shares`` what each takes of
    the rotated: weights [heads, 1, size] of ones, zero where a pair is not rotated. Without rotation there are none.
    """

    site: Site
    turned: tuple[Value, ...] = ()
    plain: tuple[Value, ...] = ()
    shares: tuple[Parameter, ...] = ()

    @property
    def key(self) -> Heads:
        return self.site.parts[1]

    @property
    def name(self) -> str:
        return f"{self.key.layer.weight.name}: keys and values"

    @property
    def whole(self) -> float:
        """What a position of keys and values takes."""
        _, key, value, _ = self.site.parts
        return (key.channels.numel() + value.channels.numel()) * item_size(key.layer.weight.dtype)

    def bytes(self, pairs: int, rank: int) -> float:
        """What a position takes with so many pairs rotated in each head."""
        return (2 * pairs * self.key.count + rank) * item_size(self.key.layer.weight.dtype)

    def still(self, kept: torch.Tensor) -> torch.Tensor:
        """[rows]: the channels of the keys' layer that are not rotated, where ``kept`` [heads, pairs] are."""
        return torch.cat([own[mask] for own, mask in zip(self.key.channels, ~self.rotated(kept), strict=True)])

    def rotated(self, kept: torch.Tensor) -> torch.Tensor:
        """[heads, size]: whether an index is in a pair of those kept."""
        found = torch.zeros(self.key.channels.shape, dtype=torch.bool)
        for own, pairs in zip(found, kept, strict=True):
            own[self.key.pairs[pairs].flatten()] = True
        return found

    def rotate_only(self, graph: Graph, kept: torch.Tensor, *, by: str) -> None:
        """Let the graph, which has this seat, rotate the pairs ``kept`` [heads, pairs] of each head and no others."""
        mask = self.rotated(kept)[:, None]
        for share, heads in zip(self.shares, _of_operands(self), strict=True):
            set_weight(graph, share, mask[heads].to(share.tensor.dtype), by=by)


def seats_of(sites: Sequence[Site], left: Counter[str]) -> Iterator[Seat]:
    """The sites that can have one latent; ``left`` counts the reasons why others cannot."""
    for site in sites:
        reason = _misfit(site)
        if reason is None:
            yield Seat(site)
        else:
            left[f"keys and values: {reason}"] += 1


def _misfit(site: Site) -> str | None:
    if site.missing:
        return "; ".join(dict.fromkeys(site.missing.values()))
    query, key, value, _ = site.parts
    if any(part.layer.node.op not in ("linear", "matmul") for part in (query, key, value)):
        return "a convolution makes them"
    if any(part.norms for part in (query, key)):
        return "they are normalised for each head, and are no map of what their layer reads"
    if any(part.cached or not part.in_order or not part.alone for part in (query, key, value)):
        return "something else reads them, or they are cached already"
    if key.x is not value.x or not all(fills_layer(part) for part in (query, key, value)):
        return "no layers of their own make them of one value"
    if not torch.equal(query.pairs, key.pairs) or len(value.pairs) or not (query.even and key.even):
        return "queries and keys are rotated or scaled in different ways"
    if not len(key.pairs) and not (query.is_layout and key.is_layout):
        return "a table multiplies keys"
    same = torch.equal(key.head_of, value.head_of) and query.count == len(query.head_of)
    if not same or not site.keeps_scale or not is_absorbed(site, "values"):
        return "the output cannot read a latent"
    return None


def seated(graph: Graph, seats: Sequence[Seat], *, by: str) -> None:
    """Put both forms of queries and keys into the graph, the rotated one with all its weight: nothing changes."""
    for seat in seats:
        node, build = seat.site.node, Builder(graph, by=by)
        turned, plain, shares = [], [], []
        for slot, part in enumerate((seat.site.parts[0], seat.key) if len(seat.key.pairs) else ()):
            read = node.inputs[slot]
            assert isinstance(read, Value) and isinstance(read.dtype, torch.dtype)
            with build.at(node):
                own = laid_out(build, part, part.layer.node.output, read)
                share = build.parameter(
                    build.unique("rotated"), torch.ones(read.shape[-3], 1, part.size, dtype=read.dtype)
                )
                rest = build.mul(own, build.sub(build.constant(torch.ones((), dtype=read.dtype), "one"), share))
                set_input(node, slot, build.add(build.mul(read, share), rest), graph)
            turned.append(read)
            plain.append(own)
            shares.append(share)
        seat.turned, seat.plain, seat.shares = tuple(turned), tuple(plain), tuple(shares)


def laid_out(build: Builder, part: Heads, result: Value, like: Value) -> Value:
    """What a layer gives as attention would read it without a rotation, [..., heads, length, size] as ``like``."""
    order = part.channels.flatten()
    if order.tolist() != list(range(len(order))):
        result = build.index_select(result, build.constant(order, "channels"), dim=result.rank - 1)
    *batch, many, length, _ = like.shape
    parted = build.reshape(result, shape=(*batch, length, part.count, part.size))
    rank = parted.rank
    found: Value = build.permute(parted, dims=(*range(rank - 3), rank - 2, rank - 3, rank - 1))
    if many != part.count:
        found = build.repeat_interleave(found, repeats=len(part.head_of) // part.count, dim=rank - 3)
    return found


def _of_operands(seat: Seat) -> Iterator[torch.Tensor]:
    """Of queries and of keys which head of the keys each head of the operand belongs to."""
    for turned in seat.turned:
        heads = seat.key.head_of
        yield heads if turned.shape[-3] == len(heads) else torch.arange(seat.key.count)
