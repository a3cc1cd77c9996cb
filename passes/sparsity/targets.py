"""Which layers a pattern of zeros can go into, and why the others are left as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.sparsity.patterns import Pattern

_LINEAR = {"linear", "conv", "matmul"}
_CHOSEN = {"not included", "excluded"}


def find_layers(
    graph: Graph, pattern: Pattern, include: Sequence[str], exclude: Sequence[str], left: Counter[str]
) -> list[Layer]:
    """The layers that take the pattern, in the order of the graph; ``left`` counts the other weights by reason.

    Globs are on names of weights. Raises PassError for one that matches none.
    """
    every = [name for parameter in graph.all_parameters() for name in parameter.names]
    check_patterns("include", include, every)
    check_patterns("exclude", exclude, every)
    found, seen = [], set[Value]()
    for owner, node in graph.walk():
        for _, value in node.operands():
            if not _is_weight(value) or value in seen:
                continue
            seen.add(value)
            second = node.inputs[1] if len(node.inputs) > 1 else None  # of a node with one input, as slice, none
            layer = layer_of(node) if owner is graph and value is second else None
            reason = _reason(node, value, layer, pattern, include, exclude)
            if owner is not graph and node.op in _LINEAR and reason not in _CHOSEN:
                reason = "it lies in a branch or the body of a loop"
            if reason:
                left[reason] += 1
            elif layer is not None:
                found.append(layer)
    return found


def _is_weight(value: Value) -> bool:
    return isinstance(value, Parameter) and value.kind == "parameter" and value.ranked and value.rank > 1


def _reason(
    node: Node, weight: Value, layer: Layer | None, pattern: Pattern, include: Sequence[str], exclude: Sequence[str]
) -> str | None:
    assert isinstance(weight, Parameter)
    if include and not matches(weight.names, include):
        return "not included"
    if matches(weight.names, exclude):
        return "excluded"
    if layer is not None:
        return pattern.misfit(layer.outputs, layer.columns // layer.taps)
    if node.op not in _LINEAR:
        hint = "; simplify before it may make one" if node.op == "permute" else ""  # x @ w.t(), as Falcon has it
        return f"no linear layer, but read by {node.op}{hint}"
    if len(weight.uses) > 1:
        return "its weight has several readers"
    return "a grouped convolution" if node.op == "conv" else "no single matrix that the input is multiplied by"
