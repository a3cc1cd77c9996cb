"""Writes into tensors, through views and not, become new values."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.ir.running.interpret import Interpreter, run
from regauge.ir.verify import verify


class Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def in_place_then_read(x: torch.Tensor) -> object:
    y = x * 2
    z = y.relu_()
    return y + 1, z


def slices(x: torch.Tensor) -> object:
    y = x * 1
    y[:, 0] = 1.0
    y[1:3].mul_(2)
    y[..., 1] += y[..., 2]
    return y


def through_a_reshape(x: torch.Tensor) -> object:
    y = x.clone()
    y.view(-1)[2:6].copy_(torch.ones(4, dtype=torch.float64))
    y.t()[0].neg_()
    y.unsqueeze(0).permute(1, 0, 2).add_(1)
    return y


def parts_of_a_split(x: torch.Tensor) -> object:
    y = x * 1
    a, b = y.chunk(2, 1)
    a.relu_()
    b.sigmoid_()
    first, *_ = y.unbind(0)
    first.fill_(3)
    return y, a * b, first


def old_views_see_new_values(x: torch.Tensor) -> object:
    y = x * 1
    row, column = y[0], y[:, 0]
    y.add_(1)
    row.mul_(2)
    return row, column, y


def indices(x: torch.Tensor) -> object:
    y = x.clone()
    y[torch.tensor([0, 1]), 1:3] = 5
    y[y > 4] = -1
    y.masked_fill_(y < -2, 0.0)
    return y


def diagonals(x: torch.Tensor) -> object:
    y = torch.zeros(4, 4) + x.sum()
    y.diagonal().add_(1)
    y.fill_diagonal_(3)
    return y


def fresh_memory(x: torch.Tensor) -> object:
    out = torch.empty(4, 4)
    out[:2] = x[:2]
    out[2:].zero_()
    return out


CASES = [in_place_then_read, slices, through_a_reshape, parts_of_a_split, old_views_see_new_values, indices, diagonals,
         fresh_memory]  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "n"}}])
@pytest.mark.parametrize("function", CASES)
@pytest.mark.filterwarnings("ignore::regauge.ir.errors.RegaugeWarning")
def test_writes_become_values(function: Callable[[torch.Tensor], object], dynamic: object) -> None:
    x = torch.randn(4, 4)
    before = x.clone()
    graph = capture(Call(function), x, dynamic=dynamic, verify=False)
    verify(graph)
    expected = function(x.clone())
    actual = run(graph, [x])
    for found, wanted in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(x, before)


def test_an_input_that_is_written_becomes_a_state() -> None:
    def function(x: torch.Tensor) -> object:
        a, b = x.chunk(2, 1)
        a.relu_()
        return a * b

    graph = capture(Call(function), torch.randn(4, 4))
    (state,) = graph.states
    assert state.before is graph.inputs[0]
    x = torch.randn(4, 4)
    interpreter = Interpreter(graph)
    interpreter.run([x])
    expected = x.clone()
    function(expected)
    torch.testing.assert_close(interpreter.states[state.name], expected)
