"""Attention layers that read the keys and values of another: exact where these only look different."""

from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from attention_networks import LENGTH, SIZE, WIDTH, Decoder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.attention.following import write_follower
from regauge.passes.attention.layer_groups import LayerGroup
from regauge.passes.attention.repair import Copy
from regauge.passes.attention.site_moments import site_rows
from regauge.passes.attention.sites import attention_sites


class Layers(nn.Module):
    """Layers of attention, one after the other, or all on the same input."""

    def __init__(self, count: int, rotation: str, kv: int, *, fused: bool = False, together: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder(rotation, kv=kv, fused=fused) for _ in range(count))
        self.together = together
        for layer in self.layers:
            layer.angles = self.layers[0].angles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.together:
            return torch.stack([layer(x) for layer in self.layers]).sum(0)
        for layer in self.layers:
            x = x + 0.3 * layer(x)
        return x


def data(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)]


def captured(model: nn.Module) -> Graph:
    return regauge.capture(model.double().eval(), (data()[0][:2],), dynamic={0: {0: "batch"}})


def distance(found: Graph, graph: Graph) -> float:
    x = data()[0]
    before, after = graph.run(x)[0], found.run(x)[0]
    torch.testing.assert_close(found.to_torch()(x), after, rtol=0, atol=1e-10)
    return float((after - before).norm() / before.norm())


def turned_copy(model: Layers, rotation: str, kv: int) -> None:
    """The second layer has the keys and values of the first, heads in another order and each in a basis of its own."""
    first, second = model.layers
    half = SIZE // 2
    for name in ("k", "v"):
        own, other = getattr(second, name), getattr(first, name)
        for head in range(kv):
            basis = torch.randn(SIZE, SIZE)
            if name == "k" and rotation:
                a, b = torch.randn(2, half)
                basis = torch.cat([torch.cat([a.diag(), -b.diag()], 1), torch.cat([b.diag(), a.diag()], 1)])
            rows, from_rows = (slice(at * SIZE, (at + 1) * SIZE) for at in (head, kv - 1 - head))
            with torch.no_grad():
                own.weight[rows] = basis @ other.weight[from_rows]
                own.bias[rows] = basis @ other.bias[from_rows]


@pytest.mark.parametrize(
    ("method", "rotation", "kv"),
    [("aligned", "", 4), ("aligned", "half", 2), ("cla", "half", 4), ("kvsharer", "", 2)],
)
def test_layers_that_differ_by_bases_and_orders_of_heads_share_exactly(method: str, rotation: str, kv: int) -> None:
    torch.manual_seed(0)
    model = Layers(2, rotation, kv, together=True)
    turned_copy(model, rotation, kv)
    graph = captured(model)
    threshold = ", threshold=-1" if method == "kvsharer" else ""
    found = regauge.optimize(graph, f"share-kv{{layers=1, method={method}{threshold}}}", data=data())
    assert distance(found, graph) < 1e-3  # healing pulls weights, by its ridge
    names = {name for name in found.parameters if ".k." in name or ".v." in name}
    assert names == {f"layers.0.{part}.{kind}" for part in "kv" for kind in ("weight", "bias")} & names
    assert len({site.node.inputs[1] for site in attention_sites(found)}) == 1
    assert f"{4 * kv * SIZE * 8} -> {2 * kv * SIZE * 8} bytes per token" in str(found.report)


@pytest.mark.parametrize("rotation", ["", "half"])
def test_a_follower_is_right_before_anything_is_refitted(rotation: str) -> None:
    torch.manual_seed(0)
    model = Layers(2, rotation, 4, together=True)
    turned_copy(model, rotation, 4)
    graph = captured(model)
    copy = Copy(graph, by="test")
    first, second = copy.sites
    fitted = LayerGroup(copy.sites, site_rows(copy.result, copy.sites, [(x,) for x in data()]), ordered=True).fitted(
        "first"
    )
    write_follower(copy.result, second, first.node, fitted.layers[1], by="test")
    assert distance(copy.result, graph) < 1e-3  # a ridge of 1e-4


def test_neighbours_share_and_what_was_made_for_none_goes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = captured(Layers(4, "half", 2, fused=True).float())
    losses = {}
    for method in ("mlkv", "cla", "aligned"):
        found = regauge.optimize(graph, f"share-kv{{layers=2, method={method}}}", data=data(2))
        losses[method] = distance(found, graph)
        rows = [found.parameters[f"layers.{layer}.qkv.weight"].shape[0] for layer in range(4)]
        assert rows == [8 * SIZE, 4 * SIZE, 8 * SIZE, 4 * SIZE]
        keys = [site.node.inputs[1] for site in attention_sites(found)]
        assert keys[0] is keys[1] and keys[2] is keys[3] and keys[1] is not keys[2]
    assert losses["aligned"] < losses["mlkv"] and losses["aligned"] < losses["cla"], losses
    found.to_onnx(tmp_path / "found.onnx", inputs=(data()[0][:2],))  # checked in onnxruntime


def test_a_layer_is_kept_where_outputs_would_change_too_much() -> None:
    torch.manual_seed(0)
    graph = captured(Layers(3, "", 4))
    found = regauge.optimize(graph, "share-kv{layers=1, method=kvsharer, threshold=1.0}", data=data(1))
    assert found.parameters.keys() == graph.parameters.keys()
    assert "3 x the outputs would change too much" in str(found.report)


def test_keys_at_other_positions_are_not_shared() -> None:
    torch.manual_seed(0)
    model = Layers(2, "half", 2)
    model.layers[1].angles = model.layers[0].angles + 0.1
    found = regauge.optimize(captured(model), "share-kv{layers=1}", data=data(1))
    assert "its keys are at other positions" in str(found.report)


def test_repair_needs_data() -> None:
    with pytest.raises(PassError, match="needs data for repair"):
        regauge.optimize(captured(Layers(2, "", 4)), "share-kv{layers=1, repair=true}")


def test_a_threshold_without_a_search_is_refused() -> None:
    with pytest.raises(PassError, match="threshold is for single layers: leave it out, or write method=kvsharer"):
        regauge.optimize(captured(Layers(2, "", 4)), "share-kv{layers=1, threshold=0.9}")


def test_normed_keys_are_left_alone_with_words_of_this_pass() -> None:
    """They were those of ``convert-gqa``, with a method that ``share-kv`` has not."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Decoder("half", kv=2, norm=True) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + 0.3 * layer(x)
            return x

    x = data(1)[0]
    found = regauge.optimize(regauge.capture(Normed().double().eval(), (x,)), "share-kv{layers=1}")
    assert "2 x its queries, keys or values are normalised: layers share no such heads" in str(found.report)
