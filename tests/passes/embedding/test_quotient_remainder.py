"""``quotient-remainder``: exact for tables that are made so, small, and the fit that the formulas say elsewhere."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph


class Words(nn.Module):
    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(*table.shape), nn.Linear(table.shape[1], 4)
        with torch.no_grad():
            self.tok.weight.copy_(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tok(ids))


def captured(table: torch.Tensor) -> Graph:
    torch.manual_seed(0)
    return capture(Words(table).eval(), (torch.arange(6).reshape(2, 3),), dynamic={0: {0: "batch"}})


@pytest.mark.parametrize("count", [30, 27])  # 27: the last quotient is not whole
@pytest.mark.parametrize("compose", ["product", "sum"])
def test_tables_that_are_made_of_two_come_back(compose: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = torch.rand(5, 1, 8) + 0.5, torch.rand(6, 8) + 0.5
    whole = first * second if compose == "product" else first + second
    graph = captured(whole.reshape(-1, 8)[:count])
    found = regauge.optimize(graph, f"quotient-remainder{{rows=6,compose={compose}}}")
    assert found.parameters["tok_quotient.weight"].shape == (5, 8)
    assert found.parameters["tok_remainder.weight"].shape == (6, 8) and "tok.weight" not in found.parameters
    ids = torch.arange(count).reshape(-1, 3)
    wanted = graph.run((ids,))[0]
    assert float((found.run((ids,))[0] - wanted).abs().max()) < 1e-3
    torch.testing.assert_close(found.to_torch()(ids), found.run((ids,))[0])
    session = onnxruntime.InferenceSession(str(found.to_onnx(tmp_path / "words.onnx")))
    (given,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), found.run((ids,))[0].detach(), rtol=1e-5, atol=1e-5)


def test_tables_with_nothing_in_common_lose_what_the_report_says_and_train_on() -> None:
    torch.manual_seed(0)
    table = torch.randn(100, 8)
    found = regauge.optimize(captured(table), "quotient-remainder")
    (note,) = found.report.passes[0].notes
    sides = table.reshape(10, 10, 8).permute(2, 0, 1)
    lost = 1 - float(torch.linalg.svdvals(sides)[:, 0].square().sum() / table.square().sum())
    assert f"squared error {lost:.3g}" in note and 0.5 < lost < 0.9
    module = found.to_torch()
    module(torch.arange(6).reshape(2, 3)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_table_that_is_the_head_too_stays() -> None:
    class Tied(Words):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.tok(ids), self.tok.weight)

    graph = capture(Tied(torch.randn(30, 8)).eval(), (torch.arange(6).reshape(2, 3),))
    report = regauge.optimize(graph, "quotient-remainder").report
    assert report.passes[0].left == {"something besides embeddings reads the table": 1}


def test_a_table_of_integers_is_split_as_floats() -> None:
    """Codes of 8 bits were split as if they were the numbers: their factors were rounded to integers."""
    first, second = torch.rand(5, 1, 8) + 0.5, torch.rand(6, 8) + 0.5
    graph = captured((first * second).reshape(-1, 8))
    found = regauge.optimize(graph, "quantize{scheme=w8},quotient-remainder{rows=6}")
    ids = torch.arange(30).reshape(-1, 3)
    wanted = graph.run((ids,))[0]
    assert float((found.run((ids,))[0] - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert "it had 2 weights as floats, quantize{scheme=w8} rounded them again: let quantize come last" in (
        found.report.passes[1].notes
    )


def test_a_table_that_holds_integers_is_left() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("table", nn.Parameter(torch.arange(120).reshape(30, 4), requires_grad=False))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids, self.table)

    graph = capture(Places().eval(), (torch.arange(6).reshape(2, 3),))
    left = regauge.optimize(graph, "quotient-remainder").report.passes[0].left
    assert left == {"its numbers are integers": 1}
