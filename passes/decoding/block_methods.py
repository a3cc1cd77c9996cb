"""Methods that round keys and values in blocks of positions, as attentions of a graph allow it."""

from __future__ import annotations

from collections import Counter

import torch

from regauge.ir.graph import Graph, Node, Value
from regauge.passes.decoding.cuts import Cuts, bytes_each
from regauge.passes.decoding.positions import Positions, find_positions
from regauge.passes.decoding.recent import BlockMethod, Recent, write_recent


def write_blocks(
    graph: Graph, method: BlockMethod, bits: int, block: int, group: int | None, axis: str | None,
    left: Counter[str], *, by: str,
) -> tuple[int, float]:  # fmt: skip
    """Rewrite, in place, the attentions that can be; returns their number, and the bytes of a block that is not full.

    Keys have a range for each channel over the positions of a block, values one for each position over ``group``
    channels, all of a head if None; ``left`` counts the reasons why others stay.
    """
    positions = find_positions(graph, axis)
    cuts, count, waiting = Cuts(positions), 0, 0.0
    for node in [node for node in graph.nodes if node.op == "attention"]:
        reason = _misfit(node, positions, cuts, group)
        if reason is not None:
            left[reason] += 1
            continue
        key, value = (operand for operand in node.inputs[1:3] if isinstance(operand, Value))
        write_recent(graph, node, Recent(method, bits, block, group or int(value.shape[-1])), by=by)
        count += 1
        waiting += sum((block - 1) * bytes_each(x, positions) for x in (key, value))
    return count, waiting


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
    value = node.inputs[2]
    assert isinstance(value, Value)
    if group is not None and int(value.shape[-1]) % group:
        return f"{group} channels do not divide {value.shape[-1]}"
    return None
