"""How ONNX Resize and Upsample are read: which of their many sampling rules are one of torch's interpolations.

ONNX states where an output entry samples the input (``coordinate_transformation_mode``) and how it rounds
(``nearest_mode``). torch knows three of these combinations for nearest entries and two for the others. Where sizes are
known, the indices that both would read are compared, so that any combination with the same indices is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node
from regauge.ir.sizes.expressions import Size, divide, same

STAND_IN = 24  # a dynamic size under an integer scale: its index pattern repeats, so that any size shows all of it


@dataclass(frozen=True)
class Target:
    """What a Resize makes of each axis: its new size, or the scale from which the new size follows."""

    shape: tuple[Size, ...]
    sizes: tuple[Size, ...] | None
    scales: tuple[float, ...] | None

    def keeps(self, axis: int) -> bool:
        if self.scales is not None:
            return self.scales[axis] == 1
        return self.sizes is not None and same(self.sizes[axis], self.shape[axis])

    def may_be_one(self, axis: int) -> bool:
        """Whether the new size of an axis could be one."""
        if self.sizes is not None:
            return same(self.sizes[axis], 1)
        assert self.scales is not None
        old, scale = self.shape[axis], self.scales[axis]
        return old * scale < 2 if isinstance(old, int) else scale < 1

    def lengths(self, axis: int) -> tuple[int, int, float]:
        """Old size, new size and scale of an axis; stand-ins where a dynamic size is multiplied by an integer."""
        old = self.shape[axis]
        if self.scales is not None:
            scale = self.scales[axis]
            if isinstance(old, int) or float(scale).is_integer():
                length = old if isinstance(old, int) else STAND_IN
                return length, math.floor(length * scale), float(scale)
        elif self.sizes is not None:
            new = self.sizes[axis]
            if isinstance(old, int) and isinstance(new, int):
                return old, new, new / old
            ratio = divide(new, old)
            if isinstance(ratio, int):
                return STAND_IN, STAND_IN * ratio, float(ratio)
        raise _refuse("this nearest Resize of a dynamic size")


def _refuse(reason: str) -> OperatorError:
    return OperatorError(f"{reason} has no counterpart in torch: the node is kept as it is")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_upsample(build: Any, call: Any) -> Any:
    """Upsample (opsets 7 and 9) samples at ``index / scale`` and rounds down."""
    scales = tuple(call.attribute("scales")) if call.opset < 9 else _scales(call, 1)
    return _resized(build, call, Target(call.operand(0).shape, None, scales), "asymmetric", "floor")


def read_resize(build: Any, call: Any) -> Any:
    shape = call.operand(0).shape
    if call.opset < 11:
        return _resized(build, call, Target(shape, None, _scales(call, 1)), "asymmetric", "floor")
    if call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise _refuse("a Resize that keeps the aspect ratio")
    sizes, scales = _sizes(call), _scales(call, 2)
    target = Target(shape, sizes, None if sizes is not None else scales)
    call.passes_over(1)  # regions belong to coordinates that are refused
    where = call.attribute("coordinate_transformation_mode", "half_pixel")
    return _resized(build, call, target, where, call.attribute("nearest_mode", "round_prefer_floor"))


def _scales(call: Any, index: int) -> tuple[float, ...] | None:
    tensor = call.constant(index) if call.has(index) else None
    if tensor is None or tensor.numel() == 0:
        return None
    return _on_axes(call, [float(number) for number in tensor.reshape(-1)], [1.0] * call.operand(0).rank)


def _sizes(call: Any) -> tuple[Size, ...] | None:
    sizes = call.sizes(3) if call.has(3) else None
    return _on_axes(call, sizes, call.operand(0).shape) if sizes else None


def _on_axes(call: Any, values: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
    """One entry per axis: from opset 18 on ``axes`` may name those that are given, and the others stay."""
    axes = call.attribute("axes")
    if axes is None:
        return tuple(values)
    result = list(rest)
    for axis, value in zip(axes, values, strict=True):
        result[axis] = value
    return tuple(result)


def _resized(build: Any, call: Any, target: Target, where: str, rounding: str) -> Any:
    x = call.operand(0)
    if target.sizes is None and target.scales is None:
        raise _refuse(f"{call.op_type} to computed sizes")
    if not 3 <= x.rank <= 5 or not (target.keeps(0) and target.keeps(1)):
        raise _refuse(f"{call.op_type} of the batch or the channel axis")
    mode, corners = _torch_mode(call, target, where, rounding)
    options = {"mode": mode, "align_corners": corners, "antialias": bool(call.attribute("antialias", 0))}
    if target.sizes is not None:
        return build.interpolate(x, size=target.sizes[2:], **options)
    return build.interpolate(x, scale=target.scales[2:], **options)  # type: ignore[index]


def _torch_mode(call: Any, target: Target, where: str, rounding: str) -> tuple[str, bool | None]:
    kind, spatial = call.attribute("mode", "nearest"), range(2, len(target.shape))
    if kind == "nearest":
        return _nearest_mode(target, where, rounding), None
    if where == "pytorch_half_pixel" and not any(target.may_be_one(axis) for axis in spatial):
        where = "half_pixel"
    if where not in ("half_pixel", "align_corners"):
        raise _refuse(f"a {kind} Resize with {where} coordinates")
    corners, antialias = where == "align_corners", bool(call.attribute("antialias", 0))
    if bool(call.attribute("exclude_outside", 0)) != antialias:
        raise _refuse(
            "such a treatment of what lies outside"
        )  # torch leaves it out where it antialiases, and only there
    if antialias and len(spatial) != 2:
        raise _refuse("antialiasing over other than two axes")
    if kind == "linear":
        return ("linear", "bilinear", "trilinear")[len(spatial) - 1], corners
    slope = -0.5 if antialias else -0.75  # torch fixes the coefficient of the cubic kernel
    if kind != "cubic" or len(spatial) != 2 or not math.isclose(call.attribute("cubic_coeff_a", -0.75), slope):
        raise _refuse(f"this {kind} Resize")
    return "bicubic", corners


# -- nearest entries ---------------------------------------------------------------------------------------------------


def _nearest_mode(target: Target, where: str, rounding: str) -> str:
    """``nearest`` reads entry floor(i / scale), ``nearest-exact`` entry floor((i + 0.5) / scale)."""
    always = {("asymmetric", "floor"): "nearest", ("half_pixel", "round_prefer_ceil"): "nearest-exact"}
    if (where, rounding) in always:
        return always[where, rounding]
    candidates = ["nearest", "nearest-exact"]
    for axis in range(2, len(target.shape)):
        old, new, scale = target.lengths(axis)
        wanted = [_rounded(_position(i, old, new, scale, where), rounding, old) for i in range(new)]
        candidates = [mode for mode in candidates if _torch_indices(mode, old, new, scale) == wanted]
    if not candidates:
        raise _refuse(f"a nearest Resize with {where} coordinates and {rounding}")
    return candidates[0]


def _position(index: int, old: int, new: int, scale: float, where: str) -> float:
    """The coordinate in the input that an output index samples (ONNX operator reference, Resize)."""
    match where:
        case "asymmetric":
            return index / scale
        case "half_pixel":
            return (index + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (index + 0.5) / scale - 0.5 if new > 1 else 0.0
        case "half_pixel_symmetric":
            centre = old / 2
            return centre * (1 - new / (scale * old)) + (index + 0.5) / scale - 0.5
        case "align_corners":
            return index * (old - 1) / (new - 1) if new > 1 else 0.0
        case "tf_half_pixel_for_nn":
            return (index + 0.5) / scale
    raise _refuse(f"a Resize with {where} coordinates")


def _rounded(position: float, rounding: str, length: int) -> int:
    match rounding:
        case "floor":
            index = math.floor(position)
        case "ceil":
            index = math.ceil(position)
        case "round_prefer_floor":
            index = math.ceil(position - 0.5)
        case _:
            index = math.floor(position + 0.5)
    return min(max(index, 0), length - 1)


def _torch_indices(mode: str, old: int, new: int, scale: float) -> list[int]:
    shift = 0.5 if mode == "nearest-exact" else 0.0
    return [min(math.floor((index + shift) / scale), old - 1) for index in range(new)]


# -- writing -----------------------------------------------------------------------------------------------------------


def write_resize(nodes: Sequence[Node], patch: Any) -> None:
    """Sizes, where they are an input, name every resized axis: the channel axis among them may have been cut."""
    inputs = patch.node.inputs
    if len(inputs) < 4 or inputs[3] is None:
        return
    shape = nodes[-1].outputs[0].shape
    axes = patch.node.attributes.get("axes")
    patch.set_sizes(3, [shape[axis] for axis in axes.value] if axes is not None else list(shape))
