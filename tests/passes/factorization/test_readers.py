"""Tables and recurrent layers as smaller ones beside a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures, local_figures
from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph
from regauge.passes.factorization.readers import readers_in


class Words(nn.Module):
    """A table of which data has few entries, and a recurrent layer that reads it."""

    def __init__(self, recurrent: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 24, padding_idx=0)
        self.recurrent = recurrent(24, 20, batch_first=True)
        self.head = nn.Linear(20 * (2 if getattr(self.recurrent, "bidirectional", False) else 1), 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.recurrent(self.table(ids))[0])
        return found


KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "two directions": lambda *sizes, **options: nn.LSTM(*sizes, bidirectional=True, num_layers=2, **options),
    "gru": lambda *sizes, **options: nn.GRU(*sizes, bias=False, **options),
    "rnn": nn.RNN,
}


def graph_and_data(kind: str) -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (48, 7), generator=torch.Generator().manual_seed(1))
    return capture(Words(KINDS[kind]).double().eval(), (ids[:2],), dynamic={0: {0: "batch"}}), ids


@pytest.mark.parametrize("kind", list(KINDS))
def test_full_rank_is_exact(kind: str) -> None:
    graph, ids = graph_and_data(kind)
    changed = graph.copy()
    readers = readers_in(changed)
    assert [reader.node.op for reader in readers] == ["embedding", "lstm" if kind == "two directions" else kind]
    for reader in readers:
        found = reader.factors(None)
        reader.write(changed, *found.of_rank(found.up.shape[1]), by="test")
    (before,), (after,) = graph.run(ids), changed.run(ids)
    assert float((before - after).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", list(KINDS))
def test_costs_are_those_of_what_is_written(kind: str) -> None:
    graph, _ = graph_and_data(kind)
    for place, reader in enumerate(readers_in(graph)):
        found = reader.factors(None)
        choices = reader.choices(graph, found, 1, on_data=False)
        for choice in choices[1::4]:
            changed = graph.copy()
            readers_in(changed)[place].write(changed, *found.of_rank(choice.ranks[0]), by="test")
            remove_dead(changed)
            before, after = figures(graph), figures(changed)
            assert after.macs - before.macs == choice.macs - choices[0].macs
            assert after.parameters - before.parameters == choice.parameters - choices[0].parameters
        assert choices[0].macs == local_figures([reader.node], graph).macs


def test_entries_that_the_data_has_are_kept(tmp_path: Path) -> None:
    graph, ids = graph_and_data("lstm")
    lost = {}
    for name, data in (("plain", None), ("data", [ids[:24]])):
        small = regauge.optimize(graph, "factorize{rank=6,tables=true,include=table.*}", data=data)
        assert {tuple(p.shape) for p in small.all_parameters()} >= {(40, 6), (24, 6)}
        lost[name] = float((small.run(ids[24:])[0] - graph.run(ids[24:])[0]).square().mean())
    assert lost["data"] < 0.5 * lost["plain"]


def test_tables_and_recurrent_layers_take_part_in_a_budget_and_go_to_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (48, 7), generator=torch.Generator().manual_seed(1))
    graph = capture(Words(nn.LSTM).eval(), (ids[:2],), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "factorize{params=0.8,tables=true}", data=[ids])
    assert figures(small).parameters <= 0.8 * figures(graph).parameters
    assert {"embedding", "lstm"} <= {node.op for node in small.nodes}
    small.to_onnx(tmp_path / "small.onnx")
    found = regauge.load(tmp_path / "small.onnx").run(ids)[0]
    assert torch.allclose(found, small.run(ids)[0], atol=1e-5)
    assert torch.allclose(small.to_torch().eval()(ids), small.run(ids)[0], atol=1e-5)
