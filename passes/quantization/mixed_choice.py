"""Which form each layer gets with ``scheme=mixed``: within bytes, within a latency, or at an accuracy."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.roofline import DEVICES
from regauge.ir.running.sample_inputs import sample_runs
from regauge.ir.timing import Timing
from regauge.passes.allocation.amounts import Amount, parse_amount, shown
from regauge.passes.allocation.latency import next_aim
from regauge.passes.base import GIVE_DATA, Context
from regauge.passes.calibration.batches import check_examples
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import labelled_batches
from regauge.passes.quantization.grid import Form
from regauge.passes.quantization.layer_times import Finish, LayerTimes, Times
from regauge.passes.quantization.mixed import Mixed, Picked
from regauge.passes.quantization.sensitivity import WITHOUT_DATA
from regauge.passes.quantization.targets import Target

if TYPE_CHECKING:
    from regauge.passes.quantization.quantize import Quantize

_TRIALS = 3
_CLOSE = 0.02

Written = Callable[[Mapping[str, Form]], Graph]
"""The whole graph with the weights of layers in these forms, for its time alone: rounded to the nearest."""


def chosen_forms(
    options: Quantize,
    graph: Graph,
    layers: Sequence[Layer],
    forms: Mapping[str, Sequence[Form]],
    target: Target,
    saved: float,
    finish: Finish,
    written: Written,
    context: Context,
) -> Mapping[str, Form]:
    """The forms of the layers that do not stay in float; ``saved``: bytes that tables of vectors lose in any case."""
    way = options.sensitivity or ("zd" if context.data is None else "loss")
    if context.data is None and (options.accuracy is not None or way not in WITHOUT_DATA):
        asked = f"sensitivity={way}" if options.accuracy is None else "accuracy"
        raise PassError(f"quantize needs data for {asked}: {GIVE_DATA}")
    batches = None if context.data is None else labelled_batches(graph, context)
    if batches is not None:
        check_examples([batch.inputs for batch in batches])
    mixed = Mixed(graph, layers, forms, way, batches, target.zeros)
    if options.accuracy is not None:
        picked = mixed.accurate(options.accuracy)
    elif options.latency is not None:
        inputs = batches[0].inputs if batches else next(sample_runs(graph), (None, None))[0]
        if inputs is None:
            raise PassError("quantize: no made-up inputs fit the graph, so its latency cannot be told: give data=")
        here = platform.machine() in target.machines and context.measure is not None
        device = DEVICES["gpu" if target.name in ("tensorrt", "torch-cuda") else "cpu"]
        measure = context.measure if here else None
        times = LayerTimes(graph, target, inputs, device, measure, finish, options.name)
        amount = parse_amount(options.latency, "latency", "time")
        picked = _Fast(mixed, times, amount, lambda found: written(_forms(forms, found))).run(context)
    else:
        assert options.bytes is not None
        whole = figures(graph).bytes
        own = sum(sizes[-1] for sizes in mixed.sizes.values())
        picked = mixed.within(parse_amount(options.bytes, "bytes", "bytes").of(whole) - (whole - own - saved))
    for name, place in picked.items():
        context.note(mixed.why(name, place))
    return _forms(forms, picked)


def _forms(forms: Mapping[str, Sequence[Form]], picked: Picked) -> dict[str, Form]:
    return {name: forms[name][at] for name, at in picked.items() if at < len(forms[name])}


@dataclass(frozen=True)
class _Trial:
    """Forms that were measured together: what was aimed at, and how far the time is off."""

    picked: Picked
    aim: float
    original: Timing
    timing: Timing
    off: float


@dataclass(frozen=True)
class _Fast:
    """Forms of least loss within a latency: times of layers add up; what they give together is measured and corrected.

    What layers save by themselves, where their weights lie in a cache, is brought to what all together save in their
    fastest forms; then the aim moves by how far a measurement is off it, as for ``prune{latency=}``
    (:mod:`regauge.passes.allocation.latency`). Where nothing can measure, the roofline is taken at its word.
    """

    mixed: Mixed
    times: LayerTimes
    amount: Amount
    written: Callable[[Picked], Graph]

    def run(self, context: Context) -> Picked:
        each: Times = self.times.of(self.mixed.layers, self.mixed.forms)
        if self.times.measure is None:
            whole = self.times.whole()
            aim = self.amount.of(whole)
            picked = self.mixed.fast(each, whole, aim)
            predicted = whole - sum(own[-1] - own[picked[name]] for name, own in each.items())
            told = f"{shown(predicted, 'time')} of {shown(whole, 'time')} predicted, {shown(aim, 'time')} asked"
            context.note(f"latency: {told}; nothing was measured")
            return picked
        calibrated, whole = self._calibrated(each)
        aim, trials = self.amount.of(whole), list[_Trial]()
        for _ in range(_TRIALS):
            try:
                picked = self.mixed.fast(calibrated, whole, aim)
            except PassError:
                if not trials:
                    raise
                break
            if any(trial.picked == picked for trial in trials):
                break
            trials.append(self._tried(picked, aim))
            if abs(trials[-1].off - 1) <= _CLOSE:
                break
            aim = next_aim(trials)
        best = min(trials, key=lambda trial: (trial.off > 1 + _CLOSE, abs(trial.off - 1)))
        asked = self.amount.of(best.original.milliseconds)
        context.note(
            f"latency: {shown(best.timing.milliseconds, 'time')} of {shown(best.original.milliseconds, 'time')} "
            f"measured in {best.timing.runtime or 'the runtime'}, {shown(asked, 'time')} asked"
        )
        return best.picked

    def _calibrated(self, each: Times) -> tuple[Times, float]:
        """The times of layers, of which what is saved in float's place adds up to what is measured of all, and the
        milliseconds of the whole in float."""
        assert self.times.measure is not None
        fastest = {name: list(own).index(min(own)) for name, own in each.items()}
        original, quick = self.times.measure([self.times.graph, self.written(fastest)], self.times.inputs)
        alone = sum(own[-1] - min(own) for own in each.values())
        share = max(original.milliseconds - quick.milliseconds, 0.0) / alone if alone else 0.0
        found = {name: [own[-1] - share * (own[-1] - time) for time in own] for name, own in each.items()}
        return found, original.milliseconds

    def _tried(self, picked: Picked, aim: float) -> _Trial:
        assert self.times.measure is not None
        original, timing = self.times.measure([self.times.graph, self.written(picked)], self.times.inputs)
        asked = self.amount.of(original.milliseconds)
        return _Trial(picked, aim, original, timing, timing.milliseconds / asked)
