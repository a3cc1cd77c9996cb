"""torch-pruning's best without fine-tuning, for benchmarks/prune.py.

What it is given, beside the model: three criteria (magnitude, batch norm scales, and where there are labels the Taylor
criterion on the calibration data), ranked globally and layer by layer, several sets of layers to leave alone where it
cannot take all, batch norms as they are and estimated anew on the calibration data. The pruning ratio that leaves the
share of multiply-accumulates is searched for. The best by the judge, on the images that are measured, is shown.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Judge = Callable[[nn.Module], tuple[float, ...]]
Ignored = Callable[[nn.Module], list[nn.Module]]


@torch.no_grad()
def macs(model: nn.Module, example: torch.Tensor) -> float:
    """Multiply-accumulates of one run, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() / 2


def best_of_peer(
    model: nn.Module,
    share: float,
    batches: Sequence[torch.Tensor],
    judge: Judge,
    ignored: Sequence[Ignored],
    labels: Sequence[torch.Tensor] = (),
) -> tuple[tuple[float, ...], float]:
    """What the judge says of the best network that torch-pruning makes, and its share of MACs.

    Raises RuntimeError where it makes none.
    """
    found: list[tuple[tuple[float, ...], float]] = []
    criteria = ["magnitude", "batch norm", *(["taylor"] if labels else [])]
    reasons = set()
    for criterion, ranked, leave in itertools.product(criteria, (True, False), ignored):
        try:
            pruned, left = _searched(model, share, batches, labels, criterion, ranked, leave)
            for candidate in _candidates(pruned, batches):
                found.append((judge(candidate), left))
        except Exception as error:  # the peer raises what it meets
            reasons.add(f"{type(error).__name__}: {error}".splitlines()[0][:100])
    for reason in sorted(reasons):
        print(f"torch-pruning: {reason}", file=sys.stderr)
    if not found:
        raise RuntimeError("; ".join(sorted(reasons)))
    return max(found)


def _candidates(pruned: nn.Module, batches: Sequence[torch.Tensor]) -> Iterator[nn.Module]:
    """The network as it is, and with the statistics of its batch norms estimated anew."""
    yield pruned.eval()
    norms = [module for module in pruned.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
    pruned.train()
    with torch.no_grad():
        for batch in batches:
            pruned(batch)
    yield pruned.eval()


def _searched(
    model: nn.Module,
    share: float,
    batches: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    criterion: str,
    ranked: bool,
    leave: Ignored,
) -> tuple[nn.Module, float]:
    """The largest network within the share of MACs, by bisection of the pruning ratio, and what it leaves."""
    example = batches[0][:1]
    whole = macs(model, example)
    low, high = 0.0, 1.0
    fits: tuple[nn.Module, float] | None = None
    for _ in range(8):
        middle = (low + high) / 2
        trial = _pruned(model, middle, batches, labels, criterion, ranked, leave)
        left = macs(trial, example) / whole
        if left <= share:
            high, fits = middle, (trial, left)
        else:
            low = middle
    if fits is None:
        raise RuntimeError(f"no pruning ratio leaves {share:.2f} of the MACs")
    return fits


def _pruned(
    model: nn.Module,
    ratio: float,
    batches: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    criterion: str,
    ranked: bool,
    leave: Ignored,
) -> nn.Module:
    import torch_pruning as tp

    importance: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "batch norm": lambda: tp.importance.BNScaleImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }
    trial = copy.deepcopy(model)
    if criterion == "taylor":
        for batch, classes in zip(batches, labels, strict=True):
            F.cross_entropy(trial(batch), classes).backward()
    pruner = tp.pruner.MagnitudePruner(
        trial, batches[0][:1], importance=importance[criterion](), pruning_ratio=ratio, global_pruning=ranked,
        ignored_layers=leave(trial),
    )  # fmt: skip
    pruner.step()
    trial.zero_grad()
    return trial
