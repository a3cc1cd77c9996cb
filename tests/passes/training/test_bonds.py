"""Ranks found while training: what is planted is found, and the finished graph is what was trained."""

import copy

import pytest
import torch
from torch import nn

import regauge
from regauge.training import Dlrt, OrderedDropout, SelfGuided, full_rank_factors


def planted(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """512 inputs and what a map of this rank, with singular values that fall from 3 to 1.5, makes of them."""
    u, _ = torch.linalg.qr(torch.randn(10, rank))
    v, _ = torch.linalg.qr(torch.randn(12, rank))
    x = torch.randn(512, 12)
    return x, x @ (u * torch.linspace(3, 1.5, rank) @ v.T).T


def factored() -> tuple[nn.Module, regauge.Graph]:
    graph = full_rank_factors(regauge.capture(nn.Linear(12, 10).eval(), (torch.randn(2, 12),)))
    model = graph.to_torch()
    return model, regauge.capture(model, (torch.randn(2, 12),), dynamic={0: {0: "batch"}})


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def test_factors_of_full_rank_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = regauge.capture(model.eval(), (torch.randn(2, 3, 8, 8),))
    found = full_rank_factors(graph)
    x = torch.randn(2, 3, 8, 8)
    assert [node.op for node in found.nodes] == ["conv", "conv", "relu", "conv", "conv"]
    torch.testing.assert_close(found.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


def test_tucker_factors_of_full_rank_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    x = torch.randn(2, 4, 6, 6)
    graph = regauge.capture(model.eval(), (x,), dynamic={0: {0: "batch"}})
    found = full_rank_factors(graph, form="tucker")
    assert [tuple(n.inputs[1].shape) for n in found.nodes if n.op == "conv"] == [
        (4, 4, 1, 1),
        (6, 4, 3, 3),
        (6, 6, 1, 1),
    ]
    torch.testing.assert_close(found.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)
    half = full_rank_factors(graph, form="tucker", share=0.5)
    assert [tuple(n.inputs[1].shape) for n in half.nodes if n.op == "conv"] == [
        (2, 4, 1, 1),
        (3, 2, 3, 3),
        (6, 3, 1, 1),
    ]


@pytest.mark.parametrize("rank", [2, 5])
def test_ordered_dropout_finds_the_rank(rank: int) -> None:
    x, y = planted(rank)
    model, graph = factored()
    sparsifier = OrderedDropout(model, graph, learning=600, penalty=2e-3, tolerance=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(800):
        part = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x[part]), y[part]) + sparsifier.loss()).backward()
        optimizer.step()
        sparsifier.step()
    model.eval()
    found = sparsifier.finish()
    assert list(sparsifier.ranks.values()) == [rank] and found.find("down.weight").shape == (rank, 12)
    torch.testing.assert_close(found.run(x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)
    assert relative(found.run(x)[0], y) < 1e-3
    values = found.find("down.weight").tensor.square().sum(1)
    torch.testing.assert_close(values, torch.linspace(3, 1.5, rank), rtol=1e-3, atol=1e-3)  # singular, in order


@pytest.mark.parametrize("rank", [2, 4, 8, 10])
def test_dlrt_finds_the_rank_of_a_matrix(rank: int) -> None:
    """Also one above half of the room there is, where old directions and new ones do not both fit in."""
    x, y = planted(rank)
    model, graph = factored()
    sparsifier = Dlrt(model, graph, learning=600, rate=0.5, tolerance=0.03)
    optimizer = torch.optim.SGD([model.get_parameter("up.bias")], lr=0.1)
    for _ in range(600):
        part = torch.randint(len(x), (64,))
        model.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
        sparsifier.step()
    found = sparsifier.finish()
    assert list(sparsifier.ranks.values()) == [rank] and found.find("up.weight").shape == (10, rank)
    assert relative(found.run(x)[0], y) < 1e-4


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 3), (5, 6)])
def test_dlrt_finds_the_ranks_of_a_kernel(inputs: int, outputs: int) -> None:
    """A convolution of these Tucker ranks, from six and eight."""
    down, core, up = (
        torch.linalg.qr(torch.randn(*shape))[0] for shape in ((6, inputs), (9 * inputs, outputs), (8, outputs))
    )
    down, up = 3 * down.t()[..., None, None], up[..., None, None]
    core = core.t().reshape(outputs, inputs, 3, 3)
    kernel = torch.einsum("oa,abhw,bi->oihw", up[..., 0, 0], core, down[..., 0, 0])
    x = torch.randn(64, 6, 6, 6)
    y = nn.functional.conv2d(x, kernel)
    chain = [nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 8, 3, bias=False), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*chain)
    graph = regauge.capture(model, (x[:2],), dynamic={0: {0: "batch"}})
    sparsifier = Dlrt(model, graph, learning=900, rate=0.3, tolerance=0.03)
    optimizer = torch.optim.SGD([model.get_parameter("2.bias")], lr=0.3)
    for _ in range(900):
        part = torch.randint(len(x), (16,))
        model.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
        sparsifier.step()
    found = sparsifier.finish()
    assert found.find("1.weight").shape == (outputs, inputs, 3, 3)
    assert found.find("0.weight").shape == (inputs, 6, 1, 1)
    assert relative(found.run(x)[0], y) < 1e-4


def test_a_dense_guide_fades_out() -> None:
    x, y = planted(4)
    model = nn.Sequential(nn.Linear(12, 4, bias=False), nn.Linear(4, 10))
    graph = regauge.capture(model, (x[:2],), dynamic={0: {0: "batch"}})
    start = model(x).detach()
    guide = SelfGuided(model, graph, learning=200, rate=0.03)
    torch.testing.assert_close(model(x), start, rtol=1e-4, atol=1e-5)  # the dense layer begins as the pair
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    shares, errors = [], []
    for _ in range(400):
        part = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        guide.step()
        shares.append(guide.share)
        errors.append(float(loss.detach()))
    assert shares[99] == pytest.approx(0.5) and shares[199] == 0 and errors[20] < 0.7 * errors[0]
    found = guide.finish()
    assert relative(found.run(x)[0], y) < 1e-2
    torch.testing.assert_close(found.run(x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)
    values = found.find("0.weight").tensor.square().sum(1)
    torch.testing.assert_close(values, torch.linspace(3, 1.5, 4), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [OrderedDropout, Dlrt, SelfGuided])
def test_a_checkpoint_goes_on_where_it_was(kind: type) -> None:
    """Saved after 50 steps, in the middle of a step of the integrator, and loaded into new objects."""
    x, y = planted(3)

    def made(state: dict | None) -> tuple[nn.Module, object]:
        torch.manual_seed(1)
        model, graph = factored()
        if state is not None:
            model.load_state_dict(state)
        return model.train(), kind(model, graph, learning=90)

    def train(model: nn.Module, sparsifier: object, steps: range) -> None:
        for step in steps:
            part = slice(step % 8 * 64, step % 8 * 64 + 64)
            model.zero_grad()
            (nn.functional.mse_loss(model(x[part]), y[part]) + sparsifier.loss()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
            sparsifier.step()

    model, sparsifier = made(None)
    train(model, sparsifier, range(50))
    held = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    train(model, sparsifier, range(50, 90))
    other, resumed = made(held[0])
    resumed.load_state_dict(held[1])
    train(other, resumed, range(50, 90))
    torch.testing.assert_close(resumed.finish().run(x)[0], sparsifier.finish().run(x)[0], rtol=1e-5, atol=1e-6)
