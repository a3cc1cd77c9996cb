"""Holding a written ONNX file to its graph: both are run on the same inputs before the file is published."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from regauge.backends.onnx_model.write import external_locations, with_nested
from regauge.backends.run_onnxruntime import Session
from regauge.ir.errors import EmitError, RegaugeError, RegaugeWarning
from regauge.ir.graph import Graph, Value
from regauge.ir.running.interpret import run
from regauge.ir.running.sample_inputs import input_symbols, remembered_runs, sample_runs
from regauge.ir.sizes.onnx_contents import constant_tensor

_TOLERANCE = {torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_DEFAULT_TOLERANCE = 1e-3  # float32 through deep networks with unnormalised weights; a wrong index is of order 1
_ROUNDED = 0.05  # where integers are made on the way: one that falls to the other side is a step in all that follows
_STEPS = 1.01
_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}


@dataclass
class Checker:
    """Called with the staged file; raises EmitError when onnxruntime cannot run it or computes something else.

    The graph's own results come from the reference interpreter, on given inputs or on made-up ones; with dynamic sizes
    two sets of sizes are tried. Where the graph cannot be run (an operator of a domain onnxruntime does not have, no
    fitting input) a warning says that nothing was compared.
    """

    graph: Graph
    inputs: Sequence[Any] | Mapping[str, Any] | None = None

    def __call__(self, path: Path) -> None:
        foreign = self._foreign_domain()
        if foreign is not None:
            self._skip(f"it uses operators of the domain {foreign}")
            return
        try:
            session = Session(path, optimisation="off")
        except RegaugeError as error:
            if not self._original_loads():
                self._skip(f"like the original it cannot be loaded: {error}")
                return
            raise EmitError(f"the written model does not run: {error}") from error
        wanted = 2 if input_symbols(self.graph) else 1
        compared = 0
        for inputs, results in self._expected():
            compared += self._compare(session, inputs, results)
            if compared == wanted:
                return
        if not compared:
            self._skip("no made-up inputs fit the graph, pass inputs=")

    def _compare(self, session: Session, inputs: dict[str, Any], results: list[Any]) -> bool:
        """Whether the results are the graph's; False for inputs that the model never could be run on."""
        try:
            found = session.run(inputs)
        except RegaugeError as error:
            if not self._original_runs(inputs):
                return False
            raise EmitError(f"the written model does not run: {error}") from error
        random = any(node.operator.random for _, node in self.graph.walk())
        coarse = coarsest(self.graph)
        steps = quantization_steps(self.graph)
        written = [ours for ours, output in zip(results, self.graph.outputs, strict=True) if isinstance(output, Value)]
        for name, ours, theirs in zip(session.outputs, written, found, strict=True):
            compare_result(name, ours, theirs, values=not random, step=steps.get(name), coarse=coarse)
        return True

    def _original_runs(self, inputs: dict[str, Any]) -> bool:
        """Whether the model the graph was loaded from runs on these inputs (where that can be tried)."""
        source = self._original()
        if source is None or self.inputs is not None:
            return True
        try:
            Session(source, optimisation="off").run(inputs)
        except RegaugeError:
            return False
        return True

    def _original_loads(self) -> bool:
        """Whether onnxruntime takes the model the graph was loaded from (where that can be tried)."""
        source = self._original()
        try:
            return source is None or Session(source, optimisation="off") is not None
        except RegaugeError:
            return False

    def _original(self) -> Any:
        """The model the graph was loaded from, or its path; None where it cannot be run."""
        carried, source = (self.graph.metadata.get(key) for key in ("onnx", "onnx_source"))
        if source is not None:
            return source[0]
        return None if carried is None or external_locations(carried) else carried

    def _foreign_domain(self) -> str | None:
        model = self.graph.metadata.get("onnx")
        if model is None:
            return None
        own = {identifier[0] for identifier in model.functions}
        used = (node.domain for graph in with_nested(model.graph) for node in graph)
        return next((domain for domain in used if domain not in _KNOWN_DOMAINS | own), None)

    def _skip(self, reason: str) -> None:
        warnings.warn(f"the written ONNX model was not compared with the graph: {reason}", RegaugeWarning, stacklevel=2)

    def _expected(self) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Inputs by name with the graph's results, for those that the graph can be run on."""
        names = [value.name for value in self.graph.inputs]
        if self.inputs is not None:
            given = [self.inputs[n] for n in names] if isinstance(self.inputs, Mapping) else list(self.inputs)
            yield dict(zip(names, given, strict=True)), run(self.graph, given)
            return
        known = remembered_runs(self.graph)
        for inputs, results in chain(known, islice(sample_runs(self.graph), len(known), None)):
            yield dict(zip(names, inputs, strict=True)), results


