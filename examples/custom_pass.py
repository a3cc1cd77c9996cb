"""A pass of your own in twenty lines: its fields are its options, and the runner verifies what it returns."""

from dataclasses import dataclass

import torch

import regauge


@dataclass(frozen=True)
class HalveWide(regauge.Pass):
    """Halve every Dim that is wider than a limit, keeping every other index.

    before  h = linear(x, w1: f32[64,8])   ->   after  h = linear(x, w1: f32[32,8])
    """

    above: int = regauge.option(32, "Dims up to this size stay", at_least=1)

    def call(self, graph: regauge.Graph, context: regauge.Context) -> regauge.Graph:
        wide = [group for group in graph.groups() if group.free and group.size > self.above]
        context.note(f"{len(wide)} Dims are wider than {self.above}")
        return regauge.resize(graph, {g.dim: range(0, g.size, 2) for g in wide}, by=self.name) if wide else graph


model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
graph = regauge.capture(model, (torch.randn(4, 8),))
print(regauge.optimize(graph, [HalveWide(above=16)]).report)
