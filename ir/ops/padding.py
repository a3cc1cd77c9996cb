"""Padding: zeros around a channel axis are a concatenation, so they are cut like any other channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Concat, resolve, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number
from regauge.ir.ops.slicing import slice_axis
from regauge.ir.scalars import Scalar
from regauge.ir.sizes.expressions import Size, is_static, same, simplify

Pads = Sequence[tuple[Size, Size]]


def _pad_rule(call: Call) -> Axes:
    """Constant padding is ``a -> (before + a + after)`` with two fresh Dims; the other modes mix entries and pin."""
    result: Axes = []
    derived: list[tuple[Any, Any]] = []
    for axis, (before, after) in zip(call.operand(0), call["pads"], strict=True):
        if same(before, 0) and same(after, 0):
            result.append(axis)
            derived.append((0, 0))
        elif call["mode"] == "constant":
            first, last = call.fresh(before), call.fresh(after)
            result.append(resolve(Concat((first, axis, last))))
            derived.append((first, last))
            if call["value"] != 0:  # a cut segment of zeros contributes nothing; one of other numbers would
                call.role("whole", first)
                call.role("whole", last)
        else:
            padded = call.fresh(simplify(size_of(axis) + before + after))
            call.role("whole", axis)
            call.role("whole", padded)
            result.append(padded)
            derived.append((before, after))
    call.derive(pads=tuple(derived))
    return result


def _negative(size: Size) -> bool:
    return size < 0 if isinstance(size, int) else bool(size.is_negative)


def pad_by(build: Builder, x: Value, pads: Pads, mode: str = "constant", value: Any = 0) -> Any:
    """Pad every axis of ``x`` by (before, after); negative amounts cut entries off instead."""
    for dim, (before, after) in enumerate(pads):
        start = simplify(-before) if _negative(before) else 0
        end = simplify(x.shape[dim] + after) if _negative(after) else x.shape[dim]
        x = slice_axis(build, x, dim, start, end)
    grown = tuple((0 if _negative(b) else b, 0 if _negative(a) else a) for b, a in pads)
    if all(same(b, 0) and same(a, 0) for b, a in grown):
        return x
    if mode != "constant":
        _check_mode(x, grown, mode)
    return build.pad(x, pads=grown, mode=mode, value=0 if value is None else value)


def _check_mode(x: Value, pads: Pads, mode: str) -> None:
    """torch reflects, replicates and wraps the trailing axes of images only."""
    fixed = pads[: min(x.rank - 1, 2)]
    if not 2 <= x.rank <= 5 or any(not same(b, 0) or not same(a, 0) for b, a in fixed):
        raise OperatorError(f"padding with the mode {mode} of batch or channel axes of {x} has no counterpart in torch")


def _trailing(x: Value, padding: Sequence[Size]) -> list[tuple[Size, Size]]:
    """torch's flat list (last axis first) as one pair per axis, first axis first."""
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)]
    return [(0, 0)] * (x.rank - len(pairs)) + pairs[::-1]


def _pad(build: Builder, x: Value, pad: Sequence[Size], mode: str = "constant", value: Any = None) -> Any:
    return pad_by(build, x, _trailing(x, pad), mode, value)


def _pad_mode(mode: str) -> Any:
    return lambda build, x, padding: pad_by(build, x, _trailing(x, padding), mode)


_ONNX_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _onnx_pad(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    as_attribute = call.opset < 11
    pads = (call.attribute("pads") or call.attribute("paddings")) if as_attribute else call.sizes(1)
    axes = call.sizes(3) if call.has(3) else range(x.rank)
    mode = _ONNX_MODES.get(call.attribute("mode", "constant"))
    value: Any = call.attribute("value", 0.0) if as_attribute else 0
    if not as_attribute and call.has(2) and mode == "constant":
        value = call.number(2)
    if pads is None or axes is None or mode is None or value is None:
        raise OperatorError("the amounts, the axes or the value of Pad are computed from data")
    full: list[tuple[Size, Size]] = [(0, 0)] * x.rank
    axes = [axis_number(int(a), x.rank) for a in axes]
    for i, axis in enumerate(axes):
        full[axis] = (pads[i], pads[i + len(axes)])
    return pad_by(build, x, full, mode, value)


def _write_pad(nodes: Sequence[Node], patch: Any) -> None:
    """Amounts per axis: what the pad node adds less what the slices before it cut off."""
    origin = nodes[0].origin
    x = nodes[0].inputs[0]
    assert isinstance(x, Value)
    before: list[Size] = [0] * x.rank
    after: list[Size] = [0] * x.rank
    for node in nodes:
        if node.op == "slice":
            source, dim = node.inputs[0], node.attributes["dim"]
            assert isinstance(source, Value)
            before[dim] = -node.attributes["start"]
            after[dim] = simplify(node.attributes["end"] - source.shape[dim])
    for node in nodes:
        for dim, (first, last) in enumerate(node.attributes["pads"] if node.op == "pad" else ()):
            before[dim], after[dim] = simplify(before[dim] + first), simplify(after[dim] + last)
    if "pads" in origin.attributes:
        patch.attribute("pads", [*before, *after])
        return
    patch.set_sizes(1, [*before, *after])
    if len(origin.inputs) > 3 and origin.inputs[3] is not None:
        patch.set_sizes(3, list(range(x.rank)))


def _spell(onnx: Any, node: Node) -> Any:
    """Amounts and value are attributes before opset 11."""
    pads, mode = node.attributes["pads"], node.attributes["mode"]
    flat = [before for before, _ in pads] + [after for _, after in pads]
    name = next(theirs for theirs, ours in _ONNX_MODES.items() if ours == mode)
    value = node.attributes["value"] if mode == "constant" else 0
    if mode == "circular" and onnx.opset < 19:
        raise onnx.refusal(f"Pad has no mode wrap in opset {onnx.opset}")
    if onnx.opset < 11:
        return onnx.Pad(onnx.operand(0), pads=flat, mode=name, value=float(value))
    return onnx.Pad(onnx.operand(0), onnx.sizes(flat), value if value else None, mode=name)


def _pad_layer(node: Node) -> str | None:
    x, pads = node.inputs[0], node.attributes["pads"]
    if not isinstance(x, Value) or not 3 <= x.rank <= 5 or any(pair != (0, 0) for pair in pads[:2]):
        return None
    if not all(isinstance(size, int) for pair in pads for size in pair):
        return None
    amounts = tuple(size for pair in reversed(pads[2:]) for size in pair)
    rank, mode = x.rank - 2, node.attributes["mode"]
    if mode == "constant":
        value = node.attributes["value"]
        return f"nn.ZeroPad{rank}d({amounts})" if value == 0 else f"nn.ConstantPad{rank}d({amounts}, {value!r})"
    name = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}[mode]
    return f"nn.{name}Pad{rank}d({amounts})"


