"""Operators of a user's own in emitted source: what their functions call and read is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from own_operators import registered
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph

SLOPE, SHIFTS = 0.3, (1.0, -2.0)


def bent(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, SLOPE)


def shifted(x: torch.Tensor) -> torch.Tensor:
    y = bent(x) + SHIFTS[0]
    return y * SHIFTS[1]


def inlined(x: torch.Tensor) -> torch.Tensor:
    return bent(x) * SLOPE


def graph_of(function: Any) -> Graph:
    graph = Graph("own")
    build = Builder(graph)
    graph.outputs = [build(function.__name__, build.input("x", (2, 3), torch.float32))]
    return graph


@pytest.mark.parametrize("function", [shifted, inlined])
def test_functions_that_are_called_are_copied_and_constants_written_out(function: Any, tmp_path: Path) -> None:
    with registered(function, "... c -> ... c"):
        graph = graph_of(function)
        folder = graph.write(tmp_path / "own")
        source = (folder / "model.py").read_text()
        assert "def bent(" in source and "0.3" in source and "SLOPE" not in source and "SHIFTS" not in source
        x = torch.randn(2, 3)
        torch.testing.assert_close(graph.to_torch()(x), function(x), rtol=0, atol=0)
