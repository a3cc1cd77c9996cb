"""Pixels: moving entries between channels and space, and the column form of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Speller, Symmetry, operator, sample

# -- shuffles ----------------------------------------------------------------------------------------------------------


def _blocks(rule: str) -> Any:
    """A rule in which p and q are the two axes of a block; the channels inside stay free."""

    def apply(call: Call) -> list[Axes]:
        return call.apply(f"{rule} ; whole p q", p=call["factor"], q=call["factor"])

    return apply


def _spell_blocks(op_type: str, **attributes: str) -> Speller:
    """One ONNX node; an image without a batch axis gets one of size one, which is taken out again."""

    def spell(onnx: Any, node: Node) -> Any:
        rank = node.outputs[0].rank
        if rank not in (3, 4):
            raise onnx.refusal(f"{op_type} takes batches of images, not {rank} axes")
        x = onnx.operand(0) if rank == 4 else onnx.unsqueeze(onnx.operand(0), 0)
        y = onnx(op_type, x, blocksize=node.attributes["factor"], **attributes)
        return y if rank == 4 else onnx.squeeze(y, 0)

    return spell


@operator(
    rule=_blocks("... (c p q) h w -> ... c (h p) (w q)"),
    aten={"pixel_shuffle": lambda build, x, factor: build.pixel_shuffle(x, factor=factor)},
    samples=lambda: [sample(randn(2, 12, 3, 2), factor=2), sample(randn(18, 2, 3), factor=3)],
    symmetry=Symmetry.LAYOUT,
    layer=lambda node: f"nn.PixelShuffle({node.attributes['factor']})",
    spell=_spell_blocks("DepthToSpace", mode="CRD"),
)
def pixel_shuffle(x: torch.Tensor, *, factor: int) -> torch.Tensor:
    return F.pixel_shuffle(x, factor)


@operator(
    rule=_blocks("... c (h p) (w q) -> ... (c p q) h w"),
    aten={"pixel_unshuffle": lambda build, x, factor: build.pixel_unshuffle(x, factor=factor)},
    samples=lambda: [sample(randn(2, 3, 4, 6), factor=2), sample(randn(3, 3, 6), factor=3)],
    symmetry=Symmetry.LAYOUT,
    layer=lambda node: f"nn.PixelUnshuffle({node.attributes['factor']})",
)
def pixel_unshuffle(x: torch.Tensor, *, factor: int) -> torch.Tensor:
    return F.pixel_unshuffle(x, factor)


def _onnx_depth_to_space(build: Builder, call: Any) -> Any:
    """Mode CRD is torch's pixel shuffle; DCR keeps the channels minor."""
    name = "pixel_shuffle" if call.attribute("mode", "DCR") == "CRD" else "depth_to_space"
    return build(name, call.operand(0), factor=call.attribute("blocksize"))


@operator(
    rule=_blocks("n (p q c) h w -> n c (h p) (w q)"),
    onnx={"DepthToSpace": _onnx_depth_to_space},
    spell=_spell_blocks("DepthToSpace", mode="DCR"),
    samples=lambda: [sample(randn(2, 12, 3, 2), factor=2)],
    symmetry=Symmetry.LAYOUT,
)
def depth_to_space(x: torch.Tensor, *, factor: int) -> torch.Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, factor, factor, c // factor**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // factor**2, h * factor, w * factor)


def _onnx_space_to_depth(build: Builder, call: Any) -> Any:
    """Mode CRD (opset 28) is torch's pixel unshuffle; DCR, the only one before, keeps the channels minor."""
    name = "pixel_unshuffle" if call.attribute("mode", "DCR") == "CRD" else "space_to_depth"
    return build(name, call.operand(0), factor=call.attribute("blocksize"))


@operator(
    rule=_blocks("n c (h p) (w q) -> n (p q c) h w"),
    onnx={"SpaceToDepth": _onnx_space_to_depth},
    spell=_spell_blocks("SpaceToDepth"),
    samples=lambda: [sample(randn(2, 3, 4, 6), factor=2)],
    symmetry=Symmetry.LAYOUT,
)
def space_to_depth(x: torch.Tensor, *, factor: int) -> torch.Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // factor, factor, w // factor, factor)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * factor**2, h // factor, w // factor)


# -- columns -----------------------------------------------------------------------------------------------------------


def _im2col_rule(call: Call) -> list[Axes]:
    a, b = call["kernel_size"]
    return call.apply("... c h w -> ... (c a b) l ; window h w a b l", a=a, b=b)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _im2col(build: Builder, x: Value, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    return build.im2col(
        x, kernel_size=_pair(kernel_size), dilation=_pair(dilation), padding=_pair(padding), stride=_pair(stride)
    )


def _columns_layer(name: str, first: Sequence[str]) -> Any:
    def text(node: Node) -> str:
        given = [str(node.attributes[key]) for key in first]
        defaults = {"dilation": (1, 1), "padding": (0, 0), "stride": (1, 1)}
        given += [f"{key}={node.attributes[key]}" for key, usual in defaults.items() if node.attributes[key] != usual]
        return f"nn.{name}({', '.join(given)})"

    return text


@operator(
    rule=_im2col_rule,
    aten={"im2col": _im2col},
    samples=lambda: [
        sample(randn(2, 3, 5, 4), kernel_size=(3, 2)),
        sample(randn(2, 3, 6, 6), kernel_size=(2, 2), stride=(2, 2)),
        sample(randn(3, 5, 5), kernel_size=(3, 3), padding=(1, 1), dilation=(2, 2)),
    ],
    symmetry=Symmetry.LAYOUT,
    layer=_columns_layer("Unfold", ("kernel_size",)),
)
def im2col(
    x: torch.Tensor,
    *,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    return F.unfold(x, kernel_size, dilation, padding, stride)


def _col2im_rule(call: Call) -> list[Axes]:
    a, b = call["kernel_size"]
    return call.apply("... (c a b) l -> ... c h w ; window h w a b l", a=a, b=b)


def _col2im(
    build: Builder, x: Value, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> Any:
    return build.col2im(
        x, output_size=tuple(output_size), kernel_size=_pair(kernel_size), dilation=_pair(dilation),
        padding=_pair(padding), stride=_pair(stride),
    )  # fmt: skip


def _onnx_col2im(build: Builder, call: Any) -> Any:
    image, block = call.sizes(1), call.sizes(2)
    if image is None or block is None:
        raise OperatorError("the shapes that Col2Im takes are computed from data")
    pads = tuple(call.attribute("pads") or (0, 0, 0, 0))
    if len(image) != 2 or pads[:2] != pads[2:]:
        raise OperatorError("Col2Im has a rule for two-dimensional images with symmetric padding only")
    return build.col2im(
        call.operand(0), output_size=tuple(image), kernel_size=tuple(int(s) for s in block), padding=pads[:2],
        dilation=tuple(call.attribute("dilations") or (1, 1)), stride=tuple(call.attribute("strides") or (1, 1)),
    )  # fmt: skip


@operator(
    rule=_col2im_rule,
    aten={"col2im": _col2im},
    onnx={"Col2Im": _onnx_col2im},
    samples=lambda: [
        sample(randn(2, 18, 9), output_size=(5, 4), kernel_size=(3, 2)),
        sample(randn(12, 9), output_size=(6, 6), kernel_size=(2, 2), stride=(2, 2)),
    ],
    symmetry=Symmetry.LAYOUT,
    layer=_columns_layer("Fold", ("output_size", "kernel_size")),
)
def col2im(
    x: torch.Tensor,
    *,
    output_size: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    return F.fold(x, output_size, kernel_size, dilation, padding, stride)