def _pad_shape(x: Value, *, pads: Pads, mode: str = "constant", **_: Any) -> tuple[Size, ...] | None:
    """The shape where as many entries are there as the mode copies."""
    amounts = [amount for pair in pads for amount in pair]
    if len(pads) != x.rank or not all(isinstance(amount, int) for amount in amounts):
        return None
    if mode != "constant" and not 2 <= x.rank <= 5:
        return None
    longest = {"constant": None, "replicate": None, "reflect": -1, "circular": 0}[mode]
    for size, pair in zip(x.shape, pads, strict=True):
        if not isinstance(size, int):
            continue
        if size + sum(pair) < 1 or min(pair) < 0 and mode != "constant":
            return None
        if longest is not None and max(pair) > size + longest:
            return None
    return tuple(size + before + after for size, (before, after) in zip(x.shape, pads, strict=True))


def _symmetry(node: Node) -> Symmetry:
    """A border of another number than zero is the same for every index of the other axes."""
    filled = node.attributes["mode"] == "constant" and node.attributes["value"] != 0
    return Symmetry.POINTWISE if filled else Symmetry.LAYOUT


def _pad_element(x: Scalar, *, pads: Pads, mode: str, value: float) -> Scalar | None:
    """What is cut off (a negative amount) is not read, what is added is the value."""
    if mode != "constant":
        return None
    places = {}
    for axis, (before, after) in enumerate(pads):
        if not is_static(before):
            return None
        if not (same(before, 0) and same(after, 0)):
            places[axis] = scalars.along(axis, 1, -before)
    return scalars.moved(x, places, value) if places else x


@operator(
    rule=_pad_rule,
    shape=_pad_shape,
    aten={
        "pad": _pad,
        "constant_pad_nd": lambda build, x, pad, value=0: _pad(build, x, pad, "constant", value),
        **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"), _pad_mode("reflect")),
        **dict.fromkeys(("replication_pad1d", "replication_pad2d", "replication_pad3d"), _pad_mode("replicate")),
        "_pad_circular": _pad_mode("circular"),
    },
    onnx={"Pad": OnnxForm(read=_onnx_pad, write=_write_pad)},
    spell=_spell,
    samples=lambda: [
        sample(randn(2, 3, 4), pads=((0, 0), (1, 2), (0, 0))),
        sample(randn(2, 3), pads=((0, 0), (0, 4))),
        sample(randn(2, 3), pads=((0, 0), (2, 0)), value=1.5),
        sample(randn(2, 3, 4, 5), pads=((0, 0), (2, 2), (1, 1), (3, 0)), value=-1.0),
        sample(randn(2, 3, 4, 5), pads=((0, 0), (0, 0), (1, 2), (2, 1)), mode="reflect"),
        sample(randn(2, 3, 4, 5), pads=((0, 0), (0, 0), (0, 0), (2, 1)), mode="replicate"),
        sample(randn(2, 3, 4), pads=((0, 0), (0, 0), (2, 1)), mode="circular"),
        sample(randn(3, 4), pads=((0, 0), (2, 1)), mode="reflect"),
    ],
    symmetry=_symmetry,
    layer=_pad_layer,
    element=_pad_element,
)
def pad(
    x: torch.Tensor, *, pads: tuple[tuple[int, int], ...], mode: str = "constant", value: float = 0
) -> torch.Tensor:
    first = min(x.dim() - 1, 2)  # the other modes want the batch and the channels left out
    if mode == "constant":
        first = 0
        while first < x.dim() - 1 and pads[first] == (0, 0):
            first += 1
    amounts = [size for pair in reversed(pads[first:]) for size in pair]
    return F.pad(x, amounts, mode, value if mode == "constant" else None)
