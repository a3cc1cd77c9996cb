"""``split-experts``: exact with all experts, near with those that count, and really fewer multiplications."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from layered_networks import Decoder, GroupedDecoder, ids, redrawn
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph


def text(batches: int = 2, count: int = 16) -> list[tuple[torch.Tensor]]:
    return [(ids(count, seed),) for seed in range(1, 1 + batches)]


def captured(model: nn.Module) -> Graph:
    return capture(redrawn(model).double().eval(), (ids(),), dynamic={0: {0: "batch"}})


@pytest.mark.parametrize("model", [Decoder, GroupedDecoder])
def test_all_experts_together_are_the_dense_layer(model: type[nn.Module]) -> None:
    """With biases and without, gated and not."""
    graph = captured(model())
    found = regauge.optimize(graph, "split-experts{experts=4,active=4}", data=text())
    assert len([node for node in found.nodes if node.op == "grouped_mm"]) >= 6
    torch.testing.assert_close(found.run((ids(5, 7),))[0], graph.run((ids(5, 7),))[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.to_torch()(ids(5, 7)), graph.run((ids(5, 7),))[0], rtol=0, atol=1e-10)


def test_dropout_on_units_rests_between_layers() -> None:
    """As T5 and BART have it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8)).double().eval()
    x = torch.randn(32, 8, dtype=torch.float64)
    graph = regauge.capture(model, (x,))
    split = regauge.optimize(graph, "split-experts{experts=4,active=4}", data=[x])
    assert split.report.passes[0].changed
    torch.testing.assert_close(split.run((x,))[0], graph.run((x,))[0])


def test_hidden_layers_of_a_loaded_file_are_products_and_sums(tmp_path: Path) -> None:
    """They were passed over without a word."""
    model = redrawn(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))).eval()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    capture(model, (x,)).to_onnx(tmp_path / "dense.onnx")
    graph = regauge.load(tmp_path / "dense.onnx")
    assert [node.op for node in graph.nodes] == ["matmul", "add", "relu", "matmul", "add"]
    found = regauge.optimize(graph, "split-experts{experts=4,active=4}", data=[(x,)])
    assert sum(node.op == "grouped_mm" for node in found.nodes) == 2
    torch.testing.assert_close(found.run((x,))[0], model(x), rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(found.to_onnx(tmp_path / "experts.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=0, atol=1e-5)


def test_a_network_without_hidden_layers_is_told() -> None:
    graph = capture(nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
    left = regauge.optimize(graph, "split-experts", data=[torch.randn(4, 8)]).report.passes[0].left
    assert left == {"no hidden layer of free units was found": 1}


class Domains(nn.Module):
    """Rows of two domains, each with hidden units of its own, which lie mixed up."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.domain = torch.randperm(32, generator=torch.Generator().manual_seed(0)) % 2
        with torch.no_grad():
            self.up.weight[:, 0] = torch.where(self.domain == 1, 6.0, -6.0)
            self.up.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


def rows(count: int, seed: int) -> torch.Tensor:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = torch.where(x[:, 0] > 0, 2.0, -2.0)
    return x


def test_units_of_a_domain_become_an_expert_and_its_rows_find_it() -> None:
    torch.manual_seed(0)
    model = Domains().eval()
    graph = capture(model, (rows(4, 0),), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "split-experts{experts=2,active=1}", data=[(rows(256, 1),)])
    x = rows(128, 2)
    wanted, given = model(x).detach(), found.run((x,))[0]
    assert float((wanted - given).square().sum() / wanted.square().sum()) < 0.02
    macs = [figures(g).macs for g in (graph, found)]
    assert macs[1] < 0.6 * macs[0]  # half of the units, and the router


def test_more_experts_that_run_lose_less() -> None:
    graph, x = captured(Decoder()), ids(32, 9)
    (wanted,), errors = graph.run((x,)), []
    for active in (1, 2, 3):
        found = regauge.optimize(graph, f"split-experts{{experts=4,active={active}}}", data=text(4))
        errors.append(float((found.run((x,))[0] - wanted).square().sum() / wanted.square().sum()))
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2] > 0, errors
    assert any(note.startswith("error of the outputs") for note in found.report.passes[0].notes)


def test_what_cannot_be_is_refused_or_left() -> None:
    graph = captured(Decoder())
    with pytest.raises(PassError, match="5 of 4 experts cannot run: active=4 at most"):
        regauge.optimize(graph, "split-experts{experts=4,active=5}", data=text())
    with pytest.raises(PassError, match="needs data"):
        regauge.optimize(graph, "split-experts")
    left = regauge.optimize(graph, "split-experts{experts=5,active=2}", data=text()).report.passes[0].left
    assert left["its units are not a multiple of 5"] == 3


class Between(nn.Module):
    """A hidden layer with something behind its activation."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(8, 12), nn.Linear(12, 8), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.up(x))
        reads = {
            "cumsum": lambda: h.cumsum(1),
            "softmax": lambda: h.softmax(2),
            "layer_norm": lambda: F.layer_norm(h, (12,)),
        }
        return self.down(reads[self.between]())


@pytest.mark.parametrize("between", ["cumsum", "softmax", "layer_norm"])
def test_what_mixes_rows_or_units_does_not_stand_between(between: str) -> None:
    """Sums along positions ran over the rows of an expert, and norms over its units alone: other numbers."""
    graph = capture(Between(between).double().eval(), (torch.randn(2, 5, 8).double(),), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "split-experts{experts=3,active=3}", data=[(torch.randn(16, 5, 8).double(),)])
    assert found.report.passes[0].left == {f"{between} stands between": 1}
    assert not any(node.op == "grouped_mm" for node in found.nodes)
