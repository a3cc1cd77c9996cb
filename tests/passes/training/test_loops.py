"""Training loops as they come: gradient accumulation, autocast with a GradScaler, a wrapped model, tied weights."""

import pytest
import torch
from torch import nn

import regauge
from digits_training import captured, convolutional, digits
from regauge.training import GradualGroups, Hesso, Hsm, Lapp, NMSparsity, Target, Vib


def gradients(parts: int) -> list[torch.Tensor]:
    """Of one batch of 64 images, taken in so many parts, with SR-STE."""
    model = convolutional().double().eval()  # batch norms would see other batches
    graph = regauge.capture(model, (torch.zeros(2, 1, 8, 8, dtype=torch.float64),), dynamic={0: {0: "batch"}})
    sparsifier = NMSparsity(model, graph, penalty=0.1)
    images, labels, _, _ = digits()
    for x, y in zip(images[:64].double().chunk(parts), labels[:64].chunk(parts), strict=True):
        ((nn.functional.cross_entropy(model(x), y) + sparsifier.loss()) / parts).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    for whole, parts in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("make", [Hesso, Lapp, Vib, NMSparsity], ids=lambda kind: kind.__name__)
def test_autocast_with_a_scaler(make: type) -> None:
    model = convolutional()
    graph = captured(model)
    options = {"warmup": 5, "periods": 2, "period_steps": 5} if make is Hesso else {"learning": 15}
    sparsifier = make(model, graph) if make is NMSparsity else make(model, graph, Target(ratio=0.5), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    images, labels, _, _ = digits()
    model.train()
    for batch in torch.arange(640).split(32):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch]) + sparsifier.loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        optimizer.zero_grad()
    small = sparsifier.finish()
    torch.testing.assert_close(small.to_torch()(images[:8]), model.eval()(images[:8]), rtol=1e-4, atol=1e-4)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class Tied(nn.Module):
    """The embedding is the head: one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(x + torch.relu(self.inner(x)))


@pytest.mark.parametrize("make", [GradualGroups, Vib, NMSparsity], ids=lambda kind: kind.__name__)
def test_tied_weights_stay_tied(make: type) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.tensor([[1, 2, 6]])
    graph = regauge.capture(model, (tokens,))
    options = {"every": 1, "updates": 2} if make is GradualGroups else {"learning": 2}
    sparsifier = make(model, graph) if make is NMSparsity else make(model, graph, Target(ratio=0.5), **options)
    for _ in range(3):
        (model(tokens).square().sum() + sparsifier.loss()).backward()
        sparsifier.step()
        assert model.head.weight is model.embed.weight
    small = sparsifier.finish()
    torch.testing.assert_close(small.run(tokens)[0], model.eval()(tokens), rtol=1e-5, atol=1e-5)
    if make is not NMSparsity:
        assert small.find("embed.weight").shape == (7, 6)


def test_a_compiled_wrapper_is_seen_through() -> None:
    model = convolutional()
    graph = captured(model)
    wrapped = torch.compile(model, backend="eager")
    assert GradualGroups(wrapped, graph, Target(ratio=0.5)).bound.model is model


@pytest.mark.parametrize("make", [Hesso, Lapp, Vib, Hsm], ids=lambda kind: kind.__name__)
def test_models_of_another_precision(make: type) -> None:
    model = convolutional().double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    graph = regauge.capture(model, (x,))
    options = {"periods": 1, "period_steps": 2} if make is Hesso else {"learning": 2}
    sparsifier = make(model, graph, Target(ratio=0.5), **options)
    for _ in range(3):
        (model(x).square().mean() + sparsifier.loss()).backward()
        sparsifier.step()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    torch.testing.assert_close(sparsifier.finish().run(x)[0], model.eval()(x), rtol=1e-10, atol=1e-10)
