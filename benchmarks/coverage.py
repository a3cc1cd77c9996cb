"""Prune any architecture, unhinted, and check the result against its masked original: ours beside torch-pruning.

    python benchmarks/coverage.py                        the 66 models, ratio 0.5, both tools
    python benchmarks/coverage.py --models hf:bert timm:resnet18:64 --no-peer
    python benchmarks/coverage.py --models wide          240 more of timm, torchvision and transformers, ours only
    python benchmarks/coverage.py --write                also append the table to docs/benchmarks.md

Each model runs in a process of its own with a time limit (the peer does not end on some). Columns: error of the
captured and of the emitted module against the model in float32, whether state_dict keys are equal, error of the pruned
module against the masked original in float64 (see mask_oracle.py), share of the parameters left, seconds.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks import wide_models
from benchmarks.isolated import Unfinished, isolated
from benchmarks.mask_oracle import masked_error, relative_error
from benchmarks.model_case import Case, float64_reference, redraw
from benchmarks.report import append_table, environment
from benchmarks.zoo import build, names

EXACT = 1e-6
RATIO = 0.5


@dataclass
class Row:
    """What one tool did to one model."""

    model: str
    verdict: str = ""
    captured: float | None = None
    emitted: float | None = None
    keys_equal: bool | None = None
    error: float | None = None
    left: float | None = None
    seconds: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        def number(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        keys = "" if self.keys_equal is None else "yes" if self.keys_equal else "no"
        return [
            self.model, self.verdict, number(self.captured, ".0e"), number(self.emitted, ".0e"), keys,
            number(self.error, ".0e"), number(self.left, ".3f"), number(self.seconds, ".1f"), self.note[:60],
        ]  # fmt: skip


HEADS = ["model", "verdict", "captured", "emitted", "keys", "pruned vs masked", "left", "s", "note"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def judge(row: Row, original: Case, pruned: nn.Module) -> None:
    """Compare a pruned module with its masked original and set the verdict."""
    before, after = parameters(original.model), parameters(pruned)
    row.left = after / before
    row.error, strange = masked_error(float64_reference(original.model), pruned, original.call)
    if strange:
        row.verdict, row.note = "no box", f"not a box of the original: {', '.join(strange[:3])}"
    elif row.error > EXACT:
        row.verdict = "WRONG"
    else:
        row.verdict = "exact" if after < before else "nothing pruned"


def ours(name: str, ratio: float) -> Row:
    """Capture, emit, prune and check one model with Regauge."""
    import regauge

    row = Row(name)
    start = time.perf_counter()
    try:
        case = build(name)
        redraw(case.model)
        graph = regauge.capture(case.model, case.args, case.kwargs, verify=False)
        expected = case.call(case.model)
        row.captured = _graph_error(graph, case, expected)
        emitted = graph.to_torch()
        row.emitted = relative_error(case.call(emitted), expected)
        row.keys_equal = set(emitted.state_dict()) == set(case.model.state_dict())
        wide = build(name).double()
        redraw(wide.model)  # after the change to float64: random float32 values are not unique
        small = regauge.optimize(
            regauge.capture(wide.model, wide.args, wide.kwargs, verify=False),
            f"prune{{ratio={ratio},compensate=false}}",
        )
        judge(row, wide, small.to_torch())
    except Exception as error:
        row.verdict, row.note = "error", f"{type(error).__name__}: {error}".splitlines()[0]
    row.seconds = time.perf_counter() - start
    return row


def _graph_error(graph: Any, case: Case, expected: Sequence[torch.Tensor]) -> float:
    """Error of the captured graph, run by the reference interpreter, over the model's flattened outputs."""
    from torch.utils import _pytree

    from regauge.ir.running.interpret import run

    leaves = [x for x in _pytree.tree_leaves((case.args, case.kwargs)) if isinstance(x, torch.Tensor)]
    results = run(graph, leaves)
    with torch.no_grad():
        full = [x for x in _pytree.tree_leaves(case.model(*case.args, **case.kwargs)) if isinstance(x, torch.Tensor)]
    return relative_error([r for r in results if isinstance(r, torch.Tensor)], full)


