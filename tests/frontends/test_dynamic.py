"""Dynamic axes: named by the user, kept through the graph, and said when a model fixes them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.ir.errors import CaptureError, RegaugeWarning
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        n, s, _ = x.shape
        q, k, v = self.qkv(x).view(n, s, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        h = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(h.transpose(1, 2).reshape(n, s, 8)) / s**0.5


def test_names_ranges_and_other_sizes() -> None:
    model = Attention()
    graph = capture(model, torch.randn(3, 5, 8), dynamic={"x": {0: "batch", 1: ("seq", 1, 64)}})
    batch, seq = symbol("batch"), symbol("seq")
    assert graph.inputs[0].shape == (batch, seq, 8)
    assert graph.symbols == {batch: (1, None), seq: (1, 64)}
    assert graph.outputs[0].shape == (batch, seq, 8)  # type: ignore[union-attr]
    for shape in ((3, 5, 8), (7, 11, 8), (2, 2, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(graph, [x])[0], model(x).detach())


def test_an_example_of_one_is_widened() -> None:
    graph = capture(nn.Linear(8, 4), torch.randn(1, 8), dynamic={"input": {0: "batch"}})
    assert graph.inputs[0].shape == (symbol("batch"), 8)


@pytest.mark.parametrize(
    "dynamic",
    [
        {"x": {0: "n"}},
        {0: {0: torch.export.Dim("n", min=1, max=9)}},
        {"x": {-2: ("n", 1, 9)}},
        {"x": ("n", None)},
        [{0: "n"}],
        {"x": {0: "n", 1: 4}},
    ],
)
def test_ways_to_say_it(dynamic: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    assert capture(Model(), torch.randn(3, 4), dynamic=dynamic).inputs[0].shape == (symbol("n"), 4)


def test_nested_and_keyword_inputs() -> None:
    class Model(nn.Module):
        def forward(self, items: Any, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return items["a"][0] + rest[0] + more["z"]

    inputs = ({"a": [torch.randn(3, 4)]}, torch.randn(3, 4))
    for dynamic in (
        {"items.a.0": {0: "n"}, "rest.0": {0: "n"}, "z": {0: "n"}},
        {"items": {"a": [{0: "n"}]}, "rest": [{0: "n"}], "z": {0: "n"}},
    ):
        graph = capture(Model(), inputs, {"z": torch.randn(3, 4)}, dynamic=dynamic)
        assert [value.name for value in graph.inputs] == ["items.a.0", "rest.0", "z"]
        assert all(value.shape == (symbol("n"), 4) for value in graph.inputs)
    assert "forward" not in vars(Model())


def test_a_fixed_axis_is_reported_with_its_line() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] == 3 else x

    with pytest.warns(
        RegaugeWarning, match=r"axis 0 of input 'x' was to be 'n', but it is fixed at 3 by test_dynamic\.py:"
    ):
        graph = capture(Model(), torch.randn(3, 4), dynamic={"x": {0: "n"}})
    assert graph.inputs[0].shape == (3, 4)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "n"}}, "names 'y', which is no tensor input: the inputs are x"),
        ({3: {0: "n"}}, "position 3"),
        ({"x": {2: "n"}}, r"axis 2, but the input has the shape \(3, 4\)"),
        ({"x": {0: ("n", 5, 9)}}, "stay in 5..9, but the example has 3"),
        ({"x": {0: ("n", 9, 5)}}, "min <= max"),
        ({"x": {0: 7}}, "fixes the size 7"),
        ({"x": {0: 2.5}}, "expected a name"),
        ({"x": {0: "a b"}}, "use a name such as"),
        ({"x": "n"}, "must map axes to names"),
    ],
)
def test_wrong_requests(dynamic: Any, message: str) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with pytest.raises(CaptureError, match=message):
        capture(Model(), torch.randn(3, 4), dynamic=dynamic)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True),
        nn.LSTM(4, 6, proj_size=2, batch_first=True),
        nn.GRU(4, 3, batch_first=True),
        nn.RNN(4, 3, batch_first=True),
    ],
)
def test_recurrent_layers_take_any_length(layer: nn.Module) -> None:
    graph = capture(layer, torch.randn(5, 7, 4), dynamic={"input": {0: "batch", 1: "length"}})
    assert graph.inputs[0].shape == (symbol("batch"), symbol("length"), 4)
    x = torch.randn(2, 11, 4)
    torch.testing.assert_close(run(graph, [x])[0], layer(x)[0].detach())


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : int(x.shape[1] * 0.5)] * 2


def test_a_size_that_python_rounded_is_told() -> None:
    """torch keeps the example's: the graph gave two steps of any length, in silence."""
    with pytest.warns(RegaugeWarning, match=r"right only where math.trunc\(0.5\*float\(x.shape\[1\]\)\) == 2"):
        capture(Half(), (torch.randn(3, 4, 6),), dynamic={0: {1: "length"}})


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x[..., ::2], scale_factor=2.0) + y


def test_sizes_that_have_to_be_equal_are_no_cause_to_warn() -> None:
    """Of two inputs, and of what is halved and doubled again: where they are not, the sum fails."""
    axes = {0: "batch", 2: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegaugeWarning)
        capture(Sum(), (torch.randn(2, 3, 8), torch.randn(2, 3, 8)), dynamic={0: axes, 1: axes})
