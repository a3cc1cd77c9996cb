"""``share`` on networks: what blocks have in common, budgets, data, and what comes out as torch and ONNX."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import regauge
from layered_networks import Decoder, ResidualNetwork, ids, images, redrawn
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import matrices_of
from regauge.passes.calibration.sensitivity import layers_by_name
from regauge.passes.factorization.problems import plain_problems
from regauge.passes.sharing.grouping import groups_of
from regauge.passes.sharing.tied import Tied


class Alike(Decoder):
    """Blocks that are noisy copies of two, each with its hidden channels in another order."""

    def __init__(self) -> None:
        super().__init__(blocks=4)
        redrawn(self)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for place, block in enumerate(self.blocks):
                block.load_state_dict(self.blocks[place // 2 * 2].state_dict())
                order = torch.randperm(32, generator=generator)
                block.fc1.weight.copy_(block.fc1.weight[order])
                block.fc1.bias.copy_(block.fc1.bias[order])
                block.fc2.weight.copy_(block.fc2.weight[:, order])
                for weight in (block.qkv.weight, block.proj.weight, block.fc1.weight, block.fc2.weight):
                    weight.add_(0.2 * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@cache
def decoder() -> Graph:
    return capture(Alike().eval(), (ids(),), dynamic={0: {0: "batch"}})


def batches() -> list[torch.Tensor]:
    return [ids(64, seed=seed) for seed in range(1, 5)]


def error(graph: Graph, found: Graph) -> float:
    x = ids(64, seed=9)
    (wanted,), (given,) = graph.run((x,)), found.run((x,))
    return float((wanted - given).square().sum() / wanted.square().sum())


def readers(graph: Graph, name: str) -> int:
    return len(graph.parameters[name].uses)


def test_neighbours_that_are_alike_are_tied() -> None:
    graph = decoder()
    found = regauge.optimize(graph, "share{blocks=2,rank=2}")
    assert "tied: blocks.0+blocks.1 blocks.2+blocks.3" in found.report.passes[0].notes
    assert readers(found, "blocks.0.fc1.weight") == 2 and "blocks.1.fc1.weight" not in found.parameters
    assert found.parameters["blocks.0.fc1.weight"].aliases == ("blocks.1.fc1.weight",)
    assert found.parameters["blocks.1.fc1_down.weight"].shape == (2, 16)
    assert error(graph, found) < 0.03


def test_one_basis_makes_them_alike() -> None:
    graph = decoder()
    errors = [error(graph, regauge.optimize(graph, f"share{{blocks=2,rank=0{more}}}")) for more in ("", ",align=false")]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("kind", ["blocks=2,rank=2", "blocks=2,kind=dictionary", "params=0.6,kind=central"])
def test_data_keeps_more_than_weights_alone(kind: str) -> None:
    graph = decoder()
    errors = [error(graph, regauge.optimize(graph, f"share{{{kind}}}", data=given)) for given in (None, batches())]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    "options", ["", ",kind=dictionary", ",kind=central", ",blocks=2", ",rank=1", ",groups=nearest"]
)
def test_budgets_are_met(options: str) -> None:
    graph = decoder()
    found = regauge.optimize(graph, f"share{{params=0.75{options}}}")
    assert 0.6 < figures(found).parameters / figures(graph).parameters <= 0.75
    with pytest.raises(PassError, match="budget of params cannot be met"):
        regauge.optimize(graph, f"share{{params=0.1{options}}}")


def test_residuals_of_full_rank_are_exact() -> None:
    graph = capture(Alike().double().eval(), (ids(),)).copy()
    names = ("blocks.0.fc1.weight", "blocks.2.fc1.weight")
    layers = layers_by_name(graph, names)
    item = Tied(names, 16, matrices_of(layers[names[0]])[0] / 3)
    wanted = graph.run((ids(),))[0]
    for layer in layers.values():
        item.matrix(*plain_problems(layer))
    item.write(graph, list(layers.values()), by="test")
    assert readers(graph, names[0]) == 2
    assert float((graph.run((ids(),))[0] - wanted).abs().max()) < 1e-10


def test_whole_blocks_become_one_module(tmp_path: Path) -> None:
    found = regauge.optimize(decoder(), "share{blocks=2,rank=0,whole=true}")
    module = found.to_torch()
    blocks = module.blocks
    first, second = (blocks.get_submodule(str(block)) for block in (0, 1))
    assert first is second and first is not blocks.get_submodule("2")
    torch.testing.assert_close(module(ids()), found.run((ids(),))[0])
    found.write(tmp_path)
    spec = spec_from_file_location("written", tmp_path / "model.py")
    assert spec is not None and spec.loader is not None
    written = module_from_spec(spec)
    spec.loader.exec_module(written)
    loaded = written.load()
    assert len(list(loaded.parameters())) == len([p for p in found.parameters.values() if p.kind == "parameter"])
    torch.testing.assert_close(loaded(ids()), module(ids()))


def test_tied_weights_stay_tied_in_training_and_state() -> None:
    found = regauge.optimize(decoder(), "share{blocks=2,rank=2}")
    module = found.to_torch()
    one, other = (module.blocks.get_submodule(f"{block}.qkv") for block in (0, 1))
    assert one.weight is other.weight and one.bias is not other.bias
    before = one.weight.detach().clone()
    training = torch.optim.SGD(module.parameters(), lr=0.1)
    module(ids()).square().mean().backward()
    training.step()
    assert one.weight is other.weight and float((one.weight - before).detach().abs().max()) > 0
    again = found.to_torch()
    again.load_state_dict(module.state_dict())
    assert again.blocks.get_submodule("1.qkv").weight is again.blocks.get_submodule("0.qkv").weight
    torch.testing.assert_close(again(ids()), module(ids()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder().to_onnx(tmp_path_factory.mktemp("whole") / "whole.onnx")


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ("blocks=2,rank=2", "torch"),
        ("blocks=2,rank=2", "onnx"),
        pytest.param("blocks=2,kind=dictionary", "torch", marks=pytest.mark.sweep),
        ("blocks=2,kind=dictionary", "onnx"),
        pytest.param("params=0.6,kind=central", "torch", marks=pytest.mark.sweep),
        ("params=0.6,kind=central", "onnx"),
        pytest.param("params=0.6,kind=codebook", "torch", marks=pytest.mark.sweep),
        ("params=0.6,kind=codebook", "onnx"),
        ("blocks=1,rank=0,whole=true", "torch"),
    ],
)
def test_shared_weights_are_stored_once_in_onnx(options: str, source: str, whole: Path, tmp_path: Path) -> None:
    graph = decoder() if source == "torch" else regauge.load(whole)
    found = regauge.optimize(graph, f"share{{{options}}}")
    model = onnx.load(found.to_onnx(tmp_path / "shared.onnx"))  # which runs it, and compares
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    held = [p for p in found.parameters.values() if p.rank > 1]
    assert len(matrices) <= len(held)
    sizes = Counter(tuple(sorted(tensor.dims)) for tensor in matrices)
    if "blocks" in options:
        assert sizes[16, 48] == (0 if "dictionary" in options else 1 if "blocks=1" in options else 2)


class Turned(nn.Module):
    """An embedding whose table is the head's weight too, and a layer that is read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids)
        return nn.functional.linear(self.layer(x) @ self.layer.weight, self.tok.weight)


