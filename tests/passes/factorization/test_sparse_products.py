"""Products of sparse factors: they keep more than single entries, in the metrics of data, and are stored sparsely."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from layer_kinds import drawn, metric
from regauge.frontends.capture import capture
from regauge.passes.calibration.layers import layer_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.palm import product, sparse_factors
from regauge.passes.factorization.problems import Problem

FAUST = FORMS["faust"]


def lost(matrix: torch.Tensor, found: torch.Tensor) -> float:
    return float((matrix - found).square().sum() / matrix.square().sum())


@pytest.mark.parametrize("shape", [(40, 80), (80, 40)])
def test_products_keep_more_of_a_matrix_than_as_many_of_its_entries(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape)
    found = sparse_factors(matrix, 2, 14, 60)
    entries = sum(int((own != 0).sum()) for own in found)
    assert entries <= 14 * (40 + 80)
    largest = torch.zeros_like(matrix).flatten()
    kept = matrix.abs().flatten().topk(entries).indices
    largest[kept] = matrix.flatten()[kept]
    assert lost(matrix, product(found)) < 0.96 * lost(matrix, largest.reshape(shape))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_factors_have_the_entries_that_they_may(count: int) -> None:
    matrix = drawn(12, 30)
    found = sparse_factors(matrix, count, 4, 30)
    assert [tuple(own.shape) for own in found] == [(12, 30)] + (count - 1) * [(12, 12)]
    assert [int((own != 0).sum()) for own in found] <= [120] + (count - 1) * [48]


def problem(rows: int, columns: int) -> Problem:
    graph = capture(nn.Linear(columns, rows).double(), (torch.zeros(2, columns).double(),))
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    return Problem(layer, drawn(rows, columns, seed=7), metric(columns), metric(rows, 3))


def test_metrics_of_data_lose_less_than_plain_ones() -> None:
    """Wrong sides would lose as much as none."""
    given = problem(18, 24)
    _, plain = FAUST.links(Problem(given.layer, given.weight), (6, 2))
    links, matrix = FAUST.links(given, (6, 2))
    assert given.error(matrix) < 0.3 * given.error(plain)
    assert sum(int((link.weight != 0).sum()) for link in links) <= 6 * (24 + 18)


def test_more_entries_lose_less() -> None:
    given = problem(12, 16)
    graph = capture(nn.Linear(16, 12), (torch.zeros(2, 16),))
    choices = FAUST.choices(given, graph, 1)
    assert {choice.axes for choice in choices} == {(2,), (3,), (4,)}
    for count in (2, 3, 4):
        losses = [choice.loss for choice in choices if choice.axes == (count,)]
        assert losses == sorted(losses, reverse=True)
        for choice in choices[::4]:
            links, matrix = FAUST.links(given, choice.numbers)
            assert sum(int((link.weight != 0).sum()) for link in links) <= choice.parameters < 12 * 16
            assert given.error(matrix) <= choice.loss * 1.0001


def test_written_layers_run_and_are_stored_sparsely(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    data = torch.randn(64, 8) @ torch.randn(8, 32)
    graph = capture(model, (data[:2],), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "factorize{params=0.4,form=faust}", data=[data])
    weights = [p.tensor for p in small.all_parameters() if p.rank == 2]
    assert sum(int((weight != 0).sum()) for weight in weights) <= 0.4 * 2 * 32 * 64 + 96
    assert "entries of factors are zero" in str(small.report)
    (before,), (after,) = graph.run(data), small.run(data)
    assert lost(before - before.mean(0), after - before.mean(0)) < 0.2
    path = small.to_onnx(tmp_path / "small.onnx", sparse_weights=True)
    whole = graph.to_onnx(tmp_path / "whole.onnx")
    assert Path(path).stat().st_size < 1.2 * Path(whole).stat().st_size
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    assert torch.allclose(torch.from_numpy(found), after, atol=1e-4)
