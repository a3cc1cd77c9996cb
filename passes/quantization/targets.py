"""What runtimes want of a quantized graph. Each rule is measured; another runtime is another value here.

ort-x86, onnxruntime on x86 processors:
- activations are unsigned with a zero point, weights signed and symmetric per output channel: what VNNI multiplies.
  Signed activations stay in float where several nodes read them.
- a linear layer is a Gemm of two axes with a bias of 32-bit integers and a float result: a MatMul whose result is
  added to a bias becomes a float Gemm before its integers are seen, unless sizes in front are dynamic. Its weight needs
  a zero point, of 0, to be seen as integers.
- a convolution has integers on both sides, and an activation behind it, and sums of its kind with them; depthwise ones
  are slower than in float.
- constant integers in front of a float layer are not folded: plain weights of 8 bits make it slower. In blocks, along
  the inputs of a MatMul, they are read by a kernel of their own (opset 21).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from regauge.passes.quantization.grid import Grid


@dataclass(frozen=True)
class Target:
    """How a runtime takes quantized layers."""

    name: str
    activations: Grid
    weights: Grid
    flat: bool  # linear layers as products of matrices with an integer bias, if sizes are known
    chains: bool  # convolutions give integers, too
    depthwise: bool  # convolutions of one channel each are worth it
    zeros: bool  # symmetric weights have zero points, too
    blocks_alone: bool  # weights alone are worth it in blocks of 16 or more, a power of two, [inputs, outputs]
    kinds: tuple[str, ...] = ("integers",)  # formats that its kernels read; others it would convert at every run


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
            kinds=("integers", "float8", "powers of two", "codebooks", "signs", "stacks"),
        ),
    )
}
