"""Holding a written ONNX file to the file it came from: by the onnx checker, and in onnxruntime on the same inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from regauge.backends.onnx_model.check import compare_result, quantization_steps
from regauge.backends.onnx_model.write import MOST_INLINE_BYTES
from regauge.backends.run_onnxruntime import Optimisation, Session
from regauge.ir.errors import EmitError, RegaugeError, RegaugeWarning, first_line
from regauge.ir.graph import Graph
from regauge.ir.running.sample_inputs import candidates, input_symbols

Runs: TypeAlias = Sequence[tuple[Mapping[str, Any], list[Any]]]

LEVELS: tuple[Optimisation, ...] = ("off", "all")


@dataclass
class Proof:
    """Called with the staged file; raises EmitError where it is worse than the file at ``source``.

    That is where the onnx checker or onnxruntime, with its optimisations off or on, refuses the new file and not the
    old one, or where results differ: on ``batches``, or on inputs made up for ``graph``, the graph of the source, at
    two bindings of its dynamic sizes, one of them 1. Outputs that come out of a DequantizeLinear may differ by one step
    of its scale. Of random operators only shapes are compared.

    What is right is what the old file gives without optimisations; only where the new one gives something else with
    them, as both may, the old one is run with them too. A warning tells where nothing could be compared.
    """

    source: Path
    graph: Graph
    batches: Sequence[Mapping[str, Any]] | None = None

    def __call__(self, path: Path) -> None:
        self._check(path)
        plain = self._runs("off")
        if not any([self._hold(path, level, plain) for level in LEVELS]):
            reason = "onnxruntime runs it on no inputs that were tried"
            text = f"the written ONNX model was not compared with the original: {reason}"
            warnings.warn(text, RegaugeWarning, stacklevel=2)

    def _hold(self, path: Path, level: Optimisation, plain: Runs) -> bool:
        """Whether the new file was compared at a level, with what the old one gives plainly or at that level."""
        try:
            after = Session(path, optimisation=level, spin=False)
        except RegaugeError as error:
            if _session(self.source, level) is None:
                return False  # operators that onnxruntime does not have
            raise EmitError(f"the written model does not load with optimisation {level}: {error}") from error
        if plain:
            try:
                self._compare(plain, after, level)
                return True
            except EmitError:
                if level == "off":
                    raise
        others = self._runs(level) if level != "off" else []
        self._compare(others, after, level)
        return bool(others)

    def _check(self, path: Path) -> None:
        import onnx

        if path.stat().st_size > MOST_INLINE_BYTES:
            return
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:  # the checker raises several types
            if _passes_checker(self.source):
                reason = first_line(error)
                raise EmitError(f"the written model does not pass the onnx checker: {reason}") from error

    def _runs(self, level: Optimisation) -> Runs:
        """Batches that the original runs on at a level, with its results; none where it cannot be loaded."""
        session = _session(self.source, level)
        if session is None:
            return []
        if self.batches is not None:
            return [(batch, session.run(batch)) for batch in self.batches]
        return list(islice(self._made_up(session), 2 if input_symbols(self.graph) else 1))

    def _made_up(self, session: Session) -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
        names = [value.name for value in self.graph.inputs]
        for made in candidates(self.graph):
            inputs = dict(zip(names, made, strict=True))
            try:
                yield inputs, session.run(inputs)
            except RegaugeError:
                continue

    def _compare(self, runs: Runs, after: Session, level: Optimisation) -> None:
        random = any(node.operator.random for _, node in self.graph.walk())
        steps = quantization_steps(self.graph)
        for inputs, expected in runs:
            try:
                found = after.run(inputs)
            except RegaugeError as error:
                raise EmitError(f"the written model does not run with optimisation {level}: {error}") from error
            for name, ours, theirs in zip(after.outputs, expected, found, strict=True):
                compare_result(name, ours, theirs, values=not random, step=steps.get(name))


def _session(path: Path, level: Optimisation) -> Session | None:
    """A file in onnxruntime; None where that cannot load it."""
    try:
        return Session(path, optimisation=level, spin=False)
    except RegaugeError:
        return None


def _passes_checker(path: Path) -> bool:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception:  # the checker raises several types
        return False
    return True
