"""Schemes of quantization: how weights are stored, and whether layers multiply integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """``bits`` of weights, None where each layer's are chosen; ``activations``: what layers read is of 8 bits, too."""

    bits: int | None
    activations: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "w8a8": Scheme(8, activations=True),
    "w8": Scheme(8),
    "w4": Scheme(4),
    "w3": Scheme(3),
    "w2": Scheme(2),
    "mixed": Scheme(None),
}
