"""What a kernel of a region takes of a device: whoever writes kernels says it, and planning counts it.

A roofline knows bytes and arithmetic. That a program spills registers, or takes so many of them that a processor holds
too few programs to keep its memory busy, is known only where kernels are cut into programs, which planning is given as
a function (:data:`Footprints`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.region import Region


@dataclass(frozen=True)
class Footprint:
    """What the kernel of a region takes, for given sizes.

    It is started in so many ``launches``. A thread of it has ``registers``, and bytes of ``spilled`` ones, and a
    program has ``shared`` bytes of memory. A processor holds ``resident`` programs at a time, which reach a share
    (``reached``) of the bandwidth, or where products are computed of the arithmetic.
    """

    launches: int = 1
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    resident: int = 1
    reached: float = 1.0

    def too_much(self) -> str:
        """Why it is no kernel whatever it saves; nothing where it may be one."""
        return f"its kernel would spill {self.spilled} bytes of registers of each thread" if self.spilled else ""

    def slow(self) -> str:
        """Why a kernel takes longer than others that move more bytes."""
        few = f"a processor holds {self.resident} of its programs at a time"
        return f"it would take longer: {few}, which reach {self.reached:.0%} of its speed"


Footprints: TypeAlias = Callable[[Region, Mapping[Dim, int]], Footprint | None]
"""``footprints(region, sizes)`` for the sizes of the loops; None where nothing is known of a kernel of the region.

Raises FusionError where the region can be no kernel for such sizes.
"""
