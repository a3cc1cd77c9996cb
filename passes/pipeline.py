"""Running passes: requirements before, verification after, a numeric check of what promises to be exact, a report."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from regauge.ir.cost import Figures, figures
from regauge.ir.edit import dead_nodes, record, remove_dead
from regauge.ir.errors import EquivalenceError, PassError, RegaugeError, RegaugeWarning
from regauge.ir.fusion.footprint import Footprints
from regauge.ir.fusion.fused import fused_nodes
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import device_of, run_seeded
from regauge.ir.running.sample_inputs import input_symbols, remember_runs, sample_runs
from regauge.ir.storage.device import on_device
from regauge.ir.storage.weights import writes
from regauge.ir.timing import Measure
from regauge.ir.verify import verify
from regauge.passes import on_floats
from regauge.passes.base import GIVE_DATA, Context, Pass, Replayed
from regauge.passes.linear_layers import linear_layers
from regauge.passes.report import PassReport, Report, recorded_cuts
from regauge.settings import current

EXACT_TOLERANCE = {torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FLOAT_TOLERANCE = 1e-4

AfterPass = Callable[[int, Graph], None]


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    data: Any = None,
    *,
    after: AfterPass | None = None,
    measure: Measure | None = None,
    footprints: Footprints | None = None,
) -> Graph:
    """The graph after all passes, with its ``report``; the given graph is not changed.

    ``after(index, graph)`` is called with the result of each pass; ``measure`` times graphs for passes that ask for it,
    and ``footprints`` says what kernels take of a GPU. A graph on a GPU is brought to the CPU for it, and the result
    back. Raises PassError where a pass lacks what it needs or breaks its contract, naming the pass.
    """
    if not isinstance(graph, Graph):
        raise PassError(f"passes run on a Graph, not a {type(graph).__name__}: make one by regauge.capture or load")
    if isinstance(data, Iterator):
        data = Replayed(data)
    if device_of(graph).type not in ("cpu", "meta"):
        return _run_from(device_of(graph), graph, passes, data, after, measure, footprints)
    result, entries, originals = graph, [], on_floats.Originals()
    known = figures(graph)
    for index, one in enumerate(passes):
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode: passes compute gradients
            context = Context(data=data, measure=measure, footprints=footprints, original=graph)
            result, entry = _run_pass(result, one, context, known, originals)
        known = entry.after
        entries.append(entry)
        if after is not None:
            after(index, result)
    if result is graph:
        result = graph.copy()
    result.report = Report(tuple(entries))
    return result


def _run_from(
    device: torch.device,
    graph: Graph,
    passes: Sequence[Pass],
    data: Any,
    after: AfterPass | None,
    measure: Measure | None,
    footprints: Footprints | None,
) -> Graph:
    """:func:`run_passes` for a graph on another device than the CPU; passes compute with arrays that are there."""
    here, origin = on_device(graph, torch.device("cpu"))

    def back(found: Graph) -> Graph:
        return on_device(found, device, origin)[0]

    result = run_passes(
        here,
        passes,
        data,
        after=None if after is None else lambda index, found: after(index, back(found)),
        measure=None if measure is None else lambda graphs, inputs: measure([back(g) for g in graphs], inputs),
        footprints=footprints,
    )
    found = back(result)
    found.report = result.report
    return found


def _run_pass(
    graph: Graph, one: Pass, context: Context, before: Figures, originals: on_floats.Originals
) -> tuple[Graph, PassReport]:
    data = context.data
    _check_needs(one, data)
    _trace(f"{one}: starts")
    given, start = _Given(graph), time.perf_counter()
    try:
        _check_fused(one, graph)
        one.requires(graph)
        source = linear_layers(graph) if one.wants_layers else graph
        result = on_floats.call(one, source, context, originals)
        result = graph if result is source else result
        _check_result(one, given, result)
        one.ensures(graph, result)
    except PassError as reason:
        raise reason if one.name in str(reason) else PassError(f"{one.name}: {reason}") from reason
    seconds = time.perf_counter() - start
    changed = result is not graph
    if changed:
        _clear(one, graph, result)
        on_floats.note_lost_zeros(result, context)
    error = _verify(one, graph, result, data) if changed else None
    if changed:
        record(result, one.name, str(one))
    after = figures(result) if changed else before
    _trace(f"{one}: ends after {seconds:.2f} s" + ("" if changed else ", nothing changed"))
    if changed and current().print_after:
        print(f"after {one}:\n{result}", file=sys.stderr)
    notes, left = tuple(context.notes), dict(context.left.most_common())
    cuts = tuple(context.cuts) or recorded_cuts(graph, result)
    return result, PassReport(str(one), one.contract, before, after, seconds, changed, error, cuts, notes, left)


def _clear(one: Pass, before: Graph, after: Graph) -> None:
    """Remove what nothing reads since the pass: weights that it folded into others, say. What was dead before stays."""
    try:
        remove_dead(after, keep={node.name for graph in before.nested() for node in dead_nodes(graph)})
    except RegaugeError as reason:
        raise PassError(f"{one.name} left a graph that does not verify: {reason}") from reason


def _trace(line: str) -> None:
    if current().trace:
        print(f"regauge: {line}", file=sys.stderr)


def _check_needs(one: Pass, data: Any) -> None:
    if one.needs and data is None:
        needs = " and ".join(sorted(one.needs))
        raise PassError(f"{one.name} needs {needs}: {GIVE_DATA}")


def _check_fused(one: Pass, graph: Graph) -> None:
    nodes = [] if one.takes_fused else fused_nodes(graph)
    if nodes:
        raise PassError(
            f"{one.name} works on nodes, and {nodes[0].label} holds fused ones: let fuse come last, or unfuse first"
        )


def _check_result(one: Pass, given: _Given, result: Any) -> None:
    if not isinstance(result, Graph):
        raise PassError(f"{one.name} returned {type(result).__name__}: its call() must return a Graph")
    if given.graph.version != given.version:
        raise PassError(f"{one.name} changed the graph it was given: let it edit graph.copy() and return that")
    name = given.changed_weight()
    if name is not None:
        raise PassError(
            f"{one.name} changed the graph it was given: it wrote into {name}, whose data copies of the graph and the "
            "user's model share; let it give a copy of the graph a new weight, regauge.ir.edit.set_weight"
        )


class _Given:
    """A graph as a pass gets it, and the counts of writes into its tensors, which are the user's own."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.version = graph.version
        self._weights = {parameter: parameter.weight for parameter in graph.all_parameters()}
        self._writes = {parameter: writes(weight) for parameter, weight in self._weights.items()}

    def changed_weight(self) -> str | None:
        """The name of a parameter that has another weight now, or whose tensor was written into."""
        for parameter, weight in self._weights.items():
            if parameter.weight is not weight or writes(weight) != self._writes[parameter]:
                return parameter.name
        return None


