"""``equalize``: channels scaled so that weights on both sides of them are as great; the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.gauge.frames import find_frames
from regauge.ir.gauge.insertion import scaled
from regauge.ir.graph import Graph
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.options import option
from regauge.passes.quantization.absorption import absorb
from regauge.passes.quantization.clips import channel_scales, closed, opened
from regauge.passes.quantization.equalization import balances, equalizing
from regauge.passes.quantization.preparation import prepared

NO_SCALE = "a Dim of several weights takes no scale, by what reads it"


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Scale channels so that what writes and what reads them has the same range: fewer bits lose less then.

    before  h = relu(x w1' + b)         y = h w2'
    after   h = relu(x (w1 / s)' + b/s) y = h (w2 s)'       s_i = sqrt(max|w1_i| / max|w2_i|)

    Norms are folded into layers first. Every Dim takes part that lies between weights and lets scales through. It helps
    where a weight has one scale, or activations do; where each row has its own, as ``quantize`` has it, less.
    """

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    absorb: bool = option(False, "shifts in front of ReLUs that are nearly always passed go into the layers behind")
    clips: Literal["keep", "bound", "relu"] = option(
        "bound", "ReLU6 and its kind end a scale, become a ReLU and a bound for each channel, or a ReLU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.absorb or self.clips == "relu":  # another function, though hardly
            object.__setattr__(self, "contract", "approximate")

    def call(self, graph: Graph, context: Context) -> Graph:
        start = graph
        if self.absorb:
            start = graph.copy()
            batches = None if context.data is None else calibration_batches(graph, context)
            count = absorb(start, batches, context.left, by=self.name)
            context.note(f"{count} values without a high shift")
        start, bounds = opened(prepared(start)) if self.clips != "keep" else (prepared(start), {})
        frames = find_frames(start)
        between = balances(start, frames)
        if not between:
            context.note("nothing to scale")
            return start if self.absorb or (self.clips == "relu" and bounds) else graph
        taken = {balance.frame.dim for balance in between}
        others = [g for g in start.groups() if g.free and g.dim not in taken]
        context.left[NO_SCALE] += sum(len({m.parameter for m in g.members if m.parameter.rank > 1}) > 1 for g in others)
        scales, rounds = equalizing(between)
        result = scaled(start, scales, by=self.name)
        if self.clips == "bound":
            closed(result, bounds, channel_scales(start, bounds, scales), by=self.name)
        context.note(f"{len(scales)} Dims equalized in {rounds} rounds")
        return result
