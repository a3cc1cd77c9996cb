"""What the average of two networks that were trained apart is worth, with and without weight matching.

    python benchmarks/merge.py [--pairs 3] [--write]

Perceptrons with two hidden layers on scikit-learn's digits, from different seeds; shares of test digits that are right.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks.report import append_table, environment
from regauge.demo import load_digits

HEADS = ["hidden", "norms", "alone", "average", "average after matching"]
STEPS, BATCH, RATE = 1500, 64, 1e-3


def perceptron(width: int, norms: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, width):
        layers += [nn.Linear(inputs, width), *([nn.LayerNorm(width)] if norms else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def row(width: int, norms: bool, pairs: int) -> list[str]:
    digits = load_digits()
    found: dict[str, list[float]] = {name: [] for name in HEADS[2:]}
    for pair in range(pairs):
        graphs = []
        for seed in (2 * pair, 2 * pair + 1):
            torch.manual_seed(seed)
            model = perceptron(width, norms)
            train(model, digits.images, digits.labels)
            graphs.append(regauge.capture(model.eval(), (digits.images[:2],), dynamic={0: {0: "batch"}}))
        merged = [regauge.merge(graphs, align=matched) for matched in (False, True)]
        for name, graph in zip([HEADS[2], HEADS[2], *HEADS[3:]], [*graphs, *merged], strict=True):
            right = graph.run(digits.test_images)[0].argmax(1) == digits.test_labels
            found[name].append(float(right.double().mean()))
    return [str(width), "yes" if norms else "no", *(f"{statistics.mean(shares):.3f}" for shares in found.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in (64, 256):
        for norms in (False, True):
            rows.append(row(width, norms, options.pairs))
            print("  ".join(rows[-1]), flush=True)
    print(environment())
    if options.write:
        note = (
            "`python benchmarks/merge.py`: perceptrons with two hidden layers on scikit-learn's digits, "
            f"{options.pairs} pairs each; shares of test digits\nthat are right."
        )
        append_table("Averages of networks that were trained apart", HEADS, rows, note)


if __name__ == "__main__":
    main()
