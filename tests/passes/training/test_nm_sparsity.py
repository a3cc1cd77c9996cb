"""N:M recipes: gradients by hand, masks, and what is left on the module when they are done."""

import copy

import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, greatest_difference, train
from regauge.passes.nm_mask import nm_mask
from regauge.training import NMSparsity


def linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.5, 0.1, -0.2, -0.3]]))
    return model


MASK = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])


def of(model: nn.Module, **options: object) -> NMSparsity:
    return NMSparsity(model, regauge.capture(model, (torch.zeros(1, 4),)), 2, 4, **options)


def test_mask_keeps_the_largest_of_each_block() -> None:
    assert torch.equal(nm_mask(linear()[0].weight.abs(), 1, 2, 4).float(), MASK)


def test_sr_ste_gradient_by_hand() -> None:
    """g(w m) + penalty (1 - m) w, for y = (w m) x summed: g is x in every row."""
    model = linear()
    weight, x = model[0].weight, torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    sparsifier = of(model, penalty=0.5)
    result = model(x)
    torch.testing.assert_close(result, x @ (weight * MASK).T)
    (result.sum() + sparsifier.loss()).backward()
    torch.testing.assert_close(weight.grad, x.expand(2, 4) + 0.5 * (1 - MASK) * weight.detach())


def test_mask_decay_by_hand() -> None:
    model = linear()
    x = torch.ones(1, 4)
    sparsifier = of(model, recipe="linear", steps=4)
    for step in range(5):
        share = 1 - step / 4
        expected = (model[0].weight * (MASK + share * (1 - MASK))).sum(1)
        torch.testing.assert_close(model(x)[0], expected)
        sparsifier.step()
    model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, MASK)


def test_structure_decay_goes_by_three_of_four() -> None:
    model = linear()
    sparsifier = of(model, recipe="structure", steps=4)
    kept = []
    for _ in range(5):
        model(torch.ones(1, 4))
        kept.append([int(row) for row in sparsifier.masks[next(iter(sparsifier.masks))].sum(1)])
        sparsifier.step()
    assert kept == [[3, 3], [3, 3], [2, 2], [2, 2], [2, 2]]


def test_structure_decay_halves_what_is_kept() -> None:
    """1:16 goes by 15, 8, 4, 2 and 1 of 16, in equal stages after the dense steps, as in the authors' code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1))
    sparsifier = NMSparsity(
        model, regauge.capture(model, (torch.zeros(2, 16),)), 1, 16, recipe="structure", begin=2, steps=10
    )
    kept = []
    for _ in range(13):
        model(torch.ones(1, 16))
        kept.append(int(next(iter(sparsifier.masks.values())).sum()))
        sparsifier.step()
    assert kept == [16, 16, 15, 15, 8, 8, 4, 4, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("recipe", ["sr-ste", "ste", "linear", "exponential", "structure"])
def test_digits_with_two_of_four(recipe: str) -> None:
    model = convolutional()
    keys = list(model.state_dict())
    sparsifier = NMSparsity(model, captured(model), recipe=recipe, steps=100, begin=10)
    train(model, 150, sparsifier)
    assert list(model.state_dict()) == keys
    masked = accuracy(model)
    small = sparsifier.finish()
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert isinstance(model[3].weight, nn.Parameter)
    assert bool(((model[6].weight.reshape(-1, 4) != 0).sum(1) == 2).all())
    assert sparsifier.sparsity == 0.5
    assert "6.weight: 50.0% zero" in str(small.report)
    assert greatest_difference(model, small.to_torch()) < 1e-5
    assert accuracy(model) == masked > 0.88


def test_parameters_are_back_when_the_module_raises() -> None:
    model = linear()
    of(model)
    weight = model[0].weight
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3))
    assert model[0].weight is weight


def test_a_copy_of_the_model_says_that_it_is_one() -> None:
    model = linear()
    sparsifier = of(model)
    with pytest.raises(regauge.RegaugeError, match="copy it before"):
        copy.deepcopy(model)(torch.zeros(1, 4))
    sparsifier.finish()
    copy.deepcopy(model)(torch.zeros(1, 4))


def test_weights_that_fit_no_pattern_are_left() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    sparsifier = NMSparsity(model, regauge.capture(model, (torch.zeros(1, 6),)))
    assert [p.name for p in sparsifier.axes] == ["2.weight"]
    assert sparsifier.left == {"its contracted axis is no multiple of 4": 1}
