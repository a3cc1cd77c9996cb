"""Which layer is factorized how far: ranks whose losses add up to least within a budget.

A layer stays whole or takes one of the choices of its form; this is the multiple-choice knapsack of
:mod:`regauge.passes.allocation.knapsack`. Of two budgets the costs are added with weights, of which several are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from regauge.ir.errors import PassError
from regauge.passes.allocation.knapsack import Table
from regauge.passes.factorization.forms import Choice

_BINS = 1 << 13
_WEIGHTS = np.linspace(0, 1, 11)


def spread(choices: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
    """Choices with the squares of their losses.

    Without data losses are shares of each layer, and nothing says which layer matters. The least sum of shares leaves
    some layers whole and takes most of others, as forms of convolutions lose much before they save anything; with
    squares many layers that lose some are better than few that lose much.
    """
    return {name: [replace(choice, loss=choice.loss**2) for choice in own] for name, own in choices.items()}


def least_loss(choices: Mapping[str, Sequence[Choice]], allowed: Mapping[str, float]) -> dict[str, Choice]:
    """The choice of each layer; the first of a layer is to leave it whole.

    ``allowed`` are the most that all layers together may cost, of ``parameters`` and ``macs``. Raises PassError where
    no choice is small enough.
    """
    loads = {
        name: [np.array([getattr(choice, name) / max(most, 1) for choice in own]) for own in choices.values()]
        for name, most in allowed.items()
    }
    losses = [np.array([choice.loss for choice in own]) for own in choices.values()]
    found = []
    for weight in _WEIGHTS if len(loads) > 1 else [1.0]:
        mixed = _mixed(list(loads.values()), float(weight))
        found += _solutions(mixed, losses, list(loads.values()))
    if not found:
        raise _too_small(choices, allowed)
    best = min(found, key=lambda picks: sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)))
    return {name: own[pick] for (name, own), pick in zip(choices.items(), best, strict=True)}


def check_least(choices: Mapping[str, Sequence[Choice]], allowed: Mapping[str, float]) -> None:
    """Raise PassError where the smallest choice of every layer is too large."""
    for name, most in allowed.items():
        if sum(min(getattr(choice, name) for choice in own) for own in choices.values()) > most:
            raise _too_small(choices, {name: most})


def _too_small(choices: Mapping[str, Sequence[Choice]], allowed: Mapping[str, float]) -> PassError:
    least = {name: sum(min(getattr(c, name) for c in own) for own in choices.values()) for name in allowed}
    name = max(allowed, key=lambda name: least[name] / max(allowed[name], 1))
    return PassError(
        f"factorize: the budget of {name} cannot be met: it leaves {max(0, allowed[name]):,.0f} for the layers "
        f"that may be factorized, and with the smallest ranks these need {least[name]:,.0f}"
    )


def _mixed(loads: Sequence[Sequence[np.ndarray]], weight: float) -> list[np.ndarray]:
    if len(loads) == 1:
        return list(loads[0])
    return [weight * first + (1 - weight) * second for first, second in zip(*loads, strict=True)]


def _solutions(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], loads: Sequence[Sequence[np.ndarray]]
) -> list[list[int]]:
    """The picks of least loss by one mixed cost, at the largest budget of it that keeps within all budgets."""
    table = Table([np.ceil(cost * _BINS).astype(np.int64) for cost in costs], losses, _BINS)
    for budget in range(_BINS, 0, -max(1, _BINS // 256)):
        picks = table.solution(budget)
        if picks is None:
            return []
        used = [sum(cost[pick] for cost, pick in zip(own, picks, strict=True)) for own in loads]
        if max(used) <= 1:
            return [picks]
    return []
