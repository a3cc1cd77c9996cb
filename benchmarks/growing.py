"""What networks that grow end with, beside those that are as large from the start, for as many multiplications.

    python benchmarks/growing.py [--only characters digits] [--steps 300] [--seeds 3] [--write]

characters  The character model is trained from its first weights: for all steps; or for a tenth of them, coalesced, the
            small one trained for half of the steps, taken back (``share=0.5``), and the whole one trained for what is
            left of the multiplications. Loss in nats for each character of held-out text: of the whole network when it
            is coalesced, of the small one at its end, of the whole one when it is taken back, and at the end
digits      Two perceptrons, trained apart for half of the multiplications together, become one of twice the width:
            with mixtures of templates between them (MixtureGrowth), or zeros; shares of test digits that are right
"""

from __future__ import annotations

import argparse
import math
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
from benchmarks import char_gpt
from benchmarks.merge import perceptron
from benchmarks.report import append_table, environment
from regauge.demo import Digits, load_digits
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.growing.coalesce import Halved, coalesce
from regauge.training import Templates

BATCH, RATE, SHARE = 8, 3e-3, 0.5
CHARACTER_HEADS = ["training", "parameters of the small one", "whole, first", "small", "taken back", "at the end"]
DIGIT_HEADS = ["training", "when it grows", "at the end", "cross-entropy"]


def characters(steps: int) -> list[list[str]]:
    windows = char_gpt.calibration_windows(4 * steps * BATCH, seed=2)
    torch.manual_seed(0)
    start = _of_text(char_gpt.CharGPT(int(windows.max()) + 1), windows)
    batches = iter(windows.split(BATCH))
    whole = _trained_on_text(start, batches, steps)
    rows = [["whole from the start", "", "", "", "", _loss(whole)]]
    print("  ".join(rows[-1]), flush=True)
    for of in get_args(Halved):
        batches = iter(windows.split(BATCH))
        first = _trained_on_text(start, batches, steps // 10)
        found = coalesce(first, of=of)
        small = _trained_on_text(found.graph, batches, steps // 2)
        back = found.back(small, share=SHARE)
        spent = steps // 2 * figures(small).macs / figures(start).macs
        last = _trained_on_text(back, batches, round(steps - steps // 10 - spent))
        size = f"{figures(small).parameters / figures(start).parameters:.2f}"
        rows.append([f"half the {of}", size, *(_loss(own) for own in (first, small, back, last))])
        print("  ".join(rows[-1]), flush=True)
    return rows


def _of_text(model: nn.Module, windows: torch.Tensor) -> Graph:
    return regauge.capture(model.eval(), (windows[:2],), dynamic={0: {0: "batch"}})


def _trained_on_text(graph: Graph, batches: Iterable[torch.Tensor], steps: int) -> Graph:
    model = graph.to_torch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _, batch in zip(range(steps), batches, strict=False):
        F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return _of_text(model, batch)


def _loss(graph: Graph) -> str:
    return f"{math.log(char_gpt.perplexity(graph.to_torch())):.3f}"


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


def _train(model: nn.Module, parameters: list[nn.Parameter], digits: Digits, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(digits.images), (64,))
        F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _judged(graph: Graph, digits: Digits) -> tuple[float, float]:
    logits = graph.run(digits.test_images)[0]
    right = float((logits.argmax(1) == digits.test_labels).double().mean())
    return right, float(F.cross_entropy(logits, digits.test_labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["characters", "digits"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    note = "`python benchmarks/growing.py`: "
    if "characters" in options.only:
        rows = characters(options.steps)
        if options.write:
            more = f"multiplications of {options.steps} steps of {BATCH} windows with the whole network."
            append_table("Coalesced, trained, taken back: a character model", CHARACTER_HEADS, rows, note + more)
    if "digits" in options.only:
        rows = grown(2 * options.steps, options.seeds)
        if options.write:
            more = f"multiplications of {2 * options.steps} steps of 64 digits, {options.seeds} seeds."
            append_table("Two narrow networks become a wide one: digits", DIGIT_HEADS, rows, note + more)
    print(environment())


if __name__ == "__main__":
    main()
