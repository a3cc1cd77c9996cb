"""What the average of two networks that were trained apart is worth, with and without weight matching; and stitching.

    python benchmarks/merge.py [--pairs 3] [--write]

Perceptrons with two hidden layers on scikit-learn's digits, from different seeds; shares of test digits that are right.

    python benchmarks/merge.py --stitch [--write]

joins the front of one network and the back of another by what least squares makes of each other's values, without
training: perceptrons of other widths (cut behind the hidden layers, on all training digits), and the character models
of char_gpt.py and char_llama.py, whose blocks differ (perplexities, on 64 windows of text).
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
from benchmarks import char_gpt, char_llama
from benchmarks.report import append_table, environment
from regauge.demo import load_digits
from regauge.ir.graph import Graph

STITCHED_HEADS = ["front", "back", "cut behind", "front alone", "back alone", "stitched"]
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


def stitched(pairs: int) -> list[list[str]]:
    return [*_perceptrons(pairs), *_characters()]


def _perceptrons(pairs: int) -> list[list[str]]:
    digits = load_digits()
    found: dict[tuple[int, int, int], list[list[float]]] = {}

    def right(graph: Graph) -> float:
        return float((graph.run(digits.test_images)[0].argmax(1) == digits.test_labels).double().mean())

    for seed in range(pairs):
        torch.manual_seed(seed)
        graphs = {}
        for width in (32, 128):
            model = perceptron(width, norms=False)
            train(model, digits.images, digits.labels)
            graphs[width] = regauge.capture(model.eval(), (digits.images[:2],), dynamic={0: {0: "batch"}})
        for front, back in ((32, 128), (128, 32)):
            for cut in (0, 1):
                names = [[node.name for node in graphs[own].nodes if node.op == "relu"][cut] for own in (front, back)]
                own = regauge.stitch(graphs[front], graphs[back], (names[0], names[1]), [digits.images])
                shares = [right(graph) for graph in (graphs[front], graphs[back], own)]
                found.setdefault((front, back, cut), []).append(shares)
    rows = []
    for (front, back, cut), each in found.items():
        means = [f"{statistics.mean(own):.3f}" for own in zip(*each, strict=True)]
        rows.append([f"perceptron {front}", f"perceptron {back}", f"hidden layer {cut + 1}", *means])
    return rows


def _characters() -> list[list[str]]:
    windows = char_gpt.calibration_windows(64)
    models = {"char_gpt": char_gpt.trained(), "char_llama": char_llama.trained()}
    graphs = {name: regauge.capture(own, (windows[:2],), dynamic={0: {0: "batch"}}) for name, own in models.items()}
    alone = {name: f"{char_gpt.perplexity(graph.to_torch()):.3f}" for name, graph in graphs.items()}
    rows = []
    for front, back in (("char_gpt", "char_llama"), ("char_llama", "char_gpt")):
        for block in range(char_gpt.BLOCKS):
            names = [_result(graphs[name], f"blocks.{block}") for name in (front, back)]
            data = [(part,) for part in windows.split(32)]
            own = regauge.stitch(graphs[front], graphs[back], (names[0], names[1]), data)
            judged = f"{char_gpt.perplexity(own.to_torch()):.3f}"
            rows.append([front, back, f"block {block + 1}", alone[front], alone[back], judged])
    return rows


def _result(graph: Graph, block: str) -> str:
    """The last sum of a block, which is what the next one reads."""
    return [node.name for node in graph.nodes if node.op == "add" and node.scope and node.scope[-1][0] == block][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--stitch", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stitch:
        rows = stitched(options.pairs)
        print("\n".join("  ".join(own) for own in rows), environment(), sep="\n")
        if options.write:
            note = "`python benchmarks/merge.py --stitch`: shares of digits that are right, and perplexities of text."
            append_table("Networks stitched together, no fine-tuning", STITCHED_HEADS, rows, note)
        return
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
