"""``share`` with central tensors and with codebooks: what is exact, what is found again, what is stored."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import regauge
from layered_networks import Decoder, ids, redrawn
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph
from regauge.passes.calibration.sensitivity import layers_by_name
from regauge.passes.factorization.networks import Network
from regauge.passes.factorization.problems import Problem, plain_problems
from regauge.passes.sharing.central import NETWORKS, Choice, choices, fitted
from regauge.passes.sharing.sites import Site


def decoder() -> Decoder:
    return redrawn(Decoder(blocks=4))


def error(graph: Graph, found: Graph) -> float:
    x = ids(64, seed=9)
    (wanted,), (given,) = graph.run((x,)), found.run((x,))
    return float((wanted - given).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("network", NETWORKS)
def test_central_tensors_of_full_size_are_exact(network: Network) -> None:
    torch.manual_seed(0)
    graph = capture(decoder().double().eval(), (ids(),)).copy()
    names = tuple(f"blocks.{block}.fc1.weight" for block in range(4))
    layers = layers_by_name(graph, names)
    problems = [plain_problems(layer)[0] for layer in layers.values()]
    sizes = {"a": 4, "b": 4, "x": 2, "y": 16} if len(network.inputs) == 2 else dict(a=2, b=4, c=2, x=2, y=8, z=2)
    sizes |= {"r": 16, "s": 4} if len(network.inputs) == 3 else {"r": 32}
    choice = Choice(network, tuple(sizes.items()), 0, 0.0)
    item = fitted(Site(names, 512), problems, choice, 1)
    wanted = graph.run((ids(),))[0]
    for problem in problems:
        item.matrix(problem)
    item.write(graph, list(layers.values()), by="test")
    shared = [
        parameter
        for parameter in graph.parameters.values()
        if len(parameter.uses) == 4 and parameter.kind == "parameter"
    ]
    assert [parameter.tensor.numel() for parameter in shared] == [item.factors[names[0]][1].numel()]
    assert float((graph.run((ids(),))[0] - wanted).abs().max()) < 1e-10


def test_central_tensors_find_what_layers_have_in_common() -> None:
    """Layers that are made of one central tensor are found again, at the size of its network."""
    torch.manual_seed(0)
    sizes = {"a": 2, "b": 8, "x": 4, "y": 8, "r": 2}
    core = torch.randn(2, 8, 8).double()
    own = [torch.randn(2, 4, 2).double() for _ in range(4)]
    graph = capture(decoder().double().eval(), (ids(),)).copy()
    layers = list(layers_by_name(graph, [f"blocks.{block}.fc1.weight" for block in range(4)]).values())
    problems = [
        Problem(layer, NETWORKS[0].image([first, core], sizes)) for layer, first in zip(layers, own, strict=True)
    ]
    least = min(choices(problems), key=lambda choice: (round(choice.loss, 6), choice.parameters))
    found = fitted(Site(tuple(layer.weight.name for layer in layers), 512), problems, least, 4)
    assert found.parameters <= 2 * (64 + 4 * 8)
    assert sum(p.error(found.matrix(p)) for p in problems) < 1e-12


def test_codebooks_hold_what_layers_are_made_of(tmp_path: Path) -> None:
    """Weights that are made of 16 vectors come back from the table and codes."""
    torch.manual_seed(0)
    model, table = decoder(), torch.randn(16, 4)
    with torch.no_grad():
        for block in model.blocks:
            block.fc1.weight.copy_(table[torch.randint(16, (32 * 4,))].reshape(32, 16))
    graph = capture(model.eval(), (ids(),), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "share{kind=codebook,params=0.9,align=false,include=blocks.*.fc1.weight}")
    held = found.parameters["blocks.0.fc1_codebook"]
    assert len(held.uses) == 4 and found.parameters["blocks.3.fc1_codes"].dtype == torch.uint8
    assert error(graph, found) < 1e-3
    torch.testing.assert_close(found.to_torch()(ids()), found.run((ids(),))[0])
    model = onnx.load(found.to_onnx(tmp_path / "codes.onnx"))
    assert [list(t.dims) for t in model.graph.initializer if t.name == "blocks.0.fc1_codebook"] == [list(held.shape)]
    assert len([t for t in model.graph.initializer if sorted(t.dims) == [16, 32]]) == 4  # of the other layers
