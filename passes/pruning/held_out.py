"""Judges refits by the outputs of the graph, on examples that neither the cut nor the refits were made from.

Refits lower the errors of layers. That is not yet an error of the outputs: behind a maximum few rows of a layer count,
a saturated softmax hides some errors and shows others, and of few examples the rows are nearly the same ones. So where
examples are few, or the outputs do not say at once that refits help, the examples are dealt out to parts, and each part
judges a cut and refits made from the others, whole and to a share a: weights between what they were, W0, and the refit,

    W0 + a (W - W0)      a in 1, 1/2, 1/4, 0

The share that changes the outputs least is taken of the refits to all examples (cross-validation, Stone 1974).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.ir.memory.mapped import mapped, on_disk
from regauge.passes.allocation.choices import Counts
from regauge.passes.calibration.batches import in_folds
from regauge.passes.calibration.losses import labelled
from regauge.passes.calibration.probe import Probe

_SHARES = (1.0, 0.5, 0.25, 0.0)
_CLEAR = 0.5  # of the change that the cut alone makes: so little is left by refits that clearly help
_MANY = 256  # rows of the outputs that are enough to believe that
_FOLDS = 4  # parts of few examples, of which a half would show too little; others are halved


@dataclass
class Attempt:
    """A graph that was cut, before and after its layers were refitted, and how many indices each Dim keeps."""

    cut: Graph
    refitted: Graph
    counts: Counts


@dataclass
class Judged:
    """The share of each refit that changes the outputs least on examples not seen, and that change per example."""

    share: float
    change: float
    all: Probe  # of the graph on all examples


def judge(
    graph: Graph, attempt: Attempt, batches: Sequence[Any], again: Callable[[list[Any]], Attempt]
) -> Judged | None:
    """What parts of the data say of attempts made ``again`` from the others; None where refits clearly help.

    Also None where the data cannot be taken apart.
    """
    probe = Probe(graph, [labelled(graph, batch).inputs for batch in batches])
    before, after = probe.change(graph=attempt.cut), probe.change(graph=attempt.refitted)
    if not before or (probe.rows >= _MANY and after <= _CLEAR * before):
        return None
    folds = in_folds(graph, batches, _FOLDS if probe.rows < _MANY else 2)
    if folds is None:
        return None
    changes, examples = dict.fromkeys(_SHARES, 0.0), 0
    for place, fold in enumerate(folds):
        trial = again([batch for other, part in enumerate(folds) if other != place for batch in part])
        unseen = Probe(graph, [labelled(graph, batch).inputs for batch in fold])
        examples += unseen.examples
        for share in _SHARES:
            change = unseen.change(graph=_between(trial, share)) * unseen.examples
            changes[share] += change if change < torch.inf else torch.inf
    best = min(_SHARES, key=lambda share: changes[share])
    return Judged(best, changes[best] / examples, probe)


def _between(attempt: Attempt, share: float) -> Graph:
    result = attempt.refitted.copy()
    move(result, attempt.cut, share, by="judged")
    return result


def move(refitted: Graph, cut: Graph, share: float, *, by: str) -> None:
    """Leave a share of what refits changed, towards the weights of the graph that was only cut."""
    before = {parameter.name: parameter.weight for parameter in cut.all_parameters()}
    for parameter in list(refitted.all_parameters()):
        old = before[parameter.name]
        if share == 1 or parameter.weight is old:
            continue
        if share == 0:
            set_weight(refitted, parameter, old, by=by)
            continue
        weight = torch.lerp(old.load().detach(), parameter.tensor.detach(), share)
        set_weight(refitted, parameter, mapped(weight) if on_disk(parameter.weight) else weight, by=by)
