"""LAPP, VIB and HSM: their terms by hand, exact targets, and the finished graph."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, greatest_difference, train
from regauge.ir.cost import figures
from regauge.passes.training.size_share import SizeShare
from regauge.passes.training.vib import kl_term
from regauge.training import Hsm, Lapp, Target, Vib

KINDS = {"lapp": Lapp, "vib": Vib, "hsm": Hsm}


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def of_perceptron(kind: type, target: Target, **options: object) -> tuple[nn.Module, object]:
    model = perceptron()
    return model, kind(model, regauge.capture(model, (torch.zeros(1, 3),)), target, **options)


def test_share_of_macs_by_hand() -> None:
    model = perceptron()
    graph = regauge.capture(model, (torch.zeros(1, 3),))
    dim = next(group.dim for group in graph.groups() if group.free)
    share = SizeShare(graph, [dim], Target(macs=10))
    count = torch.tensor(2.0, requires_grad=True)
    found = share({dim: count})
    found.backward()
    assert (found.item(), share.wanted) == (0.5, 0.5)  # 3 x 2 + 2 x 2 of 20
    assert count.grad.item() == pytest.approx(0.25)


def test_lapp_gates_and_penalty_by_hand() -> None:
    model, sparsifier = of_perceptron(Lapp, Target(ratio=0.5), temperature=0.5)
    norm = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().norm(dim=1)
    (threshold,) = sparsifier.learned.values()
    with torch.no_grad():
        threshold.fill_(float((norm / norm.mean()).sort().values[:2].mean()))
    margin = norm / norm.mean() - threshold.detach()
    (gate,) = sparsifier.gates().values()
    assert torch.equal(gate.detach(), (margin > 0).float()) and gate.sum() == 3
    loss = sparsifier.loss()
    loss.backward()
    assert loss.item() == pytest.approx((0.75 / 0.5 - 1) ** 2)
    soft = torch.sigmoid(margin / 0.5)
    slope = -(soft * (1 - soft)).sum() / 0.5
    assert threshold.grad.item() == pytest.approx(float(2 * 0.5 / 0.5 * slope / 4), rel=1e-4)


def test_lapp_bypass_by_hand() -> None:
    """In the middle a closed index has half of its bypass, in the end nothing; an open one both layers, as one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 12)
    sparsifier = Lapp(model, regauge.capture(model, (x,)), Target(ratio=0.5), learning=4, bypass=2)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))  # it is zero at first
    with torch.no_grad():
        norm = sparsifier.squares(sparsifier.dims[0]).sqrt()
        norm = norm / norm.mean()
        sparsifier.learned["0.weight:0"].copy_(norm.sort().values[3:5].mean())
        sparsifier.learned["bypass.out.0.weight"].normal_()
    beside = (sparsifier.learned["bypass.out.0.weight"] @ sparsifier.learned["bypass.in.0.weight"]).detach()
    gate = (norm > sparsifier.learned["0.weight:0"]).float()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    for steps, stands in ((0, 1.0), (1, 0.75), (2, 0.5)):
        assert sparsifier.steps == steps and gate.sum() == 4
        hidden = torch.relu(x @ (gate[:, None] * weight + beside).T + bias)
        expected = (hidden * (gate + (1 - gate) * stands)) @ model[2].weight.T + model[2].bias
        torch.testing.assert_close(model(x), expected)
        sparsifier.step()
    sparsifier.step()
    assert isinstance(model[0].weight, nn.Parameter) and not model._forward_hooks
    small = sparsifier.finish()
    kept = gate.bool()
    torch.testing.assert_close(small.parameters["0.weight"].tensor, (weight + beside)[kept])
    torch.testing.assert_close(small.run(x)[0], model(x))


def test_a_bypass_is_lighter_than_its_layer_or_there_is_none() -> None:
    _, sparsifier = of_perceptron(Lapp, Target(ratio=0.5), bypass=2)
    assert list(sparsifier.learned) == ["0.weight:0"]  # 4 x 3 against 2 x (4 + 3)
    model = convolutional()
    sparsifier = Lapp(model, captured(model), Target(ratio=0.5), bypass=6)
    sizes = {name: p.numel() for name, p in sparsifier.learned.items() if name.startswith("bypass")}
    assert sum(sizes.values()) == 6 * (32 + 16 * 9) + 6 * (32 + 288)  # not of the first, 16 x 9
    assert "bypass.in.0.weight" not in sizes


def test_kl_term_and_lagrangian_by_hand() -> None:
    mu, log_variance = torch.tensor([1.0, 2.0]), torch.tensor([0.0, math.log(2.0)])
    assert kl_term(mu, log_variance).tolist() == pytest.approx([0.5 * math.log(2), 0.5 * math.log(3)])
    _, sparsifier = of_perceptron(Vib, Target(ratio=0.5), kl_weight=0.1)
    sparsifier.multipliers = torch.tensor([2.0, 3.0])
    over = 1 / (1 + math.exp(-6)) - 0.5
    kl = 0.5 * math.log(1 + math.exp(6))
    assert sparsifier.loss().item() == pytest.approx(0.1 * kl + 2 * over + 3 * over**2, rel=1e-4)


