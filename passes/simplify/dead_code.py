"""Nodes whose results nobody reads, and operands that no branch reads."""

from __future__ import annotations

from regauge.ir.edit import drop_operand, remove_dead
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.simplify.limits import Limits, held_values


def remove_dead_code(graph: Graph, limits: Limits) -> int:
    """Remove what no output and no state depends on, in the graph and its regions; returns how many nodes and operands.

    Regions come first: what only they read, and for nothing, is dead outside too.
    """
    count = 0
    for node in list(graph.nodes):
        count += sum(remove_dead_code(region, limits) for region in node.regions)
        if node.op == "cond":
            count += _drop_unread_operands(graph, node)
    if _has_dead(graph):
        count += remove_dead(graph)
    return count


def drop_orphans(before: Graph, after: Graph) -> int:
    """Remove unread buffers of modules of which nothing else is left, such as the counter of a batch norm.

    A module of which a part below is still read stays whole; a buffer that was alone in its module to begin with is
    the user's own, and stays. Returns how many went.
    """
    held = held_values(after)
    gone = _modules(before) - _modules(after)
    orphans = [
        name
        for name, parameter in after.parameters.items()
        if parameter.kind == "buffer" and not parameter.uses and parameter not in held
        if name.rpartition(".")[0] in gone
    ]
    for name in orphans:
        del after.parameters[name]
        after.version += 1
    return len(orphans)


def _modules(graph: Graph) -> set[str]:
    """Paths of modules of which a weight is read, in them or below; the root is the empty path."""
    found = {""}
    for name, parameter in graph.parameters.items():
        while parameter.uses and name:
            name = name.rpartition(".")[0]
            found.add(name)
    return found


def _drop_unread_operands(graph: Graph, node: Node) -> int:
    """Remove those operands of a choice that no branch reads."""
    slots = [
        slot
        for slot in range(1, len(node.inputs))
        if all(_is_unread(region, region.inputs[slot - 1]) for region in node.regions)
    ]
    for slot in reversed(slots):
        drop_operand(graph, node, slot)
        for region in node.regions:
            del region.inputs[slot - 1]
            region.version += 1
    return len(slots)


def _is_unread(region: Graph, value: Value) -> bool:
    return not value.uses and all(output is not value for output in region.outputs)


def _has_dead(graph: Graph) -> bool:
    """Whether something is unread: a cheap look before a long one."""
    held = {output for output in graph.outputs if isinstance(output, Value)} | {s.after for s in graph.states}
    held |= {state.before for state in graph.states}
    unread = any(not any(v.uses or v in held for v in node.outputs) for node in graph.nodes)
    return unread or any(p.kind == "constant" and not p.uses and p not in held for p in graph.parameters.values())