def _verify(one: Pass, before: Graph, after: Graph, data: Any) -> float | None:
    """Structural verification, and the numeric error of a pass that is exact or bounded."""
    level = current().verify
    if level == "off":
        return None
    try:
        verify(after)
    except RegaugeError as reason:
        raise PassError(f"{one.name} left a graph that does not verify: {reason}") from reason
    if one.contract == "approximate" or level == "structure":
        return None
    error = _measured_error(one, before, after, data)
    if error is None:
        return None
    if one.contract == "exact" and not error <= _tolerance(before):
        if _varies(before, data):
            return None
        raise EquivalenceError(
            f"{one.name} promises to be exact, but outputs differ by {error:.1e} of their range: "
            "find the first bad change with regauge.bisect, or leave the pass out"
        )
    return error


def _varies(graph: Graph, data: Any) -> bool:
    """Whether a graph differs from itself at every run, as what is kept as it is may draw numbers; warns where so."""
    error = _measured_error_of(graph, graph, data)
    varies = error is not None and not error <= _tolerance(graph)
    if varies:
        reason = "it gives other outputs at every run"
        warnings.warn(f"the graph was not checked with numbers: {reason}", RegaugeWarning, stacklevel=5)
    return varies


def _measured_error(one: Pass, before: Graph, after: Graph, data: Any) -> float | None:
    """The largest error on the first batch, or on made-up inputs with two bindings of dynamic sizes; warns of none."""
    error = _measured_error_of(before, after, data)
    if error is None:
        reason = "no made-up inputs fit the graph, give data="
        warnings.warn(f"what {one.name} did was not checked with numbers: {reason}", RegaugeWarning, stacklevel=4)
        return None
    return error


def _measured_error_of(before: Graph, after: Graph, data: Any) -> float | None:
    if data is not None:
        batch = next(Context(data=data).inputs(before))
        return _relative_error(run_seeded(before, batch), run_seeded(after, batch))
    wanted = 2 if input_symbols(before) else 1
    errors, runs = [], []
    for inputs, expected in islice(sample_runs(before), wanted):
        found = run_seeded(after, inputs)
        errors.append(_relative_error(expected, found))
        runs.append((inputs, found))
    remember_runs(after, runs)
    return max(errors) if errors else None


def _tolerance(graph: Graph) -> float:
    dtypes = {value.dtype for value in graph.values() if isinstance(value.dtype, torch.dtype)}
    return max([FLOAT_TOLERANCE if torch.float32 in dtypes else 0.0, *(EXACT_TOLERANCE.get(d, 0.0) for d in dtypes)])


def _relative_error(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Greatest difference of an output, relative to that output's greatest magnitude."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            worst = max(worst, _largest_difference(a, b))
    return worst


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference; inf where only one is finite, or both are not and differ. Equal NaN and inf are equal."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    if not torch.isfinite(difference).all():
        return float("inf")
    finite = a.abs()[torch.isfinite(a)]
    scale = float(finite.max()) if finite.numel() else 0.0
    return float(difference.max()) / max(scale, 1e-12)
