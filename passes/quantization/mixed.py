"""Mixed precision: each layer gets the form that loses least where bytes are bounded, or takes least where accuracy is.

knapsack   what layers lose adds up: the least sum within the bytes, or within the time that layers take, a
           multiple-choice knapsack; with sensitivity=entropy what blocks of dependent layers lose together
bisection  with a bound on accuracy, for each form from the largest on the most layers that meet the bound, of those
           that took the form before and the least sensitive first (Schaefer et al. 2023; forms x log(layers) runs)

Weights alone need no layer to have the form of another one: what several layers read stays in float.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.printing.tables import short
from regauge.ir.running.interpret import run
from regauge.passes.allocation.amounts import shown
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import Labelled
from regauge.passes.calibration.probe import Probe
from regauge.passes.quantization.dependency import dependent_blocks
from regauge.passes.quantization.grid import Form
from regauge.passes.quantization.sensitivity import Losses, Sensitivity, losses
from regauge.passes.quantization.trials import Trials, trials

SCALE_BITS = 32
_MOST_TOGETHER = 125  # choices in a block of layers, each of which is measured

Picked = dict[str, int]
"""By the name of a layer's weight the place of its form; one behind the last means that it stays in float."""


@dataclass(frozen=True)
class Block:
    """Layers that are judged together, by the names of their weights: places of their forms, and what these cost."""

    names: tuple[str, ...]
    choices: Sequence[tuple[int, ...]]
    losses: Sequence[float]

    def of_each(self) -> dict[str, list[float]]:
        """What each form of each layer costs while the others of the block are in float."""
        last = max(self.choices)
        known = dict(zip(self.choices, self.losses, strict=True))
        return {
            name: [known[(*last[:at], place, *last[at + 1 :])] for place in range(last[at] + 1)]
            for at, name in enumerate(self.names)
        }


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
        if self.way == "entropy":
            return {name: own for block in self.blocks for name, own in block.of_each().items()}
        found = losses(self.way, self.graph, self.layers, self.tried, self.batches or [])
        return {name: [*own, 0.0] for name, own in found.items()}

    @cached_property
    def blocks(self) -> list[Block]:
        """The layers that are judged together, in all their forms: one by one, or as they depend on one another."""
        if self.way != "entropy":
            return [Block((name,), [(place,) for place in range(len(own))], own) for name, own in self.losses.items()]
        batches = [batch.inputs for batch in self.batches or []]
        most = max(1, int(math.log(_MOST_TOGETHER, 1 + max(map(len, self.forms.values()), default=1))))
        probe, found = Probe(self.graph, batches), list[Block]()
        for block in dependent_blocks(self.graph, self.layers, batches, most):
            names = tuple(layer.weight.name for layer in block)
            every = list(itertools.product(*(range(len(self.forms[name]) + 1) for name in names)))
            found.append(Block(names, every, [self._together(probe, dict(zip(names, p, strict=True))) for p in every]))
        return found

    def _together(self, probe: Probe, picked: Picked) -> float:
        data = self._data(picked)
        return probe.change(data) if data else 0.0

    def _data(self, picked: Picked) -> dict[str, torch.Tensor]:
        data: dict[str, torch.Tensor] = {}
        for name, place in picked.items():
            data |= self.tried[name][place].data if place < len(self.forms[name]) else {}
        return data

    def fast(self, times: Mapping[str, Sequence[float]], whole: float, aim: float) -> Picked:
        """The forms with which a graph of ``whole`` milliseconds takes ``aim`` at most, as layers' ``times`` say.

        They are those of each layer in each form, and in float. Raises PassError where the fastest forms take longer.
        """
        most = sum(own[-1] - min(own) for own in times.values())
        if whole - most > aim * (1 + 1e-9):
            raise PassError(
                f"quantize: with the fastest forms of all layers {shown(whole - most, 'time')} of "
                f"{shown(whole, 'time')} are left, and {shown(aim, 'time')} are wanted: ask for more, or another target"
            )
        return _by_knapsack(times, self.blocks, aim - whole + sum(own[-1] for own in times.values()))

    def within(self, budget: float) -> Picked:
        """The forms whose bytes add up to the budget at most; PassError where the smallest ones exceed it."""
        least = sum(own[0] for own in self.sizes.values())
        if least > budget:
            raise PassError(
                f"quantize: the layers take at least {short(least)}B, and of the bytes asked {short(max(budget, 0))}B "
                "are left beside all else: ask for more, or allow fewer bits"
            )
        return _by_knapsack(self.sizes, self.blocks, budget)

    def accurate(self, share: float) -> Picked:
        """The forms with which so large a ``share`` of the rows of the first output stay in their class on data."""
        batches = self.batches or []
        wanted = [_classes(run(self.graph, batch.inputs)) for batch in batches]

        def meets(picked: Picked) -> bool:
            data = self._data(picked)
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


def _by_knapsack(sizes: Mapping[str, Sequence[float]], blocks: Sequence[Block], budget: float) -> Picked:
    """The choices of blocks of least loss whose sizes add up to the budget at most."""
    wholes = [
        np.array([sum(sizes[n][p] for n, p in zip(block.names, places, strict=True)) for places in block.choices])
        for block in blocks
    ]
    least = [own.min() for own in wholes]
    room = min(budget, sum(own.max() for own in wholes)) - sum(least)
    unit = max(room / BINS, 1e-9)
    bins = [np.ceil((own - low) / unit - 1e-6) for own, low in zip(wholes, least, strict=True)]
    found = Table(bins, [np.array(block.losses) for block in blocks], BINS).solution(BINS)
    assert found is not None  # the least of every layer costs nothing
    picked = zip(blocks, found, strict=True)
    return {name: place for block, at in picked for name, place in zip(block.names, block.choices[at], strict=True)}


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
