"""Attention whose keys and values are rounded in blocks of positions, once a block is full: older ones as codes, the
block that is not full yet as it is.

    before   attention(q, k, v), causal
    after    attention(q, [k', k], [v', v], mask)

k' is what is left of the full blocks of ``block`` positions. Of the columns of k' the mask shows a query those of the
blocks before its own, of the columns of k those of its own block up to itself. As the number of full blocks changes
with the length, this has a form of its own for steps (:mod:`regauge.passes.decoding.recent_steps`); what that needs to
know is noted at the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.sizes import Size, floor_divide, simplify
from regauge.passes.decoding.block_ranges import BlockCoder, BlockRanges
from regauge.passes.decoding.gear import Gear
from regauge.passes.decoding.shrunk import Bases, Shrunk, heads_axis, latent_ranges

BlockMethod: TypeAlias = Literal["kivi", "gear", "cskv"]

NOTE = "regauge.recent"
"""Where a node's metadata has its :class:`Recent`, in words."""


@dataclass(frozen=True)
class Recent:
    """How full blocks of ``block`` positions are kept: KIVI's ranges of ``bits`` bits, of keys over the positions of a
    block, of values over ``group`` channels; ``gear`` keeps what they miss besides, ``cskv`` shrinks channels by
    ``bases``, the names of parameters (four of keys, four of values), and rounds the latents."""

    method: BlockMethod
    bits: int
    block: int
    group: int
    bases: tuple[str, ...] = ()

    def coders(self, graph: Graph, key: Value, value: Value) -> tuple[BlockCoder, BlockCoder]:
        """Of keys and of values [..., channels]."""
        if self.method == "cskv":
            own, bases = latent_ranges(self.bits, self.block), [graph.parameters[name] for name in self.bases]
            first, second = (
                Shrunk(Bases(*part), heads_axis(x), own) for part, x in ((bases[:4], key), (bases[4:], value))
            )
            return first, second
        ranges = BlockRanges(self.bits, -2, self.block), BlockRanges(self.bits, -1, self.group)
        if self.method == "kivi":
            return ranges
        keys, values = (Gear(own, self.block, int(x.shape[-1])) for own, x in zip(ranges, (key, value), strict=True))
        return keys, values

    def noted(self) -> str:
        return " ".join([self.method, *map(str, (self.bits, self.block, self.group)), *self.bases])


def recent_of(node: Node) -> Recent | None:
    """What is noted at an attention over rounded blocks."""
    note = node.metadata.get(NOTE)
    if note is None:
        return None
    method, bits, block, group, *bases = note.split()
    methods: dict[str, BlockMethod] = {"kivi": "kivi", "gear": "gear", "cskv": "cskv"}
    return Recent(methods[method], int(bits), int(block), int(group), tuple(bases))


def write_recent(graph: Graph, node: Node, recent: Recent, *, by: str) -> None:
    """Rewrite a causal ``attention`` without a mask, in place; its keys and values have an axis of positions at -2."""
    query, key, value = (operand for operand in node.inputs[:3] if isinstance(operand, Value))
    build, length = Builder(graph, by=by), key.shape[-2]
    blocks = floor_divide(length, recent.block)
    with build.at(node):
        read = []
        for x, coder in zip((key, value), recent.coders(graph, key, value), strict=True):
            whole = build.slice(x, dim=x.rank - 2, start=0, end=simplify(blocks * recent.block))
            full = in_blocks(build, whole, recent.block, blocks)
            left = coder.back(build, coder.codes(build, full), int(x.shape[-1]))
            read.append(build.concat(in_a_row(build, left, x), x, dim=x.rank - 2))
        mask = recent_mask(build, recent.block, blocks, (0, length), (0, length))
        result = attend(build, node, query, read[0], read[1], mask)
    assert result.producer is not None
    result.producer.metadata[NOTE] = recent.noted()
    replace_uses(graph, node.output, result)
    remove_node(graph, node)


def in_blocks(build: Builder, x: Value, block: int, blocks: Size) -> Value:
    """[..., blocks * block, channels] as [..., blocks, block, channels] of float32."""
    parted = build.reshape(x, shape=(*x.shape[:-2], blocks, block, x.shape[-1]))
    return parted if x.dtype == torch.float32 else build.cast(parted, dtype=torch.float32)  # type: ignore[no-any-return]


def in_a_row(build: Builder, left: Value, like: Value) -> Value:
    """The other way round, of the type of ``like``."""
    *lead, blocks, block, channels = left.shape
    row = build.reshape(left, shape=(*lead, simplify(blocks * block), channels))
    return row if like.dtype == torch.float32 else build.cast(row, dtype=like.dtype)  # type: ignore[no-any-return]


def attend(build: Builder, node: Node, query: Value, keys: Value, values: Value, mask: Value) -> Value:
    """The same attention with a mask in place of ``is_causal``."""
    attributes = {**node.attributes, "is_causal": False}
    result: Value = build(node.op, query, keys, values, mask, name=node.op, **attributes)
    result.producer.metadata.update(node.metadata)  # type: ignore[union-attr]
    return result


def recent_mask(
    build: Builder, block: int, blocks: Size, queries: tuple[Size, Size], recent: tuple[Size, Size]
) -> Value:
    """True where a query [rows] reads a column: first those of ``blocks`` full blocks, then the recent positions.

    ``queries`` and ``recent`` are spans of positions, from and to.
    """
    own = build.unsqueeze(build.arange(start=queries[0], end=queries[1]), dim=1)
    first = build.mul(build.div(own, block, rounding_mode="floor"), block)  # of the block of the query
    old = build.unsqueeze(build.arange(end=simplify(blocks * block)), dim=0)
    new = build.unsqueeze(build.arange(start=recent[0], end=recent[1]), dim=0)
    past, now = build.lt(old, first), build.logical_and(build.ge(new, first), build.le(new, own))
    return build.concat(past, now, dim=1)  # type: ignore[no-any-return]