def test_weights_that_are_read_transposed_too_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = capture(Turned().eval(), (ids(),)).to_onnx(tmp_path / "turned.onnx")
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert names == {"tok.weight", "layer.weight", "layer.bias"}


class Behind(nn.Module):
    """Layers without biases that have one weight; the exporter itself finds equal tensors of up to 1,024 entries."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(40) for _ in range(2)])
        self.layers = nn.ModuleList([nn.Linear(40, 40, bias=False) for _ in range(2)])
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x)).relu()
        return x


def test_weights_that_several_layers_read_transposed_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = capture(Behind().eval(), (torch.randn(2, 3, 40),)).to_onnx(tmp_path / "tied.onnx")
    assert len([tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) > 1]) == 1


def test_simplify_leaves_shared_weights_shared() -> None:
    for options in ("blocks=2,rank=2", "blocks=2,kind=dictionary"):
        found = regauge.optimize(decoder(), f"share{{{options}}}")
        again = regauge.optimize(found, "simplify")
        assert figures(again).parameters == figures(found).parameters


class Rows(nn.Module):
    """Residual blocks on rows of 16."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 2, 16)), (8, (16, 16))])
def test_results_are_mixed_where_that_is_cheaper_than_mixing_matrices(rows: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = redrawn(Rows()), torch.randn(rows, 16)
    graph = capture(model, (x,))
    found = regauge.optimize(graph, "share{kind=dictionary,blocks=2}")
    assert shape in {node.output.shape for node in found.nodes if node.op == "reshape"}
    atoms, mixture = (found.parameters[f"blocks.0.1_{name}"].tensor for name in ("atoms", "mixture"))
    y = nn.functional.layer_norm(x, (16,), *(found.parameters[f"blocks.0.0.{n}"].tensor for n in ("weight", "bias")))
    wanted = y @ (mixture @ atoms).reshape(16, 16).t() + found.parameters["blocks.0.1.bias"].tensor
    given = next(node for node in found.nodes if node.op == "gelu").inputs[0]
    results = []
    found.run((x,), hook=lambda node, values: results.append((node, values)))
    torch.testing.assert_close(next(values[0] for node, values in results if given in node.outputs), wanted)
    torch.testing.assert_close(found.to_torch()(x), found.run((x,))[0])


def test_convolutions_are_shared() -> None:
    graph = capture(redrawn(ResidualNetwork()), (images(),), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "share{blocks=1,rank=4}", data=[images(32, seed) for seed in range(2)])
    assert readers(found, "blocks.0.conv1.weight") == 3
    torch.testing.assert_close(found.to_torch()(images()), found.run((images(),))[0])


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("adjacent", [(0,), (1, 2, 3), (4,)]),
        ("cycle", [(0, 3), (1, 4), (2,)]),
        ("nearest", [(0, 4), (1, 2, 3)][:2]),
    ],
)
def test_groups(how: str, wanted: list[tuple[int, ...]]) -> None:
    places = [0.0, 5.0, 5.1, 5.2, 0.3]

    def loss(group: tuple[int, ...]) -> float:
        mean = sum(places[block] for block in group) / len(group)
        return sum((places[block] - mean) ** 2 for block in group)

    assert groups_of(5, len(wanted), how, loss) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "say how much is kept"),
        ("blocks=2,whole=true", "nothing is chosen"),
        ("blocks=2,kind=dictionary,rank=3", "rank is for tied blocks"),
        ("blocks=2,kind=central", "write share{kind=central,params=0.5}"),
        ("blocks=2,include=nothing.*", "matches no parameter"),
    ],
)
def test_what_makes_no_sense_is_refused(options: str, words: str) -> None:
    with pytest.raises(PassError, match=words):
        regauge.optimize(decoder(), f"share{{{options}}}" if options else "share")


