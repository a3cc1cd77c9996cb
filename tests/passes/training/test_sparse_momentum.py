"""Sparse momentum: the number of entries stays, the smallest go, and those of largest momentum grow."""

import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, greatest_difference, train
from regauge.training import SparseMomentum


def test_one_move_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    sparsifier = SparseMomentum(
        model, regauge.capture(model, (torch.zeros(1, 4),)), 0.5, every=1, moves=3, prune_rate=0.7, momentum=0.5
    )
    (parameter,) = sparsifier.masks
    sparsifier.masks[parameter] = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 2.0, 0.0, 0.0]]))
    model[0].weight.grad = torch.tensor([[1.0, 1.0, -4.0, 3.0]])
    sparsifier.step()  # 0.7 (1 + cos(pi / 3)) / 2 of two entries is one: the first, for which the third grows
    assert sparsifier.masks[parameter].tolist() == [[False, True, True, False]]
    assert model[0].weight.tolist() == [[0, 2, 0, 0]]


def test_digits_at_a_density_of_a_third() -> None:
    model = convolutional()
    sparsifier = SparseMomentum(model, captured(model), 1 / 3, every=20, moves=5)
    before = {p: mask.clone() for p, mask in sparsifier.masks.items()}
    wanted = sum(round(mask.numel() / 3) for mask in before.values())
    counts = []
    train(model, 200, sparsifier, after=lambda: counts.append(sum(int(m.sum()) for m in sparsifier.masks.values())))
    assert set(counts) == {wanted}
    assert any(not torch.equal(before[p], mask) for p, mask in sparsifier.masks.items())
    zeros = sum(int((model.get_parameter(p.name) == 0).sum()) for p in sparsifier.axes)
    assert zeros >= sum(mask.numel() for mask in before.values()) - wanted
    assert greatest_difference(model, sparsifier.finish().to_torch()) < 1e-5
    assert accuracy(model) > 0.88


def test_layers_share_what_grows_by_their_momentum() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    sparsifier = SparseMomentum(model, regauge.capture(model, (torch.zeros(1, 8),)), 0.5)
    first, second = sparsifier.masks
    assert sparsifier._distributed(8, {first: 3.0, second: 1.0}) == {first: 6, second: 2}
    assert sparsifier._distributed(40, {first: 9.0, second: 1.0}) == {first: 32, second: 8}


def test_gradients_are_asked_for() -> None:
    model = convolutional()
    with pytest.raises(regauge.RegaugeError, match="before optimizer.zero_grad"):
        SparseMomentum(model, captured(model)).step()
