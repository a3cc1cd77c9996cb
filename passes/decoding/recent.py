"""Attention whose keys and values are rounded in blocks of positions, once a block is full: older ones as codes, the
block that is not full yet as it is.

    before   attention(q, k, v), causal
    after    attention(q, [k', k], [v', v], mask)

k' is what is left of the full blocks of ``block`` positions. Of the columns of k' the mask shows a query those of the
blocks before its own, of the columns of k those of its own block up to itself. Where what is kept is what keys are
computed from before they are rotated, k' is computed from what is left of that. As the number of full blocks changes
with the length, this has a form of its own for steps (:mod:`regauge.passes.decoding.recent_steps`); what that needs to
know is noted at the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.sizes.expressions import Size, floor_divide, simplify
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
    ``bases``, the names of parameters (four of keys, four of values), and rounds the latents. ``source`` is the name of
    what keys are computed from by position where that is kept in their place: keys before they are rotated."""

    method: BlockMethod
    bits: int
    block: int
    group: int
    bases: tuple[str, ...] = ()
    source: str = ""

    def kept(self, graph: Graph, key: Value, value: Value) -> tuple[Value, Value]:
        """What is kept for keys and for values."""
        return graph.find(self.source) if self.source else key, value

    def coders(self, graph: Graph, key: Value, value: Value) -> tuple[BlockCoder, BlockCoder]:
        """Of what is kept for keys and for values [..., channels]."""
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
        return " ".join([self.method, *map(str, (self.bits, self.block, self.group)), self.source or "-", *self.bases])


def recent_of(node: Node) -> Recent | None:
    """What is noted at an attention over rounded blocks."""
    note = node.metadata.get(NOTE)
    if note is None:
        return None
    method, bits, block, group, source, *bases = note.split()
    methods: dict[str, BlockMethod] = {"kivi": "kivi", "gear": "gear", "cskv": "cskv"}
    return Recent(methods[method], int(bits), int(block), int(group), tuple(bases), "" if source == "-" else source)


def write_recent(graph: Graph, node: Node, recent: Recent, *, by: str) -> None:
    """Rewrite a causal ``attention`` without a mask, in place; its keys and values have an axis of positions at -2."""
    query, key, value = (operand for operand in node.inputs[:3] if isinstance(operand, Value))
    build, length = Builder(graph, by=by), key.shape[-2]
    blocks = floor_divide(length, recent.block)
    with build.at(node):
        read, kept = [], recent.kept(graph, key, value)
        full = simplify(blocks * recent.block)
        for x, own, coder in zip((key, value), kept, recent.coders(graph, *kept), strict=True):
            whole = build.slice(own, dim=own.rank - 2, start=0, end=full)
            parted = in_blocks(build, whole, recent.block, blocks)
            left = in_a_row(build, coder.back(build, coder.codes(build, parted), int(own.shape[-1])), own)
            if own is not x:
                rest = build.slice(own, dim=own.rank - 2, start=full, end=length)
                turned = computed_again(build, x, own, build.concat(left, rest, dim=own.rank - 2))
                left = build.slice(turned, dim=x.rank - 2, start=0, end=full)
            read.append(build.concat(left, x, dim=x.rank - 2))
        mask = recent_mask(build, recent.block, blocks, (0, length), (0, length))
        result = attend(build, node, query, read[0], read[1], mask)
    assert result.producer is not None
    result.producer.metadata[NOTE] = recent.noted()
    replace_uses(graph, node.output, result)
    remove_node(graph, node)


def between(value: Value, source: Value) -> list[Node]:
    """The nodes that compute a value from its source, in their order."""
    reached = dict[Node, bool]()

    def visit(own: Value) -> bool:
        node = own.producer
        if own is source or node is None:
            return own is source
        if node not in reached:
            reached[node] = any([visit(operand) for _, operand in node.operands()])
        return reached[node]

    visit(value)
    return [node for node, is_between in reached.items() if is_between]


def computed_again(build: Builder, value: Value, source: Value, given: Value) -> Value:
    """What a value is where its source is what is given."""
    made = {source: given}
    for node in between(value, source):
        operands = [made.get(operand, operand) if isinstance(operand, Value) else operand for operand in node.inputs]
        results = build(node.op, *operands, **node.attributes)
        made.update(zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True))
    return made[value]


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
