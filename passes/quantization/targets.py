"""What runtimes want of a quantized graph; another runtime is another value here. Rules of x86 are measured, those of
ARM and TensorRT are taken from their sources and manuals: neither runs here.

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
- the kernel that reads blocks is not taken where an activation follows its
  bias: all three become one float Gemm, if the bias is added; it is subtracted with its sign turned there. Nor where a
  ReLU follows at once, as that would belong to a product of integers: it is a leaky one there, which leaks nothing.
  Nor where another matrix is added at once, which is taken for a bias: a vector of zeros is subtracted in between.
- a ReLU or Clip right behind a product of integers is taken for the range of integers made of it: where none are made,
  the product is one of floats. Such a ReLU is a leaky one, and zeros are subtracted in front of such a Clip.
- that kernel rounds what it multiplies by its weights to 8 bits too, in blocks, as it runs: 41 dB on normal numbers, as
  good as nothing beside weights of 4 bits and most of the error beside those of 8. A session may forbid it.
- by ranges that are found when it runs, of whole activations, products of matrices are as fast as by ranges of data
  (DynamicQuantizeMatMul), if no bias is seen as part of one; convolutions are 5 to 25 times slower than in float.

ort-x86-avx2, the same on processors without VNNI:
- products of unsigned and signed bytes are added up in pairs of 16 bits, which clip at 2^15 - 1 = 32767 (vpmaddubsw):
  2 * 255 * 127 does not fit, 2 * 255 * 64 does. Weights have 7 bits, which a byte holds.

ort-arm, onnxruntime on 64-bit ARM processors:
- UDOT and UMMLA multiply unsigned bytes and add into 32 bits, without clipping: signed weights are turned unsigned when
  they are packed. Signed activations, with SDOT, are as fast, but a zero point other than the lowest code keeps a clamp
  from the kernel in front: unsigned ones are taken here as well.
- with symmetric weights for each channel, convolutions have kernels of their own that do not copy their input, and so
  have those of one channel each.

tensorrt, NVIDIA TensorRT with explicit quantization:
- activations and weights are signed and have no zero point; one scale for an activation, one for each output of a
  weight. Biases stay in float.
- what layers read is quantized, what they give is not, and nothing stands between a convolution, its norm and its
  clamp: Q moves up and DQ down to where they meet a layer.
- a sum behind a convolution becomes part of it where the other addend is quantized, too.
- Q moves up past what only moves entries, and past joins: all that one of them holds has one scale.
- norms and softmax stay in float. Weights alone have 4 bits, in blocks along the inputs of a product of matrices.

torch-cpu, emitted modules on x86 processors (torch 2.13; the layers are those of backends/torch_module/quantized.py):
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
- torch._scaled_mm multiplies floats of 8 bits from sm_89 on, inputs and outputs in multiples of 16; generated kernels
  do from sm_90 on, and read them as bytes before. There are no convolutions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

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
    kinds: tuple[str, ...] = ("integers",)  # formats that its kernels read; others it would convert at every run
    integer_bias: bool = True  # biases are integers in steps of the product
    addends: bool = False  # what is added to a convolution's result is quantized, too
    aligned: bool = False  # of values that hold entries of one another, all have one scale
    centred: bool = False  # weights have no zero points, whatever their bits
    block: int = 32  # inputs that share a scale, where weights alone are stored in blocks
    apart: bool = False  # behind weights alone a bias in front of an activation, and a ReLU, must not be seen as such
    bits_alone: int = 8  # greatest number of bits of weights alone
    machines: tuple[str, ...] = ()  # processors that it runs on, as ``platform.machine`` calls them
    windows: bool = False  # convolutions are products of their windows: of two axes, in one group, without gaps
    at_run: Literal["rows", "whole"] | None = None  # what may be rounded by its own range, found when it runs
    multiple: int = 1  # inputs and outputs of a product of integers are multiples of this
    multiple_of_floats: int = 1  # and those of a product of floats of 8 bits
    folds: bool = False  # what computes in float reads weights converted at load
    of_blocks: str = ""  # what its kernels of weights in blocks do that the graph does not say


_ORT_X86 = Target(
    name="ort-x86",
    activations=Grid(8, symmetric=False),
    weights=Grid(8),
    flat=True,
    chains=True,
    depthwise=False,
    zeros=True,
    blocks_alone=True,
    at_run="whole",
    apart=True,
    machines=("x86_64", "AMD64"),
    folds=True,
    of_blocks="onnxruntime rounds what meets blocks to 8 bits as it runs, unless a session sets "
    "session.qdq_matmulnbits_accuracy_level to 0",
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _ORT_X86,
        replace(_ORT_X86, name="ort-x86-avx2", weights=Grid(7)),
        replace(_ORT_X86, name="ort-arm", depthwise=True, machines=("aarch64", "arm64", "ARM64")),
        Target(
            name="tensorrt",
            activations=Grid(8),
            weights=Grid(8),
            flat=False,
            chains=False,
            depthwise=True,
            zeros=False,
            blocks_alone=True,
            integer_bias=False,
            addends=True,
            aligned=True,
            centred=True,
            block=128,
            bits_alone=4,
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
            at_run="rows",
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
            at_run="rows",
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
            at_run="rows",
            multiple=8,
            kinds=("integers", "float8"),
            multiple_of_floats=16,
        ),
    )
}
