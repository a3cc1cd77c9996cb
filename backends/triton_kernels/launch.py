"""How kernels are started: how many programs, with which constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regauge.backends.triton_kernels.source import Rounding

REGISTERS, MOST_REGISTERS = 65536, 255
"""Registers of a multiprocessor, and those that a thread has at most."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: how many programs, with which constants, in how many warps.

    ``stages`` is how many steps of a loop are in flight at a time; ``parts`` how many programs share what one of
    ``programs`` would compute, and ``partials`` how many numbers they leave for a second kernel; ``kept`` is how many
    each leaves of a sum over rows.
    """

    programs: int
    constants: Mapping[str, int]
    warps: int
    stages: int = 2
    parts: int = 1
    partials: int = 0
    kept: int = 0

    @property
    def grids(self) -> tuple[tuple[int, ...], ...]:
        """The programs of each kernel."""
        return ((self.programs, self.parts), (self.programs,)) if self.partials else ((self.programs,),)

    def options(self, rounding: Rounding) -> dict[str, Any]:
        """What Triton is told; where each node is rounded no product may be fused with a sum."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": rounding == "fused"}


def power_above(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def is_at_least(architecture: str, number: int) -> bool:
    """Whether an architecture, such as ``sm_90``, is known, and no older than one of this number."""
    version = architecture.removeprefix("sm_")
    return version.isdecimal() and int(version) >= number
