"""Weights with many zeros as sparse initializers: smaller files that load as they did."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from regauge.cli import main
from regauge.ir.graph import Graph


def sparse_graph(share: float, width: int = 48) -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 8))
    graph = regauge.capture(model, (torch.randn(4, width),), dynamic={0: {0: "batch"}})
    return regauge.optimize(graph, f"sparsify{{pattern=unstructured,ratio={share}}}")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_sparse_weights_make_the_file_smaller_and_load_as_they_were(tmp_path: Path, share: float) -> None:
    graph, x = sparse_graph(share), torch.randn(5, 48)
    dense = graph.to_onnx(tmp_path / "dense.onnx").stat().st_size
    path = graph.to_onnx(tmp_path / "sparse.onnx", sparse_weights=True)
    weights = 4 * 64 * (48 + 8)
    assert path.stat().st_size < dense - 0.8 * weights * (1 - (1 - share) * 6.2 / 4)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {sparse.values.name for sparse in model.graph.sparse_initializer} == {"0.weight", "2.weight"}
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, graph.run(x)[0], rtol=1e-5, atol=1e-6)
    loaded = regauge.load(path)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(loaded.parameters[name].tensor, graph.parameters[name].tensor)


def test_weights_that_would_grow_stay_dense_to_the_bit(tmp_path: Path) -> None:
    graph = sparse_graph(0.1)
    plain = graph.to_onnx(tmp_path / "a.onnx").read_bytes()
    assert graph.to_onnx(tmp_path / "b.onnx", sparse_weights=True).read_bytes() == plain


def test_a_negative_zero_stays_one(tmp_path: Path) -> None:
    model = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        model.weight.zero_()[0, :4] = torch.tensor([-0.0, 1, 2, 3])
    graph = regauge.capture(model, (torch.randn(2, 16),))
    loaded = regauge.load(graph.to_onnx(tmp_path / "m.onnx", sparse_weights=True))
    (weight,) = (parameter.tensor for parameter in loaded.parameters.values())
    assert bool((torch.signbit(weight).sum() == 1) & (weight.count_nonzero() == 3))


def test_a_loaded_file_is_stored_sparsely_without_a_pass_and_by_the_command_line(tmp_path: Path) -> None:
    dense = sparse_graph(0.8).to_onnx(tmp_path / "dense.onnx")
    sparse = tmp_path / "sparse.onnx"
    assert main(["optimize", str(dense), "-o", str(sparse), "--sparse-weights"]) == 0
    assert sparse.stat().st_size < 0.6 * dense.stat().st_size
    assert regauge.compare(dense, sparse).equal(0)
