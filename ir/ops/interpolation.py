"""Resampling: interpolation to another size, and sampling at positions that a grid gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, rand, randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Adapter, OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.onnx_resize import read_resize, read_upsample, write_resize
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import symbols_in

_WITH_CORNERS = {"linear", "bilinear", "bicubic", "trilinear"}


# -- interpolate -------------------------------------------------------------------------------------------------------


def _upsample_vec(mode: str, antialias: bool = False) -> Adapter:
    """The overload that gives either the size or the scale factors; linear modes say ``align_corners`` in between."""

    def adapter(build: Any, x: Any, size: Any, *rest: Any) -> Any:
        scale = rest[-1] if rest else None
        corners = rest[0] if mode in _WITH_CORNERS else None
        if size is not None:
            return build.interpolate(x, size=size, mode=mode, align_corners=corners, antialias=antialias)
        return build.interpolate(x, scale=scale, mode=mode, align_corners=corners, antialias=antialias)

    return adapter


def _upsample(mode: str, antialias: bool = False) -> Adapter:
    """The overload that gives the size, and optionally the scales it came from, which then place the samples."""

    def adapter(build: Any, x: Any, size: Any, *rest: Any, **named: Any) -> Any:
        corners = rest[0] if mode in _WITH_CORNERS else None
        scales = rest[1:] if mode in _WITH_CORNERS else rest
        given = [s for s in (*scales, *named.values()) if s is not None]
        options = {"mode": mode, "align_corners": corners, "antialias": antialias}
        if not given or corners:
            return build.interpolate(x, size=size, **options)
        if len(given) != len(size) or any(
            isinstance(n, int) and isinstance(old, int) and math.floor(old * s) != n
            for n, old, s in zip(size, x.shape[2:], given, strict=True)
        ):
            raise OperatorError("an upsampling with scales that do not give its size: the node is kept as it is")
        return build.interpolate(x, scale=given, **options)

    return adapter


def _names() -> dict[str, Adapter]:
    modes = {
        "upsample_linear1d": "linear",
        "upsample_bilinear2d": "bilinear",
        "upsample_bicubic2d": "bicubic",
        "upsample_trilinear3d": "trilinear",
        **{f"upsample_nearest{n}d": "nearest" for n in (1, 2, 3)},
        **{f"_upsample_nearest_exact{n}d": "nearest-exact" for n in (1, 2, 3)},
    }
    found = {name: _upsample(mode) for name, mode in modes.items()}
    found |= {f"{name}.vec": _upsample_vec(mode) for name, mode in modes.items()}
    for mode in ("bilinear", "bicubic"):
        found[f"_upsample_{mode}2d_aa"] = _upsample(mode, antialias=True)
        found[f"_upsample_{mode}2d_aa.vec"] = _upsample_vec(mode, antialias=True)
    return found


def _interpolate_layer(node: Node) -> str | None:
    given = node.attributes
    if given["antialias"] or not all(isinstance(size, int) for size in given["size"] or ()):
        return None
    target = f"size={given['size']}" if given["size"] is not None else f"scale_factor={given['scale']}"
    corners = "" if given["align_corners"] is None else f", align_corners={given['align_corners']}"
    return f"nn.Upsample({target}, mode={given['mode']!r}{corners})"


_ONNX_MODES = {
    "nearest": "nearest", "nearest-exact": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear",
    "bicubic": "cubic",
}  # fmt: skip


def _spell(onnx: Any, node: Node) -> Any:
    """Resize to sizes or by factors, with torch's coordinates."""
    given, x = node.attributes, node.inputs[0]
    mode = _ONNX_MODES.get(given["mode"])
    if given["antialias"]:
        raise onnx.refusal("runtimes smooth before they shrink unlike torch")
    if mode is None or not isinstance(x, Value) or onnx.opset < 11:
        raise onnx.refusal(f"Resize of opset {onnx.opset} has no mode {given['mode']}")
    options: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "pytorch_half_pixel"}
    if mode == "nearest":
        exact = given["mode"] == "nearest-exact"
        options["coordinate_transformation_mode"] = "half_pixel" if exact else "asymmetric"
        options["nearest_mode"] = "round_prefer_ceil" if exact else "floor"
    elif given["align_corners"]:
        options["coordinate_transformation_mode"] = "align_corners"
    if mode == "cubic":
        options["cubic_coeff_a"] = -0.75
    absent = None if onnx.opset >= 13 else onnx.constant([], torch.float32)
    if given["size"] is None:
        factors = onnx.constant([1.0, 1.0, *given["scale"]], torch.float32)
        return onnx.Resize(onnx.operand(0), absent, factors, **options)
    return onnx.Resize(onnx.operand(0), absent, absent, onnx.sizes([*x.shape[:2], *given["size"]]), **options)


_RANKS = {
    "nearest": (3, 4, 5), "nearest-exact": (3, 4, 5), "area": (3, 4, 5), "linear": (3,), "bilinear": (4,),
    "bicubic": (4,), "trilinear": (5,),
}  # fmt: skip


