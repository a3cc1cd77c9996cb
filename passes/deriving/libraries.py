"""What share of a device's figures libraries reach with what is no product of matrices.

The shares are of float32 on one core with AVX-512, as ratios to products of as many MACs (docs/benchmarks.md has
measurements of what is chosen by them); they are rough, and ``derive{gain=...}`` says how much has to be in it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regauge.ir.errors import PassError


@dataclass(frozen=True)
class Library:
    """Shares, 1 where an operator is as fast as the roofline of the device has it.

    ``volume`` of convolutions over three axes, ``spread`` of transposed ones, ``grouped`` of those with groups of
    several channels, ``permuted`` of the bandwidth in a permute of single entries. ``pixels``: how many neighbouring
    entries of the last axis a convolution computes at a time; ``colours``: up to how many input channels it takes as
    they are, more being filled up to a block; ``spread_by_columns``, that a transposed one is computed as a product, in
    which few channels fill no block. ``starts``: how often the device's overhead it takes to start a node.
    """

    name: str = "roofline"
    volume: float = 1.0
    spread: float = 1.0
    grouped: float = 1.0
    permuted: float = 1.0
    pixels: int = 1
    colours: int = sys.maxsize
    spread_by_columns: bool = False
    starts: float = 1.0


LIBRARIES: Mapping[str, Library] = {
    "onnxruntime": Library(
        "onnxruntime", volume=0.65, grouped=0.85, permuted=0.3, pixels=4, colours=4, spread_by_columns=True
    ),
    "torch": Library("torch", volume=0.55, spread=0.6, grouped=0.6, pixels=4, colours=4, starts=3.0),
    "roofline": Library(),
}


def libraries_of(name: str, device: str | Mapping[str, float]) -> Sequence[Library]:
    """A library by name; of ``any`` both that run on a CPU, and on a GPU, of which none was measured, the roofline."""
    if name == "any":
        return (LIBRARIES["roofline"],) if device == "gpu" else (LIBRARIES["onnxruntime"], LIBRARIES["torch"])
    if name not in LIBRARIES:
        raise PassError(f"library={name} is unknown: say {', '.join(LIBRARIES)} or any")
    return (LIBRARIES[name],)
