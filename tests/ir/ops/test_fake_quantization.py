"""Fake quantization against the operators that it stands for, and its gradients by hand."""

import pytest
import torch

from regauge.ir.ops.fake_quantization import fake_quantize, mean_scale
from regauge.ir.ops.quantization import dequantize, quantize

X = 3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scale", "zero", "where"),
    [
        (torch.tensor(0.05), torch.tensor(100, dtype=torch.uint8), {}),
        (torch.rand(6) + 0.01, None, {"axis": 0}),
        (torch.rand(6, 2) + 0.01, torch.randint(-9, 9, (6, 2)).to(torch.int8), {"axis": 1, "block_size": 4}),
    ],
    ids=["whole", "rows", "blocks"],
)
def test_it_gives_what_codes_stand_for(scale: torch.Tensor, zero: torch.Tensor | None, where: dict[str, int]) -> None:
    dtype = torch.int8 if zero is None else zero.dtype
    limits = torch.iinfo(dtype)
    codes = quantize(X, scale, zero, dtype=dtype, **where)
    found = fake_quantize(X, scale, zero, low=limits.min, high=limits.max, **where)
    assert torch.equal(found, dequantize(codes, scale, zero, **where))


def test_gradients_are_those_of_learned_steps() -> None:
    """Esser et al. 2020, eq. 3: round(v / s) - v / s inside, the last code outside; of v 1 inside and 0 outside."""
    x = torch.tensor([0.3, -0.9, 5.0, -5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, low=-4, high=3).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == [1, 10, 0, 0]
    expected = (1 - 0.6) + 10 * (-2 + 1.8) + 100 * 3 + 1000 * -4
    torch.testing.assert_close(scale.grad, torch.tensor(expected))


def test_levels_half_way_between_integers() -> None:
    """Two bits: four levels, none of them 0, that reach to twice the mean magnitude."""
    x = torch.tensor([[0.1, -0.1, 0.9, -4.9]])  # mean magnitude 1.5
    scale = mean_scale(x, axis=0, bits=2)
    assert scale.tolist() == [1.5]
    found = fake_quantize(x, scale, axis=0, low=-2, high=1, midrise=True)
    assert found.tolist() == [[0.75, -0.75, 0.75, -2.25]]


def test_mean_scales_of_blocks() -> None:
    expected = X.reshape(3, 2, 8).abs().mean(1) / 4
    torch.testing.assert_close(mean_scale(X, axis=0, block_size=2, bits=4), expected)
    torch.testing.assert_close(mean_scale(X, axis=-1, block_size=4, bits=2), X.reshape(6, 2, 4).abs().mean(2))


def test_rows_of_zeros_have_a_scale() -> None:
    x = torch.zeros(2, 4)
    found = fake_quantize(x, mean_scale(x, axis=0, bits=2), axis=0, low=-2, high=1, midrise=True)
    assert float(found.abs().max()) < 1e-6