def _interpolate_shape(x: Value, *, size: Any = None, scale: Any = None, mode: str = "nearest", **options: Any) -> Any:
    """The shape where it is given in numbers, or by factors of which every size has a whole multiple."""
    if x.rank not in _RANKS.get(mode, ()) or options.get("antialias") or symbols_in([x.shape, size or ()]):
        return None
    if options.get("align_corners") is not None and mode in ("nearest", "nearest-exact", "area"):
        return None
    target = size if size is not None else [n * factor for n, factor in zip(x.shape[2:], scale, strict=True)]
    if len(target) != x.rank - 2 or any(n != int(n) or n < 1 for n in (*x.shape, *target)):
        return None
    return (*x.shape[:2], *map(int, target))


@operator(
    rule="n c s... -> n c t... ; window s t",
    shape=_interpolate_shape,
    aten=_names(),
    onnx={
        "Resize": OnnxForm(read=read_resize, write=write_resize, stores_shape=True),
        "Upsample": OnnxForm(read=read_upsample, write=write_resize),
    },
    spell=_spell,
    samples=lambda: [
        sample(randn(2, 3, 4, 5), scale=(2.0, 2.0)),
        sample(randn(2, 3, 4), size=(7,), mode="linear", align_corners=True),
        sample(randn(2, 3, 4, 5), size=(3, 9), mode="bilinear", align_corners=False),
        sample(randn(2, 3, 6, 6), scale=(1.5, 0.5), mode="bicubic", align_corners=False),
        sample(randn(2, 3, 8, 8), size=(3, 3), mode="bicubic", align_corners=False, antialias=True),
        sample(randn(2, 3, 4, 4), size=(5, 6), mode="nearest-exact"),
        sample(randn(2, 3, 4, 4), size=(2, 2), mode="area"),
        sample(randn(2, 2, 3, 3, 3), scale=(2.0, 1.0, 2.0), mode="trilinear", align_corners=False),
    ],
    symmetry=Symmetry.LINEAR,
    layer=_interpolate_layer,
)
def interpolate(
    x: Tensor,
    *,
    size: tuple[int, ...] | None = None,
    scale: tuple[float, ...] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    return F.interpolate(x, size=size, scale_factor=scale, mode=mode, align_corners=align_corners, antialias=antialias)


# -- sampling at positions ---------------------------------------------------------------------------------------------

_MODES = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")


def _grid_sampler(build: Any, x: Any, grid: Any, mode: int, padding: int, align_corners: bool) -> Any:
    return build.grid_sample(x, grid, mode=_MODES[mode], padding_mode=_PADDINGS[padding], align_corners=align_corners)


def _onnx_grid_sample(build: Any, call: Any) -> Any:
    """Opset 20 renamed the modes."""
    mode = call.attribute("mode", "bilinear")
    return build.grid_sample(
        call.operand(0),
        call.operand(1),
        mode={"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode),
        padding_mode=call.attribute("padding_mode", "zeros"),
        align_corners=bool(call.attribute("align_corners", 0)),
    )


@operator(
    rule="n c s..., n t... d -> n c t... ; indexed s ; whole d",
    aten=dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _grid_sampler),
    onnx={"GridSample": _onnx_grid_sample},
    samples=lambda: [
        sample(randn(2, 3, 5, 4), rand(2, 3, 2, 2) * 2 - 1, align_corners=True),
        sample(randn(2, 3, 5, 4), rand(2, 3, 3, 2) * 3 - 1.5, mode="nearest", padding_mode="border"),
        sample(randn(2, 2, 3, 3, 3), rand(2, 2, 3, 2, 3) * 2 - 1),
    ],
    zeroed_by=(),
    scaling=Scaling(powers={"x": 1}),
)
def grid_sample(
    x: Tensor, grid: Tensor, *, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = False
) -> Tensor:
    return F.grid_sample(x, grid, mode, padding_mode, align_corners)


def _affine_rule(call: Call) -> list[Axes]:
    """One grid per transformation; of ``size`` only the batch axis follows the operand."""
    batch, *matrix = call.operand(0)
    made = [call.fresh(size) for size in call.node.outputs[0].shape[1:]]
    for extent in (*matrix, *made):
        call.role("whole", extent)
    call.derive(size=(batch, *call["size"][1:]))
    return [[batch, *made]]


def _onnx_affine_grid(build: Any, call: Any) -> Any:
    size = call.sizes(1)
    if size is None:
        raise OperatorError("the size of AffineGrid is computed when it runs: the node is kept as it is")
    return build.affine_grid(call.operand(0), size=size, align_corners=bool(call.attribute("align_corners", 0)))


def _write_affine_grid(nodes: Sequence[Node], patch: Any) -> None:
    patch.set_sizes(1, nodes[0].attributes["size"])


@operator(
    rule=_affine_rule,
    aten={"affine_grid_generator": lambda build, theta, size, align_corners: build.affine_grid(
        theta, size=size, align_corners=align_corners
    )},
    onnx={"AffineGrid": OnnxForm(read=_onnx_affine_grid, write=_write_affine_grid)},
    samples=lambda: [
        sample(randn(2, 2, 3), size=(2, 3, 4, 5), align_corners=False),
        sample(randn(2, 3, 4), size=(2, 1, 3, 4, 2), align_corners=True),
    ],
)  # fmt: skip
def affine_grid(theta: Tensor, *, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
    return F.affine_grid(theta, size, align_corners)  # type: ignore[arg-type]
