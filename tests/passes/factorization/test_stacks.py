"""Experts and other stacks of matrices as two stacks of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from torch import randn

import regauge
from onnx_oracle import runtime_outputs
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph

EXPERTS, INPUTS, OUTPUTS = 4, 12, 10


def experts(weight: torch.Tensor, *, turned: bool = False) -> Graph:
    """Rows, and the expert of each: sorted by expert, multiplied by its matrix [inputs, outputs]."""
    graph = Graph()
    build, rows = Builder(graph), sympy.Symbol("rows", integer=True, positive=True)
    graph.symbols[rows] = (1, None)
    x, expert = build.input("x", (rows, weight.shape[1]), weight.dtype), build.input("expert", (rows,), torch.int64)
    held = build.parameter("experts.up", weight.mT.contiguous() if turned else weight)
    read = build.permute(held, dims=(0, 2, 1)) if turned else held
    ordered, order = build.sort(expert, dim=0, stable=True)
    numbers = build.constant(torch.arange(1, len(weight) + 1)[:, None], "numbers")
    before = build.cast(build.lt(build.unsqueeze(ordered, dim=0), numbers), dtype=torch.int32)
    ends = build.sum(before, dims=(1,))
    graph.outputs = [build.grouped_mm(build.index_select(x, order, dim=0), read, ends)]
    return graph


def of_rank(rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    return randn(EXPERTS, INPUTS, rank).double() @ randn(EXPERTS, rank, OUTPUTS).double()


def batch(rows: int, seed: int = 1) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    mixed = randn(INPUTS, INPUTS, generator=drawn) * torch.logspace(0, -2, INPUTS)
    x = randn(rows, INPUTS, generator=drawn) @ mixed
    return [x.double(), torch.randint(0, EXPERTS, (rows,), generator=drawn)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("with_data", [False, True])
def test_experts_of_a_rank_stay_what_they_are(turned: bool, with_data: bool) -> None:
    graph, given = experts(of_rank(4), turned=turned), batch(30)
    small = regauge.optimize(graph, "factorize{rank=4}", data=[batch(200)] if with_data else None)
    assert [node.op for node in small.nodes].count("grouped_mm") == 2 and "permute" not in {n.op for n in small.nodes}
    assert {name: tuple(own.shape) for name, own in small.parameters.items() if own.kind == "parameter"} == {
        "experts.up_down.weight": (EXPERTS, INPUTS, 4), "experts.up_up.weight": (EXPERTS, 4, OUTPUTS)
    }  # fmt: skip
    (wanted,), (found,) = graph.run(given), small.run(given)
    assert float((wanted - found).abs().max()) < 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("metric", ["output-aware", "whitened", "asvd"])
def test_each_expert_is_fitted_to_the_rows_that_it_gets(metric: str) -> None:
    graph, held_out = experts(of_rank(9)), batch(200, 2)
    held_out[0] = batch(200)[0]
    plain = regauge.optimize(graph, "factorize{rank=3}")
    fitted = regauge.optimize(graph, f"factorize{{rank=3,metric={metric}}}", data=[batch(400)])
    (wanted,) = graph.run(held_out)
    losses = [float((own.run(held_out)[0] - wanted).square().sum()) for own in (plain, fitted)]
    assert losses[1] < (0.9 if metric == "asvd" else 0.3) * losses[0]


def test_an_expert_without_rows_keeps_its_best_directions() -> None:
    graph, given = experts(of_rank(4)), batch(60)
    given[1] = given[1] % (EXPERTS - 1)
    small = regauge.optimize(graph, "factorize{rank=4}", data=[given])
    other = batch(20)
    torch.testing.assert_close(small.run(other)[0], graph.run(other)[0], rtol=1e-4, atol=1e-5)


def test_factors_of_experts_run_as_onnx(tmp_path: Path) -> None:
    graph, given = experts(of_rank(9).float(), turned=True), batch(30)
    given[0] = given[0].float()
    small = regauge.optimize(graph, "factorize{rank=3}")
    path = tmp_path / "small.onnx"
    small.to_onnx(path)
    (found,) = runtime_outputs(path, {"x": given[0].numpy(), "expert": given[1].numpy()})
    torch.testing.assert_close(torch.as_tensor(found), small.run(given)[0], rtol=1e-4, atol=1e-4)
