"""What networks that grow end with, beside those that are as large from the start, for as many multiplications.

    python benchmarks/growing.py [--only coalesce templates] [--steps 300] [--seeds 2] [--write]

coalesce    A vision transformer is trained from its first weights for all steps; or for a tenth of them, coalesced, the
            small one trained for half of the steps, taken back (``share=0.5``), and the whole one trained for what is
            left of the multiplications. Cross-entropy of test digits: of the whole network when it is coalesced, of the
            small one at its end, of the whole one when it is taken back, and at the end, with the share that is right
templates   Two perceptrons, trained apart for half of the multiplications together, become one of twice the width:
            with mixtures of templates between them (MixtureGrowth), or zeros; shares of test digits that are right
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks.merge import perceptron
from benchmarks.report import append_table, environment
from benchmarks.train_sparse import Transformer
from regauge.demo import Digits, load_digits
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.growing.coalesce import Halved, coalesce
from regauge.training import Templates

WIDTH, SHARE = 64, 0.5
COALESCE_HEADS = [
    "training",
    "parameters of the small one",
    "whole, first",
    "small",
    "taken back",
    "at the end",
    "right",
]
TEMPLATE_HEADS = ["training", "when it grows", "at the end", "cross-entropy"]


def coalesced(steps: int, seeds: int) -> list[list[str]]:
    digits, found = load_digits(), dict[str, list[list[float]]]()
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = _of_digits(Transformer(WIDTH), digits)
        found.setdefault("whole from the start", []).append([1.0, *_loss(_ended(start, digits, steps), digits)])
        for of in get_args(Halved):
            first = _ended(start, digits, steps // 10)
            way = coalesce(first, of=of)
            small = _ended(way.graph, digits, steps // 2)
            back = way.back(small, share=SHARE)
            spent = steps // 2 * figures(small).macs / figures(start).macs
            last = _ended(back, digits, round(steps - steps // 10 - spent))
            size = figures(small).parameters / figures(start).parameters
            losses = [_judged(own, digits)[1] for own in (first, small, back)]
            found.setdefault(f"half: {of}", []).append([size, *losses, *_loss(last, digits)])
            print(seed, of, found[f"half: {of}"][-1], flush=True)
    rows = []
    for name, runs in found.items():
        means = [f"{statistics.mean(own):.3f}" for own in zip(*runs, strict=True)]
        rows.append([name, *means] if len(means) > 3 else [name, "", "", "", "", *means[1:]])
        print("  ".join(rows[-1]), flush=True)
    return rows


def _ended(graph: Graph, digits: Digits, steps: int) -> Graph:
    """After so many steps at a rate that falls to zero."""
    model = graph.to_torch()
    _train(model, list(model.parameters()), digits, steps, most=3e-3)
    return _of_digits(model, digits)


def _loss(graph: Graph, digits: Digits) -> tuple[float, float]:
    right, loss = _judged(graph, digits)
    return loss, right


def grown(steps: int, seeds: int) -> list[list[str]]:
    digits = load_digits()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        for name, graph, left in _starts(digits, steps, seed):
            early = _judged(graph, digits)[0]
            model = graph.to_torch()
            _train(model, list(model.parameters()), digits, left)
            found.setdefault(name, []).append((early, *_judged(_of_digits(model, digits), digits)))
    rows = []
    for name, runs in found.items():
        rows.append([name, *(f"{statistics.mean(values):.3f}" for values in zip(*runs, strict=True))])
        print("  ".join(rows[-1]), flush=True)
    return rows


def _starts(digits: Digits, steps: int, seed: int) -> Iterable[tuple[str, Graph, int]]:
    """Networks of the great width with the steps that are left for them."""
    torch.manual_seed(seed)
    wide = _of_digits(perceptron(128, norms=False), digits)
    yield "wide from the start", wide, steps
    for name, scale in (("mixtures of templates", 1.0), ("zeros", 0.0)):
        pair = []
        for number in range(2):
            torch.manual_seed(1000 * number + seed)
            model = perceptron(64, norms=False)
            own = Templates(model, _of_digits(model, digits), seed=seed + number)
            biases = [p for p in model.parameters() if p.dim() == 1]
            narrow = figures(own.graph).macs / figures(wide).macs
            _train(model, [*own.parameters(), *biases], digits, round(steps / 4 / narrow))
            pair.append(own)
        yield name, pair[0].grow(pair[1], scale=scale), steps // 2


def _of_digits(model: nn.Module, digits: Digits) -> Graph:
    return regauge.capture(model.eval(), (digits.images[:2],), dynamic={0: {0: "batch"}})


def _train(
    model: nn.Module, parameters: list[nn.Parameter], digits: Digits, steps: int, most: float | None = None
) -> None:
    """At a rate of 0.001, or one that rises to the greatest and falls to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=most or 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, total_steps=steps) if most else None
    for _ in range(steps):
        batch = torch.randint(len(digits.images), (64,))
        F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def _judged(graph: Graph, digits: Digits) -> tuple[float, float]:
    logits = graph.run(digits.test_images)[0]
    right = float((logits.argmax(1) == digits.test_labels).double().mean())
    return right, float(F.cross_entropy(logits, digits.test_labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["coalesce", "templates"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    note = (
        f"`python benchmarks/growing.py`: as many multiplications as {options.steps} steps of 64 digits with the whole "
    )
    note += f"network, {options.seeds} seeds."
    if "coalesce" in options.only:
        rows = coalesced(options.steps, options.seeds)
        if options.write:
            append_table("Coalesced, trained and taken back: digits", COALESCE_HEADS, rows, note)
    if "templates" in options.only:
        rows = grown(options.steps, options.seeds)
        if options.write:
            append_table("Two narrow networks become a wide one: digits", TEMPLATE_HEADS, rows, note)
    print(environment())


if __name__ == "__main__":
    main()
