"""Tables of configurations for the kernels of a model: screened without a GPU, timed where there is one.

    table = tune([(kernel, sizes), ...], "sm_90")                           screened only
    table = tune(kernels, "sm_90", measured(torch.device("cuda")))          those that fit, timed

Kernels of one form and type whose sizes have the same powers of two above them are one case: the configuration that is
best for all of them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from regauge.backends.gpu_timing import rotating, times
from regauge.backends.triton_kernels.configs import Entry, Table, config_of, newest_not_above
from regauge.backends.triton_kernels.kernel import Kernel, Source, case_of, config_for, shape_of
from regauge.backends.triton_kernels.samples import Sample
from regauge.backends.triton_kernels.screen import GPUS, screen
from regauge.ir.dims.extents import Dim

Measure: TypeAlias = Callable[[Sample, Sequence[Kernel]], list[float]]
"""The seconds of kernels that differ in nothing but their table, on random data of some sizes."""
TIMED = 12
"""Configurations of a case that are timed: the best that the screen finds."""


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a case, what the model says of it, and where measured the seconds, and those of what the
    shipped table has."""

    entry: Entry
    predicted: float
    seconds: float | None = None
    shipped: float | None = None


def tune(kernels: Sequence[Sample], architecture: str, measure: Measure | None = None) -> Iterator[Tuned]:
    """The best configuration of each case that tables hold, in turn; raises FusionError where none fits.

    What is timed on an architecture of which the model knows nothing is screened for an older one.
    """
    compiled_for = architecture if measure is None else newest_not_above(GPUS, architecture) or architecture
    cases: dict[tuple[Any, ...], list[Sample]] = {}
    for kernel, sizes in kernels:
        source = _source(kernel, sizes)
        if config_for(source, sizes, architecture) is None:
            continue
        case = case_of(source, sizes)
        cases.setdefault((case.form, case.numbers, case.buckets()), []).append((kernel, sizes))
    for group in cases.values():
        sized = [(_source(kernel, sizes), sizes) for kernel, sizes in group]
        case = case_of(*sized[0])
        found = screen(sized, compiled_for, 1 if measure is None else TIMED)
        if measure is None:
            yield Tuned(Entry(architecture, case, found[0].config), found[0].seconds)
            continue
        usual = config_of(case, architecture)
        configs = [usual, *(one.config for one in found if one.config != usual)]
        totals = [0.0] * len(configs)
        for kernel, sizes in group:
            own = case_of(_source(kernel, sizes), sizes)
            rivals = [replace(kernel, tuned=Table([Entry(architecture, own, config)])) for config in configs]
            totals = [a + b for a, b in zip(totals, measure((kernel, sizes), rivals), strict=True)]
        best = min(range(len(configs)), key=totals.__getitem__)
        predicted = next((one.seconds for one in found if one.config == configs[best]), float("nan"))
        yield Tuned(Entry(architecture, case, configs[best]), predicted, totals[best], totals[0])


def measured(device: torch.device) -> Measure:
    """A measure that launches kernels on a GPU."""

    def measure(sample: Sample, rivals: Sequence[Kernel]) -> list[float]:
        kernel, sizes = sample
        source = _source(kernel, sizes)
        generator = torch.Generator(device).manual_seed(0)
        tensors = []
        for tensor in source.reads:
            numbers = torch.randn(shape_of(tensor.layout, sizes), generator=generator, device=device)
            kind = tensor.value.dtype
            assert isinstance(kind, torch.dtype)
            tensors.append(numbers > 1 if kind == torch.bool else numbers.to(kind))
        values = [tensor.value for tensor in source.reads]

        def call(rival: Kernel) -> Callable[..., Any]:
            return lambda *given: rival.launch(dict(zip(values, given, strict=True)), source.form)

        spreads = times([call(rival) for rival in rivals], rotating(tensors))
        return [spread.median for spread in spreads]

    return measure


def _source(kernel: Kernel, sizes: Mapping[Dim, int]) -> Source:
    return kernel.source(kernel.form_for(sizes, single=True))
