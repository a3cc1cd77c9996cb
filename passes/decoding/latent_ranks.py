"""The ranks that the heads of one attention may have, and what each choice of them loses.

CLOVER (Meng et al. 2024) cuts each head to the directions that carry its energy, so that heads differ in rank. Caches
then hold fewer numbers, but attention has one width for all heads that it computes together: heads of the same rank
are a group with an attention of its own, and only so many ranks are used as groups are worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regauge.ir.cost import item_size
from regauge.ir.graph import Value
from regauge.passes.decoding.latent_parts import Part

NOTHING = 1e-12  # share of what keys or values are, below which a loss is rounding
_MOST_PRICES = 64


@dataclass(frozen=True)
class RankChoice:
    """The ranks of a part's maps, what a position takes in the cache with them, and what they lose."""

    part: Part
    ranks: tuple[int, ...]
    bytes: float
    loss: float


def rank_choices(part: Part, tails: list[torch.Tensor], widths: int, *, share: bool) -> list[RankChoice]:
    """All choices with one rank for all maps, and the best with up to ``widths`` ranks.

    ``tails`` has what is lost of each map at every rank from 0 on; as a ``share`` of the part where that is asked for.
    """
    lost = np.stack([_padded(tail, part.most) for tail in tails])
    whole = max(float(lost[:, 0].sum()), 1e-300)
    lost[lost < NOTHING * whole] = 0  # of forms that lose nothing the knapsack takes the first
    lost = lost / whole if share else lost
    found = [(rank,) * len(lost) for rank in range(1, part.most + 1)]
    if widths > 1 and len(lost) > 1 and part.divisible:
        found += [ranks for ranks in best_ranks(lost, widths) if len(set(ranks)) > 1]
    heads = np.arange(len(lost))
    return [RankChoice(part, ranks, part.bytes(ranks), float(lost[heads, list(ranks)].sum())) for ranks in found]


def larger_than_now(choices: Sequence[RankChoice]) -> list[RankChoice]:
    """The choices of parts that come from latents already, which take no more than what was chosen for them."""
    found = []
    for latent, own in _by_latent(choices).items():
        if latent is not None and sum(choice.bytes for choice in own) >= _bytes_of(latent):
            found += own
    return found


def bytes_now(choices: Sequence[RankChoice]) -> float:
    """What the parts take in the cache before any of them is made smaller: each latent that they come from once."""
    return sum(
        sum(choice.part.bytes(choice.part.whole) for choice in own) if latent is None else _bytes_of(latent)
        for latent, own in _by_latent(choices).items()
    )


def _by_latent(choices: Sequence[RankChoice]) -> dict[Value | None, list[RankChoice]]:
    found: dict[Value | None, list[RankChoice]] = {}
    for choice in choices:
        found.setdefault(choice.part.latent, []).append(choice)
    return found


def _bytes_of(latent: Value) -> float:
    return int(latent.shape[-1]) * item_size(latent.dtype)


def best_ranks(lost: np.ndarray, widths: int) -> list[tuple[int, ...]]:
    """Ranks of at least 1 for every map, at most ``widths`` different ones, that lose least for what they cost.

    ``lost`` [maps, ranks from 0 on] falls ever slower. For each of many prices of a direction the maps are laid in the
    order of the ranks that they would like, cut into runs of one rank each so that the sum of losses and prices is
    least (dynamic programming), and each then takes the best of the ranks found.
    """
    gains = np.unique(-np.diff(lost, axis=1))
    gains = gains[gains > 0]
    if not len(gains):
        return []
    # below the least gain, too: what loses something is all kept
    prices = np.unique([gains[0] / 2, *np.quantile(gains, np.linspace(0, 1, _MOST_PRICES))])
    return list(dict.fromkeys(_ranks_at(lost, widths, float(price)) for price in prices))


def _ranks_at(lost: np.ndarray, widths: int, price: float) -> tuple[int, ...]:
    """At one price of a direction."""
    costs = lost[:, 1:] + price * np.arange(1, lost.shape[1])
    order = np.argsort(costs.argmin(1), kind="stable")
    summed = np.concatenate([np.zeros((1, costs.shape[1])), np.cumsum(costs[order], axis=0)])
    runs = summed[None] - summed[:, None]  # [start, end, rank]
    runs_cost = np.where(np.tri(len(summed), k=0, dtype=bool), np.inf, runs.min(2))
    best, starts = runs_cost[0], [np.zeros(len(summed), dtype=int)]
    for _ in range(min(widths, len(lost)) - 1):
        trial = best[:, None] + runs_cost  # a last run from each start to each end
        starts.append(np.where(trial.min(0) < best, trial.argmin(0), -1))
        best = np.minimum(best, trial.min(0))
    ranks, end = [], len(lost)
    for own in reversed(starts):
        start = int(own[end])
        if start < 0:
            continue  # fewer runs are as good
        ranks.append(int(runs[start, end].argmin()))
        end = start
        if end == 0:
            break
    taken = np.array(sorted(set(ranks)))
    return tuple(int(rank) + 1 for rank in taken[costs[:, taken].argmin(1)])


def _padded(tail: torch.Tensor, most: int) -> np.ndarray:
    """Of a map with fewer inputs than channels nothing is lost above their number."""
    return np.pad(tail.double().numpy()[: most + 1], (0, max(0, most + 1 - len(tail))))
