"""Caches that a decoder has already: inputs that new keys or values are laid behind, and that are given out so."""

from __future__ import annotations

from collections.abc import Iterator

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, State, Value
from regauge.ir.states import carried
from regauge.passes.decoding.positions import ATTENTIONS

_SAME = ("identity", "cast")


def recognised_caches(graph: Graph) -> list[State]:
    """The states that are told by structure alone: an output that is a concatenation of an input with something else,
    along the axis over which an attention, or a product, sums."""
    sums = {size for node in graph.nodes for size in _summed(node)}
    found: list[State] = []
    for output in graph.outputs:
        if not isinstance(output, Value) or any(state.after is output for state in found):
            continue
        node = _past(output, "concat")
        parts = [] if node is None else _parts(node)
        before = _origin(parts[0]) if len(parts) == 2 else None
        if node is None or before is None or before not in graph.inputs or before.rank != output.rank:
            continue
        axis = node.attributes["dim"] % output.rank
        others = [(a, b) for place, (a, b) in enumerate(zip(before.shape, output.shape, strict=True)) if place != axis]
        if all(a == b for a, b in others) and output.shape[axis] in sums and before.dtype == output.dtype:
            found.append(State(before.name, before, output, returned=True))
    return found


def refuse_caches(graph: Graph, name: str) -> None:
    """Raise PassError where keys and values come from caches already: what the pass ``name`` makes smaller stands in
    front of them."""
    if carried(graph):
        raise PassError(f"{name}: the graph has states already: run it in front of kv-cache")
    own = recognised_caches(graph)
    if own:
        raise PassError(
            f"{name}: the graph has caches of its own, such as {own[0].name}: capture or export the model without them "
            f"(as use_cache=False does in transformers), and run kv-cache behind {name}"
        )


def _summed(node: Node) -> Iterator[object]:
    """The sizes of axes that scores have a weight for each entry of."""
    slots = (1, 2) if node.op in ATTENTIONS else (1,) if node.op == "matmul" else ()
    for slot in slots:
        value = node.inputs[slot]
        if isinstance(value, Value) and value.rank > 1:
            yield value.shape[-2]


def _past(value: Value, op: str) -> Node | None:
    """The node of an operator that a value comes from, but for nodes that change nothing of it."""
    node = value.producer
    while node is not None and node.op in _SAME:
        given = node.inputs[0]
        node = given.producer if isinstance(given, Value) else None
    return node if node is not None and node.op == op else None


def _parts(node: Node) -> list[Value]:
    """What is concatenated, without what is empty."""
    return [value for _, value in node.operands() if 0 not in value.shape]


def _origin(value: Value) -> Value | None:
    """The input that a value is: through nodes that change nothing, and concatenations with nothing."""
    while value.producer is not None:
        node = value.producer
        parts = _parts(node) if node.op == "concat" else [v for _, v in node.operands()] if node.op in _SAME else []
        if len(parts) != 1:
            return None
        value = parts[0]
    return value
