"""A budget in time: predicted by a model of the device, which is brought to measurements, and checked by measuring.

    1. The graph and a few smaller versions are measured; the model of the device is calibrated by them.
    2. Counts are searched with the model's time as one of the budgets.
    3. What they give is measured beside the original. Where it misses the budget, step 2 aims higher or lower by that.
    4. Where blocks of the device are too coarse for the budget, the same with a model in which time has no steps.

Where nothing can measure, the model is taken at its word, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.roofline import DEVICES, Calibrated, Device, roofline
from regauge.ir.timing import Measure, Timing
from regauge.passes.allocation.amounts import Amount, shown
from regauge.passes.allocation.budgets import Budget, Budgets
from regauge.passes.allocation.choices import Choice, Counts
from regauge.passes.allocation.plans import uniform_plan
from regauge.passes.allocation.search import Search

_LEVELS = (0.3, 0.6, 1.0)  # shares of the indices that go in the versions that are measured at first
_TRIALS = (3, 4)  # with the blocks of the device, and without steps
_CLOSE = 0.01
_STEEPEST = 2.0  # how far one correction may move the aim

Pruned = Callable[[Counts], Graph]


def device_of(given: str | Mapping[str, float] | None) -> Device:
    """A device by name or by its figures, those that are left out as of ``cpu``; raises PassError for another name."""
    if given is None:
        return DEVICES["cpu"]
    if isinstance(given, str):
        if given not in DEVICES:
            raise PassError(f"device={given} is unknown: say {' or '.join(DEVICES)}, or give figures, {{flops=5e10}}")
        return DEVICES[given]
    known = ("flops", "bandwidth", "overhead", "multiple")
    for name in given:
        if name not in known:
            raise PassError(f"device has no figure {name!r}: it has {', '.join(known)}")
    return Device(**given)  # type: ignore[arg-type]


@dataclass
class LatencySearch:
    """The counts that meet a latency, and other budgets beside it.

    ``pruned`` makes the graph of some counts, ``measure`` times graphs on ``inputs``; ``at`` binds the dynamic sizes
    that these inputs have.
    """

    search: Search
    others: Sequence[Budget]
    amount: Amount
    device: Device
    pruned: Pruned
    measure: Measure | None = None
    inputs: Any = None
    at: Mapping[Any, int] | None = None

    def run(self) -> tuple[Counts, Budgets, str]:
        """The counts, the budgets at these, and what was predicted and measured, for the report."""
        meter = roofline(self.search.graph, self.device, self.at)
        if self.measure is None:
            predicted = Calibrated(meter, [(meter.original, meter.original * 1e3)])
            counts, budgets = self._search(predicted, self.amount.of(predicted.original))
            return counts, budgets, f"{budgets.budgets[-1]}; as predicted, nothing was measured"
        return self._measured(self.measure)

    def _search(self, meter: Calibrated, target: float, near: Counts | None = None) -> tuple[Counts, Budgets]:
        budgets = Budgets([*self.others, Budget("latency", meter, target, "time")])
        return self.search.counts(budgets, near), budgets

    def _calibrated(self, measure: Measure) -> tuple[Calibrated, Calibrated]:
        """The model with the blocks of the device and one without, both brought to the same measurements."""
        plan = uniform_plan(self.search.choices)
        versions = [_whole(self.search.choices), *map(plan, _LEVELS)]
        timings = measure([self.search.graph, *map(self.pruned, versions[1:])], self.inputs)

        def calibrated(device: Device) -> Calibrated:
            meter = roofline(self.search.graph, device, self.at)
            said = [meter.set_sizes(counts) for counts in versions]
            return Calibrated(meter, [(x, timing.milliseconds) for x, timing in zip(said, timings, strict=True)])

        return calibrated(self.device), calibrated(replace(self.device, multiple=1))

    def _measured(self, measure: Measure) -> tuple[Counts, Budgets, str]:
        """Search, measure and correct until the latency is met within 1 %, or no other counts come out."""
        trials: list[_Trial] = []
        for meter, most in zip(self._calibrated(measure), _TRIALS, strict=True):
            trials += self._corrected(meter, most, trials, measure)
            best = min(trials, key=lambda trial: trial.distance)
            if best.close:
                break
        budgets = Budgets([*self.others, Budget("latency", best.meter, self.amount.of(meter.original), "time")])
        budgets.set_sizes(best.counts)
        return best.counts, budgets, self._told(best)

    def _corrected(self, meter: Calibrated, most: int, before: Sequence[_Trial], measure: Measure) -> list[_Trial]:
        aim, own = self.amount.of(meter.original), list[_Trial]()
        for _ in range(most):
            try:
                near = own[-1].counts if own else None
                counts, _ = self._search(meter, aim, near)
            except PassError:
                if not own and not before:
                    raise
                break
            own.append(self._tried(counts, aim, meter, [*before, *own], measure))
            if own[-1].close:
                break
            aim = next_aim(own)
        return own

    def _tried(
        self, counts: Counts, aim: float, meter: Calibrated, trials: Sequence[_Trial], measure: Measure
    ) -> _Trial:
        """Counts with what they measure; those that were measured are not measured again."""
        for trial in trials:
            if trial.counts == counts:
                return replace(trial, aim=aim, meter=meter, predicted=meter.total)
        original, timing = measure([self.search.graph, self.pruned(counts)], self.inputs)
        return _Trial(counts, aim, meter, meter.total, original, timing, self._off(original, timing))

    def _off(self, original: Timing, timing: Timing) -> float:
        """What was measured by what is wanted; a share is one of the time that the original took in the same turns."""
        whole = original.milliseconds if self.amount.relative else 1.0
        return timing.milliseconds / (self.amount.value * whole)

    def _told(self, trial: _Trial) -> str:
        original, timing = trial.original, trial.timing
        asked = shown(self.amount.of(original.milliseconds), "time")
        noise = (original.noise**2 + timing.noise**2) ** 0.5 if self.amount.relative else timing.noise
        text = (
            f"latency: {shown(timing.milliseconds, 'time')} of {shown(original.milliseconds, 'time')} measured in "
            f"{timing.runtime or 'the runtime'}, {asked} asked; {shown(trial.predicted, 'time')} predicted, "
            f"noise {noise:.1%}"
        )
        if trial.off <= 1 and trial.counts == _whole(self.search.choices):
            return f"{text}; nothing has to go for it"
        missed = abs(trial.off - 1) > max(_CLOSE, 2 * noise)
        return text + (f"; no counts were found nearer than {trial.off - 1:+.1%}" if missed else "")


@dataclass(frozen=True)
class _Trial:
    """Counts that were measured: what was aimed at and predicted, and how far the measurement is off."""

    counts: Counts
    aim: float
    meter: Calibrated
    predicted: float
    original: Timing
    timing: Timing
    off: float

    @property
    def close(self) -> bool:
        return abs(self.off - 1) <= _CLOSE

    @property
    def distance(self) -> float:
        """How far it is from the budget; above it counts double, beyond what is close."""
        return self.off - 1 if 1 <= self.off <= 1 + _CLOSE else 2 * (self.off - 1) if self.off > 1 else 1 - self.off


class Aimed(Protocol):
    """What was measured: what was aimed at, in milliseconds, and the time as a multiple of what is wanted."""

    @property
    def aim(self) -> float: ...

    @property
    def off(self) -> float: ...


def next_aim(trials: Sequence[Aimed]) -> float:
    """What to aim at next: between the nearest trials on both sides of the budget, or beyond the last one."""
    over = [trial for trial in trials if trial.off > 1]
    under = [trial for trial in trials if trial.off <= 1]
    if over and under:
        above, below = min(over, key=lambda t: t.off), max(under, key=lambda t: t.off)
        if above.aim > below.aim:
            return below.aim + (above.aim - below.aim) * (1 - below.off) / (above.off - below.off)
    last = trials[-1]
    return last.aim * min(max(1 / last.off, 1 / _STEEPEST), _STEEPEST)


def _whole(choices: Sequence[Choice]) -> Counts:
    return {choice.dim: choice.size for choice in choices}
