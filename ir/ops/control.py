"""Control flow: operators whose nodes hold regions. Every outer value that a region needs is an explicit operand.

Shapes of results come from the frontend (``results=``), since they follow from the regions; the axis rules analyse the
regions and unify what flows in, around and out. The same records serve ONNX If, Loop and Scan and torch's cond,
while_loop and scan.
"""

from __future__ import annotations

from typing import Any

import torch

from regauge.ir.dims.extents import Extent, fresh, size_of
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Symmetry, operator
from regauge.ir.sizes.expressions import same


def _join(call: Any, first: list[Extent], second: list[Extent], sizes: Any, reason: str) -> list[Extent]:
    """The axes of a value that comes from either of two places; where sizes differ the axis is pinned on both sides."""
    if len(first) != len(second):
        for extent in (*first, *second):
            call.pin(extent, reason)
        return _pinned(call, sizes, reason)
    result = []
    for a, b, size in zip(first, second, sizes, strict=False):
        if same(size_of(a), size_of(b)) and same(size_of(a), size):
            call.unify(a, b)
            result.append(a)
            continue
        call.pin(a, reason)
        call.pin(b, reason)
        result.extend(_pinned(call, [size], reason))
    return result


def _pinned(call: Any, sizes: Any, reason: str) -> list[Extent]:
    axes = [fresh(size) for size in sizes]
    for extent in axes:
        call.pin(extent, reason)
    return axes


def _region(call: Any, index: int, operands: list[list[Extent]]) -> list[list[Extent]]:
    """The axes a region gives; an axis that enters with another size than it has inside is pinned on both sides."""
    reason = "it changes its size from one iteration to the next"
    entering = [
        _join(call, axes, [fresh(size) for size in value.shape], value.shape, reason)
        if not all(same(size_of(a), size) for a, size in zip(axes, value.shape, strict=True))
        else axes
        for axes, value in zip(operands, call.node.regions[index].inputs, strict=True)
    ]
    found: list[list[Extent]] = call.region(index, entering)
    return found


def _cond_rule(call: Any) -> Any:
    operands = [axes or [] for axes in call.axes[1:]]
    branches = [_region(call, index, operands) for index in range(len(call.node.regions))]
    results = branches[0]
    for branch in branches[1:]:
        results = [
            _join(call, a, b, value.shape, "the branches give it different sizes")
            for a, b, value in zip(results, branch, call.node.outputs, strict=True)
        ]
    return [list(axes) for axes in results]


@operator(rule=_cond_rule, symmetry=Symmetry.POINTWISE)
def cond(predicate, *operands, regions=()):  # type: ignore[no-untyped-def]
    """One of two regions, (then, else), applied to the operands; both give results of the same types."""
    return regions[0](*operands) if bool(predicate) else regions[1](*operands)


def _carry(call: Any, before: list[list[Extent]], after: list[list[Extent]], values: Any) -> list[list[Extent]]:
    """Loop-carried values have the same axes before and after an iteration."""
    return [
        _join(call, a, b, value.shape, "it changes its size from one iteration to the next")
        for a, b, value in zip(before, after, values, strict=True)
    ]


def _while_rule(call: Any) -> Any:
    operands = [axes or [] for axes in call.axes]
    carried = call["carried"]
    _region(call, 0, operands)
    after = _region(call, 1, operands)
    return _carry(call, operands[:carried], after[:carried], call.node.outputs)


@operator(rule=_while_rule)
def while_loop(*operands, carried, regions=()):  # type: ignore[no-untyped-def]
    """Regions (condition, body): while the condition holds, the body gives the next ``carried`` first operands."""
    state, captured = list(operands[:carried]), operands[carried:]
    while bool(regions[0](*state, *captured)[0]):
        state = list(regions[1](*state, *captured))
    return tuple(state)


