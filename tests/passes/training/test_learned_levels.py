"""Levels that are trained: gradients by hand, and what is emitted is what was trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, train
from regauge.ir.cost import figures
from regauge.ir.ops.fake_quantization import nearest_level
from regauge.training import LearnedLevels


def test_a_level_gets_the_gradients_of_what_it_stands_for() -> None:
    x = torch.tensor([-1.0, -0.7, 0.2, 0.9], requires_grad=True)
    levels = torch.tensor([1.0, -0.8, 0.0], requires_grad=True)  # in any order
    found = nearest_level(x, levels)
    assert found.tolist() == pytest.approx([-0.8, -0.8, 0.0, 1.0])
    found.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert levels.grad.tolist() == [1000, 11, 100] and x.grad is None


def test_levels_begin_at_quantiles_of_scaled_weights() -> None:
    """Two levels: quartiles of the weights over the greatest of each row."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, -4.0, 3.0], [-0.1, 0.1, 0.05, 0.0]]))
    levels = LearnedLevels(regauge.capture(model, (torch.zeros(3, 4),)), bits=1)
    scaled = torch.tensor([0.25, 0.5, -1, 0.75, -1, 1, 0.5, 0])
    expected = torch.quantile(scaled, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(levels.module.weight_levels.detach(), expected)


def test_digits_on_four_levels(tmp_path: Path) -> None:
    """Accuracy rises, levels alone are trained of the weights, and the file computes what was trained."""
    model = convolutional()
    train(model, 150)
    graph = captured(model.eval())
    levels = LearnedLevels(graph, bits=2)
    assert [name for name, _ in levels.module.named_parameters() if "weight" in name] == [
        f"{place}.weight_levels" for place in (0, 3, 6, 8)
    ]
    before = accuracy(levels.finish().to_torch())
    train(levels.module, 60, optimizer=torch.optim.Adam(levels.module.parameters(), lr=5e-3))
    small = levels.finish()
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(small.run(x)[0], levels.module(x))
    after = accuracy(small.to_torch())
    assert after > before + 0.02, (before, after)
    assert figures(small).bytes < 0.3 * figures(graph).bytes
    small.to_onnx(tmp_path / "small.onnx")  # which compares outputs


def test_what_is_refused() -> None:
    graph = regauge.capture(nn.Sequential(nn.LayerNorm(4)), (torch.zeros(2, 4),))
    with pytest.raises(regauge.RegaugeError, match="LearnedLevels finds no layer"):
        LearnedLevels(graph)
    with pytest.raises(regauge.RegaugeError, match="bits=9 is out of range"):
        LearnedLevels(graph, bits=9)
