"""How far a target is reached after a share of the steps: functions from 0..1 to 0..1."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Decay: TypeAlias = Literal["linear", "exponential"]

_LAST = 0.01  # what an exponential decay has come down to when it ends


def cubic(time: float) -> float:
    """The share of the final sparsity at a share of the schedule: fast at first, when much is redundant.

    s_t = s_f + (s_0 - s_f) (1 - t)^3 with s_0 = 0, as a share of s_f (Zhu and Gupta 2017, To prune, or not to prune,
    eq. 1).
    """
    left = 1 - min(max(time, 0.0), 1.0)
    return 1 - left**3


def decayed(time: float, kind: Decay) -> float:
    """A factor that falls from 1 to 0 over a schedule: 1 - t, or 0.01^t with a last step to 0."""
    if time >= 1:
        return 0.0
    return 1 - max(time, 0.0) if kind == "linear" else math.pow(_LAST, max(time, 0.0))