def test_a_network_without_repeated_blocks_is_left_alone() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), (torch.randn(2, 4),))
    for text in ("share{blocks=1}", "share{kind=dictionary,params=0.7}"):
        assert "1 x no blocks of one structure were found" in str(regauge.optimize(graph, text).report)


def test_starts_of_recursive_transformers() -> None:
    graph = decoder()
    for start, source in (("lower", 1), ("stepwise", 3)):
        found = regauge.optimize(graph, f"share{{blocks=2,rank=0,align=false,groups=cycle,init={start}}}")
        shared = found.parameters["blocks.1.proj.weight"]  # of blocks 1 and 3, the second group
        assert shared.aliases == ("blocks.3.proj.weight",)
        torch.testing.assert_close(shared.tensor, graph.parameters[f"blocks.{source}.proj.weight"].tensor)


def test_runs_that_are_longer_than_they_can_be_are_not_weighed() -> None:
    """What blocks lose is asked for few runs of many, and the groups are the best of all."""
    places = [0.0, 0.1, 0.3, 3.0, 3.1, 3.3, 6.0, 6.1, 6.2, 9.0, 9.1, 9.4]
    asked = set[tuple[int, ...]]()

    def loss(group: tuple[int, ...]) -> float:
        asked.add(group)
        mean = sum(places[block] for block in group) / len(group)
        return sum((places[block] - mean) ** 2 for block in group)

    assert groups_of(12, 4, "adjacent", loss) == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert len(asked) <= 45  # of 78 runs
