"""Reading If, Loop and Scan: nested graphs become regions, and what they read from around them explicit operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir

from regauge.frontends.onnx_model.call import OnnxCall
from regauge.frontends.onnx_model.file import captured_values
from regauge.frontends.onnx_model.scope import Entry, Scope
from regauge.frontends.onnx_model.weights import is_float, tensors_of
from regauge.ir.dtypes import Dtype
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Graph, Operand, Value
from regauge.ir.sizes.expressions import Size, same, symbol

if TYPE_CHECKING:
    from regauge.frontends.from_onnx import _Importer

Type = tuple[tuple[Size, ...], Dtype]


def _scope_of(scope: Scope, graph: onnx_ir.Graph) -> Scope:
    region = Graph(name=graph.name or "region")
    return Scope(scope.build.region(region), scope.opsets, parent=scope, attributes=scope.attributes, fixed=scope.fixed)


def _read_body(importer: _Importer, inner: Scope, graph: onnx_ir.Graph) -> Graph:
    """Read a nested graph whose inputs have entries already."""
    importer.initializers(inner, graph)
    importer.nodes(inner, graph)
    region = inner.build.graph
    region.outputs = [inner.operand(value) for value in graph.outputs]
    return region


def _types(region: Graph) -> list[Type]:
    for output in region.outputs:
        if isinstance(output, Value) and not output.ranked:
            raise OperatorError(f"the rank of {output.name}, which it gives, is not known before the model runs")
    return [(output.shape, output.dtype) for output in region.outputs if isinstance(output, Value)]


def read_cond(importer: _Importer, scope: Scope, node: onnx_ir.Node) -> None:
    """If: both branches are regions.

    Exporters leave checks of ranks and sizes in the file, with branches that differ in form. Where such a condition is
    known, the branch taken is read in place, unless the other, which never runs, has weights that must stay valid.
    Where it depends on a dynamic size and the branches differ in form, the first is taken, with a note: it is the case
    that the exporter singled out (``squeeze`` of an axis of size 1).
    """
    call = OnnxCall(node, scope)
    graphs = [call.attribute("then_branch"), call.attribute("else_branch")]
    taken = call.number(0)
    known = isinstance(taken, bool | int)
    entry = call.entry(0)
    assumed = entry is not None and entry.content is not None and entry.content.undecided
    if known and not _reads_weights(scope, node, graphs[1 if taken else 0]):
        _inline(importer, scope, node, graphs[0 if taken else 1], 0 if taken else 1)
        return
    before = importer.opaque.copy()
    inners = [_scope_of(scope, graph) for graph in graphs]
    try:
        regions = [_read_body(importer, inner, graph) for inner, graph in zip(inners, graphs, strict=True)]
        types = _join_types(node, *[_types(region) for region in regions], exact=known)
    except Exception:
        importer.opaque[:] = before
        if not known and not assumed:
            raise
        for inner in inners:
            inner.release_names()
        branch = 0 if assumed or taken else 1
        if assumed:
            importer.assume(node)
        _inline(importer, scope, node, graphs[branch], branch)
        return
    outside = list(dict.fromkeys(outer for inner in inners for outer in inner.captures))
    for inner, region in zip(inners, regions, strict=True):
        region.inputs = [inner.captures.get(o) or inner.build.input(o.name, o.shape, o.dtype) for o in outside]
    found = scope.build("cond", call.operand(0), *outside, regions=regions, results=types)
    importer.bind(scope, node, found if isinstance(found, tuple) else (found,))


def _reads_weights(scope: Scope, node: onnx_ir.Node, graph: onnx_ir.Graph) -> bool:
    """Whether a branch that never runs must still follow when weights are cut: it holds some, or reads some."""
    if any(is_float(tensor.dtype) and len(tensor.shape) for tensor in tensors_of(graph)):
        return True
    entries = [scope.find(value) for value in captured_values(node)]
    return any(e.tensor is not None and is_float(e.tensor.dtype) and len(e.shape) > 0 for e in entries)


def _inline(importer: _Importer, scope: Scope, node: onnx_ir.Node, graph: onnx_ir.Graph, branch: int) -> None:
    importer.branches[node] = branch
    inner = Scope(scope.build, scope.opsets, parent=scope, attributes=scope.attributes, fixed=scope.fixed)
    importer.initializers(inner, graph)
    importer.nodes(inner, graph)
    for formal, actual in zip(graph.outputs, node.outputs, strict=True):
        entry = inner.find(formal)
        scope.entries[actual] = Entry(actual, entry.scope, entry.value, entry.content, entry.tensor, entry.producer)
        if entry.value is None and entry.content is None and entry.tensor is None:
            scope.entries[actual].value = inner.operand(formal)


def _join_types(node: onnx_ir.Node, first: list[Type], second: list[Type], *, exact: bool) -> list[Type]:
    """What is true of a value that comes from either branch; a size that differs gets a symbol of its own."""
    result: list[Type] = []
    for output, (shape, dtype), (other_shape, other_dtype) in zip(node.outputs, first, second, strict=True):
        if dtype != other_dtype or len(shape) != len(other_shape):
            raise OperatorError(f"its branches give {output.name!r} different ranks or types")
        agree = [same(a, b) for a, b in zip(shape, other_shape, strict=True)]
        if exact and not all(agree):
            raise OperatorError(f"its branches give {output.name!r} different sizes")
        sizes = [a if ok else symbol(f"{output.name}_{i}") for i, (a, ok) in enumerate(zip(shape, agree, strict=True))]
        result.append((tuple(sizes), dtype))
    return result


def _grown(names: Sequence[str], before: list[Type], after: list[Type]) -> list[Type]:
    """The types of loop-carried values: an axis that an iteration changes gets a dynamic size."""
    result: list[Type] = []
    for name, (shape, dtype), (new_shape, new_dtype) in zip(names, before, after, strict=True):
        if dtype != new_dtype or len(shape) != len(new_shape):
            raise OperatorError(f"the loop changes the rank or type of {name!r}")
        pairs = enumerate(zip(shape, new_shape, strict=True))
        result.append((tuple(a if same(a, b) else symbol(f"{name}_{i}") for i, (a, b) in pairs), dtype))
    return result


def _iterate(
    importer: _Importer,
    scope: Scope,
    graph: onnx_ir.Graph,
    leading: list[Type],
    carried: list[Type],
    entries: list[Type],
    skip: int,
) -> tuple[Scope, Graph, list[Type]]:
    """Read the body of a loop until its carried values have the same types before and after; at most three times."""
    names = [value.name or "carried" for value in graph.inputs[len(leading) : len(leading) + len(carried)]]
    for _ in range(3):
        inner = _scope_of(scope, graph)
        for formal, (shape, dtype) in zip(graph.inputs, [*leading, *carried, *entries], strict=True):
            value = inner.build.input(formal.name or "input", shape, dtype)
            inner.name(value, formal, "input")
            value.origin = formal
            inner.entries[formal] = Entry(formal, inner, value=value)
        region = _read_body(importer, inner, graph)
        settled = _grown(names, carried, _types(region)[skip : skip + len(carried)])
        if settled == carried:
            return inner, region, carried
        carried = settled
        inner.release_names()
    raise OperatorError("the sizes of its carried values do not settle")


def _type(value: Value) -> Type:
    return value.shape, value.dtype


def read_loop(importer: _Importer, scope: Scope, node: onnx_ir.Node) -> None:
    """Loop: body (iteration, condition, carried...) -> (condition, carried..., one row of each stacked...)."""
    import torch

    call = OnnxCall(node, scope)
    body = call.attribute("body")
    states = [call.operand(i) for i in range(2, call.count)]
    leading: list[Type] = [((), torch.int64), ((), torch.bool)]
    inner, region, carried = _iterate(importer, scope, body, leading, [_type(v) for v in states], [], 1)
    trips, condition = (_number_or_value(call, i) for i in (0, 1))
    count = trips if isinstance(trips, int) and condition in (None, True) else symbol(f"{node.outputs[0].name}_trips")
    rows = _types(region)[1 + len(states) :]
    results = [*carried, *[((count, *shape), dtype) for shape, dtype in rows]]
    found = scope.build(
        "loop", trips, condition, *states, *inner.captures, carried=len(states), regions=[region], results=results
    )
    importer.bind(scope, node, found if isinstance(found, tuple) else (found,))


def _number_or_value(call: OnnxCall, index: int) -> Operand:
    if not call.has(index):
        return None
    number = call.number(index)
    return number if isinstance(number, bool | int) else call.operand(index)


def read_scan(importer: _Importer, scope: Scope, node: onnx_ir.Node) -> None:
    """Scan: body (states..., one entry of each scanned...) -> (states..., one row of each stacked...)."""
    call = OnnxCall(node, scope)
    if call.opset < 9:
        raise OperatorError("Scan before opset 9 has a batch axis of its own")
    body, count = call.attribute("body"), call.attribute("num_scan_inputs")
    operands = [call.operand(i) for i in range(call.count)]
    states, scanned = operands[: len(operands) - count], operands[len(operands) - count :]
    axes_in = [a % v.rank for a, v in zip(call.attribute("scan_input_axes", (0,) * count), scanned, strict=True)]
    entries = [((*v.shape[:a], *v.shape[a + 1 :]), v.dtype) for v, a in zip(scanned, axes_in, strict=True)]
    inner, region, carried = _iterate(importer, scope, body, [], [_type(v) for v in states], entries, 0)
    rows = _types(region)[len(states) :]
    axes_out = call.attribute("scan_output_axes", (0,) * len(rows))
    axes_out = [a % (len(shape) + 1) for a, (shape, _) in zip(axes_out, rows, strict=True)]
    steps = scanned[0].shape[axes_in[0]]
    stacked = [((*s[:a], steps, *s[a:]), d) for a, (s, d) in zip(axes_out, rows, strict=True)]
    found = scope.build(
        "scan",
        *operands,
        *inner.captures,
        carried=len(states),
        input_axes=axes_in,
        output_axes=axes_out,
        input_reverse=tuple(bool(d) for d in call.attribute("scan_input_directions", ())),
        output_reverse=tuple(bool(d) for d in call.attribute("scan_output_directions", ())),
        regions=[region],
        results=[*carried, *stacked],
    )
    importer.bind(scope, node, found if isinstance(found, tuple) else (found,))
