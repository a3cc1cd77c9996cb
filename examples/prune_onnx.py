"""Prune an ONNX file: ``python prune_onnx.py model.onnx small.onnx`` (without arguments, a file made on the spot)."""

import sys

import torch
from torch import nn

import regauge


def example_file() -> str:
    """A small network as torch.onnx writes it."""
    model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 4)).eval()
    torch.onnx.export(model, (torch.randn(1, 16),), "example.onnx", dynamo=True, external_data=False, verbose=False)
    return "example.onnx"


source, target = sys.argv[1:] if len(sys.argv) == 3 else (example_file(), "small.onnx")
graph = regauge.load(source)
for group in graph.groups():
    print(group.name, group.size, "free" if group.free else group.pins[:1])

small = regauge.optimize(graph, "prune{params=0.5,scope=global}")
print(small.report)
small.to_onnx(target)  # nodes, names and metadata that need no change stay as they were
print(regauge.compare(small, target))
