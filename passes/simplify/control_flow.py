"""Control flow that is decided: a branch that is always taken, branches that are equal, loops of no or one iteration.

y = cond(True, x) with then, else     the nodes of then
y = loop(1, None, x) with body        the nodes of body
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder, inline_region, remove_node, replace_uses
from regauge.ir.folding.fold import is_table
from regauge.ir.folding.purity import is_fixed, is_pure
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import same
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.merging import same_bytes

INLINED = "inlined_regions"  # metadata: origins of nodes that were inlined, and which of their regions is there now
NO_ITERATION = -1


def inline_decided(graph: Graph, limits: Limits) -> int:
    """Inline what is decided, in the graph and its regions, inside out as it comes; returns how many nodes went."""
    count = 0
    again = True
    taken: dict[Any, int] = {}
    while again:
        again = False
        for owner, build in list(scopes(graph)):
            done = sum(_inline(owner, build, node, taken) for node in list(owner.nodes) if node.regions)
            count, again = count + done, again or done > 0
            if done:
                break  # scopes have changed
    if taken:
        graph.metadata[INLINED] = {**graph.metadata.get(INLINED, {}), **taken}
    return count


def _inline(graph: Graph, build: Builder, node: Node, taken: dict[Any, int]) -> bool:
    """Whether a node was replaced by nodes of one of its regions, which is noted in ``taken``."""
    if any(region.states for region in node.regions) or is_fixed(node):
        return False
    index = None
    if node.op == "cond":
        index = _branch(node, graph)
        if index is not None and not _replace(graph, build, node, node.regions[index], node.inputs[1:], 0):
            index = None
    if node.op == "loop":
        index = _inline_loop(graph, build, node)
    if index is not None and node.origin is not None:
        taken[node.origin] = index
    return index is not None


def _number(operand: Operand, graph: Graph) -> Any:
    """A bool or an integer, given as such or as a constant; None where it is computed."""
    if isinstance(operand, Parameter):
        states = {state.before for state in graph.states}
        return operand.tensor.item() if is_table(operand, states) and operand.weight.shape in ((), (1,)) else None
    return operand if isinstance(operand, bool | int) else None


def _branch(node: Node, graph: Graph) -> int | None:
    predicate = _number(node.inputs[0], graph)
    if predicate is not None:
        return 0 if predicate else 1
    return 0 if is_pure(node) and same_region(*node.regions) else None


def _inline_loop(graph: Graph, build: Builder, node: Node) -> int | None:
    """The region that took the place of a loop, NO_ITERATION where it never runs, None where it stays."""
    trips, going = _number(node.inputs[0], graph), node.inputs[1]
    going = True if going is None else _number(going, graph)
    carried, operands = node.attributes["carried"], node.inputs[2:]
    stacked = len(node.outputs) > carried
    if (trips == 0 or going is False) and not stacked:
        return NO_ITERATION if _results(graph, build, node, operands[:carried]) else None
    if trips != 1 or going is not True or stacked:
        return None
    if not _fits(node, node.regions[0].outputs[1:]):
        return None
    step = [build.constant(torch.tensor(0), "iteration"), build.constant(torch.tensor(True), "condition")]
    return 0 if _replace(graph, build, node, node.regions[0], [*step, *operands], 1) else None


def _replace(graph: Graph, build: Builder, node: Node, region: Graph, operands: Sequence[Operand], skip: int) -> bool:
    """Put the nodes of a region in the place of a node; results begin with output ``skip`` of the region."""
    results = region.outputs[skip:]
    if not _fits(node, results):
        return False
    found = inline_region(build, node, region, operands)
    return _results(graph, build, node, found[skip:])


def _fits(node: Node, results: Sequence[Operand]) -> bool:
    """Whether the results are what the node says: a size that differed between branches has a symbol of its own."""
    return len(results) == len(node.outputs) and all(
        isinstance(new, Value) and new.dtype == old.dtype and new.rank == old.rank
        and all(map(same, new.shape, old.shape))
        for old, new in zip(node.outputs, results, strict=True)
    )  # fmt: skip


def _results(graph: Graph, build: Builder, node: Node, results: Sequence[Operand]) -> bool:
    """Let everything read the results instead of those of the node, which goes; outputs stay values of their own."""
    if not _fits(node, results):
        return False
    held = held_values(graph)
    names: dict[Value, str] = {}
    for old, new in zip(node.outputs, results, strict=True):
        assert isinstance(new, Value)
        if old in held:
            if new.producer is None or new in held or new.producer not in graph._nodes:
                with build.at(node):
                    new = build.identity(new, name=old.name)
            names[new] = old.name
            held.add(new)
        replace_uses(graph, old, new)
    remove_node(graph, node)
    for value, name in names.items():
        value.name = name
    return True


# -- equal regions -----------------------------------------------------------------------------------------------------


def same_region(a: Graph, b: Graph) -> bool:
    """Whether two regions compute the same, node by node, from the same operands."""
    if len(a) != len(b) or len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs):
        return False
    matched: dict[Value, Value] = dict(zip(a.inputs, b.inputs, strict=True))
    for one, other in zip(a.nodes, b.nodes, strict=True):
        if one.op != other.op or one.attributes != other.attributes or len(one.outputs) != len(other.outputs):
            return False
        if one.regions or len(one.inputs) != len(other.inputs) or not _same_operands(one.inputs, other.inputs, matched):
            return False
        matched.update(zip(one.outputs, other.outputs, strict=True))
    return _same_operands(a.outputs, b.outputs, matched)


def _same_operands(first: Sequence[Operand], second: Sequence[Operand], matched: dict[Value, Value]) -> bool:
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Parameter) and isinstance(b, Parameter):
            if not same_bytes(a, b):
                return False
        elif isinstance(a, Value):
            if matched.get(a) is not b:
                return False
        elif type(a) is not type(b) or repr(a) != repr(b):
            return False
    return True
