"""Prune a torch model to half its multiply-accumulates, train the result a little, and save it."""

import torch
from torch import nn

import regauge

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip
images = torch.randn(4, 3, 32, 32)

graph = regauge.capture(model.eval(), (images,), dynamic={0: {0: "batch"}})
print(graph.explain("0.weight:0"))  # the output channels of the first convolution: where else they occur

small = regauge.optimize(graph, "prune{macs=0.5,round_to=4}")
print(small.report)

module = small.to_torch().train()  # an nn.Module with the names of the original, ready to be trained
optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
for _ in range(3):
    optimiser.zero_grad()
    nn.functional.cross_entropy(module(images), torch.randint(0, 10, (4,))).backward()
    optimiser.step()

tuned = regauge.capture(module.eval(), (images,), dynamic={0: {0: "batch"}})
tuned.to_onnx("pruned.onnx")
print(regauge.compare(module, "pruned.onnx", (images,)))
