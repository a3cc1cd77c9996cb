"""Methods that round keys and values in blocks of positions, as attentions of a graph allow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.decoding.cuts import Cuts, bytes_each
from regauge.passes.decoding.kept import source_of
from regauge.passes.decoding.positions import Positions, find_positions
from regauge.passes.decoding.recent import BlockMethod, Recent, between, write_recent
from regauge.passes.decoding.shrunk import Shrinking


def nodes_in_blocks(graph: Graph, group: int | None, axis: str | None, left: Counter[str]) -> list[Node]:
    """The attentions whose keys and values can be rounded so; ``left`` counts the reasons why others stay."""
    positions = find_positions(graph, axis)
    cuts, found = Cuts(positions), list[Node]()
    for node in graph.nodes:
        if node.op == "attention":
            reason = _misfit(node, positions, cuts, group)
            if reason is None:
                found.append(node)
            else:
                left[reason] += 1
    return found


def write_blocks(
    graph: Graph, nodes: Sequence[Node], method: BlockMethod, bits: int, block: int, group: int | None,
    axis: str | None, *, shrunk: Mapping[str, tuple[Shrinking, int]], by: str,
) -> float:  # fmt: skip
    """Rewrite these attentions of ``graph`` in place; returns the bytes of a block that is not full.

    Keys have a range for each channel over the positions of a block, values one for each position over ``group``
    channels, all of a head if None; ``shrunk`` has of what cskv keeps, by name, how to shrink it and its rank.
    """
    positions, waiting, build = find_positions(graph, axis), 0.0, Builder(graph, by=by)
    for node in nodes:
        key, value = read_by(node)
        kept = kept_for(node, positions) if shrunk else (key, value)
        ways = [shrunk[x.name] for x in kept if x.name in shrunk]
        bases = [name for way, rank in ways for name in way.parameters(build, rank)]
        source = "" if kept[0] is key else kept[0].name
        recent = Recent(method, bits, block, group or int(value.shape[-1]), tuple(bases), source)
        write_recent(graph, node, recent, by=by)
        waiting += sum((block - 1) * bytes_each(x, positions) for x in (key, value))
    return waiting


def read_by(node: Node) -> tuple[Value, Value]:
    """The keys and the values that an attention reads."""
    key, value = node.inputs[1:3]
    assert isinstance(key, Value) and isinstance(value, Value)
    return key, value


def kept_for(node: Node, positions: Positions) -> tuple[Value, Value]:
    """What may be kept for the keys and the values of an attention: keys as they are before they are rotated."""
    key, value = read_by(node)
    source = source_of(Cuts(positions, far=True), key, key, positions)
    chain = between(key, source)
    inside = {source, *(own for other in chain for own in other.outputs)}
    alone = all(v in inside or v not in positions.streamed for other in chain for _, v in other.operands())
    fits = source.rank > 2 and positions.axes(source) == [source.rank - 2] and source.dtype == key.dtype
    layout = all(other.op in ("reshape", "permute") for other in chain)
    return (source if alone and fits and not layout and isinstance(source.shape[-1], int) else key), value


def _misfit(node: Node, positions: Positions, cuts: Cuts, group: int | None) -> str | None:
    """Why the keys and values of an attention stay as they are, or None."""
    if not node.attributes["is_causal"] or any(operand is not None for operand in node.inputs[3:]):
        return "an attention that is not causal, or has a mask"
    for operand in node.inputs[:3]:
        if not isinstance(operand, Value) or positions.axes(operand) != [operand.rank - 2]:
            return "an attention whose positions are no axis of their own"
        if not isinstance(operand.shape[-1], int) or not isinstance(operand.dtype, torch.dtype):
            return "a cache whose last axis holds no channels"
    for operand in node.inputs[1:3]:
        assert isinstance(operand, Value)
        if sum(bytes_each(own, positions) for own in cuts.of(operand)) < bytes_each(operand, positions):
            return "keys or values that are computed of something smaller, or repeated, in front of attention"
    _, value = read_by(node)
    if group is not None and int(value.shape[-1]) % group:
        return f"{group} channels do not divide {value.shape[-1]}"
    return None