def torch_pruning(name: str, ratio: float) -> Row:
    """The same with torch-pruning: group magnitude, heads of the model ignored, nothing model-specific."""
    row = Row(name)
    start = time.perf_counter()
    try:
        import torch_pruning as tp

        case = build(name).double()
        redraw(case.model)
        model = copy.deepcopy(case.model)
        ours_to_copy = dict(zip(case.model.modules(), model.modules(), strict=True))
        inputs = case.kwargs or case.args
        pruner = tp.pruner.MagnitudePruner(
            model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
            ignored_layers=[ours_to_copy[head] for head in case.heads], output_transform=None,
        )  # fmt: skip
        pruner.step()
        judge(row, case, model)
    except Exception as error:
        row.verdict, row.note = "error", f"{type(error).__name__}: {error}".splitlines()[0]
    row.seconds = time.perf_counter() - start
    return row


TOOLS = {"regauge": ours, "torch-pruning": torch_pruning}


def _measure(tool: str, name: str, ratio: float) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return TOOLS[tool](name, ratio)


def measure(tool: str, name: str, ratio: float, limit: float) -> Row:
    """One row, from a process of its own that is ended after ``limit`` seconds."""
    try:
        row = isolated(_measure, tool, name, ratio, limit=limit)
    except Unfinished as problem:
        return Row(name, str(problem), seconds=limit if str(problem) == "no end" else None)
    assert isinstance(row, Row)
    return row


def summary(tool: str, rows: list[Row]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    small = sum(row.verdict == "exact" and (row.left or 1) <= 0.36 for row in rows)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    captured = sum(row.captured is not None and row.captured <= 1e-5 for row in rows)
    emitted = sum(row.emitted is not None and row.emitted <= 1e-5 and bool(row.keys_equal) for row in rows)
    text = f"{tool}: of {len(rows)} models: {verdicts}; {small} exact with at most 36 % of the parameters"
    return text + (f"; {captured} captured and {emitted} emitted equal to 1e-5" if tool == "regauge" else "")


def is_clean(row: Row) -> bool:
    """Captured, emitted and pruned without a fault: what the table of a long list leaves out."""
    equal = all(error is not None and error <= 1e-5 for error in (row.captured, row.emitted))
    return row.verdict == "exact" and equal and bool(row.keys_equal)


def write_table(tool: str, rows: list[Row], ratio: float, wide: bool) -> None:
    """Put the rows into docs/benchmarks.md; of the wide list only those with a fault."""
    shown = [row for row in rows if not is_clean(row)] if wide else rows
    title = f"Coverage, {'wide list, ' if wide else ''}{tool}, ratio {ratio}"
    note = summary(tool, rows) + (f"; the other {len(shown)}:" if wide else "")
    append_table(title, HEADS, [row.cells() for row in shown], note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="models to run, or 'wide' (default: the 66 of the list)")
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model of ours")
    parser.add_argument("--peer-limit", type=float, default=60.0, help="seconds for one model of the peer")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="append the tables to docs/benchmarks.md")
    options = parser.parse_args()
    wide = options.models == ["wide"]
    models = wide_models.NAMES if wide else options.models or names()
    limits = {"regauge": options.limit, "torch-pruning": options.peer_limit}
    tools = ["regauge"] if options.no_peer or wide else list(TOOLS)  # the wide list does not say what the heads are
    for tool in tools:
        rows: list[Row] = []
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [pool.submit(measure, tool, name, options.ratio, limits[tool]) for name in models]
            for job in jobs:
                rows.append(job.result())
                print(f"{tool:14s} " + " ".join(f"{cell:>9s}" for cell in rows[-1].cells()), flush=True)
        print(summary(tool, rows))
        if options.write:
            write_table(tool, rows, options.ratio, wide)
    print(environment())


if __name__ == "__main__":
    main()
