"""``sparsify`` on networks: patterns in every layer, errors beside magnitude's, what is left alone, ONNX in and out."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.cli import main
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.verify import verify
from regauge.passes.base import Context
from regauge.passes.calibration.layers import layer_of
from regauge.passes.sparsity.allocation import least_total
from regauge.passes.sparsity.patterns import Blocks, NofM, Unstructured
from regauge.passes.sparsity.permutation import permuted
from regauge.passes.sparsity.run_costs import RunCost, cost_per_weight


class Attention(nn.Module):
    """A transformer block with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.ln1, self.ln2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.ln2(x))))
        return x @ self.embed.weight.t()


@cache
def transformer() -> tuple[Graph, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        model.embed.weight.mul_(torch.linspace(0.2, 2, 16))  # inputs of unlike size
        model.up.bias.add_(0.5)
    tokens = torch.randint(0, 20, (48, 12), generator=torch.Generator().manual_seed(1))
    graph = capture(model, (tokens[:2],), dynamic={0: {0: "batch"}})
    return graph, list(tokens[:32].split(16)), tokens[32:]


@cache
def convolutional() -> tuple[Graph, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1), nn.ReLU(),
        nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8 * 4, 4),
    )  # fmt: skip
    x = torch.randn(160, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model(x[:40])  # running statistics
    graph = capture(model.eval(), (x[:2],), dynamic={0: {0: "batch"}})
    return graph, list(x[:96].split(48)), x[96:]


Network = Callable[[], tuple[Graph, list[torch.Tensor], torch.Tensor]]
NETWORKS = [transformer, convolutional]
LAYERS = {transformer: 4, convolutional: 3}


def error(graph: Graph, sparse: Graph, x: torch.Tensor) -> float:
    """The squared error of the outputs, as a share of their variance."""
    (y,), (z,) = graph.run(x), sparse.run(x)
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


def matrices(graph: Graph, sparse: Graph) -> dict[str, torch.Tensor]:
    """The weights that changed and have zeros now, as [rows, inputs]."""
    found = {}
    for name, parameter in sparse.parameters.items():
        now = parameter.tensor
        if parameter.rank > 1 and bool((now == 0).any()) and not torch.equal(now, graph.parameters[name].tensor):
            found[name] = now.movedim(1, -1).reshape(-1, now.shape[1])
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("with_data", [False, True])
def test_every_layer_that_fits_gets_the_pattern(network: Network, with_data: bool) -> None:
    graph, data, _ = network()
    sparse = regauge.optimize(graph, "sparsify{pattern=2:4}", data=data if with_data else None)
    verify(sparse)
    found = matrices(graph, sparse)
    assert len(found) == LAYERS[network]
    assert all(NofM(2, 4).holds(matrix != 0) for matrix in found.values())
    assert not any(bool((matrix.signbit() & (matrix == 0)).any()) for matrix in found.values())  # zeros are all bits 0
    assert "2:4: 50.0% of the weights" in str(sparse.report)


@pytest.mark.parametrize("network", NETWORKS)
def test_each_method_loses_less_than_the_one_before(network: Network) -> None:
    graph, data, unseen = network()
    steps = ["method=magnitude,update=off", "update=columns,refine=off", "refine=off", ""]
    errors = [
        error(graph, regauge.optimize(graph, f"sparsify{{pattern=2:4,{step}}}", data=data), unseen) for step in steps
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]
    assert errors[3] < 1.05 * errors[2] and errors[3] < 0.4 * errors[0]


@pytest.mark.parametrize(
    "options",
    ["pattern=1:4", "pattern=2:4,transposable=true", "pattern=unstructured,ratio=0.6",
     "pattern=block,block=2x4,ratio=0.3",
     "method=wanda,refine=means", "method=wanda,update=off", "pattern=unstructured,method=wanda,allocation=uniform",
     "method=magnitude,refine=exchange", "permute=true"],
)  # fmt: skip
@pytest.mark.parametrize("network", NETWORKS)
def test_every_option_gives_a_network_that_works(network: Network, options: str) -> None:
    graph, data, unseen = network()
    sparse = regauge.optimize(graph, f"sparsify{{{options}}}", data=data)
    verify(sparse)
    module = sparse.to_torch()
    torch.testing.assert_close(module(unseen), sparse.run(unseen)[0], rtol=1e-4, atol=1e-4)
    assert error(graph, sparse, unseen) < 1 or "update=off" in options  # nothing is trained: small outputs


@pytest.mark.parametrize("options", ["pattern=unstructured,ratio=0.7", "pattern=block,block=4x4,ratio=0.5"])
def test_ratios_are_met_over_all_layers_and_unlike_between_them(options: str) -> None:
    graph, data, _ = transformer()
    sparse = regauge.optimize(graph, f"sparsify{{{options}}}", data=data)
    shares = {name: float((matrix == 0).float().mean()) for name, matrix in matrices(graph, sparse).items()}
    sizes = {name: graph.parameters[name].tensor.numel() for name in shares}
    gone = sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())
    assert gone == pytest.approx(float(options.rpartition("=")[2]), abs=0.02)
    assert max(shares.values()) - min(shares.values()) > 0.05
    told = {cut.dim: 1 - cut.after / cut.before for cut in sparse.report.passes[0].cuts}
    assert told == pytest.approx(shares)
    assert all(f"{name}: {share:.1%} zero" in str(sparse.report) for name, share in shares.items())


