"""Fewer heads of keys and values: exact where heads only look different, close to it elsewhere, and really smaller."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from assembled_networks import NETWORKS
from attention_networks import LENGTH, SIZE, WIDTH, Decoder
from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.attention.sites import Heads, attention_sites

EXACT = "convert-gqa{kv_heads=2, repair=false}"


def data(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)]


def captured(model: nn.Module) -> Graph:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return regauge.capture(model.double().eval(), (data()[0][:2],), dynamic={0: {0: "batch"}})


def with_copies(graph: Graph, *groups: tuple[int, ...]) -> Graph:
    """The heads of each group have the keys and the values of its first one, each in a basis of its own."""
    (site,) = attention_sites(graph)
    for part in (site.key, site.value):
        assert part is not None
        bias, weight = part.bias, part.weight
        for first, *others in groups:
            for head in others:
                basis = free_map(part)
                weight[head] = basis @ weight[first]
                if bias is not None:
                    bias[head] = basis @ bias[first]
        set_weight(graph, part.layer.weight, part.put(part.layer.weight.tensor, weight))
        if bias is not None and part.layer.bias is not None:
            held = part.layer.bias.tensor.detach().clone()
            held[part.channels] = bias
            set_weight(graph, part.layer.bias, held)
    return graph


def free_map(part: Heads) -> torch.Tensor:
    """A matrix that queries can undo: any one, but of pairs that are rotated a turn and a scale."""
    found = torch.randn(part.size, part.size, dtype=torch.float64)
    rotated = part.pairs.flatten()
    found[rotated], found[:, rotated] = 0, 0
    for i, j in part.pairs.tolist():
        a, b = torch.randn(2).tolist()
        found[i, i], found[i, j], found[j, i], found[j, j] = a, -b, b, a
    return found


def distance(found: Graph, graph: Graph) -> float:
    x = data()[0]
    before, after = graph.run(x)[0], found.run(x)[0]
    torch.testing.assert_close(found.to_torch()(x), after, rtol=0, atol=1e-10)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("rotation", ["", "half", "interleaved", "complex", "partly"])
def test_heads_that_are_copies_in_another_basis_become_one_exactly(rotation: str, with_data: bool) -> None:
    graph = with_copies(captured(Decoder(rotation, kv=4, fused=with_data)), (0, 2), (1, 3))
    found = regauge.optimize(graph, EXACT, data=data() if with_data else None)
    assert distance(found, graph) < 1e-10
    rows = {name: parameter.shape[0] for name, parameter in found.parameters.items() if "v.weight" in name}
    assert rows == ({"qkv.weight": 8 * SIZE} if with_data else {"v.weight": 2 * SIZE})
    (site,) = attention_sites(found)
    assert site.node.attributes["enable_gqa"] and site.key is not None and site.key.head_of.tolist() == [0, 0, 1, 1]
    assert "cache of keys and values: 512 -> 256 bytes per token" in str(found.report)


def test_a_group_may_be_larger_than_others() -> None:
    graph = with_copies(captured(Decoder("half", kv=4)), (1, 3))
    found = regauge.optimize(graph, "convert-gqa{kv_heads=3, repair=false}")
    assert distance(found, graph) < 1e-10
    assert found.parameters["k.weight"].shape == (3 * SIZE, WIDTH)
    (site,) = attention_sites(found)  # heads are repeated by an index, which is followed
    assert site.key is not None and site.key.count == 3 and site.key.head_of.tolist() == [0, 1, 2, 1]


def test_shared_heads_are_shared_by_more() -> None:
    graph = with_copies(captured(Decoder("half", kv=2)), (0, 1))
    found = regauge.optimize(graph, "convert-gqa{kv_heads=1, repair=false}")
    assert distance(found, graph) < 1e-10
    assert found.parameters["v.weight"].shape == (SIZE, WIDTH)


class Masked(Decoder):
    """Scores to which a mask adds other numbers for each head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (-1, SIZE)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        mask = torch.linspace(-2, 2, 4 * LENGTH * LENGTH, dtype=x.dtype).reshape(1, 4, LENGTH, LENGTH)
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def test_heads_that_a_mask_tells_apart_keep_their_order() -> None:
    graph = with_copies(captured(Masked(kv=4)), (0, 2), (1, 3))
    assert distance(regauge.optimize(graph, EXACT), graph) < 1e-10


def test_aligned_heads_lose_less_than_their_mean_and_a_refit_less_still() -> None:
    graph = captured(Decoder("half", kv=4))
    steps = [
        "{kv_heads=2, method=mean}",
        "{kv_heads=2, method=key-driven}",
        "{kv_heads=2, repair=false}",
        "{kv_heads=2}",
    ]
    many = data(12)
    mean, driven, aligned, refitted = (
        distance(regauge.optimize(graph, f"convert-gqa{step}", data=many if "mean" not in step else None), graph)
        for step in steps
    )
    assert refitted < aligned < 0.6 * mean, (mean, driven, aligned, refitted)


