"""Passes that choose and solve for weights, where these are integers: they get floats, and integers come behind them.

    quantize{scheme=w8},prune{macs=0.5}    prune reads, cuts and refits floats, quantize{scheme=w8} rounds the result

A code alone says nothing of a weight, and the layer behind one could not be refitted: without this a pass would cut as
if nothing could be made up for, or do nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.base import Context, Pass

SPARSE = "sparse"  # in graph.metadata: the zeros that were set in weights, by name
_ROUNDS = "quantize"
_BETTER = "let quantize come last"


class Originals:
    """The float graph that the integers of the last graph of a pipeline were made of, where nothing came between.

    What was rounded once is then not rounded twice, and what was scaled for it is as it was.
    """

    def __init__(self) -> None:
        self._last: tuple[Graph, Graph] | None = None

    def of(self, graph: Graph) -> Graph | None:
        return self._last[1] if self._last is not None and self._last[0] is graph else None

    def remember(self, quantized: Graph, floats: Graph) -> None:
        self._last = quantized, floats


def call(one: Pass, graph: Graph, context: Context, originals: Originals) -> Graph:
    """What a pass makes of a graph; of one with integers, where it wants floats, with integers again.

    Where these cannot be had the same way again, the pass gets the graph as it is, and the report says so.
    """
    count = codes_in(graph) if one.wants_floats(context) else 0
    if not count:
        result = one.call(graph, context)
        if one.name == _ROUNDS and result is not graph:
            originals.remember(result, originals.of(graph) or graph)
        return result
    reason = _not_again(one, graph)
    if reason is None:
        try:
            return _with_floats(one, graph, context, originals)
        except _NotAgain as found:
            reason = str(found)
    context.note(f"{count} weights are integers, which {one.name} takes as they are: {_BETTER}; {reason}")
    return one.call(graph, context)


def note_lost_zeros(graph: Graph, context: Context) -> None:
    """Say whether the pattern that ``sparsify`` gave to weights is still there, where it did."""
    if graph.metadata.get(SPARSE):
        from regauge.passes.sparsity.still_sparse import holding

        context.note(holding(graph))


def codes_in(graph: Graph) -> int:
    """How many tensors of a graph are codes that are made floats of, those that vectors are looked up in among them."""
    from regauge.passes.quantization.dequantize import table_of_codes

    nodes = (node for node in graph.nodes if node.operator.coding and isinstance(node.inputs[0], Parameter))
    found = {node.inputs[0] for node in nodes if len(node.inputs[0].shape) > 1}  # type: ignore[union-attr]
    return len(found | {table[1] for node in graph.nodes if (table := table_of_codes(node)) is not None})


class _NotAgain(Exception):
    """The result of a pass could not be quantized."""


def _not_again(one: Pass, graph: Graph) -> str | None:
    """Why a graph cannot be quantized again as it was."""
    if one.contract != "approximate":
        return "rounding again would not be exact"
    if not _quantized_by(graph):
        return "or put dequantize before it, and quantize behind it"
    return None


def _with_floats(one: Pass, graph: Graph, context: Context, originals: Originals) -> Graph:
    from regauge.passes.catalog import as_passes
    from regauge.passes.quantization.dequantize import with_floats

    own, rounding = replace(context, cuts=[], notes=[], left=Counter()), Context(data=context.data)
    floats = originals.of(graph) or with_floats(graph, by=one.name)[0]
    found = one.call(floats, own)
    result = graph
    if found is not floats:
        again = as_passes(_quantized_by(graph))
        result = found
        for stage in again:
            try:
                result = stage.call(result, rounding)
            except PassError as reason:
                raise _NotAgain(str(reason)) from reason
        result.history = [*graph.history, *result.history[len(floats.history) :]]
        own.note(
            f"it had {codes_in(graph)} weights as floats, {', '.join(map(str, again))} rounded them again: {_BETTER}"
        )
        originals.remember(result, found)
    context.cuts += own.cuts
    context.notes += own.notes
    context.left.update(own.left)
    context.made_up = own.made_up
    return result


def _quantized_by(graph: Graph) -> list[str]:
    """The passes that made a graph's floats integers, as they were written."""
    found: list[str] = []
    for edit in graph.history:
        name = edit.what.partition("{")[0]
        if edit.by == name == "dequantize":
            found.clear()
        elif edit.by == name == _ROUNDS and edit.what not in found:
            found.append(edit.what)
    return found
