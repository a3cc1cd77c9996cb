"""``flatten``: channels that are far greater than others cut into several; the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from regauge.ir.graph import Graph
from regauge.passes.base import Context, Contract, Need, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.options import option
from regauge.passes.quantization.preparation import prepared
from regauge.passes.quantization.smoothing import Readers
from regauge.passes.quantization.smoothing_moves import linear_misfit, readers_of
from regauge.passes.quantization.splitting import parts_of, split, threshold_of

_WORTH_IT = 1.5  # how much nearer to each other the greatest magnitudes have to come


@dataclass(frozen=True, kw_only=True)
class Flatten(Pass):
    """Cut what layers read into channels within a threshold, so that one scale for all of them can be small.

    before  y = x w'                                               |x_3| up to 10, the others up to 4
    after   y = [x_1, x_2, clamp(x_3, -5, 5), the rest of x_3] w'  the column w_3 stands there twice

    Layers multiply more columns in return, by ``most`` at the most, and six nodes cut the value. What lies beyond the
    data is in the last part of its channel, so that the function stays. ``smooth`` before it leaves less to cut.
    """

    name: ClassVar[str] = "flatten"
    contract: ClassVar[Contract] = "exact"
    needs: ClassVar[frozenset[Need]] = frozenset({"data"})

    most: float = option(1.25, "how many times as many channels a value may have", above=1)
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def call(self, graph: Graph, context: Context) -> Graph:
        result = prepared(graph).copy()
        layers = chosen_layers(result, self.include, self.exclude, context.left, linear_misfit)
        count, before, after = 0, 0, 0
        for readers in readers_of(result, layers, calibration_batches(result, context)):
            reach = _reach(readers)
            parts = parts_of(reach, threshold := threshold_of(reach, self.most))
            if float(reach.max()) < _WORTH_IT * threshold:
                context.left["no channel of what it reads is far greater than others"] += len(readers.layers)
                continue
            split(result, readers.value, readers.layers, parts, by=self.name)
            count, before, after = count + 1, before + len(reach), after + len(parts.channel)
        if not count:
            return graph
        context.note(f"{count} values cut: {before} channels are {after}")
        return result


def _reach(readers: Readers) -> torch.Tensor:
    return torch.maximum(-readers.range.lowest, readers.range.highest)
