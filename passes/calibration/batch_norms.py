"""Batch norms in inference as what they then are, a gain and a shift for each channel; the way back through them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from regauge.ir.graph import Node, Parameter

_USABLE = 1e-2  # gains smaller than this share of their mean are not divided by


def is_fixed(node: Node) -> bool:
    """Whether a node is a batch norm in inference whose statistics the graph holds."""
    if node.op != "batch_norm" or node.attributes.get("training") or len(node.inputs) < 5:
        return False
    held = all(isinstance(operand, Parameter) for operand in node.inputs[3:5])
    return held and all(operand is None or isinstance(operand, Parameter) for operand in node.inputs[1:3])


def gain_of(norm: Node) -> torch.Tensor:
    """What a batch norm in inference multiplies each channel by, gamma / sqrt(var + eps); [channels] in double."""
    gain, variance = norm.inputs[1], norm.inputs[4]
    assert isinstance(variance, Parameter)
    scale = (variance.tensor.detach().double() + float(norm.attributes["eps"])).rsqrt()
    return scale * gain.tensor.detach().double() if isinstance(gain, Parameter) else scale


def shift_of(norm: Node) -> torch.Tensor:
    """What a batch norm in inference then adds to each channel, beta - gain mean; [channels] in double."""
    bias, mean = norm.inputs[2], norm.inputs[3]
    assert isinstance(mean, Parameter)
    shift = -gain_of(norm) * mean.tensor.detach().double()
    return shift + bias.tensor.detach().double() if isinstance(bias, Parameter) else shift


def before_norm(norm: Node, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What the input of a batch norm should have more for its output to have these more, [examples, channels, ...]."""
    gain = gain_of(norm)
    return (divided_by(part, gain.reshape([1, -1] + [1] * (part.dim() - 2))) for part in parts)


def divided_by(part: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The part over the gain; 0 where the gain is too small to go back through."""
    gain = gain.to(part.dtype)
    usable = gain.abs() > _USABLE * gain.abs().mean()
    return torch.where(usable, part / torch.where(usable, gain, 1.0), 0.0)
