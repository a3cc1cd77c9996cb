"""Canonical bonds: the same function in every family, singular values in their order, and less lost by a cut."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import regauge
from attention_networks import LENGTH, WIDTH, Decoder
from random_networks import networks
from regauge.ir.graph import Graph
from regauge.ir.running.sample_inputs import sample_runs
from regauge.passes.base import Context
from regauge.passes.factorization.canonicalize import Canonicalize


class Bonds(nn.Module):
    """A matrix of rank three in a bond of four, a bond of two writers and two readers, and one between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 9)
        with torch.no_grad():
            self.down.weight[3] = self.down.weight[0]
        self.a, self.b = nn.Linear(9, 5), nn.Linear(WIDTH, 5, bias=False)
        self.c, self.d = nn.Linear(5, 9), nn.Linear(5, 7)
        self.first, self.last = nn.Conv1d(LENGTH, 4, 3, bias=False), nn.Conv1d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.up(self.down(x)).tanh()
        h = self.a(y) + self.b(x)
        return self.last(self.first(self.c(h).tanh())), self.d(h)


class OfPixels(nn.Module):
    """Attention of pixels: projections and output are convolutions, heads are laid before positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Conv1d(LENGTH, 48, 1), nn.Conv1d(16, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(1, (2, 24)).transpose(2, 3).split(8, -1)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2))


def captured(model: nn.Module, width: int = WIDTH) -> Graph:
    return regauge.capture(model.double().eval(), (torch.randn(2, LENGTH, width).double(),))


FAMILIES = {
    "bonds": Bonds,
    "one head": lambda: Decoder(kv=1),
    "grouped": lambda: Decoder(kv=2),
    "heads": lambda: Decoder(kv=4, fused=True),
    "rotary": lambda: Decoder("half", kv=2),
    "interleaved": lambda: Decoder("interleaved", kv=2, fused=True),
    "partly rotary": lambda: Decoder("partly", kv=2),
    "normed queries": lambda: Decoder("half", norm=True),
    "pixels": OfPixels,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 3, 20, batch_first=True),
}


@pytest.mark.parametrize("on_data", [False, True], ids=["weights", "data"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str, on_data: bool) -> None:
    graph = captured(FAMILIES[family]())
    context = Context(data=[torch.randn(2, LENGTH, WIDTH).double()] if on_data else None)
    found = Canonicalize().call(graph, context)
    x = torch.randn(2, LENGTH, WIDTH).double()
    for now, before in zip(found.run(x), graph.run(x), strict=True):
        torch.testing.assert_close(now, before, rtol=1e-9, atol=1e-9)
    assert found is not graph and context.left.total() == (family == "normed queries")


@settings(max_examples=25)
@given(networks())
def test_the_function_of_random_networks_stays(graph: Graph) -> None:
    found = Canonicalize().call(graph, Context())
    (inputs, results), *_ = sample_runs(graph)
    for now, before in zip(found.run(inputs), results, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-7, atol=1e-7)


def test_bonds_have_the_singular_values_on_both_sides() -> None:
    graph = captured(Bonds())
    found = Canonicalize().call(graph, Context())
    up, down = found.parameters["up.weight"].tensor, found.parameters["down.weight"].tensor
    values = torch.linalg.svdvals(graph.parameters["up.weight"].tensor @ graph.parameters["down.weight"].tensor)
    for gram in (down @ down.T, up.T @ up):
        torch.testing.assert_close(gram[:3, :3], values[:3].diag(), rtol=1e-6, atol=1e-6)
        assert float(gram[3:].abs().max()) < 1e-5  # of rank three


def relative_error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    before = graph.run(x)[0]
    return float((other.run(x)[0] - before).norm() / before.norm())


LAID_OUT = {
    "apart": (lambda: Decoder(kv=2), ("q.weight", "k.weight", "v.weight"), "q.weight:0.2,v.weight:0.1"),
    "stacked": (
        lambda: nn.TransformerEncoderLayer(24, 3, 20, batch_first=True),
        ("self_attn.in_proj_weight",),
        "self_attn.in_proj_weight:0.2",
    ),
}


@pytest.mark.parametrize("kind", LAID_OUT)
def test_heads_of_low_rank_are_cut_to_it(kind: str) -> None:
    """Products of queries with keys, and of values with outputs, of rank three in heads of eight; no biases."""
    make, names, dims = LAID_OUT[kind]
    graph = captured(make(), 24 if kind == "stacked" else WIDTH)
    with torch.no_grad():
        for name in names:
            weight = graph.parameters[name].tensor
            heads = weight.view(-1, 8, weight.shape[1])
            heads[:, 3:] = torch.randn(5, 3).double() @ heads[:, :3]
            bias = graph.parameters[name.replace("weight", "bias")].tensor
            bias.zero_()
    x = torch.randn(2, LENGTH, int(graph.inputs[0].shape[-1])).double()
    cut = f"prune{{ratio=0.625,score=l2,compensate=false,include=[{dims}]}}"
    small, other = (regauge.optimize(graph, text) for text in (f"canonicalize,{cut}", cut))
    assert small.find(names[0]).shape[0] == graph.find(names[0]).shape[0] * 3 // 8
    assert relative_error(graph, small, x) < 1e-10 < 0.1 < relative_error(graph, other, x)


def test_on_data_directions_are_those_that_it_uses() -> None:
    """Inputs near two directions of twelve: half of each head then loses a small part of what it would by weights."""
    x = (torch.randn(64, LENGTH, 2) @ torch.randn(2, WIDTH) + 0.02 * torch.randn(64, LENGTH, WIDTH)).double()
    graph = regauge.capture(Decoder("half", kv=2).double().eval(), (x[:2],), dynamic={0: {0: "batch"}})
    cut, data = "prune{ratio=0.5,compensate=false,include=[v.weight:0.1]}", [x[:32]]
    on_data = regauge.optimize(graph, f"canonicalize,{cut}", data=data)
    by_weights = regauge.optimize(regauge.optimize(graph, "canonicalize"), cut, data=data)
    as_it_is = regauge.optimize(graph, cut, data=data)
    errors = [relative_error(graph, other, x[32:]) for other in (on_data, by_weights, as_it_is)]
    assert errors[0] < 0.01 and errors[1] > 0.2 and errors[2] > 0.5


def test_an_onnx_file_is_canonicalized_and_cut(tmp_path: Path) -> None:
    """It runs in onnxruntime, and scores keep the scale that they had for the whole heads."""
    torch.onnx.export(
        Decoder(kv=2).eval(), (torch.randn(2, LENGTH, WIDTH),), tmp_path / "whole.onnx", opset_version=18, verbose=False
    )
    whole = regauge.load(tmp_path / "whole.onnx")
    found = regauge.optimize(whole, "canonicalize")
    dims = [group.dim.name for group in found.groups() if group.free and group.dim.size == 8]
    small = regauge.optimize(found, f"prune{{ratio=0.5,score=l2,compensate=false,include=[{','.join(dims)}]}}")
    small.to_onnx(tmp_path / "small.onnx")
    x = torch.randn(2, LENGTH, WIDTH)
    (result,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {small.inputs[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), small.run(x)[0], rtol=1e-4, atol=1e-5)
    assert (
        len(dims) == 2 and small.parameters["val_0"].shape == (16, 12) and whole.parameters["val_0"].shape == (12, 32)
    )
