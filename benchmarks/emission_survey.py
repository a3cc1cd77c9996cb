"""What to_torch() makes of real models: source, exactness, names, pickling, re-export, gradients, and after a cut.

    python benchmarks/emission_survey.py [NAME ...]        default: the models of the coverage list

One row per model: nodes, lines and classes of source, seconds to emit, largest relative difference from the original,
whether the state_dict is the same, whether pickle, torch.export and backward work, and the difference between the
emitted module and the interpreter with every free Dim cut in half. Exit status 1 when a model fails a check.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils import _pytree as pytree

from benchmarks.model_case import redraw
from benchmarks.zoo import build, names
from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.runtime import source_of
from regauge.frontends.capture import capture
from regauge.ir.dims.resize import resize
from regauge.ir.running.interpret import run

TOLERANCE = 1e-5
CHECKS = ("keys", "pickle", "export", "backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to try; default: all of the coverage list")
    chosen = parser.parse_args().names or names()
    print(f"{'model':40} nodes lines class  secs   error {' '.join(CHECKS)} cut-error")
    bad = 0
    for name in chosen:
        try:
            row = survey(name)
        except Exception as error:  # one model's failure is a row, not the end
            print(f"{name:40} FAILED: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
            bad += 1
            continue
        bad += not row["ok"]
        print_row(name, row)
    print(f"{len(chosen) - bad} of {len(chosen)} models pass every check")
    return 1 if bad else 0


def survey(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    case = build(name)
    redraw(case.model)
    model, inputs = case.model, case.inputs
    graph = capture(model, inputs, verify=False)
    start = time.perf_counter()
    emitted = to_torch(graph)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "nodes": len(graph)}
    source = source_of(emitted)
    row.update(lines=source.count("\n"), classes=source.count("\nclass "))
    with torch.no_grad():
        results = tensors(call(emitted, inputs))
        row["error"] = difference(results, tensors(call(model, inputs)))
    row["keys"] = shapes(model) == shapes(emitted)
    row["pickle"] = attempt(lambda: difference(tensors(call(reloaded(emitted), inputs)), results) <= TOLERANCE)
    row["export"] = attempt(lambda: exported(emitted, inputs, results))
    row["backward"] = attempt(lambda: gradients(emitted, inputs))
    row["cut"] = cut_error(graph, inputs)
    row["ok"] = row["error"] <= TOLERANCE and row["cut"] <= TOLERANCE and all(row[check] for check in CHECKS)
    return row


def print_row(name: str, row: dict[str, Any]) -> None:
    marks = " ".join(f"{'yes' if row[check] else 'NO':>{len(check)}}" for check in CHECKS)
    numbers = f"{row['nodes']:5} {row['lines']:5} {row['classes']:5} {row['seconds']:5.2f} {row['error']:7.1e}"
    print(f"{name:40} {numbers} {marks} {row['cut']:9.1e}", flush=True)


def call(module: torch.nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of any result, relative to its largest value; infinite where results are missing."""
    if len(actual) > len(expected):
        actual, expected = expected, actual
    if not actual or any(a.shape != e.shape for a, e in zip(actual, expected, strict=False)):
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=False):
        scale = max(float(e.abs().double().max()), 1e-9)
        worst = max(worst, float((a.double() - e.double()).abs().max()) / scale)
    return worst


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def attempt(check: Any) -> bool:
    try:
        return bool(check())
    except Exception as error:  # reported in the row
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return False


def reloaded(module: torch.nn.Module) -> torch.nn.Module:
    loaded: torch.nn.Module = pickle.loads(pickle.dumps(module))
    return loaded


def exported(module: torch.nn.Module, inputs: Any, results: list[torch.Tensor]) -> bool:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    program = torch.export.export(module, args, kwargs, strict=False)
    return difference(tensors(call(program.module(), inputs)), results) <= TOLERANCE


def gradients(module: torch.nn.Module, inputs: Any) -> bool:
    sum(t.sum() for t in tensors(call(module, inputs)) if t.is_floating_point()).backward()  # type: ignore[union-attr]
    return any(parameter.grad is not None for parameter in module.parameters())


def cut_error(graph: Any, inputs: Any) -> float:
    """The emitted module against the interpreter, with every free Dim cut in half."""
    cut = resize(graph, {g.dim: range(max(1, g.dim.size // 2)) for g in graph.groups() if g.free})
    with torch.no_grad():
        actual = tensors(call(to_torch(cut), inputs))
    given = {name: tensor for name, tensor in inputs.items()} if isinstance(inputs, dict) else list(inputs)
    return difference(actual, [t for t in run(cut, given) if isinstance(t, torch.Tensor)])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