@pytest.mark.parametrize("pattern", ["unstructured", "block,block=2x2"])
def test_more_goes_where_the_outputs_lose_less(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8].repeat(3, 1)  # the second layer gets every input four times
        model[0].bias[8:] = model[0].bias[:8].repeat(3)
    x = torch.randn(400, 16)
    graph = capture(model, (x[:2],), dynamic={0: {0: "batch"}})
    errors = [
        error(
            graph, regauge.optimize(graph, f"sparsify{{pattern={pattern},ratio=0.35{more}}}", data=[x[:200]]), x[200:]
        )
        for more in ("", ",allocation=uniform")
    ]
    assert errors[0] < 0.4 * errors[1]


def test_the_least_sum_takes_pieces_by_their_slopes() -> None:
    curves = {"flat": [0.0, 1.0, 2.0], "steep": [0.0, 10.0, 11.0]}  # the bump of the second lies above its hull
    found = least_total(curves, {"flat": 100, "steep": 100}, (0.0, 0.5, 1.0), 0.5)
    assert found == {"flat": 1.0, "steep": 0.0}
    found = least_total(curves, {"flat": 100, "steep": 100}, (0.0, 0.5, 1.0), 0.75)
    assert found == {"flat": 1.0, "steep": 0.5}


def test_what_a_weight_costs_by_hand() -> None:
    graph, _, _ = convolutional()
    layer = next(layer for layer in map(layer_of, graph.nodes) if layer is not None)
    assert [cost_per_weight(cost, layer, Blocks(2, 4), 64.0) for cost in ("weights", "macs")] == [1.0, 64.0]
    assert cost_per_weight("power", layer, Blocks(2, 4), 64.0) == pytest.approx(3 / 16 / 8)  # of 3 input channels
    arithmetic, moved = 3.7 + 0.9, (4 + 2 * 2) / (2 * 4) * 4 * 2.5  # numbers of 4 bytes
    found = cost_per_weight("energy", layer, Blocks(2, 4), 64.0)
    assert found == pytest.approx(64 * (arithmetic + moved) + 4 * 162.5)
    assert cost_per_weight("energy", layer, Unstructured(), 64.0) == pytest.approx(64 * (4.6 + 30) + 650)


def test_the_least_sum_within_a_cost_goes_where_weights_cost_the_most() -> None:
    curves = {"wide": [0.0, 1.0, 3.0], "long": [0.0, 2.0, 6.0]}
    assert least_total(curves, {"wide": 100, "long": 100}, (0.0, 0.5, 1.0), 0.25) == {"wide": 0.5, "long": 0.0}
    # in "long" each weight is used four times: its first half saves 200 for 2, that of "wide" 50 for 1
    assert least_total(curves, {"wide": 100, "long": 400}, (0.0, 0.5, 1.0), 0.4) == {"wide": 0.0, "long": 0.5}


