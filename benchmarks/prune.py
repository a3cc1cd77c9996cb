"""What pruning without fine-tuning leaves of trained networks, beside torch-pruning.

    python benchmarks/prune.py [--write] [--depths 20 56] [--examples 1000]
    python benchmarks/prune.py --scopes uniform global knapsack dp [--write] [--depths 20 56] [--examples 500]

Residual networks for 32x32 images with trained weights are cut to shares of their multiply-accumulates. Shown are, on
crops of photographs that no method saw, the share of images put into the class that the original puts them in, and the
squared error of the logits as a share of their variance. The peer's row is the better of its magnitude and batch-norm
criteria, ranked globally, each with batch norms estimated anew on the same crops; it cuts the channels inside blocks.
With ``--scopes`` ways to weigh Dims against one another are compared, all by distortion and refitted.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import regauge
from benchmarks.cifar_resnet import crops, trained
from benchmarks.report import append_table, environment

SHARES = (0.7, 0.5)
OURS = {
    "l2": ("prune{{macs={share},compensate=false}}", False),
    "no data, refitted": ("prune{{macs={share}}}", False),
    "distortion": ("prune{{macs={share},compensate=false}}", True),
    "l2, refitted": ("prune{{macs={share},score=l2}}", True),
    "distortion, refitted": ("prune{{macs={share}}}", True),
}
SCOPES = ("uniform", "isomorphic", "global", "knapsack", "dp")
HEADS = ["network", "MACs kept", "method", "same class", "error", "seconds"]


class Judge:
    """How near a model is to the original on held-out images."""

    def __init__(self, original: nn.Module, images: torch.Tensor) -> None:
        self.images = images
        self.logits = self.run(original)

    @torch.no_grad()
    def run(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(part) for part in self.images.split(500)])

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        found = self.run(model)
        same = float((found.argmax(1) == self.logits.argmax(1)).float().mean())
        spread = (self.logits - self.logits.mean(0)).square().sum()
        return same, float((found - self.logits).square().sum() / spread)


def peer(model: nn.Module, share: float, batches: list[torch.Tensor], judge: Judge) -> tuple[float, float]:
    """torch-pruning's best: the pruning ratio that leaves the share of MACs is searched for."""
    import torch_pruning as tp

    criteria: list[Callable[[], object]] = [
        lambda: tp.importance.GroupMagnitudeImportance(p=2),
        lambda: tp.importance.BNScaleImportance(),
    ]
    best = (0.0, float("inf"))
    for criterion in criteria:
        pruned = _peer_pruned(model, share, criterion)
        for module in pruned.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        pruned.train()
        with torch.no_grad():
            for batch in batches:
                pruned(batch)
        best = max(best, judge(pruned.eval()))
    return best


def _peer_pruned(model: nn.Module, share: float, criterion: Callable[[], object]) -> nn.Module:
    import torch_pruning as tp

    example = torch.zeros(1, 3, 32, 32)
    whole = tp.utils.count_ops_and_params(model, example)[0]
    low, high = 0.0, 1.0
    fits = copy.deepcopy(model)
    for _ in range(8):
        middle = (low + high) / 2
        trial = copy.deepcopy(model)
        pruner = tp.pruner.MagnitudePruner(
            trial, example, importance=criterion(), pruning_ratio=middle, global_pruning=True,
            ignored_layers=_beside_shortcuts(trial),
        )  # fmt: skip
        pruner.step()
        if tp.utils.count_ops_and_params(trial, example)[0] <= share * whole:
            high, fits = middle, trial
        else:
            low = middle
    return fits


def _beside_shortcuts(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs are added to zero-padded shortcuts, of which the peer loses track: it raises IndexError."""
    return [model.linear, model.conv1, *(m for name, m in model.named_modules() if name.endswith("conv2"))]


def measure(depth: int, examples: int) -> list[list[str]]:
    model = trained(depth)
    judge = Judge(model, crops(2000, held_out=True))
    batches = list(crops(examples, held_out=False).split(125))
    graph = regauge.capture(model, (torch.zeros(2, 3, 32, 32),), dynamic={0: {0: "batch"}})
    rows = []
    for share in SHARES:
        start = time.perf_counter()
        try:
            results = [("torch-pruning", peer(model, share, batches, judge), time.perf_counter() - start)]
        except Exception as error:  # the peer may not take the network
            results = []
            print(f"torch-pruning: {type(error).__name__}: {error}", file=sys.stderr)
        for method, (pipeline, with_data) in OURS.items():
            start = time.perf_counter()
            data = [(batch,) for batch in batches] if with_data else None
            small = regauge.optimize(graph, pipeline.format(share=share), data=data)
            results.append((method, judge(small.to_torch().eval()), time.perf_counter() - start))
        for method, (same, error), seconds in results:
            rows.append([f"resnet{depth}", f"{share:.2f}", method, f"{same:.1%}", f"{error:.3f}", f"{seconds:.0f}"])
            print("  ".join(rows[-1]), flush=True)
    return rows


def measure_scopes(depth: int, examples: int, scopes: Sequence[str]) -> list[list[str]]:
    model = trained(depth)
    judge = Judge(model, crops(1000, held_out=True))
    data = [(batch,) for batch in crops(examples, held_out=False).split(125)]
    graph = regauge.capture(model, (torch.zeros(2, 3, 32, 32),), dynamic={0: {0: "batch"}})
    rows = []
    for share in SHARES:
        for scope in scopes:
            start = time.perf_counter()
            small = regauge.optimize(graph, f"prune{{macs={share},scope={scope}}}", data=data)
            seconds, (same, error) = time.perf_counter() - start, judge(small.to_torch().eval())
            rows.append([f"resnet{depth}", f"{share:.2f}", scope, f"{same:.1%}", f"{error:.3f}", f"{seconds:.0f}"])
            print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--scopes", nargs="*", choices=SCOPES)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.scopes:
        rows = [row for depth in options.depths for row in measure_scopes(depth, options.examples, options.scopes)]
        if options.write:
            note = f"No fine-tuning; {options.examples} calibration crops, 1,000 held-out crops of the other halves."
            append_table("Allocation with data", [*HEADS[:2], "scope", *HEADS[3:]], rows, note)
        return
    rows = [row for depth in options.depths for row in measure(depth, options.examples)]
    print(environment())
    if options.write:
        note = f"No fine-tuning; {options.examples} calibration crops, 2,000 held-out crops of the other halves."
        append_table("Pruning without fine-tuning", HEADS, rows, note)


if __name__ == "__main__":
    main()