def _loop_rule(call: Any) -> Any:
    """Body: iteration number, condition, carried..., captured... -> condition, carried..., stacked..."""
    carried = call["carried"]
    operands = [axes or [] for axes in call.axes[2:]]
    after = _region(call, 0, [[], [], *operands])
    outputs = call.node.outputs
    finals = _carry(call, operands[:carried], after[1 : 1 + carried], outputs[:carried])
    stacked = [
        [*_pinned(call, value.shape[:1], "it counts the iterations"), *axes]
        for value, axes in zip(outputs[carried:], after[1 + carried :], strict=True)
    ]
    return [*finals, *stacked]


@operator(rule=_loop_rule)
def loop(trip_count, condition, *operands, carried, regions=()):  # type: ignore[no-untyped-def]
    """ONNX Loop: at most ``trip_count`` iterations while ``condition``; what follows the carried results is stacked."""
    state, captured = list(operands[:carried]), operands[carried:]
    going = True if condition is None else bool(condition)
    rows = []
    step = 0
    while going and (trip_count is None or step < int(trip_count)):
        result = regions[0](torch.tensor(step), torch.tensor(going), *state, *captured)
        going = bool(result[0])
        state = list(result[1 : 1 + carried])
        rows.append(result[1 + carried :])
        step += 1
    return (*state, *[torch.stack(list(column)) for column in zip(*rows, strict=True)])


def _scan_rule(call: Any) -> Any:
    """Body: carried..., one entry of each scanned..., captured... -> carried..., one entry of each stacked."""
    carried, axes_in, axes_out = call["carried"], call["input_axes"], call["output_axes"]
    operands = [axes or [] for axes in call.axes]
    entries = []
    for axes, axis in zip(operands[carried : carried + len(axes_in)], axes_in, strict=True):
        position = call.normal(axis, len(axes))
        call.role("scan", axes[position])
        entries.append([extent for i, extent in enumerate(axes) if i != position])
    after = _region(call, 0, [*operands[:carried], *entries, *operands[carried + len(axes_in) :]])
    outputs = call.node.outputs
    results = _carry(call, operands[:carried], after[:carried], outputs[:carried])
    for axes, axis, value in zip(after[carried:], axes_out, outputs[carried:], strict=True):
        position = call.normal(axis, len(axes) + 1)
        counted = _pinned(call, [value.shape[position]], "it counts the steps of a scan")
        results.append([*axes[:position], *counted, *axes[position:]])
    return results


@operator(rule=_scan_rule)
def scan(  # type: ignore[no-untyped-def]
    *operands, carried, input_axes, output_axes, input_reverse=(), output_reverse=(), regions=()
):
    """One step per entry of the scanned operands: ``carried`` initial states first, then scanned, then captured ones.

    ``input_axes`` gives the scanned axis of each scanned operand, ``output_axes`` the stacked axis of each result after
    the states; ``input_reverse`` and ``output_reverse`` say which run backwards.
    """
    count = len(input_axes)
    state, captured = list(operands[:carried]), operands[carried + count :]
    streams = [list(torch.unbind(x, axis)) for x, axis in zip(operands[carried:], input_axes, strict=False)]
    streams = [s[::-1] if i < len(input_reverse) and input_reverse[i] else s for i, s in enumerate(streams)]
    rows = []
    for entries in zip(*streams, strict=True):
        result = regions[0](*state, *entries, *captured)
        state = list(result[:carried])
        rows.append(result[carried:])
    columns = [list(column) for column in zip(*rows, strict=True)]
    columns = [c[::-1] if i < len(output_reverse) and output_reverse[i] else c for i, c in enumerate(columns)]
    return (*state, *[torch.stack(c, axis) for c, axis in zip(columns, output_axes, strict=True)])


def captured_values(node: Node, slot: int) -> list[Value]:
    """What stands in each region for an operand that regions read as it is, at every step; none of other operands."""
    attributes = node.attributes
    first = {
        "cond": 1,
        "while_loop": attributes.get("carried", 0),
        "loop": 2 + attributes.get("carried", 0),
        "scan": attributes.get("carried", 0) + len(attributes.get("input_axes", ())),
    }.get(node.op)
    if first is None or slot < first:
        return []
    return [region.inputs[slot - len(node.inputs)] for region in node.regions]