def quantization_steps(graph: Graph) -> dict[str, float]:
    """Outputs that are quantized, or dequantized by constant scales, and what one step of them is."""
    found: dict[str, float] = {}
    carried = graph.metadata.get("onnx")
    for value in carried.graph.outputs if carried is not None else ():
        node = value.producer()
        if node is not None and node.op_type == "QuantizeLinear":
            found[value.name] = 1.0
        if node is not None and node.op_type == "DequantizeLinear" and node.inputs[1] is not None:
            scale = constant_tensor(node.inputs[1])
            if scale is not None:
                found[value.name] = float(torch.as_tensor(scale.numpy()).double().max())
    return found


def coarsest(graph: Graph) -> float:
    """The tolerance of what a graph rounds to on its way, integers or half precision; 0 where it does not."""
    found = 0.0
    for _, node in graph.walk():
        kinds = (value.dtype for value in node.outputs)
        found = max(found, *(_TOLERANCE.get(kind, 0.0) for kind in kinds if isinstance(kind, torch.dtype)), 0.0)
        found = max(found, _ROUNDED) if node.op == "quantize" else found
    return found


def compare_result(
    name: str, ours: Any, theirs: Any, *, values: bool = True, step: float | None = None, coarse: float = 0.0
) -> None:
    """Raise EmitError when a result of onnxruntime is not the graph's: another shape, or numbers too far off.

    With ``step``, that of a quantized output, they may be off by one step: rounding may fall to the other side. Where
    the graph rounds to few bits on the way they may be further off, as ``coarse`` says.
    """
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return
    if ours.dtype != theirs.dtype:
        raise EmitError(f"the written model gives {name} the type {theirs.dtype}, the graph gives {ours.dtype}")
    if ours.shape != theirs.shape:
        was, now = tuple(ours.shape), tuple(theirs.shape)
        raise EmitError(f"the written model gives {name} the shape {now}, the graph gives {was}")
    if not values or not ours.numel():
        return
    if step is not None:
        steps = float((ours.double() - theirs.double()).abs().max()) / step
        if not steps <= _STEPS:
            raise EmitError(f"the written model computes something else: {name} is off by {steps:.2g} steps")
        return
    if not (ours.dtype.is_floating_point or ours.dtype.is_complex):
        differing = int((ours != theirs.to(ours.dtype)).sum())
        if differing > ours.numel() // 100:  # an index of equal scores may differ
            raise EmitError(f"the written model gives other values of {name}: {differing} of {ours.numel()} differ")
        return
    error = relative_error(ours, theirs)
    tolerance = max(coarse, _TOLERANCE.get(ours.dtype, _DEFAULT_TOLERANCE))
    if not error <= tolerance:
        raise EmitError(f"the written model computes something else: {name} is off by {error:.2g} of its largest value")


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest magnitude; infinite where only one of the two is finite."""
    a, b = ours.to(torch.complex128 if ours.is_complex() else torch.float64), theirs.to(ours.dtype)
    b = b.to(a.dtype)
    finite = torch.isfinite(a) & torch.isfinite(b)
    rest = ~finite
    if bool(rest.any()) and not torch.equal(torch.nan_to_num(a[rest]), torch.nan_to_num(b[rest])):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a[finite] - b[finite]).abs().max() / a[finite].abs().max().clamp_min(1e-6))
