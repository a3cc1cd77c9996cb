"""Rows of quantizers beside one another for a small file, and what is said of a peer that fails."""

from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from benchmarks import quantize_peers


def test_rows_of_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    rows = torch.randn(32, 16)
    regauge.capture(model, (rows[:2],), dynamic={0: {0: "batch"}}).to_onnx(tmp_path / "model.onnx")
    name = regauge.load(tmp_path / "model.onnx").inputs[0].name
    batches = [{name: part} for part in rows.split(8)]

    def fails(source: Path, target: Path) -> None:
        raise ValueError("reads no such file\nat all")

    monkeypatch.setattr(quantize_peers, "onnxruntime_dynamic", fails)
    monkeypatch.setattr(quantize_peers, "TURNS", 1)
    found = {
        row[0]: row[1:]
        for row in quantize_peers.compare(
            tmp_path / "model.onnx",
            batches,
            batches[2:],
            [batches[0]],
            transformer=False,
            judge=lambda result: str(tuple(result.shape)),
            tools=("float", "regauge*", "onnxruntime*"),
        )
    }
    assert list(found) == ["float", "regauge, w8a8", "regauge, w8", "onnxruntime, static", "onnxruntime, dynamic"]
    assert found["float"][:3] == ["", "(16, 8)", "1.00"]
    assert found["onnxruntime, dynamic"] == ["ValueError: reads no such file"]
    for tool in ("regauge, w8a8", "regauge, w8", "onnxruntime, static"):
        assert float(found[tool][0]) > 20 and found[tool][1] == "(16, 8)"
        assert len(found[tool]) == 4


def test_batches_of_fewer_examples_are_filled_up_for_what_takes_one_size() -> None:
    seen = []

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(x))
        return (x * 2,)

    contender = quantize_peers._of_module(run, nn.Linear(2, 2), ["x"], size=8)
    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(contender.run({"x": x}), x * 2)
    assert seen == [8] and contender.fixed
