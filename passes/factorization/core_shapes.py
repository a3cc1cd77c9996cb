"""Ranks of both sides of a Tucker decomposition that are worth weighing, of all that there are.

The error of ranks p and q is at most the sum of the tails of the two unfoldings' singular values (De Lathauwer et al.
2000, property 10), and what is kept by that measure within a budget is the problem of core shapes (Ghadiri et al. 2023,
Approximately Optimal Core Shapes for Tucker Decompositions). There it is solved for tensors of many sides; with two,
all pairs can be looked at. Those are kept that no other undercuts in that sum at no greater cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_SHAPES = 64  # that are kept of the best by each cost, at even distances


def core_shapes(
    first: Sequence[int],
    second: Sequence[int],
    tails: tuple[torch.Tensor, torch.Tensor],
    costs: Sequence[np.ndarray],
) -> list[tuple[int, int]]:
    """Pairs of the ranks ``first`` and ``second``, in order.

    ``tails[side][r]`` is what is lost with all singular values from r on; each of ``costs`` is [first, second].
    """
    lost = tails[0].numpy()[list(first)][:, None] + tails[1].numpy()[list(second)]
    kept = set[int]()
    for cost in costs:
        order = np.lexsort((lost.ravel(), cost.ravel()))
        least = np.minimum.accumulate(lost.ravel()[order])
        best = order[np.concatenate([[True], least[1:] < least[:-1]])]
        places = np.unique(np.linspace(0, len(best) - 1, min(len(best), _SHAPES)).round().astype(int))
        kept.update(best[places].tolist())
    return [(first[at // len(second)], second[at % len(second)]) for at in sorted(kept)]
