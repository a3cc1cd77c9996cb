"""Mixed precision: each layer gets the form that loses least where bytes are bounded, or takes least where accuracy is.

knapsack   what layers lose adds up: the least sum within the bytes, a multiple-choice knapsack
bisection  with a bound on accuracy, for each form from the largest on the most layers that meet the bound, of those
           that took the form before and the least sensitive first (Schaefer et al. 2023; forms x log(layers) runs)

Weights alone need no layer to have the form of another one: what several layers read stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.interpret import run
from regauge.ir.tables import short
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import Labelled
from regauge.passes.quantization.grid import Form
from regauge.passes.quantization.sensitivity import Losses, Sensitivity, losses
from regauge.passes.quantization.trials import Trials, trials

SCALE_BITS = 32

Picked = dict[str, int]
"""By the name of a layer's weight the place of its form; one behind the last means that it stays in float."""


@dataclass(frozen=True)
class Mixed:
    """What forms are chosen from: ``forms`` of each layer by the name of its weight, those of the fewest bytes first.

    ``zeros``: symmetric codes have zero points, too. Without batches weights are rounded to the nearest codes.
    """

    graph: Graph
    layers: Sequence[Layer]
    forms: Mapping[str, Sequence[Form]]
    way: Sensitivity
    batches: Sequence[Labelled] | None
    zeros: bool

    @cached_property
    def tried(self) -> Trials:
        inputs = None if self.batches is None else [batch.inputs for batch in self.batches]
        return trials(self.graph, self.layers, self.forms, inputs)

    @cached_property
    def sizes(self) -> dict[str, list[float]]:
        """Bytes of each layer in each form, and in float."""
        found = {}
        for layer in self.layers:
            own = [stored_bytes(layer, form, zeros=self.zeros) for form in self.forms[layer.weight.name]]
            found[layer.weight.name] = [*own, float(layer.weight.tensor.detach().nbytes)]
        return found

    @cached_property
    def losses(self) -> Losses:
        """Of each layer in each form, and in float: that is nothing."""
        found = losses(self.way, self.graph, self.layers, self.tried, self.batches or [])
        return {name: [*own, 0.0] for name, own in found.items()}

    def within(self, budget: float) -> Picked:
        """The forms whose bytes add up to the budget at most; PassError where the smallest ones exceed it."""
        least = sum(own[0] for own in self.sizes.values())
        if least > budget:
            raise PassError(
                f"quantize: the layers take at least {short(least)}B, and of the bytes asked {short(max(budget, 0))}B "
                "are left beside all else: ask for more, or allow fewer bits"
            )
        return _by_knapsack(self.sizes, self.losses, budget)

    def accurate(self, share: float) -> Picked:
        """The forms with which so large a ``share`` of the rows of the first output stay in their class on data."""
        batches = self.batches or []
        wanted = [_classes(run(self.graph, batch.inputs)) for batch in batches]

        def meets(picked: Picked) -> bool:
            data: dict[str, torch.Tensor] = {}
            for name, place in picked.items():
                data |= self.tried[name][place].data if place < len(self.forms[name]) else {}
            found = [_classes(run(self.graph, batch.inputs, weights=data)) for batch in batches]
            return float((torch.cat(found) == torch.cat(wanted)).double().mean()) >= share

        return _by_bisection(len(next(iter(self.forms.values()))), self._order, meets)

    def _order(self, form: int) -> list[str]:
        """The layers, the least sensitive to a form first."""
        return sorted(self.losses, key=lambda name: self.losses[name][form])

    def why(self, name: str, place: int) -> str:
        """A line for the report: the form of a layer, and what each would have cost."""
        forms = self.forms[name]
        found = f"{forms[place].grid.bits} bits" if place < len(forms) else "float"
        each = ", ".join(f"{form.grid.bits}: {own:.2g}" for form, own in zip(forms, self.losses[name], strict=False))
        return f"{name}: {found}; {self.way} by bits {each}"


def stored_bytes(layer: Layer, form: Form, *, zeros: bool) -> float:
    """Bytes of a layer's weight in a form: codes of so many bits, scales and zero points."""
    entries, bits = layer.weight.tensor.numel(), form.grid.bits
    beside = SCALE_BITS + (bits if zeros or not form.grid.symmetric else 0)
    return (entries * bits + entries / form.group * beside) / 8


def _classes(outputs: Sequence[object]) -> torch.Tensor:
    first = outputs[0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.dim() < 2:
        raise PassError("quantize: accuracy is told by the classes of the first output, which has none: give bytes")
    return first.argmax(-1).flatten()


def _by_knapsack(sizes: Mapping[str, Sequence[float]], costs: Losses, budget: float) -> Picked:
    names = list(sizes)
    least = np.array([min(sizes[name]) for name in names])
    room = min(budget, sum(max(sizes[name]) for name in names)) - least.sum()
    unit = max(room / BINS, 1e-9)
    bins = [np.ceil((np.array(sizes[name]) - low) / unit - 1e-6) for name, low in zip(names, least, strict=True)]
    found = Table(bins, [np.array(costs[name]) for name in names], BINS).solution(BINS)
    assert found is not None  # the least of every layer costs nothing
    return dict(zip(names, found, strict=True))


def _by_bisection(forms: int, order: Callable[[int], Sequence[str]], meets: Callable[[Picked], bool]) -> Picked:
    picked = dict.fromkeys(order(0), forms)
    moved = set(picked)
    for form in range(forms - 1, -1, -1):
        line = [name for name in order(form) if name in moved]
        low, high = 0, len(line)  # of the first so many: low are known to meet the bound, more than high are not
        while low < high:
            middle = (low + high + 1) // 2
            if meets(picked | dict.fromkeys(line[:middle], form)):
                low = middle
            else:
                high = middle - 1
        moved = set(line[:low])
        picked |= dict.fromkeys(moved, form)
    return picked
