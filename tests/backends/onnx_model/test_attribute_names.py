"""Modules that are called like a word of Python are written to ONNX under their names."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

import regauge


class InAndOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in": nn.Linear(3, 4), "class": nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers["class"](torch.relu(self.layers["in"](x)))  # type: ignore[no-any-return]


def test_a_layer_may_be_called_like_a_word_of_python(tmp_path: Path) -> None:
    graph = regauge.capture(InAndOut().eval(), (torch.randn(2, 3),))
    graph.to_onnx(tmp_path / "words.onnx")  # which compares it with the graph
    names = {tensor.name for tensor in onnx.load(tmp_path / "words.onnx").graph.initializer}
    assert names == {f"layers.{layer}.{part}" for layer in ("in", "class") for part in ("weight", "bias")}
