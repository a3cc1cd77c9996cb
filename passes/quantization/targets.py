"""What runtimes want of a quantized graph. Each rule is measured; another runtime is another value here.

ort-x86, onnxruntime on x86 processors:
- activations are unsigned with a zero point, weights signed and symmetric per output channel: what VNNI multiplies.
  Signed activations stay in float where several nodes read them.
- a linear layer is a Gemm of two axes with a bias of 32-bit integers and a float result: a MatMul whose result is
  added to a bias becomes a float Gemm before its integers are seen, unless sizes in front are dynamic. Its weight needs
  a zero point, of 0, to be seen as integers.
- a convolution has integers on both sides, and an activation behind it, and sums of its kind with them; a depthwise
  one alone is slower than in float; between integers its weights would be rounded with one scale for all channels.
- constant integers in front of a float layer are not folded: plain weights of 8 bits make it slower. In blocks, along
  the inputs of a MatMul, they are read by a kernel of their own (opset 21). What Cast, Sub and Mul make of constants is
  computed when the file is loaded, in branches too: so spelled they cost no time, and the file is as small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.passes.quantization.grid import Grid


@dataclass(frozen=True)
class Target:
    """How a runtime takes quantized layers."""

    name: str
    activations: Grid
    weights: Grid
    flat: bool  # linear layers as products of matrices with an integer bias, if sizes are known
    chains: bool  # convolutions give integers, too
    depthwise: bool  # convolutions of one channel each are worth it, even alone
    zeros: bool  # symmetric weights have zero points, too
    blocks_alone: bool  # weights alone are worth it in blocks of 16 or more, a power of two, [inputs, outputs]
    folds: bool = field(default=True, kw_only=True)  # what computes in float reads weights converted at load


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-x86",
            activations=Grid(8, symmetric=False),
            weights=Grid(8),
            flat=True,
            chains=True,
            depthwise=False,
            zeros=True,
            blocks_alone=True,
        ),
        Target(
            name="reference",
            activations=Grid(8, symmetric=False),
            weights=Grid(8),
            flat=False,
            chains=False,
            depthwise=True,
            zeros=False,
            blocks_alone=False,
            folds=False,
        ),
    )
}