def test_noise_is_there_in_training_only() -> None:
    model, _ = of_perceptron(Vib, Target(ratio=0.5))
    x = torch.ones(1, 3)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), perceptron()(x))


def test_hsm_changes_nothing_at_first_and_is_folded_at_the_end() -> None:
    model, sparsifier = of_perceptron(Hsm, Target(ratio=0.5), learning=10, rank=2)
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), perceptron()(x))
    down = sparsifier.learned["down.0.weight"]
    torch.testing.assert_close(down @ down.T, torch.eye(2))
    # at first: no identity loss, a size of 1 against 0.5, logits somewhat away from where they are pulled
    pulled = (sparsifier.learned["theta.0.weight:0"] - 0.5).square().mean().item()
    assert sparsifier.loss().item() == pytest.approx(10 * (1 / 0.5 - 1) + pulled, rel=1e-4)
    sparsifier.steps = 3  # of 10, until 8 of which the mask is soft
    theta = sparsifier.learned["theta.0.weight:0"].detach()
    expected = torch.sigmoid(theta / (1 - math.log(3) / math.log(10))) + 0.2
    torch.testing.assert_close(
        next(iter(sparsifier.gates().values())).detach(), expected.clamp(max=1), rtol=1e-4, atol=0
    )
    sparsifier.steps = 0
    with torch.no_grad():
        sparsifier.learned["up.0.weight"].normal_()
        sparsifier.learned["gain.0.weight"].uniform_(0.5, 2)
        sparsifier.learned["theta.0.weight:0"].copy_(torch.tensor([0.5, -0.5, 0.4, -0.1]))
    # half is kept, as wanted; of those above 0 and of the others a mean each
    assert sparsifier.loss().item() == pytest.approx((0.0 + 0.01) / 2 + (0.0 + 0.16) / 2, rel=1e-3)
    for _ in range(9):
        sparsifier.step()
    inside = model(x)
    sparsifier.step()
    assert isinstance(model[0].weight, nn.Parameter) and not model._forward_hooks
    torch.testing.assert_close(model(x), inside)
    small = sparsifier.finish()
    assert small.parameters["0.weight"].shape == (2, 3)
    torch.testing.assert_close(small.run(x)[0], inside)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_macs_on_digits(kind: str) -> None:
    model = convolutional()
    keys = list(model.state_dict())
    graph = captured(model)
    sparsifier = KINDS[kind](model, graph, Target(macs=0.5), learning=150, rate=0.02)
    train(model, 250, sparsifier)
    assert list(model.state_dict()) == keys and not model._forward_hooks
    small = sparsifier.finish()
    assert 0.49 * figures(graph).macs < figures(small).macs <= 0.5 * figures(graph).macs
    assert greatest_difference(model, small.to_torch()) < 1e-4
    assert accuracy(model) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_learning_approaches_the_target_by_itself(kind: str) -> None:
    model = convolutional()
    graph = captured(model)
    sparsifier = KINDS[kind](model, graph, Target(macs=0.5), learning=1000, rate=0.01 if kind == "hsm" else 0.05)
    train(model, 150, sparsifier)
    if kind == "vib":
        shares = {dim: torch.sigmoid(sparsifier.signal(dim)).sum() for dim in sparsifier.dims}
    elif kind == "lapp":
        shares = {dim: gate.sum() for dim, gate in sparsifier.gates().items()}
    else:
        shares = {dim: (sparsifier._theta(dim) >= 0).float().sum() for dim in sparsifier.dims}
    assert 0.3 < sparsifier.share(shares).item() < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind: str) -> None:
    def fresh() -> tuple[nn.Module, object, torch.optim.Optimizer]:
        model = convolutional()
        sparsifier = KINDS[kind](model, captured(model), Target(ratio=0.5), learning=16, rate=0.05)
        return model, sparsifier, torch.optim.Adam(model.parameters())

    model, sparsifier, optimizer = fresh()
    train(model, 10, sparsifier, optimizer=optimizer)
    saved = [copy.deepcopy(part.state_dict()) for part in (model, sparsifier, optimizer)]
    train(model, 10, sparsifier, optimizer=optimizer, seed=1)
    again, resumed, other = fresh()
    for part, state in zip((again, resumed, other), saved, strict=True):
        part.load_state_dict(state)
    train(again, 10, resumed, optimizer=other, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(sparsifier.alive.values(), resumed.alive.values(), strict=True))


def test_attention_heads_and_hidden_units() -> None:
    """Dims that no weight reads (the head size of queries and keys) are gated where they are made."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0, activation="gelu")
    model = nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Linear(16, 16), layer, nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(6, 64)
    graph = regauge.capture(model.eval(), (x,))
    for kind in KINDS.values():
        copied = copy.deepcopy(model).train()
        sparsifier = kind(copied, graph, Target(ratio=0.5), learning=3)
        for _ in range(4):
            (copied(x).square().sum() + sparsifier.loss()).backward()
            sparsifier.step()
            copied.zero_grad()
        small = sparsifier.finish()
        torch.testing.assert_close(small.run(x)[0], copied.eval()(x), rtol=1e-4, atol=1e-5)
        assert figures(small).macs < 0.8 * figures(graph).macs
