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

torch-cpu, emitted modules on x86 processors (torch 2.13; the layers are those of backends/torch_quantized.py):
- weights are signed and symmetric per output channel: torch._int_mm multiplies them with signed codes, exactly, and a
  zero point of the activations costs one addition. It is as fast as oneDNN's qlinear_pointwise for wide layers and
  twice as fast for small ones; that takes a thousand times as long for signed activations.
- a convolution is such a product of its windows. There are no grouped ones, and none of other than two axes.
- codes are not handed on from layer to layer: each rounds what it reads.
- weights alone are worth it in bfloat16, where kernels read 4 bits in groups of 32, 64, 128 or 256 inputs, and 8 bits
  with a scale for each output; with activations in single precision these kernels are 5 to 100 times slower, so the
  layers cast. Convolutions have none: they compute in float, on weights that are unpacked at every call.
- products of float8 are 2 to 50 times slower than those in float.

torch-cuda, emitted modules on NVIDIA GPUs, where nothing was measured yet:
- torch._int_mm takes more than 16 rows, and inputs and outputs in multiples of 8; layers of other sizes stay in float.
- a zero point would have to be subtracted from every product all the same: activations are symmetric.
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
    windows: bool = False  # convolutions are products of their windows: of two axes, in one group, without gaps
    rows: bool = False  # each row may be rounded by its own range, found when it runs
    multiple: int = 1  # inputs and outputs of a product of integers are multiples of this


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
            rows=True,
        ),
        Target(
            name="torch-cpu",
            activations=Grid(8, symmetric=False),
            weights=Grid(8),
            flat=False,
            chains=False,
            depthwise=False,
            zeros=False,
            blocks_alone=False,
            windows=True,
            rows=True,
        ),
        Target(
            name="torch-cuda",
            activations=Grid(8),
            weights=Grid(8),
            flat=False,
            chains=False,
            depthwise=False,
            zeros=False,
            blocks_alone=False,
            windows=True,
            rows=True,
            multiple=8,
        ),
    )
}
