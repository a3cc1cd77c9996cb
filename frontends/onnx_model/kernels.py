"""Calls of functions that were written from fused regions: fused nodes again, as their metadata has them.

The text of the region is taken where the nodes of the function are those that it was written as; else the nodes count,
as those of any local function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir
import sympy

from regauge.frontends.onnx_model.call import OnnxCall
from regauge.frontends.onnx_model.scope import Scope
from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder
from regauge.ir.errors import RegaugeError
from regauge.ir.fusion.fused import named_sizes
from regauge.ir.graph import Graph, Operand, Value
from regauge.ir.onnx_kernels import DOMAIN, HASH, REGION, ROUNDING, function_hash
from regauge.ir.printing.parse import parse_graph
from regauge.ir.sizes.expressions import Size, replaced, same, symbols_in

if TYPE_CHECKING:
    from regauge.frontends.from_onnx import _Importer

ROUNDINGS = ("fused", "eager")


def read_region(importer: _Importer, scope: Scope, node: onnx_ir.Node, function: onnx_ir.Function) -> bool:
    """Read a call as a fused node; False, with nothing done, where the function does not say which."""
    text, notes = _noted_region(function), function.metadata_props
    call = OnnxCall(node, scope)
    if text is None or call.count != len(text.inputs) or not all(map(call.has, range(call.count))):
        return False
    operands = [call.operand(place) for place in range(call.count)]
    region = _region_for(text, operands)
    if region is None:
        return False
    results = [(value.shape, value.dtype) for value in region.outputs if isinstance(value, Value)]
    rounding = notes.get(ROUNDING)
    if len(results) != len(node.outputs) or rounding not in ROUNDINGS:
        return False
    found = scope.build(FUSED, *operands, regions=[region], results=results, rounding=rounding)
    importer.bind(scope, node, found if isinstance(found, tuple) else (found,))
    return True


def _noted_region(function: onnx_ir.Function) -> Graph | None:
    """The region that a function was written from, if its nodes are still those."""
    text = function.metadata_props.get(REGION)
    if function.domain != DOMAIN or text is None or function.metadata_props.get(HASH) != function_hash(function):
        return None
    try:
        return parse_graph(text)
    except RegaugeError:
        return None


def _region_for(text: Graph, operands: Sequence[Value]) -> Graph | None:
    """The region over operands of other sizes; None where they do not fit."""
    sizes: dict[sympy.Symbol, Size] = {}
    for formal, actual in zip(text.inputs, operands, strict=True):
        if formal.dtype != actual.dtype or formal.rank != actual.rank:
            return None
        pairs = zip(formal.shape, actual.shape, strict=True)
        sizes.update((was, now) for was, now in pairs if isinstance(was, sympy.Symbol))
    if not _is_told(text, operands, sizes):
        return None
    region = Graph(text.name)
    build = Builder(region)
    found: dict[Value, Value] = {
        formal: build.input(formal.name, actual.shape, actual.dtype)
        for formal, actual in zip(text.inputs, operands, strict=True)
    }

    def moved(operand: Operand) -> Operand:
        return found[operand] if isinstance(operand, Value) else replaced(operand, sizes)

    try:
        for node in text.nodes:
            attributes = {name: _resized(value, sizes) for name, value in node.attributes.items()}
            found[node.output] = build(node.op, *map(moved, node.inputs), name=node.name, **attributes)
    except RegaugeError:
        return None
    region.outputs = [moved(output) for output in text.outputs]
    return region


def _is_told(text: Graph, operands: Sequence[Value], sizes: dict[sympy.Symbol, Size]) -> bool:
    """Whether what nodes name of the sizes of operands is the same here: one function is called with ``[s,s]``, of
    which the text was made, and with ``[s,p]``, where ``s`` may be meant or ``p``."""
    named = named_sizes(text.nodes)
    pairs = [
        pair
        for one, other in zip(text.inputs, operands, strict=True)
        for pair in zip(one.shape, other.shape, strict=True)
    ]
    return all(same(replaced(was, sizes), now) for was, now in pairs if named & symbols_in(was))


def _resized(value: Any, sizes: dict[sympy.Symbol, Size]) -> Any:
    if isinstance(value, tuple):
        return tuple(_resized(part, sizes) for part in value)
    return replaced(value, sizes)
