"""``merge-adapters``: what adapters learned goes into the weights that they stand beside."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from regauge.ir.edit import Builder, dead_nodes, record, remove_dead, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.rewriting.rewrite import RuleSet, rewrite_graph
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.adapters.channel_rule import CHANNELS
from regauge.passes.adapters.folding import computed_of_parameters, number_of
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.rewriting import tell
from regauge.passes.simplify.branches import RULES

_ADAPTERS = RuleSet([*(rule for rule in RULES if "adapter" in rule.name), CHANNELS])


@dataclass(frozen=True, kw_only=True)
class MergeAdapters(Pass):
    """Put adapters into the weights that they stand beside; all parameters train again.

    before  y = linear(x, w, b) + linear(linear(x, down), up)
    after   y = linear(x, w + up down, b)

    Adapters are whatever trainable parameters are added to a frozen weight, or stand as two narrow layers beside one:
    those of ``adapt`` in a graph or in a module that was trained and captured again, and others of these shapes.
    """

    name: ClassVar[str] = "merge-adapters"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        count = _fold_computed(result, self.name)
        adds = [node for node in result.nodes if node.op == "add" and any(map(_is_adapter, node.operands()))]
        log = rewrite_graph(result, _ADAPTERS, nodes=adds)
        remove_dead(result)
        tell(log, context)
        if not count and not log.total:
            context.left["no trainable parameters stand beside a frozen weight"] += not context.left
            return graph
        if count:
            context.note(f"{count} weights took in what was computed beside them")
        for parameter in result.all_parameters():
            parameter.trainable = parameter.kind == "parameter"
        record(result, self.name, f"{count + log.total} adapters merged")
        return result


def _is_adapter(operand: tuple[int, Value]) -> bool:
    """Whether a value comes from a map with a trainable weight, or is such a result times a number."""
    node = operand[1].producer
    while node is not None and node.op in ("mul", "div"):
        node = next((v.producer for _, v in node.operands() if v.producer is not None), None)
    return node is not None and any(isinstance(v, Parameter) and v.trainable for _, v in node.operands())


def _fold_computed(graph: Graph, by: str) -> int:
    """Compute what trainable parameters and others are combined into before a layer reads it; returns how many."""
    build, computed = Builder(graph, by=by), computed_of_parameters(graph)
    found = {
        value: below
        for value, below in computed.items()
        if _is_real(value)
        and any(source.trainable for source in below)
        and any(not _is_below(n, computed) for n in value.consumers())
    }
    for value, below in found.items():
        # The frozen weight comes first, which is real: indices are frozen, too.
        sources = sorted(below, key=lambda p: (not _is_real(p), p.trainable, p.shape != value.shape))
        fold = partial(_number_of, value, sources)
        shape = [int(size) for size in value.shape]
        assert isinstance(value.dtype, torch.dtype)
        new = build.folded(sources[0], fold, *sources[1:], shape=shape, dtype=value.dtype)
        new.trainable = True
        replace_uses(graph, value, new)
    for node in dead_nodes(graph):
        remove_node(graph, node)
    settle_successors(graph, build)
    return len(found)


def _is_real(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def _is_below(node: Node, computed: Container[Value]) -> bool:
    """Whether a node is computed of parameters alone itself."""
    return any(value in computed for value in node.outputs)


def _number_of(value: Value, sources: Sequence[Parameter], *tensors: torch.Tensor) -> torch.Tensor:
    """The value for ``tensors`` in double precision; what is no real number, as indices are, is made that again."""
    pairs = zip(sources, tensors, strict=True)
    return number_of(value, {p: t if _is_real(p) else t.to(p.tensor.dtype) for p, t in pairs})
