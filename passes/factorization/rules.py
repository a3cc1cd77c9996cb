"""Rules by which ranks are chosen, beside the knapsack of :mod:`regauge.passes.factorization.ranks`.

energy           of each layer the same share of its squared singular values is kept
effective-rank   ranks are proportional to exp(entropy of the singular values' shares) (Roy and Vetterli 2007)
welore           one threshold for the singular values of all layers, between the least and the greatest of each; layers
                 of which half stays, or more, stay whole (Jaiswal et al. 2024, WeLore)
fisher           ranks are proportional to the root of the mean squared gradient of the weight (Chang et al. 2025, Palu,
                 section 3.3)

Each is a level from 0 to 1, of which the greatest is taken that keeps within the budget. Without a budget a share of
energy may be given itself (:func:`keeping`): in the metric of inputs what is kept are the directions that outputs take
on data, as many as hold it, whatever directions the weight has besides (the utilised rank of a layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch

from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.ranks import check_least

Rule: TypeAlias = Literal["knapsack", "energy", "effective-rank", "welore", "fisher"]
Wanted: TypeAlias = Callable[[str, float], float]
"""The rank of the layer whose weight has a name, at a level; infinite where it is to stay whole."""

_HALVINGS = 30
_ROUNDING = 1e-12  # of all energy: what is none but for rounding


def by_rule(choices: Mapping[str, Sequence[Choice]], allowed: Mapping[str, float], wanted: Wanted) -> dict[str, Choice]:
    """The choice of each layer at the greatest level within the budgets; the first of a layer is to leave it whole.

    Raises PassError where no choice is small enough.
    """
    check_least(choices, allowed)

    def at(level: float) -> dict[str, Choice]:
        return {name: nearest(own, wanted(name, level)) for name, own in choices.items()}

    def fits(picked: Mapping[str, Choice]) -> bool:
        return all(sum(getattr(own, figure) for own in picked.values()) <= most for figure, most in allowed.items())

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    best = at(low)
    if not fits(best):  # some layers cannot become small enough at any level: the smallest of each
        figure = max(allowed, key=lambda name: sum(getattr(own, name) for own in best.values()) / max(allowed[name], 1))
        best = {name: min(own, key=lambda choice: float(getattr(choice, figure))) for name, own in choices.items()}
    return best


def keeping(choices: Mapping[str, Sequence[Choice]], carried: Mapping[str, float], energy: float) -> dict[str, Choice]:
    """Of each layer the choice that costs least of those that lose at most ``1 - energy`` of what is ``carried``.

    Layers that stay whole are left out. Costs are the shares of parameters and of multiplications, added up.
    """
    picked = dict[str, Choice]()
    for name, (whole, *others) in choices.items():
        allowed = (1 - energy) * carried[name] + _ROUNDING * carried[name]
        fits = [own for own in others if own.loss <= allowed]
        cheapest = min(fits, key=lambda own: _share(own, whole), default=whole)
        if _share(cheapest, whole) < _share(whole, whole):
            picked[name] = cheapest
    return picked


def _share(choice: Choice, whole: Choice) -> float:
    return choice.parameters / max(whole.parameters, 1) + choice.macs / max(whole.macs, 1)


def nearest(choices: Sequence[Choice], rank: float) -> Choice:
    """Of the choices whose ranks come closest that which loses least; whole where the rank is above all of them."""
    possible = choices[1:]
    if not possible or rank > max(max(choice.ranks) for choice in possible):
        return choices[0]
    return min(possible, key=lambda choice: (max(abs(own - rank) for own in choice.ranks), choice.loss))


def squared_values(blocks: Sequence[Problem]) -> torch.Tensor:
    """Of a layer, in the metric of its problems: the mean over blocks, the greatest first."""
    tails = torch.stack([problem.factored.tail for problem in blocks]).mean(0)
    return (tails[:-1] - tails[1:]).clamp(min=0)


def wanted_by(rule: Rule, values: Mapping[str, torch.Tensor], squares: Mapping[str, torch.Tensor]) -> Wanted:
    """The ranks that a rule wants, by :func:`squared_values` and squared gradients of each layer."""
    if rule == "energy":
        return lambda name, level: _of_energy(values[name], level)
    if rule == "welore":
        return lambda name, level: _above_threshold(values[name].sqrt(), level)
    if rule == "effective-rank":
        weights = {name: _effective(own.sqrt()) for name, own in values.items()}
    else:
        weights = {name: float(squares[name].mean().sqrt()) if name in squares else 0.0 for name in values}
    most = max(len(values[name]) / max(weight, 1e-300) for name, weight in weights.items() if weight > 0)
    return lambda name, level: weights[name] * most * level


def _of_energy(squares: torch.Tensor, level: float) -> float:
    kept = squares.cumsum(0)
    return float((kept < level * kept[-1]).sum() + 1)


def _above_threshold(values: torch.Tensor, level: float) -> float:
    spread = values.max() - values.min()
    kept = int(((values - values.min()) / spread.clamp(min=1e-300) >= 1 - level).sum())
    return kept if 2 * kept < len(values) else float("inf")


def _effective(values: torch.Tensor) -> float:
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))
