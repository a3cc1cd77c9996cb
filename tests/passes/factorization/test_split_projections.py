"""Fused projections as one layer for each part: exact, in every order of heads, and factorized each for itself."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from regauge.ir.graph import Graph


class Attention(nn.Module):
    """Heads of 4 and 16 channels, whose queries, keys and values lie in ``order``."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[0], x.shape[1]
        y = self.qkv(x.flatten(0, 1)).view(*shape, 48) if self.order == "flat" else self.qkv(x)
        if self.order in ("chunk", "flat"):
            q, k, v = (part.view(*shape, 4, 4).transpose(1, 2) for part in y.chunk(3, -1))
        elif self.order == "unbind":
            q, k, v = y.reshape(*shape, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "index":
            heads = y.reshape(*shape, 3, 4, 4).permute(2, 0, 3, 1, 4)
            q, k, v = heads[0], heads[1], heads[2]
        else:
            q, k, v = (part.transpose(1, 2) for part in y.view(*shape, 4, 12).chunk(3, -1))
        found: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*shape, 16))
        return found


def captured(model: nn.Module) -> tuple[Graph, torch.Tensor]:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    return regauge.capture(model.double().eval(), (x,), dynamic={0: {0: "batch", 1: "time"}}), x


@pytest.mark.parametrize("order", ["chunk", "flat", "unbind", "index", "interleaved"])
def test_heads_in_any_order_are_split_exactly(order: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, x = captured(Attention(order))
    split = regauge.optimize(graph, "split-projections")
    weights = {name: tuple(p.shape) for name, p in split.parameters.items() if name.endswith("weight")}
    assert weights == {f"qkv.part{part}.weight": (16, 16) for part in range(3)} | {"out.weight": (16, 16)}
    assert torch.allclose(split.run(x)[0], graph.run(x)[0], atol=1e-12)
    assert torch.allclose(split.to_torch()(x), graph.run(x)[0], atol=1e-12)
    assert not {"split", "unbind", "select", "slice"} & {node.op for node in split.nodes}


def test_each_part_gets_a_rank_of_its_own() -> None:
    """Of a fused weight whose queries and keys are of rank 2, and values of full rank: split, ranks follow these."""
    torch.manual_seed(0)
    model = Attention("unbind")
    with torch.no_grad():
        low = [torch.randn(16, 2) @ torch.randn(2, 16) / 4 for _ in range(2)]
        model.qkv.weight.copy_(torch.cat([*low, torch.randn(16, 16)]))
    graph, x = captured(model)
    every = sum(parameter.tensor.numel() for parameter in graph.all_parameters())
    step = f"factorize{{params={every - 2 * (256 - 64) + 20},include=qkv*}}"  # of another rank it would be 32
    errors = []
    for passes in (step, f"split-projections,{step}"):
        small = regauge.optimize(graph, passes)
        errors.append(float((small.run(x)[0] - graph.run(x)[0]).norm() / graph.run(x)[0].norm()))
    assert errors[1] < 1e-6
    assert errors[0] > 0.05
    shapes = {name: tuple(p.shape) for name, p in small.parameters.items() if "down" in name}
    assert shapes == {"qkv.part0.down.weight": (2, 16), "qkv.part1.down.weight": (2, 16)}


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = (x @ self.weight).chunk(2, -1)
        return up * torch.sigmoid(gate)


def test_products_without_a_bias_are_split() -> None:
    graph, x = captured(Gate())
    split = regauge.optimize(graph, "split-projections")
    assert {name: tuple(p.shape) for name, p in split.parameters.items()} == {
        "weight.part0.weight": (16, 12),
        "weight.part1.weight": (16, 12),
    }
    assert torch.allclose(split.run(x)[0], graph.run(x)[0], atol=1e-12)


@pytest.mark.parametrize("order", ["chunk", "unbind", "interleaved"])
def test_files_are_split_too(order: str, tmp_path: Path) -> None:
    """There the bias is added by a node of its own."""
    torch.manual_seed(0)
    model, x = Attention(order).eval(), torch.randn(3, 5, 16)
    torch.onnx.export(model, (x,), str(tmp_path / "whole.onnx"), dynamo=True, verbose=False)
    split = regauge.optimize(regauge.load(tmp_path / "whole.onnx"), "split-projections")
    assert sum("part" in name for name in split.parameters) == 6
    session = onnxruntime.InferenceSession(split.to_onnx(tmp_path / "split.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


class Rotary(nn.Module):
    """What is read in halves and whole is not taken apart; nor what overlaps."""

    def __init__(self, overlap: bool) -> None:
        super().__init__()
        self.overlap, self.linear = overlap, nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.overlap:
            return y[..., :6] + y[..., 2:]
        return y + torch.cat([-y[..., 4:], y[..., :4]], -1)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_read_whole_stays(overlap: bool) -> None:
    graph, _ = captured(Rotary(overlap))
    same = regauge.optimize(graph, "split-projections")
    assert "linear.weight" in same.parameters
    assert "its result is read whole" in str(same.report)


class Turned(nn.Module):
    """Queries whose halves, next to each other or not, rotary positions turn into each other, and a gate."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.query, self.gate = order, nn.Linear(16, 8), nn.Linear(16, 8)
        self.register_buffer("angles", torch.linspace(0.0, 2.0, 20).reshape(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.query(x)
        if self.order == "halves":
            first, second = y.chunk(2, -1)
        elif self.order == "pairs":
            first, second = y.unflatten(-1, (4, 2)).unbind(-1)
        else:
            first, second = y[..., ::2], y[..., 1::2]
        cosines, sines = self.angles.cos(), self.angles.sin()
        found = torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)
        up, gate = self.gate(x).chunk(2, -1)
        return found + (up * gate.sigmoid()).repeat(1, 1, 2)


@pytest.mark.parametrize("order", ["halves", "pairs", "every other"])
def test_halves_that_rotary_positions_turn_stay_together(order: str) -> None:
    graph, x = captured(Turned(order))
    split = regauge.optimize(graph, "split-projections")
    assert {"query.weight", "gate.part0.weight", "gate.part1.weight"} <= set(split.parameters)
    assert "as rotary positions do" in str(split.report)
    assert torch.allclose(split.run(x)[0], graph.run(x)[0], atol=1e-12)
