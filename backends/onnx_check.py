"""Holding a written ONNX file to its graph: both are run on the same inputs before the file is published."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch

from regauge.backends.run_onnxruntime import Session
from regauge.ir.errors import EmitError, RegaugeError, RegaugeWarning
from regauge.ir.graph import Graph
from regauge.ir.interpret import run
from regauge.ir.sample_inputs import sample_inputs

# Sizes tried for all dynamic axes alike where small, different ones do not fit (a network of strides and windows).
_SIZES = (2, 16, 64, 512, 1024, 224)
_TOLERANCE = {torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_DEFAULT_TOLERANCE = 1e-3  # float32 through deep networks with unnormalised weights; a wrong index is of order 1
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
        random = any(node.operator.random for _, node in self.graph.walk())
        expected = list(self._expected())
        try:
            session = Session(path, optimisation="off")
            for inputs, results in expected:
                found = session.run(inputs)
                for name, ours, theirs in zip(session.outputs, results, found, strict=True):
                    compare_result(name, ours, theirs, values=not random)
        except EmitError:
            raise
        except RegaugeError as error:
            raise EmitError(f"the written model does not run: {error}") from error
        if not expected:
            self._skip("no made-up inputs fit the graph, pass inputs=")

    def _foreign_domain(self) -> str | None:
        model = self.graph.metadata.get("onnx")
        if model is None:
            return None
        own = {identifier[0] for identifier in model.functions}
        used = (node.domain for node in model.graph.all_nodes())
        return next((domain for domain in used if domain not in _KNOWN_DOMAINS | own), None)

    def _skip(self, reason: str) -> None:
        warnings.warn(f"the written ONNX model was not compared with the graph: {reason}", RegaugeWarning, stacklevel=2)

    def _expected(self) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Inputs by name with the graph's results: at most two that the graph can be run on."""
        names = [value.name for value in self.graph.inputs]
        if self.inputs is not None:
            given = [self.inputs[n] for n in names] if isinstance(self.inputs, Mapping) else list(self.inputs)
            yield dict(zip(names, given, strict=True)), run(self.graph, given)
            return
        wanted = 2 if self._symbols() else 1
        for inputs in self._candidates():
            if not wanted:
                return
            try:
                results = run(self.graph, inputs)
            except (RegaugeError, RuntimeError):
                continue
            wanted -= 1
            yield dict(zip(names, inputs, strict=True)), results

    def _candidates(self) -> Iterator[list[Any]]:
        symbols = self._symbols()
        try:
            yield self._with_defaults(sample_inputs(self.graph))
            for size in _SIZES if symbols else ():
                sizes = {s: self._within(s, size) for s in symbols}
                yield self._with_defaults(sample_inputs(self.graph, seed=size, sizes=sizes))
        except RegaugeError:
            return

    def _with_defaults(self, inputs: list[Any]) -> list[Any]:
        """Initializers that callers may override are tried as they are."""
        defaults = self.graph.metadata.get("input_defaults", {})
        pairs = zip(self.graph.inputs, inputs, strict=True)
        return [defaults[value.name].load() if value.name in defaults else x for value, x in pairs]

    def _symbols(self) -> set[sympy.Symbol]:
        sizes = [size for value in self.graph.inputs for size in value.shape if isinstance(size, sympy.Basic)]
        return set().union(*(size.free_symbols for size in sizes))

    def _within(self, symbol: sympy.Symbol, size: int) -> int:
        low, high = self.graph.symbols.get(symbol, (1, None))
        return max(low, size if high is None else min(size, high))


def compare_result(name: str, ours: Any, theirs: Any, *, values: bool = True) -> None:
    """Raise EmitError when a result of onnxruntime is not the graph's: another shape, or numbers too far off."""
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return
    if ours.shape != theirs.shape:
        was, now = tuple(ours.shape), tuple(theirs.shape)
        raise EmitError(f"the written model gives {name} the shape {now}, the graph gives {was}")
    if not values or not ours.numel():
        return
    if not (ours.dtype.is_floating_point or ours.dtype.is_complex):
        differing = int((ours != theirs.to(ours.dtype)).sum())
        if differing > ours.numel() // 100:  # an index of equal scores may differ
            raise EmitError(f"the written model gives other values of {name}: {differing} of {ours.numel()} differ")
        return
    error = relative_error(ours, theirs)
    tolerance = _TOLERANCE.get(ours.dtype, _DEFAULT_TOLERANCE)
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
