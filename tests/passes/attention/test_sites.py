"""Sites of attention: which channels are which head, which pairs a rotation mixes, and who else reads them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from attention_networks import LENGTH, SIZE, WIDTH, Decoder
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.sites import Heads, Site, attention_sites


def captured(model: nn.Module, *, dynamic: bool = False) -> Graph:
    sizes = {0: {0: "batch"}} if dynamic else None
    return regauge.capture(model.double().eval(), (torch.randn(2, LENGTH, WIDTH).double(),), dynamic=sizes)


def only_site(graph: Graph) -> Site:
    (site,) = attention_sites(graph)
    return site


def parts(site: Site) -> tuple[Heads, Heads, Heads, Heads]:
    assert site.query and site.key and site.value and site.output, site.missing
    return site.query, site.key, site.value, site.output


def put(graph: Graph, part: Heads, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    layer = part.layer
    set_weight(graph, layer.weight, part.put(layer.weight.tensor.detach(), weight))
    if bias is not None and layer.bias is not None:
        held = layer.bias.tensor.detach().clone()
        held[part.channels] = bias
        set_weight(graph, layer.bias, held)


def mapped(graph: Graph, part: Heads, maps: torch.Tensor) -> None:
    """Multiply each head by its matrix, [heads, size, size], or the inverse transpose for the output."""
    bias = None if part.bias is None else torch.einsum("hij,hj->hi", maps, part.bias)
    put(graph, part, maps @ part.weight, bias)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_any_map_goes_through_values_and_without_rotation_through_scores(kv: int, fused: bool) -> None:
    graph = captured(Decoder(kv=kv, fused=fused), dynamic=True)
    x = torch.randn(3, LENGTH, WIDTH).double()
    before = graph.run(x)[0]
    query, key, value, output = parts(only_site(graph))
    assert query.channels.tolist() == torch.arange(4 * SIZE).reshape(4, SIZE).tolist()
    assert key.count == value.count == kv and key.head_of.tolist() == [head * kv // 4 for head in range(4)]
    assert all(part.is_layout and part.alone and part.in_order for part in (query, key, value, output))
    maps = torch.randn(kv, SIZE, SIZE).double()
    opposite = torch.linalg.inv(maps).mT
    mapped(graph, value, maps)
    mapped(graph, output, opposite[value.head_of])
    mapped(graph, key, maps)
    mapped(graph, query, opposite[key.head_of])
    torch.testing.assert_close(graph.run(x)[0], before, rtol=1e-8, atol=1e-8)
    assert float((query.weight[0] - query.weight[1]).abs().max()) > 0.1  # heads are not the same, so a swap shows


@pytest.mark.parametrize(
    ("rotation", "pairs"),
    [
        ("half", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("interleaved", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("complex", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("partly", [[0, 2], [1, 3]]),
    ],
)
def test_a_complex_number_goes_through_each_pair_of_a_rotation(rotation: str, pairs: list[list[int]]) -> None:
    graph = captured(Decoder(rotation))
    x = torch.randn(2, LENGTH, WIDTH).double()
    before = graph.run(x)[0]
    query, key, value, _ = parts(only_site(graph))
    assert query.pairs.tolist() == key.pairs.tolist() == pairs and not len(value.pairs)
    assert query.even and key.even and query.factor is None and not query.is_layout
    number = torch.randn(2, len(pairs), dtype=torch.complex128)
    for part, by in ((key, number), (query, (1 / number.conj())[key.head_of])):
        maps = torch.eye(SIZE).double().repeat(part.count, 1, 1)
        for place, (i, j) in enumerate(pairs):
            maps[:, i, i] = maps[:, j, j] = by[:, place].real
            maps[:, j, i], maps[:, i, j] = by[:, place].imag, -by[:, place].imag
        mapped(graph, part, maps)
    torch.testing.assert_close(graph.run(x)[0], before, rtol=1e-8, atol=1e-8)


def test_what_is_found_of_others() -> None:
    stretched = only_site(captured(Decoder("stretched")))
    assert stretched.missing == {
        "query": "pairs are mixed by other than rotations", "key": "pairs are mixed by other than rotations"
    }  # fmt: skip
    query, *_ = parts(only_site(captured(Decoder("half", norm=True))))
    assert [node.op for node in query.norms] == ["rms_norm"] and len(query.pairs) == 4 and query.alone


class Shared(nn.Module):
    """Two attentions on the same keys and values, as in cross-layer attention; the queries of one are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.p, self.kv = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 32)
        self.o, self.u = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, p, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (self.q(x), self.p(x), *self.kv(x).chunk(2, -1)))
        first = self.o(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(-2))
        second = self.u(F.scaled_dot_product_attention(p * 0.5, k, v, scale=0.3).transpose(1, 2).flatten(-2))
        return first + second, q


def test_channels_that_others_read_too_are_not_alone() -> None:
    first, second = attention_sites(captured(Shared()))
    assert not any(part.alone for part in (*parts(first)[:3], *parts(second)[1:3]))
    assert parts(second)[0].alone and parts(second)[0].factor == 0.5 and parts(first)[3].alone


class Cached(nn.Module):
    """One step of decoding: keys and values of the past are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 48), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def test_a_cache_beside_the_keys() -> None:
    inputs = torch.randn(2, 1, WIDTH), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    query, key, value, _ = parts(only_site(regauge.capture(Cached().eval(), inputs)))
    assert key.cached and value.cached and not query.cached and not key.in_order
    assert key.channels.tolist() == (torch.arange(16) + 16).reshape(2, 8).tolist()


def test_heads_folded_into_the_batch() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 3, 20, batch_first=True).eval()
    graph = regauge.optimize(regauge.capture(model, (torch.randn(2, LENGTH, WIDTH),)), "simplify")
    query, key, value, output = parts(only_site(graph))
    assert [int(part.channels[1, 0]) for part in (query, key, value, output)] == [4, 16, 28, 4]


def test_an_onnx_file_has_the_same_sites(tmp_path: Path) -> None:
    """Of an opset without Attention, whose products and biases are put together first."""
    model = Decoder("half").eval()
    x = torch.randn(2, LENGTH, WIDTH)
    torch.onnx.export(model, (x,), tmp_path / "decoder.onnx", dynamo=True, opset_version=18, verbose=False)
    graph = assembled(regauge.load(tmp_path / "decoder.onnx"))
    query, key, value, output = parts(only_site(graph))
    assert query.pairs.tolist() == key.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    torch.testing.assert_close(query.weight.flatten(0, 1).float(), model.q.weight.detach())
    torch.testing.assert_close(output.weight.flatten(0, 1).float(), model.o.weight.detach().T)
    assert value.head_of.tolist() == [0, 0, 1, 1]
