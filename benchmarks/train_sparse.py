"""What training with sparsity is worth, beside pruning at once.

    python benchmarks/train_sparse.py [--write] [--share 0.5] [--seeds 3] [--steps 400]

A convolutional network and a vision transformer are trained on scikit-learn's digits; every method then gets the same
number of further steps, the dense network too, from the same weights, and has to end at a share of the
multiply-accumulates. Shown is the accuracy on held-out images, mean and standard deviation over seeds. Methods that
leave zeros in weights keep the sizes: of them the share of zeros in the weights that they make sparse is the target.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks.report import append_table, environment
from regauge import training
from regauge.demo import Digits, load_digits
from regauge.ir.cost import figures
from regauge.training import Target

BATCH = 64
HEADS = ["network", "method", "MACs", "zeros", "accuracy", "sd"]


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, the mean over tokens."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def convolutional() -> nn.Module:
    def layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(1, 16), *layer(16, 16), *layer(16, 32, 2), *layer(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutional": convolutional, "transformer": Transformer}


class Run:
    """One seed of one network: the trained dense one, and what every method makes of it."""

    def __init__(self, network: str, digits: Digits, steps: int, share: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.digits, self.steps, self.share, self.seed = digits, steps, share, seed
        self.dense = NETWORKS[network]()
        self.train(self.dense, 3e-3)
        self.graph = regauge.capture(self.dense.eval(), (digits.images[:2],), dynamic={0: {0: "batch"}})
        self.target = Target(macs=share)

    def train(self, model: nn.Module, rate: float, sparsifier: Any = None, distil: Any = None) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        model.train()
        for _ in range(self.steps):
            batch = torch.randint(len(self.digits.images), (BATCH,), generator=generator)
            images, labels = self.digits.images[batch], self.digits.labels[batch]
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss = loss + sparsifier.loss() if sparsifier is not None else loss
            loss = loss + distil(logits, images) if distil is not None else loss
            loss.backward()
            optimizer.step()
            if sparsifier is not None:
                sparsifier.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        found = model.eval()(self.digits.test_images).argmax(1)
        return float((found == self.digits.test_labels).float().mean())

    def methods(self) -> dict[str, Callable[[], tuple[float, float, float]]]:
        """Name of method -> share of MACs, share of zeros, accuracy."""
        n, target = self.steps, self.target
        early = n // 2  # sparsity is reached by then, and the rest is for the weights
        sparse = {
            "gradual magnitude": lambda m, g: training.GradualGroups(m, g, target, every=early // 10, updates=10),
            "HESSO": lambda m, g: training.Hesso(
                m, g, target, warmup=n // 20, periods=5, period_steps=(early - n // 20) // 5
            ),
            "CRIC": lambda m, g: training.Cric(
                m, g, target, warmup=n // 20, period_steps=n // 5, sampling_steps=n // 40, cycles=10
            ),
            "LAPP": lambda m, g: training.Lapp(m, g, target, learning=early),
            "VTrans (VIB)": lambda m, g: training.Vib(m, g, target, learning=early),
            "PAT (HSM)": lambda m, g: training.Hsm(m, g, target, learning=early),
            "zeros: gradual magnitude": lambda m, g: training.GradualWeights(
                m, g, 1 - self.share, every=early // 10, updates=10
            ),
            "zeros: sparse momentum": lambda m, g: training.SparseMomentum(m, g, self.share, every=n // 20),
        }
        if self.share == 0.5:
            for recipe in ("sr-ste", "linear", "structure"):
                sparse[f"zeros: 2:4, {recipe}"] = partial(training.NMSparsity, recipe=recipe, steps=early)
        return {
            "dense, trained on": self.dense_on,
            "pruned at once": lambda: self.pruned(False, False),
            "pruned at once, fine-tuned": lambda: self.pruned(True, False),
            "pruned at once, distilled": lambda: self.pruned(True, True),
            **{name: partial(self.sparsified, make) for name, make in sparse.items()},
            "elastic, trained nested": self.nested,
        }

    def dense_on(self) -> tuple[float, float, float]:
        model = copy.deepcopy(self.dense)
        self.train(model, 1e-3)
        return 1.0, 0.0, self.accuracy(model)

    def pruned(self, tuned: bool, distilled: bool) -> tuple[float, float, float]:
        small = regauge.optimize(self.graph, f"prune{{macs={self.share}}}")
        module = small.to_torch()
        distil = training.Distillation(self.dense, module, self.graph, small) if distilled else None
        if tuned:
            self.train(module, 1e-3, distil=distil)
        return self.kept(small), 0.0, self.accuracy(module)

    def sparsified(self, make: Callable[[nn.Module, Any], Any]) -> tuple[float, float, float]:
        model = copy.deepcopy(self.dense)
        sparsifier = make(model, self.graph)
        self.train(model, 1e-3, sparsifier)
        small = sparsifier.finish()
        module = small.to_torch()
        zeros = 0.0
        if isinstance(sparsifier, training.NMSparsity | training.GradualWeights | training.SparseMomentum):
            zeros = sparsifier.sparsity
        return self.kept(small), zeros, self.accuracy(module)

    def nested(self) -> tuple[float, float, float]:
        """Trained at several widths at once, one of which meets the budget."""
        elastic = regauge.elastic(self.graph)
        mixes = {"wanted": elastic.uniform(macs=self.share)}
        net = training.Supernet(elastic, widths=(0.5, 0.75), mixes=mixes).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            batch = torch.randint(len(self.digits.images), (BATCH,), generator=generator)
            labels = self.digits.labels[batch]
            net.sandwich((self.digits.images[batch],), partial(F.cross_entropy, target=labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        small = net.at("wanted", self.digits.images.split(200))
        return self.kept(small), 0.0, self.accuracy(small.to_torch())

    def kept(self, small: Any) -> float:
        return figures(small).macs / figures(self.graph).macs


def measure(network: str, steps: int, share: float, seeds: int) -> list[list[str]]:
    digits = load_digits()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        run = Run(network, digits, steps, share, seed)
        found.setdefault("dense", []).append((1.0, 0.0, run.accuracy(run.dense)))
        for name, method in run.methods().items():
            found.setdefault(name, []).append(method())
            print(network, seed, name, *(f"{value:.3f}" for value in found[name][-1]), flush=True)
    rows = []
    for name, results in found.items():
        macs, zeros, accuracy = zip(*results, strict=True)
        deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        means = [statistics.mean(values) for values in (macs, zeros, accuracy)]
        rows.append([network, name, *(f"{mean:.1%}" for mean in means), f"{deviation:.1%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [row for name in options.networks for row in measure(name, options.steps, options.share, options.seeds)]
    for row in rows:
        print("  ".join(row))
    print(environment())
    if options.write:
        note = (
            f"Digits, {options.seeds} seeds, {options.steps} steps of 64 images for the dense network and as many "
            "for every method after it. zeros: share of zeros in the weights that keep their sizes."
        )
        append_table(f"Sparsity while training, {options.share:.0%} of the MACs", HEADS, rows, note)


if __name__ == "__main__":
    main()
