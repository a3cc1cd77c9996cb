"""Holding a written ONNX file to the file it came from: by the onnx checker, and in onnxruntime on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from regauge.backends.onnx_check import compare_result, quantization_steps
from regauge.backends.onnx_write import MOST_INLINE_BYTES
from regauge.backends.run_onnxruntime import Optimisation, Session
from regauge.ir.errors import EmitError, RegaugeError, first_line
from regauge.ir.graph import Graph
from regauge.ir.sample_inputs import candidates, input_symbols

LEVELS: tuple[Optimisation, ...] = ("off", "all")


@dataclass
class Proof:
    """Called with the staged file; raises EmitError where it is worse than the file at ``source``.

    That is where the onnx checker or onnxruntime, with its optimisations off or on, refuses the new file and not the
    old one, or where results differ: on ``batches``, or on inputs made up for ``graph``, the graph of the source, at
    two bindings of its dynamic sizes, one of them 1. Outputs that come out of a DequantizeLinear may differ by one step
    of its scale. Of random operators only shapes are compared.
    """

    source: Path
    graph: Graph
    batches: Sequence[Mapping[str, Any]] | None = None

    def __call__(self, path: Path) -> None:
        self._check(path)
        for level in LEVELS:
            try:
                before = Session(self.source, optimisation=level)
            except RegaugeError:
                continue  # operators that onnxruntime does not have
            try:
                after = Session(path, optimisation=level)
            except RegaugeError as error:
                raise EmitError(f"the written model does not load with optimisation {level}: {error}") from error
            for inputs, expected in self._runs(before):
                self._compare(before.outputs, expected, after, inputs, level)

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

    def _runs(self, session: Session) -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
        """Batches that the original runs on, with its results."""
        if self.batches is not None:
            yield from ((batch, session.run(batch)) for batch in self.batches)
            return
        yield from islice(self._made_up(session), 2 if input_symbols(self.graph) else 1)

    def _made_up(self, session: Session) -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
        names = [value.name for value in self.graph.inputs]
        for made in candidates(self.graph):
            inputs = dict(zip(names, made, strict=True))
            try:
                yield inputs, session.run(inputs)
            except RegaugeError:
                continue

    def _compare(
        self,
        names: Sequence[str],
        expected: Sequence[Any],
        after: Session,
        inputs: Mapping[str, Any],
        level: Optimisation,
    ) -> None:
        random = any(node.operator.random for _, node in self.graph.walk())
        try:
            found = after.run(inputs)
        except RegaugeError as error:
            raise EmitError(f"the written model does not run with optimisation {level}: {error}") from error
        steps = quantization_steps(self.graph)
        for name, ours, theirs in zip(names, expected, found, strict=True):
            compare_result(name, ours, theirs, values=not random, step=steps.get(name))


def _passes_checker(path: Path) -> bool:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception:  # the checker raises several types
        return False
    return True
