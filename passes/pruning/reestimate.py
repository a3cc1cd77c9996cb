"""Statistics of batch norms behind a cut, taken anew on data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.dims.kept import Keep
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.batch_norms import is_fixed
from regauge.passes.calibration.side_by_side import SideBySide

_SAME = 1e-3  # a relative difference that is rounding


def reestimate(
    original: Graph, pruned: Graph, keep: Keep, batches: Sequence[Any], left: Counter[str], *, by: str
) -> int:
    """Let batch norms in inference that are given something else than in ``original`` hold its mean and variance.

    In the order of the graph: each sees what those before it give by then. Both graphs run once on the batches. The
    variance is that of all entries, not the unbiased one. Returns how many are new; ``left`` counts the others.
    """
    run, done = SideBySide(original, pruned, batches, keep), 0
    for was, node in run.steps():
        if not is_fixed(node) or node.inputs[0] not in run.drifted or _as_before(was, node, run):
            continue
        mean, variance = node.inputs[3:5]
        assert isinstance(mean, Parameter) and isinstance(variance, Parameter)
        if len(mean.uses) > 1 or len(variance.uses) > 1:
            left["its statistics are those of several batch norms"] += 1
            continue
        for parameter, found in zip((mean, variance), _statistics(node, run), strict=True):
            assert isinstance(parameter.dtype, torch.dtype)
            if bool(found.isfinite().all()):
                set_weight(pruned, parameter, found.to(parameter.dtype), by=by)
        done += 1
    return done


def _as_before(was: Node, node: Node, run: SideBySide) -> bool:
    """Whether a node gets what it got, but for channels that are gone: its own statistics are better than new ones."""
    x = was.inputs[0]
    assert isinstance(x, Value)
    pairs = zip(run.before.values(x), run.now.values(node.inputs[0]), strict=True)
    return all(float((run.kept(old, x) - new).norm()) <= _SAME * float(new.norm()) for old, new in pairs)


def _statistics(node: Node, run: SideBySide) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel over all batches, in double precision."""
    rows, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in run.now.values(node.inputs[0]):
        own = x.movedim(1, -1).flatten(0, -2).double()
        rows, total, squares = rows + len(own), total + own.sum(0), squares + own.square().sum(0)
    mean = total / max(1, rows)
    return mean, (squares / max(1, rows) - mean.square()).clamp(min=0)
