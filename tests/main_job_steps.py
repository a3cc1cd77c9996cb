"""The main job, step by step: what each step leaves is one function in torch, in an emitted module and in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

import regauge
from regauge.backends.run_onnxruntime import Session
from regauge.ir.fusion.fused import fused_nodes, without_fused
from regauge.ir.graph import Graph
from regauge.ir.verify import verify

STEPS = ("simplify", "prune{params=0.7}", "factorize{params=0.8}", "quantize{scheme=w8}", "fuse")


@dataclass(frozen=True)
class Seen(regauge.Pass):
    """Changes nothing, and shows the graph that it is given: ``show(graph)``."""

    name = "seen"
    contract = "exact"
    takes_fused = True
    show: Callable[[Graph], None]

    def call(self, graph: Graph, context: regauge.Context) -> Graph:
        self.show(graph)
        return graph


def agreed(graph: Graph, inputs: torch.Tensor, path: Path) -> torch.Tensor:
    """The result of a graph, which its module and its file give too."""
    verify(graph, axes=True)
    (found,) = graph.run(inputs)
    with torch.no_grad():
        torch.testing.assert_close(graph.to_torch()(inputs), found, rtol=1e-4, atol=1e-5)
    graph.to_onnx(path, verify=False, functions=True)
    torch.testing.assert_close(Session(path, optimisation="off").run([inputs])[0], found, rtol=1e-4, atol=1e-5)
    return found


def regions_come_along(quantized: Graph, fused: Graph, inputs: torch.Tensor, path: Path) -> None:
    """Fused nodes compute what their nodes did, to the last bit; so do modules with kernels and ONNX functions."""
    (wanted,) = quantized.run(inputs)
    assert fused_nodes(fused) and torch.equal(fused.run(inputs)[0], wanted)
    assert torch.equal(without_fused(fused).run(inputs)[0], wanted)
    with torch.no_grad():
        torch.testing.assert_close(fused.to_torch(kernels="triton")(inputs), wanted, rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    loaded = regauge.load(path)
    functions = len(fused_nodes(loaded))  # a causal mask of dynamic sizes has no spelling as a part of one
    assert functions == len(fused_nodes(fused)) or 0 < functions < len(fused_nodes(fused))
    torch.testing.assert_close(loaded.run(inputs)[0], wanted, rtol=1e-4, atol=1e-5)
