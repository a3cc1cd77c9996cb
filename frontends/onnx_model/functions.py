"""Calls of model-local functions: the body is read in place, pinned where a change would have to be written into it.

A function is shared by its calls and holds no initializers; its weights come from outside, as operands. So cutting
changes initializers only, and what is written inside the body (sizes, constants) must stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

from regauge.frontends.onnx_model.call import resolved_attributes
from regauge.frontends.onnx_model.file import nested_graphs
from regauge.frontends.onnx_model.scope import Scope
from regauge.ir.graph import Node, Value

if TYPE_CHECKING:
    from regauge.frontends.from_onnx import _Importer


def expand_function(importer: _Importer, scope: Scope, node: onnx_ir.Node, function: onnx_ir.Function) -> None:
    """Read the body of a function in place of a call of it; all its nodes point back to the call."""
    given = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
    given.update(resolved_attributes(node, scope))
    reason = scope.fixed or f"it is written inside the local function {function.name}"
    inner = Scope(scope.build, dict(function.opset_imports), parent=scope, attributes=given, fixed=reason)
    for formal, actual in zip(function.inputs, node.inputs, strict=False):
        if actual is not None:
            inner.entries[formal] = scope.find(actual)
    start = len(scope.build.added)
    importer.nodes(inner, function)
    for added in scope.build.added[start:]:
        _fix(added, node, reason)
    results: list[Value | None] = []
    for formal, actual in zip(function.outputs, node.outputs, strict=False):
        entry = inner.find(formal)
        if entry.value is None and entry.content is not None:
            scope.entries[actual] = entry
        results.append(inner.operand(formal) if actual.name else None)
    importer.bind(scope, node, results)


def called_functions(model: onnx_ir.Model, node: onnx_ir.Node) -> list[onnx_ir.Function]:
    """The functions of a model that a node calls: itself, in branches and bodies, or by a function that it calls."""
    found: dict[onnx_ir.OperatorIdentifier, onnx_ir.Function] = {}
    waiting = [node]
    while waiting:
        caller = waiting.pop()
        waiting += [inner for graph in nested_graphs(caller) for inner in graph]
        function = model.functions.get(caller.op_identifier())
        if function is not None and caller.op_identifier() not in found:
            found[caller.op_identifier()] = function
            waiting += function
    return list(found.values())


def _fix(added: Node, call: onnx_ir.Node, reason: str) -> None:
    added.origin = call
    added.metadata["fixed"] = reason
    for value in added.outputs:
        value.origin = None  # the body is shared by all calls: its values stand for no single value of ours
    for region in added.regions:
        for inner in region.nodes:
            _fix(inner, call, reason)
