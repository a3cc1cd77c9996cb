"""The torch networks that benchmarks/prune.py prunes, what they are calibrated on, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import regauge
from benchmarks import cifar_resnet, train_sparse
from benchmarks.prune_peer import Ignored
from regauge.demo import load_digits

TRAINING_STEPS = 400


@dataclass(frozen=True)
class Network:
    """A trained network; ``judge`` gives the figures named by ``measures``, of which the first counts."""

    model: nn.Module
    graph: Any
    batches: Sequence[torch.Tensor]
    judge: Callable[[nn.Module], tuple[float, ...]]
    measures: tuple[str, ...]
    ignored: Sequence[Ignored]  # sets of layers that the peer leaves alone, each tried
    labels: Sequence[torch.Tensor] = ()


class Judge:
    """How near a model is to the original on held-out images, and how often it is right where there are labels."""

    def __init__(self, original: nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.logits = self.run(original)

    @torch.no_grad()
    def run(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(part) for part in self.images.split(500)])

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        found = self.run(model)
        wanted = self.logits.argmax(1) if self.labels is None else self.labels
        same = float((found.argmax(1) == wanted).float().mean())
        spread = (self.logits - self.logits.mean(0)).square().sum()
        return same, float((found - self.logits).square().sum() / spread)


def residual(depth: int, examples: int, seed: int, *, fresh: bool = True, held_out: int = 2000) -> Network:
    """A residual network with trained weights, on crops of photographs."""
    model = cifar_resnet.trained(depth)
    if fresh:
        images = cifar_resnet.fresh_crops(held_out, seed=seed)
    else:
        images = cifar_resnet.crops(held_out, held_out=True, seed=seed)
    return Network(
        model,
        regauge.capture(model, (torch.zeros(2, 3, 32, 32),), dynamic={0: {0: "batch"}}),
        cifar_resnet.crops(examples, held_out=False, seed=seed).split(125),
        Judge(model, images),
        ("same class", "error"),
        [beside_shortcuts],
    )


def beside_shortcuts(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs are added to zero-padded shortcuts, of which the peer loses track: it raises IndexError."""
    return [model.linear, model.conv1, *(m for name, m in model.named_modules() if name.endswith("conv2"))]


def on_digits(kind: str, examples: int, seed: int) -> Network:
    """A network of benchmarks/train_sparse.py trained on the digits; calibrated on images it learned from."""
    digits = load_digits()
    run = train_sparse.Run(kind, digits, TRAINING_STEPS, 1.0, seed)
    return Network(
        run.dense,
        run.graph,
        digits.images[:examples].split(125),
        Judge(run.dense, digits.test_images, digits.test_labels),
        ("accuracy", "error"),
        [_heads, _all_but_hidden],
        digits.labels[:examples].split(125),
    )


def _heads(model: nn.Module) -> list[nn.Module]:
    return [[module for module in model.modules() if isinstance(module, nn.Linear)][-1]]


def _all_but_hidden(model: nn.Module) -> list[nn.Module]:
    """The peer cannot cut the transformer's attention or its width, only the hidden layers of its perceptrons."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [module for name, module in layers if not name.endswith("mlp.0")]
