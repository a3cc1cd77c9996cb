"""Selects the layers of a pass that changes weights one by one, and says why the others are left as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.name_patterns import check_patterns, matches

_LINEAR = {"linear", "conv", "matmul"}


def chosen_layers(
    graph: Graph,
    include: Sequence[str],
    exclude: Sequence[str],
    left: Counter[str],
    misfit: Callable[[Layer], str | None],
    *,
    blocks: bool = False,
    apart: Collection[Value] = (),
) -> list[Layer]:
    """The layers that ``misfit`` has nothing against, in the order of the graph; ``left`` counts the rest by reason.

    Globs are on names of weights. Layers of several ``blocks``, as grouped convolutions are, count where they are asked
    for; weights that are seen to ``apart`` are passed over. Raises PassError for a glob that matches no weight.
    """
    every = [name for parameter in graph.all_parameters() for name in parameter.names]
    check_patterns("include", include, every)
    check_patterns("exclude", exclude, every)
    found, seen = [], {*apart}
    for owner, node in graph.walk():
        for _, value in node.operands():
            if not _is_weight(value) or value in seen:
                continue
            seen.add(value)
            second = node.inputs[1] if len(node.inputs) > 1 else None  # of a node with one input, as slice, none
            layer = layer_of(node, blocks=blocks) if owner is graph and value is second else None
            reason = _not_chosen(value, include, exclude)
            if reason is None and owner is not graph and node.op in _LINEAR:
                reason = "it lies in a branch or the body of a loop"
            reason = reason or (misfit(layer) if layer is not None else _no_layer(node, value))
            if reason:
                left[reason] += 1
            elif layer is not None:
                found.append(layer)
    return found


def _is_weight(value: Value) -> bool:
    return isinstance(value, Parameter) and value.kind == "parameter" and value.ranked and value.rank > 1


def _not_chosen(weight: Value, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    assert isinstance(weight, Parameter)
    if include and not matches(weight.names, include):
        return "not included"
    return "excluded" if matches(weight.names, exclude) else None


def _no_layer(node: Node, weight: Value) -> str:
    if node.op == "dequantize":
        return "stored as integers: put dequantize before, and quantize behind"
    if node.op not in _LINEAR:
        return f"no linear layer, but read by {node.attributes.get('target', node.op)}"  # that of a call of torch
    if len(weight.uses) > 1:
        return "its weight has several readers"
    return "a grouped convolution" if node.op == "conv" else "no single matrix that the input is multiplied by"
