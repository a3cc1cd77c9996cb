"""Training a network while half of its work goes away, and training on what is left."""

import torch
from torch import nn

import regauge
from regauge.training import Hesso, Target

torch.manual_seed(0)
images = torch.rand(512, 1, 8, 8)
labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()  # brighter above or below
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 9, 32), nn.ReLU(), nn.Linear(32, 2),
)  # fmt: skip


def train(model: nn.Module, steps: int, sparsifier: Hesso | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()  # after the optimizer, before the gradients are gone
            if step % 30 == 0:
                print(f"step {step}: loss {loss.item():.3f}, {sparsifier.sparsity:.0%} of the indices are zero")
        optimizer.zero_grad()
    model.eval()


graph = regauge.capture(model, (images[:2],), dynamic={0: {0: "batch"}})
train(model, 150, sparsifier := Hesso(model, graph, Target(macs=0.5), warmup=50, periods=5, period_steps=10))
small = sparsifier.finish()  # a graph: it computes what the model does, without the zeros
module = small.to_torch()
print(f"{graph.find('3.weight')} became {small.find('3.weight')}")
print(f"the same results to {(module(images) - model(images)).abs().max():.1e}")
train(module, 30)
print(f"{(module(images).argmax(1) == labels).float().mean():.1%} of the images are right")
