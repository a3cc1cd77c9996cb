"""Modules that do something else in training than in evaluation are emitted so that they train like the user's."""

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import regauge
from regauge.ir.errors import RegaugeWarning


class Called(nn.Module):
    """A layer called on its input, as the attention of a block is, and a linear map behind it."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.layer, self.call, self.head = layer, call, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.layer, x))  # type: ignore[no-any-return]


def once(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x))  # type: ignore[no-any-return]


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def weighed(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))  # type: ignore[no-any-return]


CASES = {
    "cumulative average": (lambda: nn.BatchNorm1d(16, momentum=None), once, (8, 16)),
    "instance norm": (lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True), once, (3, 5, 16)),
    "instance norm without weights": (lambda: nn.InstanceNorm1d(5, track_running_stats=True), once, (3, 5, 16)),
    "attention": (lambda: nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True), attended, (2, 5, 16)),
    "attention by weights": (lambda: nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True), weighed, (2, 5, 16)),
    "encoder": (encoder, once, (2, 5, 16)),
    "norm called twice": (lambda: nn.BatchNorm1d(16), twice, (8, 16)),
    "random slopes": (nn.RReLU, once, (8, 16)),
}


def assert_trains_alike(
    model: nn.Module, emitted: nn.Module, x: Tensor, modes: Sequence[bool] = (True, True, False)
) -> None:
    """Two steps of training give the same results and buffers, and evaluation after them too."""
    for mode in modes:
        results = []
        for module in (model, emitted):
            torch.manual_seed(1)
            results.append(module.train(mode)(x))
            if mode:
                results[-1].sum().backward()
        torch.testing.assert_close(results[1], results[0])
    buffers = dict(emitted.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", [False, True])
def test_what_is_emitted_trains_like_the_model(case: str, train: bool) -> None:
    torch.manual_seed(0)
    make, call, shape = CASES[case]
    model, x = Called(make(), call, shape[-1]).train(), torch.randn(*shape)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if not train else "ignore", category=RegaugeWarning)
        emitted = regauge.capture(copy.deepcopy(model), (x,), train=train).to_torch()
    assert_trains_alike(model, emitted, x)


def test_buffers_that_are_written_and_read_take_part_in_training() -> None:
    torch.manual_seed(0)
    model, x = Called(spectral(), once, 16).train(), torch.randn(4, 16)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegaugeWarning)
        emitted = regauge.capture(copy.deepcopy(model), (x,), train=True).to_torch()
    assert_trains_alike(model, emitted, x, (True, True))


def test_the_model_keeps_its_momentum() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None))
    regauge.capture(model, (torch.randn(8, 4),), train=True)
    assert model[0].momentum is None


def test_a_pruned_model_keeps_the_notes() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.InstanceNorm1d(8, affine=True, track_running_stats=True), nn.RReLU())
    graph = regauge.capture(nn.Sequential(*model, nn.Conv1d(8, 2, 1)), (torch.randn(2, 3, 5),))
    small = regauge.optimize(graph, "prune{compensate=false,ratio=0.5}").to_torch()
    assert [type(layer).__name__ for layer in small.children()] == ["Conv1d", "InstanceNorm1d", "RReLU", "Conv1d"]
    assert small.get_submodule("1").track_running_stats


def test_dropout_without_a_trace_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.2))
    with pytest.warns(RegaugeWarning, match=r"1 \(AlphaDropout, p=0.2\).*capture\(train=True\)"):
        regauge.capture(model, (torch.randn(2, 4),))