def seen_through(part: Heads, gains: str) -> torch.Tensor:
    """A matrix that norms and scores let through: scaled, and a turn of each pair, or a sign where gains differ."""
    found = torch.eye(part.size, dtype=torch.float64)
    angles = torch.randn(len(part.pairs)).tolist() if gains == "in pairs" else [0, torch.pi] * (part.size // 4)
    for (i, j), angle in zip(part.pairs.tolist(), angles, strict=False):
        turn = torch.polar(torch.ones(()).double(), torch.tensor(angle).double())
        found[i, i], found[i, j], found[j, i], found[j, j] = turn.real, -turn.imag, turn.imag, turn.real
    if not len(part.pairs):
        other = torch.randn(part.size, part.size).double()
        found = torch.linalg.qr(other)[0] if gains == "one" else torch.diag(other.diagonal().sign())
    return 3 * found


@pytest.mark.parametrize(
    ("rotation", "gains"),
    [("half", "apart"), ("half", "in pairs"), ("", "apart"), ("", "one"), ("interleaved", "apart")],
)
def test_normalised_keys_that_look_different_become_one_exactly(rotation: str, gains: str) -> None:
    graph = captured(Decoder(rotation, kv=4, norm=True))
    (site,) = attention_sites(graph)
    key, value, norm = site.key, site.value, graph.parameters["norm.weight"]
    assert key is not None and value is not None
    gain = torch.linspace(0.5, 1.5, SIZE) if gains == "apart" else torch.ones(SIZE)
    if gains == "in pairs":
        gain = torch.linspace(0.5, 1.5, SIZE // 2).repeat(2)
    set_weight(graph, norm, gain.double())
    weight, bias, held = key.weight, key.bias, value.weight
    assert bias is not None
    for first, other in ((0, 2), (1, 3)):
        seen = seen_through(key, gains)
        weight[other], bias[other] = seen @ weight[first], seen @ bias[first]
        held[other] = torch.randn(SIZE, SIZE).double() @ held[first]
    set_weight(graph, key.layer.weight, key.put(key.layer.weight.tensor, weight))
    set_weight(graph, graph.parameters["k.bias"], bias.flatten())
    set_weight(graph, value.layer.weight, value.put(value.layer.weight.tensor, held))
    found = regauge.optimize(graph, EXACT)
    assert found.parameters["k.weight"].shape == (2 * SIZE, WIDTH)
    assert distance(found, graph) < 1e-6


def test_normalised_keys_lose_less_aligned_than_as_their_mean() -> None:
    graph = captured(Decoder("half", kv=4, norm=True))
    mean, aligned = (
        distance(regauge.optimize(graph, f"convert-gqa{{kv_heads=2,repair=false,method={how}}}", data=data(6)), graph)
        for how in ("mean", "aligned")
    )
    assert aligned < 0.8 * mean, (mean, aligned)


class NormedWhole(Decoder):
    """Keys that a norm goes over with all heads together."""

    def __init__(self) -> None:
        super().__init__("half", kv=4)
        self.whole = nn.RMSNorm(4 * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (-1, SIZE)).transpose(1, 2) for y in (self.q(x), self.whole(self.k(x)), self.v(x)))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_a_norm_over_all_heads_together_leaves_only_the_mean() -> None:
    found = regauge.optimize(captured(NormedWhole()), "convert-gqa{kv_heads=2}")
    assert "normalised: only their mean can be shared" in str(found.report)


@pytest.mark.parametrize(("name", "heads"), [("bert", 2), ("gpt2", 2), ("llama", 1), ("vit", 3), ("t5", 2)])
def test_networks_of_well_known_families_run_in_torch_and_in_onnxruntime(name: str, heads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, inputs = network.make().eval(), network.inputs()
    graph = regauge.capture(model, inputs)
    found = regauge.optimize(graph, f"convert-gqa{{kv_heads={heads}}}", data=[inputs])
    (site,) = attention_sites(found)
    assert site.key is not None and site.value is not None and site.key.count == site.value.count == heads
    after = found.run(inputs)[0]
    torch.testing.assert_close(found.to_torch()(*inputs), after, rtol=0, atol=1e-5)
    assert float((after - graph.run(inputs)[0]).norm() / after.norm()) < 0.05  # refitted on this very input
    found.to_onnx(tmp_path / "found.onnx", inputs=inputs)  # checked in onnxruntime


def test_repair_needs_data() -> None:
    with pytest.raises(PassError, match="needs data for repair"):
        regauge.optimize(captured(Decoder(kv=4)), "convert-gqa{kv_heads=2, repair=true}")
