"""A pass that looks at data: it measures how large the activations of each channel are, and cuts the quiet ones."""

from dataclasses import dataclass

import torch
from torch import nn

import regauge


@dataclass(frozen=True)
class DropQuiet(regauge.Pass):
    """Remove the channels whose activations are smallest on average over calibration batches.

    before  h = relu(conv(x, w1: f32[32,3,3,3]))   ->   after  h = relu(conv(x, w1: f32[16,3,3,3]))
    """

    needs = frozenset({"data"})  # optimize(graph, passes, data=...) must be given batches
    ratio: float = regauge.option(0.5, "share of the channels that goes", at_least=0, below=1)

    def call(self, graph: regauge.Graph, context: regauge.Context) -> regauge.Graph:
        free = {group.dim for group in graph.groups() if group.free}
        size = {}  # of the activations, by Dim: one number per index

        def measure(node, results):
            if node.op != "relu":
                return
            for axis, dims in enumerate(graph.dims(node.output)):
                if len(dims) == 1 and dims[0] in free:  # not a product or a concatenation of several Dims
                    others = [other for other in range(results[0].dim()) if other != axis]
                    size[dims[0]] = size.get(dims[0], 0) + results[0].abs().mean(others)

        for inputs in context.inputs(graph):  # of a DataLoader's batches without the labels
            graph.run(inputs, hook=measure)
        context.note(f"{len(size)} Dims were measured")
        keep = {dim: mean.topk(len(mean) - int(self.ratio * len(mean))).indices.tolist() for dim, mean in size.items()}
        return regauge.resize(graph, keep, by=self.name) if keep else graph


model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
).eval()  # fmt: skip
graph = regauge.capture(model, (torch.randn(2, 3, 16, 16),), dynamic={0: {0: "batch"}})
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]
small = regauge.optimize(graph, [DropQuiet(ratio=0.5)], data=batches)
print(small.report)
print(small.to_torch()(torch.randn(5, 3, 16, 16)).shape)
