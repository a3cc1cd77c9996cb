"""``factorize`` on networks: budgets, errors beside plain factors, what is left alone, ONNX in and out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.ranks import least_loss, spread


class Encoder(nn.Module):
    """A transformer block with a fused projection and a wide hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x))))


@cache
def encoder() -> tuple[Graph, list[torch.Tensor], torch.Tensor]:
    """With inputs that lie near a few directions, as those of trained networks do."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Encoder().eval()
    basis = torch.randn(24, 24, generator=generator) * torch.logspace(0, -2, 24)[:, None]
    data = torch.randn(80, 12, 24, generator=generator) @ basis
    graph = capture(model, (data[:2],), dynamic={0: {0: "batch"}})
    return graph, list(data[:64].split(16)), data[64:]


@cache
def convolutional() -> tuple[Graph, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.ConvTranspose2d(32, 12, 2, 2), nn.Flatten(), nn.Linear(12 * 64, 10))
    noise = torch.randn(48, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(noise, size=(8, 8), mode="bilinear")  # neighbours are alike
    graph = capture(model.eval(), (images[:2],), dynamic={0: {0: "batch"}})
    return graph, list(images[:32].split(16)), images[32:]


def error(graph: Graph, small: Graph, x: torch.Tensor) -> float:
    (wanted,), (found,) = graph.run(x), small.run(x)
    return float((wanted - found).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("option", ["params=0.6", "macs=0.6", "params=0.7,macs=0.6"])
@pytest.mark.parametrize("network", [encoder, convolutional])
def test_budgets_are_met(network: object, option: str) -> None:
    graph, data, _ = network()  # type: ignore[operator]
    small = regauge.optimize(graph, f"factorize{{{option}}}", data=data)
    before, after = figures(graph), figures(small)
    shares = {"params": after.parameters / before.parameters, "macs": after.macs / before.macs}
    for part in option.split(","):
        name, _, most = part.partition("=")
        assert float(most) - 0.1 < shares[name] <= float(most) or len(option.split(",")) > 1
        assert shares[name] <= float(most)


def test_data_keeps_more_than_weights_alone() -> None:
    graph, data, held_out = encoder()
    found = {
        name: error(graph, regauge.optimize(graph, "factorize{params=0.5}", data=given), held_out)
        for name, given in (("plain", None), ("data", data))
    }
    assert found["data"] < 0.3 * found["plain"]


def test_convolutions_lose_less_with_data() -> None:
    graph, data, held_out = convolutional()
    found = [
        error(graph, regauge.optimize(graph, "factorize{macs=0.5}", data=given), held_out) for given in (None, data)
    ]
    assert found[1] < 0.8 * found[0]


def test_what_it_emits_is_plain_layers_under_telling_names(tmp_path: Path) -> None:
    graph, data, held_out = encoder()
    small = regauge.optimize(graph, "factorize{rank=6,include=up.*}", data=data)
    module = small.to_torch()
    keys = set(module.state_dict())
    assert {"up.down.weight", "up.up.weight", "up.up.bias", "down.weight", "qkv.weight"} <= keys
    assert "up.weight" not in keys and "up.bias" not in keys
    assert module.state_dict()["up.down.weight"].shape == (6, 24)
    path = tmp_path / "small.onnx"
    small.to_onnx(path)
    again = regauge.load(path)
    assert torch.allclose(again.run(held_out)[0], small.run(held_out)[0], atol=1e-5)


def test_an_onnx_file_is_factorized(tmp_path: Path) -> None:
    graph, data, held_out = convolutional()
    path = tmp_path / "whole.onnx"
    graph.to_onnx(path)
    loaded = regauge.load(path)
    small = regauge.optimize(loaded, "factorize{macs=0.6}", data=data)
    out = tmp_path / "small.onnx"
    small.to_onnx(out)
    assert torch.allclose(regauge.load(out).run(held_out)[0], small.run(held_out)[0], atol=1e-4)
    assert out.stat().st_size < path.stat().st_size


def test_every_form_can_be_asked_for() -> None:
    graph, data, _ = convolutional()
    ops = {}
    for form in ("low-rank", "tucker", "columns", "rows", "cp", "tt"):
        small = regauge.optimize(graph, f"factorize{{rank=0.5,form={form}}}", data=data)
        ops[form] = sum(node.op in ("conv", "conv_transpose", "linear") for node in small.nodes)
    assert ops == {"low-rank": 8, "tucker": 10, "columns": 6, "rows": 6, "cp": 13, "tt": 13}


def test_grouped_and_depthwise_convolutions_become_links_of_as_many_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 12, 5, padding=2, groups=12)]
    images = torch.randn(24, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    graph = capture(nn.Sequential(*layers).eval(), (images[:2],), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "factorize{macs=0.5,form=columns}", data=[images[:16]])
    groups = [node.attributes["groups"] for node in small.nodes if node.op == "conv"]
    assert groups == [2, 2, 12, 12]
    plain = regauge.optimize(graph, "factorize{macs=0.5,form=columns}")
    assert error(graph, small, images[16:]) < error(graph, plain, images[16:]) < 1
    small.to_onnx(tmp_path / "small.onnx")
    found = regauge.load(tmp_path / "small.onnx").run(images[16:])[0]
    assert torch.allclose(found, small.run(images[16:])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factorize", "say how small it is to become"),
        ("factorize{rank=4,params=0.5}", "not both"),
        ("factorize{rank=4.5}", "neither a share nor a whole number"),
        ("factorize{params=0.001}", "budget of parameters cannot be met"),
    ],
)
def test_wrong_budgets(text: str, message: str) -> None:
    graph, _, _ = encoder()
    with pytest.raises(PassError, match=message):
        regauge.optimize(graph, text)


def test_what_is_left_whole_is_said() -> None:
    graph, _, _ = encoder()
    small = regauge.optimize(graph, "factorize{params=0.95}")
    assert "it is worth more whole" in str(small.report)


def test_without_data_no_layer_pays_for_another_that_stays_whole() -> None:
    """Squares of shares are added: two layers that lose 0.3 are better than one that loses 0.55."""
    whole, half, least = (
        Choice("", (), 10, 10, 0.0),
        Choice("tucker", (4, 4), 5, 5, 0.3),
        Choice("tucker", (1, 1), 1, 1, 0.55),
    )
    choices = {name: [whole, half, least] for name in ("first", "second")}
    losses = [own.loss for own in least_loss(choices, {"macs": 11.5}).values()]
    assert sorted(losses) == [0.0, 0.55]
    assert {own.ranks for own in least_loss(spread(choices), {"macs": 11.5}).values()} == {(4, 4)}


@pytest.mark.parametrize("form", ["tucker", "cp", "tt"])
def test_transposed_convolutions_of_few_directions_stay_what_they_were(form: str) -> None:
    """A kernel of rank 3 on every side, of which one to fewer channels and one of single places keep more numbers."""
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1, output_padding=1).double()
    factors = [torch.randn(size, 3).double() for size in (16, 12, 4, 4)]
    conv.weight = nn.Parameter(torch.einsum("iq,oq,rq,cq->iorc", *factors))
    x = torch.randn(4, 16, 5, 6).double()
    graph = regauge.capture(nn.Sequential(conv).eval(), (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, f"factorize{{form={form},{'rank=3' if form == 'cp' else 'energy=0.999999'}}}")
    assert figures(small).parameters < 0.2 * figures(graph).parameters
    assert figures(small).macs < 0.35 * figures(graph).macs
    off = small.run(x)[0] - graph.run(x)[0]
    assert float(off.square().mean() / graph.run(x)[0].square().mean()) < 1e-5
    on_data = regauge.optimize(graph, f"factorize{{form={form},params=0.3}}", data=[x])
    off = on_data.run(x)[0] - graph.run(x)[0]
    assert float(off.square().mean() / graph.run(x)[0].square().mean()) < 1e-5
