"""Identities: where they go, and where they must stay."""

from typing import Any

import pytest
import torch
from torch import nn

import regauge
from regauge.passes.simplify.identities import RULES, is_lossless, is_skipped_by
from simplifying import BATCH, made, ops, simplified

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda build, x: build.identity(build.identity(x)),
        lambda build, x: build.add(0, build.sub(x, 0.0)),
        lambda build, x: build.pow(build.div(build.mul(x, build.constant(torch.ones(3, 1).double())), 1), 1),
        lambda build, x: build.reshape(build.permute(x, dims=(0, -2, 2)), shape=(BATCH, 3, 4)),
        lambda build, x: build.slice(build.expand(x, shape=(BATCH, 3, 4)), dim=0, start=0, end=BATCH),
        lambda build, x: build.pad(build.clamp(x), pads=((0, 0), (0, 0), (0, 0)), mode="constant"),
        lambda build, x: build.neg(build.neg(x)),
        lambda build, x: build.concat(x, dim=1),
    ],
)
def test_what_does_nothing_goes(call: Any) -> None:
    graph = made(lambda build, x: build.tanh(call(build, x)), x=(BATCH, 3, 4))
    assert ops(simplified(graph, RULES)) == ["tanh"]


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        (lambda build, x: build.add(x, build.constant(torch.zeros(5, 1, 1).double())), F64),  # broadcasts
        (lambda build, x: build.add(x, 0.0), torch.int64),  # makes floats of integers
        (lambda build, x: build.mul(x, build.constant(torch.ones(1, dtype=F64))), F32),  # makes doubles of floats
        (lambda build, x: build.mul(x, build.constant(torch.tensor([1.001], dtype=F16))), F16),  # nearly one
        (lambda build, x: build.sub(0, x), F64),
        (lambda build, x: build.div(1, x), F64),
        (lambda build, x: build.div(x, 1, rounding_mode="floor"), F64),  # rounds
        (lambda build, x: build.div(x, 1), torch.int64),
        (lambda build, x: build.mul(x, 0), F64),  # NaN * 0 is NaN
        (lambda build, x: build.sub(x, x), F64),
        (lambda build, x: build.div(x, x), F64),
        (lambda build, x: build.slice(x, dim=1, start=0, end=3, step=2), F64),
        (lambda build, x: build.permute(x, dims=(1, 0)), F64),  # of a square: the shape stays
        (lambda build, x: build.flip(x, dims=(1,)), F64),
        (lambda build, x: build.cast(build.cast(x, dtype=F16), dtype=F64), F64),
        (lambda build, x: build.cast(build.cast(x, dtype=torch.int32), dtype=F64), F64),
        (lambda build, x: build.cast(build.cast(x, dtype=BF16), dtype=F16), F16),
        (lambda build, x: build.dropout(x, p=0.5, training=True), F64),
        (lambda build, x: build.logical_not(build.logical_not(x)), F64),  # makes truths of numbers
        (lambda build, x: build.round(build.round(x, decimals=2)), F64),
        (lambda build, x: build.clamp(build.clamp(x, 0.0, 1.0), 2.0, 1.5), F64),  # crossed
        (lambda build, x: build.clamp(build.clamp(x, 0, 1), 0.5, None), torch.int64),
        (lambda build, x: build.relu(build.neg(x)), F64),
        (lambda build, x: build.relu(build.abs(x)), torch.int8),  # abs(-128) is -128
        (lambda build, x: build.abs(build.sign(x)), F64),
    ],
)
def test_what_does_something_stays(call: Any, dtype: Any) -> None:
    graph = made(lambda build, x: call(build, x), dtype, x=(3, 3))
    if any(node.operator.random for node in graph.nodes):
        after = graph.copy()
        regauge.optimize(after, "simplify{only=identities}")
    else:
        after = simplified(graph, RULES)
    assert str(after) == str(graph)


def test_a_weight_of_ones_that_is_trained_stays() -> None:
    graph = made(lambda build, x: build.mul(x, build.parameter("gain", torch.ones(3).double())), x=(2, 3))
    assert ops(simplified(graph, RULES)) == ["mul"]


def test_outputs_stay_values_of_their_own() -> None:
    """An output is not made an input, nor two outputs one value; the name of an output stays."""
    graph = made(lambda build, x: [build.identity(x), build.tanh(x)], x=(2, 3))
    assert str(simplified(graph, RULES)) == str(graph)

    def twice(build: Any, x: Any) -> Any:
        y = build.tanh(x)
        return [y, build.identity(y)]

    assert ops(simplified(made(twice, x=(2, 3)), RULES)) == ["tanh", "identity"]
    last = made(lambda build, x: build.identity(build.tanh(x), name="y"), x=(2, 3))
    after = simplified(last, RULES)
    assert ops(after) == ["tanh"] and after.nodes[0].name == last.nodes[-1].name


def test_casts_are_skipped_only_where_nothing_is_lost() -> None:
    assert is_lossless(F16, F32) and is_lossless(BF16, F32) and is_lossless(torch.int32, F64)
    assert not is_lossless(F16, BF16) and not is_lossless(BF16, F16) and not is_lossless(torch.int32, F32)
    assert not is_lossless(torch.int64, F64) and not is_lossless(torch.uint8, torch.int8)
    assert is_lossless(torch.int8, BF16) and not is_lossless(torch.int16, BF16)
    assert is_skipped_by(F32, F64, F32) and not is_skipped_by(F64, F32, F64)
    assert not is_skipped_by(torch.int32, F64, torch.int8)  # a float out of range is no integer modulo 256


@pytest.mark.parametrize("a", [F16, BF16, F32, torch.int8, torch.uint8, torch.int16])
@pytest.mark.parametrize("b", [F16, BF16, F32, F64, torch.int16, torch.int64])
@pytest.mark.parametrize("c", [F16, BF16, F32, F64, torch.int8, torch.int64, torch.bool])
def test_skipped_casts_agree_on_every_bit_pattern(a: Any, b: Any, c: Any) -> None:
    if not is_skipped_by(a, b, c):
        return
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(a) if a.itemsize == 2 else bits.to(torch.int8).view(a) if a.itemsize == 1 else bits.to(a) * 1.1
    if a.is_floating_point and not c.is_floating_point and c != torch.bool:
        x = x[x.isfinite() & (x.abs() < 127)]
    assert torch.equal(x.to(b).to(c).nan_to_num() if c.is_floating_point else x.to(b).to(c),
                       x.to(c).nan_to_num() if c.is_floating_point else x.to(c))  # fmt: skip


class Padded(nn.Module):
    """What people write, and what exporters leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(torch.relu(self.first(x) * 1.0) + 0).double().float()
        return self.last(y.clamp(max=6.0).clamp(min=0.0).reshape(y.shape)).abs().abs()


def test_a_module_loses_what_does_nothing_and_keeps_its_keys() -> None:
    model = Padded().eval()
    x = torch.randn(5, 4)
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    after = regauge.optimize(graph, "simplify")
    assert ops(after) == ["linear", "clamp", "linear", "abs"]
    module = after.to_torch()
    assert list(module.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(module(x), model(x))
