"""Captures models and prints, per model: nodes, operators kept opaque, largest error, seconds of export and of import.

    python benchmarks/capture_survey.py models.py [name ...]

``models.py`` defines ``ALL``, a list of names, and ``build(name)``, which gives a model and its example inputs first.
The exit status is 1 when a model cannot be captured or has opaque operators.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from regauge.frontends import numeric_check
from regauge.frontends.capture import import_traced, trace_program
from regauge.frontends.outputs import plain_outputs
from regauge.frontends.pytrees import flatten_outputs, tensors_of


def load_models(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def survey(name: str, model: torch.nn.Module, inputs: Any) -> tuple[str, bool]:
    """One line about a model, and whether it was captured without opaque operators and with equal results."""
    start = time.perf_counter()
    traced = trace_program(model, inputs, None)
    exported = time.perf_counter() - start
    start = time.perf_counter()
    graph = import_traced(traced).graph
    imported = time.perf_counter() - start
    result = numeric_check.run_module(model, traced.args, traced.kwargs, protect=False)
    expected = flatten_outputs(plain_outputs(result) if traced.plain else result)
    actual = numeric_check.run_graph(graph, tensors_of(traced.leaves))
    error = max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))
    opaque = sorted({node.attributes["target"] for _, node in graph.walk() if node.op == "torch_call"})
    problems = graph.axes.problems
    line = f"{name:44} nodes {len(graph):5} error {error:8.1e} export {exported:6.2f} s import {imported:6.2f} s"
    line += f" rule problems {len(problems)}: {problems[0]}" if problems else ""
    return line + (f" opaque: {', '.join(opaque)}" if opaque else ""), not opaque and error < 1e-5


def relative_error(actual: Any, expected: Any) -> float:
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def main(arguments: list[str]) -> int:
    models = load_models(Path(arguments[0]))
    names = arguments[1:] or models.ALL
    good = 0
    for name in names:
        torch.manual_seed(0)
        try:
            model, inputs, *_ = models.build(name)
            if hasattr(models, "randomize"):
                models.randomize(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                line, fine = survey(name, model, inputs)
        except Exception as error:
            line, fine = f"{name:44} {type(error).__name__}: {str(error)[:300]}", False
        good += fine
        print(line, flush=True)
    print(f"{good} of {len(names)} captured with equal results and no opaque operator")
    return 0 if good == len(names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
