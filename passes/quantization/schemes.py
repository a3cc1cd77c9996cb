"""Schemes of quantization: how weights are stored, and whether layers multiply integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """``bits`` of weights; ``activations``: whether what layers read is quantized, too, to 8 bits."""

    bits: int
    activations: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "w8a8": Scheme(8, activations=True),
    "w8": Scheme(8),
    "w4": Scheme(4),
    "w3": Scheme(3),
    "w2": Scheme(2),
}