class Pooled(nn.Module):
    """Two layers on twelve tokens, of which the second has every input four times, and two on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.a.weight[8:] = self.a.weight[:8].repeat(3, 1)
            self.a.bias[8:] = self.a.bias[:8].repeat(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.d(self.c(self.b(self.a(x).relu()).mean(1)).relu())
        return result


@pytest.mark.parametrize("cost", ["macs", "power", "energy"])
def test_a_share_of_what_a_run_costs_goes_where_the_outputs_lose_least_by_it(cost: RunCost) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 12, 16)
    graph = capture(Pooled().eval(), (x[:2],), dynamic={0: {0: "batch"}})
    layers = [layer for layer in map(layer_of, graph.nodes) if layer is not None]
    each = {
        layer.weight.name: cost_per_weight(cost, layer, Blocks(2, 2), rows)
        for layer, rows in zip(layers, (12, 12, 1, 1), strict=True)
    }
    kept, errors = {}, {}
    for options in (f"cost={cost}", "cost=weights", "allocation=uniform"):
        given = f"sparsify{{pattern=block,block=2x2,ratio=0.4,{options}}}"
        sparse = regauge.optimize(graph, given, data=[x[:100]])
        kept[options] = sum(float((sparse.parameters[n].tensor != 0).sum()) * price for n, price in each.items())
        errors[options] = error(graph, sparse, x[100:])
        told = re.search(rf"([\d.]+)% of the {cost} of", str(sparse.report))
        assert (told is not None) == (options == f"cost={cost}")
        if told is not None:
            assert float(told[1]) == pytest.approx(40, abs=1.5)
    every = sum(graph.parameters[name].tensor.numel() * price for name, price in each.items())
    assert kept[f"cost={cost}"] / every == pytest.approx(0.6, abs=0.015)
    assert abs(kept["cost=weights"] / every - 0.6) > 0.01, "a share of weights is another share of the costs"
    assert errors[f"cost={cost}"] < 0.7 * errors["allocation=uniform"]


@pytest.mark.parametrize("network", NETWORKS)
def test_reordering_raises_what_masks_keep(network: Network) -> None:
    graph, data, _ = network()
    kept = {}
    for permute in ("false", "true"):
        sparse = regauge.optimize(graph, f"sparsify{{permute={permute}}}")
        kept[permute] = sum(float(matrix.abs().sum()) for matrix in matrices(graph, sparse).values())
    assert kept["true"] > 1.005 * kept["false"]


@pytest.mark.parametrize("network", NETWORKS)
def test_reordered_networks_compute_the_same(network: Network) -> None:
    graph, data, unseen = network()
    context = Context()
    names = list(graph.parameters)
    for batches in (None, [(part,) for part in data]):
        reordered = permuted(graph, names, NofM(2, 4), batches, 0, context, by="sparsify")
        verify(reordered)
        assert any(edit.what.endswith("reordered") for edit in reordered.history)
        (y,), (z,) = graph.run(unseen), reordered.run(unseen)
        assert float((y - z).abs().max()) <= 1e-6 * float(y.abs().max())


def test_large_layers_are_bettered_without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data, unseen = transformer()
    off = error(graph, regauge.optimize(graph, "sparsify{refine=off}", data=data), unseen)
    monkeypatch.setattr("regauge.passes.sparsity.sequential.MOST_WORK", 0)
    sparse = regauge.optimize(graph, "sparsify", data=data)
    assert error(graph, sparse, unseen) < 1.2 * off  # what layers save does not add up in so small a network
    assert "4 large layers: entries changed places with the other weights held fixed" in str(sparse.report)


def test_infinite_inputs_are_told_with_their_layer() -> None:
    graph, data, _ = convolutional()
    with pytest.raises(PassError, match="infinite numbers on the calibration data"):
        regauge.optimize(graph, "sparsify", data=[data[0] * torch.inf])


@pytest.mark.parametrize("options", ["", "pattern=unstructured", "permute=true", "method=wanda", "pattern=block"])
def test_inputs_that_hardly_vary_leave_weights_as_they_are(options: str) -> None:
    """Centring them leaves rounding, which is no matrix of squares and nothing to fit weights to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
        model[0].bias.abs_().add_(1)
    graph = capture(model, (torch.randn(2, 12),), dynamic={0: {0: "batch"}})
    data = [torch.randn(64, 12) for _ in range(3)]
    sparse = regauge.optimize(graph, f"sparsify{{{options}}}", data=data)
    (expected,), (found,) = graph.run((data[0],)), sparse.run((data[0],))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    weight = graph.parameters["2.weight"].tensor
    assert float(sparse.parameters["2.weight"].tensor.abs().max()) < 2 * float(weight.abs().max())


