"""ONNX sequences whose length is known: lists of values while a model is read, never values of the graph.

Exporters cut a tensor with SplitToSequence and pick the pieces with SequenceAt; read so, it is a split like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir

from regauge.frontends.onnx_model.call import OnnxCall
from regauge.frontends.onnx_model.scope import Entry, Scope
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Value
from regauge.ir.operator import find_onnx
from regauge.ir.sizes.onnx_contents import content


def read_sequence(scope: Scope, node: onnx_ir.Node) -> None:
    """Note the pieces of a sequence, or what is taken out; raises OperatorError where the length is not known."""
    call = OnnxCall(node, scope)
    result = _READERS[node.op_type](call)
    output = node.outputs[0]
    if isinstance(result, Entry):
        scope.entries[output] = result
    elif isinstance(result, Value):
        fresh = result.origin is None and result.producer is not None
        if fresh:
            scope.name(result, output, node.op_type)
            result.origin = output
        scope.entries[output] = Entry(output, scope, value=result)
    else:
        scope.entries[output] = Entry(output, scope, sequence=list(result), producer=node)


def _split(call: OnnxCall) -> Sequence[Value]:
    found = find_onnx("", "SplitToSequence")
    if found is None or found[1].read is None:
        raise OperatorError("there is no record for it")
    pieces: Sequence[Value] = found[1].read(call.scope.build, call)
    return pieces


def _pieces(call: OnnxCall) -> list[Value]:
    entry = call.entry(0)
    pieces = None if entry is None else call.scope.sequence(entry)
    if pieces is None:
        raise OperatorError("the length of its sequence is not known")
    return pieces


def _at(call: OnnxCall) -> Value:
    pieces, place = _pieces(call), call.number(1)
    if not isinstance(place, int) or not -len(pieces) <= place < len(pieces):
        raise OperatorError(f"a sequence of {len(pieces)} has no entry {place}")
    return pieces[place]


def _join(call: OnnxCall) -> Value:
    pieces, axis = _pieces(call), call.attribute("axis")
    joined: Value
    if call.attribute("new_axis", 0):
        joined = call.scope.build.stack(*pieces, dim=axis % (pieces[0].rank + 1))
    else:
        joined = call.scope.build.concat(*pieces, dim=axis % pieces[0].rank)
    return joined


def _length(call: OnnxCall) -> Entry:
    known = content(len(_pieces(call)), onnx_ir.DataType.INT64)
    return Entry(call.node.outputs[0], call.scope, content=known, producer=call.node)


def _construct(call: OnnxCall) -> list[Value]:
    return [call.operand(i) for i in range(call.count)]


_READERS: dict[str, Callable[[OnnxCall], Value | Entry | Sequence[Value]]] = {
    "SplitToSequence": _split,
    "SequenceAt": _at,
    "SequenceConstruct": _construct,
    "SequenceLength": _length,
    "ConcatFromSequence": _join,
}
SEQUENCE_OPERATORS = frozenset(_READERS)
