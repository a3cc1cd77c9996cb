"""Whether a quantized graph is faster than the one it was made of, measured in the runtime that it is written for."""

from __future__ import annotations

import platform
import warnings
from typing import Any, Literal, TypeAlias

from regauge.ir.errors import PassError, RegaugeWarning
from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.quantization.targets import Target

Gate: TypeAlias = Literal["off", "warn", "error"]

_SURE = 3  # standard errors of the difference of two medians


def check_latency(before: Graph, after: Graph, target: Target, inputs: Any, context: Context, gate: Gate) -> None:
    """Time both graphs in turns on ``inputs``, made-up ones if None, and note both times.

    Where the quantized graph is slower, by more than the noise of the measurement, this warns, or raises PassError with
    ``gate="error"``. On another machine than the target's nothing is measured, and the note says so.
    """
    if gate == "off":
        return
    if platform.machine() not in target.machines or context.measure is None:
        context.note(f"times were not measured: {target.name} does not run on this machine")
        return
    old, new = context.measure([before, after], inputs)
    text = f"{new.milliseconds:.3g} ms for {old.milliseconds:.3g} ms in {new.runtime}, one thread"
    context.note(text)
    if new.milliseconds / old.milliseconds - 1 > _SURE * (old.noise**2 + new.noise**2) ** 0.5:
        reason = f"quantize: {text}: slower than in float"
        if gate == "error":
            raise PassError(f"{reason}; leave layers out (exclude=...), or say gate=warn to have it nevertheless")
        warnings.warn(reason, RegaugeWarning, stacklevel=2)