class Experts(nn.Module):
    """Two layers, each with examples of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(y)


@pytest.mark.parametrize("options", ["", "pattern=unstructured", "method=wanda", "refine=means", "update=columns"])
def test_a_layer_that_no_example_reaches_keeps_what_is_left_of_it(options: str) -> None:
    """As an expert that no token is sent to: there are no means, and nothing to move the bias by."""
    dynamic = {0: {0: "unseen"}, 1: {0: "seen"}}
    graph = capture(Experts(), (torch.randn(2, 8), torch.randn(3, 8)), dynamic=dynamic)
    sparse = regauge.optimize(graph, f"sparsify{{{options}}}", data=[(torch.zeros(0, 8), torch.randn(5, 8))])
    before, after = graph.parameters["first.weight"].tensor, sparse.parameters["first.weight"].tensor
    assert bool((after == 0).any())
    torch.testing.assert_close(after, torch.where(after != 0, before, 0))
    torch.testing.assert_close(sparse.parameters["first.bias"].tensor, graph.parameters["first.bias"].tensor)


def test_what_is_left_alone_is_counted_with_its_reason() -> None:
    graph, data, _ = convolutional()
    left = regauge.optimize(graph, "sparsify{exclude=[11.*]}").report.passes[0].left
    assert left["excluded"] == 1
    assert left["a grouped convolution"] == 1
    assert left["its inputs are no multiple of 4"] == 1
    graph, data, _ = transformer()
    sparse = regauge.optimize(graph, "sparsify{include=[up.*]}", data=data)
    assert list(matrices(graph, sparse)) == ["up.weight"]


class Prompted(nn.Module):
    """A token of its own before those of the input, as vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


def test_weights_that_an_operator_of_one_input_reads_are_left_alone() -> None:
    graph = capture(Prompted(), (torch.randn(2, 3, 8),), dynamic={0: {0: "batch"}})
    sparse = regauge.optimize(graph, "sparsify")
    assert list(matrices(graph, sparse)) == ["layer.weight"]
    assert sparse.report.passes[0].left["no linear layer, but read by expand"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("pattern=4:2", "no pattern"),
        ("pattern=2:4,ratio=0.5", "give no ratio"),
        ("pattern=block,block=4y4", "no size of a block"),
        ("pattern=2:4,block=4x4", "is for pattern=block"),
        ("pattern=2:4,allocation=uniform", "give no allocation"),
        ("pattern=unstructured,transposable=true", "is for patterns N:M"),
        ("method=obs", "needs data for method=obs"),
        ("transposable=true,refine=exchange", "rows depend on one another"),
        ("refine=means,update=columns", "which refine=means would change"),
        ("pattern=block,cost=macs", "needs data for cost=macs"),
        ("pattern=block,cost=energy,allocation=uniform", "with allocation=adaptive"),
        ("cost=energy", "is for a ratio that layers share out"),
        ("exclude=[haed.*]", "matches no parameter"),
    ],
)
def test_wrong_options_are_told(options: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        regauge.optimize(transformer()[0], f"sparsify{{{options}}}")


def test_onnx_in_and_out_by_the_command_line(tmp_path: Path) -> None:
    graph, batches, unseen = convolutional()
    graph.to_onnx(tmp_path / "in.onnx")
    loaded = regauge.load(tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", **{loaded.inputs[0].name: torch.cat(batches).numpy()})
    errors = []
    for given in ([], ["--data", str(tmp_path / "x.npz")]):
        out = str(tmp_path / "out.onnx")
        assert (
            main(["optimize", str(tmp_path / "in.onnx"), "-o", out, "--passes", "sparsify{pattern=2:4}", *given]) == 0
        )
        written = regauge.load(out)
        found = matrices(loaded, written)
        assert len(found) == 3 and all(NofM(2, 4).holds(matrix != 0) for matrix in found.values())
        errors.append(error(loaded, written, unseen))
    assert errors[1] < 0.1 * errors[0]


class Transposed(nn.Module):
    """A linear layer written as Falcon writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight.t())


def test_weights_that_are_turned_first_have_zeros_too() -> None:
    sparse = regauge.optimize(capture(Transposed(), (torch.randn(2, 8),)), "sparsify{pattern=2:4}")
    assert float((sparse.parameters["weight"].tensor == 0).double().mean()) == 0.5
    assert not sparse.report.passes[0].left
