"""Simplifying ONNX files: ours beside onnxsim, onnxslim, onnxscript, onnxoptimizer and onnxruntime's offline optimiser.

    python benchmarks/simplify.py                            all networks, real files and light models
    python benchmarks/simplify.py --networks resnet18 bert --flavours raw --no-light --no-real
    python benchmarks/simplify.py --six --flavours raw --no-light --no-real
    python benchmarks/simplify.py --write                    also append the tables to docs/benchmarks.md

All tools run in one process per file (a crash costs that file only). For each result: nodes (Constant nodes aside,
nested graphs included), bytes, largest error against the original with onnxruntime's optimisations off, latency with
all of them as a ratio to the original's (medians of interleaved runs; 0.95 to 1.05 is noise), whether metadata of the
model and of its nodes survived, and the time the tool took. A result that onnxruntime cannot load, that computes
something else, or that lost an input is a failure.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import onnx.parser

from benchmarks.isolated import Unfinished, isolated
from benchmarks.onnx_exports import FLAVOURS, NETWORKS, SIX_KINDS, export, light_files, real_files
from benchmarks.report import append_table, environment

TOLERANCE = 1e-4
REPEATS = 17  # at least, of which two warm up
ENOUGH = 0.5  # seconds of runs for each file, then it is enough
# what each tool is run on once before its time is taken
SMALL = """<ir_version: 8, opset_import: ["" : 17]>
small (float[2, 3] x) => (float[2, 3] y) <float[3] w = {1, 2, 3}> { z = Mul(x, w)  i = Identity(z)  y = Relu(i) }"""
HEADS = ("file", "tool", "nodes", "share", "bytes", "error", "latency", "metadata", "s", "failure")


@dataclass
class Row:
    """What one tool made of one file."""

    file: str
    tool: str
    before: int
    nodes: int | None = None
    bytes: float = math.nan  # ratio to the original
    error: float = math.nan
    latency: float = math.nan  # ratio to the original
    metadata: bool | None = None
    seconds: float = math.nan
    failure: str = ""

    def cells(self) -> list[str]:
        share = "" if self.nodes is None else f"{self.nodes / max(self.before, 1):.2f}"
        kept = "" if self.metadata is None else "kept" if self.metadata else "lost"
        return [
            self.file, self.tool, str(self.nodes or ""), share, f"{self.bytes:.3f}", f"{self.error:.0e}",
            f"{self.latency:.2f}", kept, f"{self.seconds:.2f}", self.failure[:60],
        ]  # fmt: skip


# -- the tools ---------------------------------------------------------------------------------------------------------


def _regauge(source: Path, target: Path) -> None:
    import regauge

    regauge.optimize(regauge.load(source), "simplify").to_onnx(target)


def _onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, target)


def _onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), target)


def _onnxscript(source: Path, target: Path) -> None:
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.load(source)
    onnxscript.optimizer.optimize(model)
    onnx_ir.save(model, target)


def _onnxoptimizer(source: Path, target: Path) -> None:
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source), onnxoptimizer.get_fuse_and_elimination_passes()), target)


def _onnxruntime(source: Path, target: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "regauge": _regauge,
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxscript": _onnxscript,
    "onnxoptimizer": _onnxoptimizer,
    "onnxruntime": _onnxruntime,
}

# -- judging -----------------------------------------------------------------------------------------------------------


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else ())):
                yield from all_nodes(inner)


def count_nodes(model: onnx.ModelProto) -> int:
    return sum(node.op_type != "Constant" for node in all_nodes(model.graph))


def session(path: Path, level: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds_for(path: Path) -> list[dict[str, np.ndarray]]:
    """Two sets of inputs on which the original runs; sizes are found by way of our graph, values are made up."""
    from itertools import islice

    import regauge
    from regauge.ir.running.sample_inputs import sample_runs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = regauge.load(path)
    names = [value.name for value in graph.inputs]
    original = session(path, "ORT_DISABLE_ALL")
    wanted = {value.name for value in original.get_inputs()}
    found = []
    for inputs, _ in islice(sample_runs(graph), 4):
        feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n in wanted}
        try:
            original.run(None, feed)
        except Exception:
            continue
        found.append(feed)
    return found[:2]


def error_between(one: Any, other: Any, feeds: list[dict[str, np.ndarray]]) -> float:
    worst = 0.0
    for feed in feeds:
        for a, b in zip(one.run(None, feed), other.run(None, feed), strict=True):
            if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiu" or not a.size:
                continue
            if a.shape != b.shape:
                return math.inf
            difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
            if not np.isfinite(difference).all():
                return math.inf if not np.array_equal(a, b, equal_nan=True) else worst
            worst = max(worst, float(difference.max() / max(float(np.abs(a).max()), 1e-6)))
    return worst


def has_metadata(original: onnx.ModelProto, model: onnx.ModelProto) -> bool:
    """Whether the properties of the model and those of (most of) the nodes that are left survived."""
    mine = {p.key: p.value for p in model.metadata_props}
    if (
        any(mine.get(p.key) != p.value for p in original.metadata_props)
        or model.producer_name != original.producer_name
    ):
        return False
    if model.doc_string != original.doc_string or model.graph.name != original.graph.name:
        return False
    if not any(node.metadata_props for node in original.graph.node):
        return True
    left = [node for node in model.graph.node if node.op_type != "Constant"]
    return sum(bool(node.metadata_props) for node in left) >= 0.9 * len(left)


def interface(graph: onnx.GraphProto, kind: str) -> list[str]:
    """What a caller feeds or is given: files older than IR version 4 list their weights among the inputs as well."""
    weights = {initializer.name for initializer in graph.initializer}
    return [value.name for value in getattr(graph, kind) if kind == "output" or value.name not in weights]


def judge(row: Row, source: Path, target: Path, original: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> None:
    model = onnx.load(target)
    row.nodes = count_nodes(model)
    row.bytes = target.stat().st_size / source.stat().st_size
    row.metadata = has_metadata(original, model)
    for kind in ("input", "output"):
        before, after = (interface(m.graph, kind) for m in (original, model))
        if before != after:
            row.failure = f"{kind}s are {after}"[:60]
            return
    mine, theirs = session(target, "ORT_DISABLE_ALL"), session(source, "ORT_DISABLE_ALL")
    session(target, "ORT_ENABLE_ALL")
    row.error = error_between(theirs, mine, feeds)
    if not row.error <= TOLERANCE:
        row.failure = f"outputs differ by {row.error:.1e}"


def latencies(paths: dict[str, Path], feed: dict[str, np.ndarray]) -> dict[str, float]:
    """Medians in seconds of one thread with all of onnxruntime's optimisations, runs interleaved."""
    sessions = {name: session(path, "ORT_ENABLE_ALL") for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    begin = time.process_time()
    while len(times["original"]) < REPEATS or time.process_time() - begin < ENOUGH * len(sessions):
        for name, one in sessions.items():
            start = time.process_time()
            one.run(None, feed)
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def measure(source: Path, tools: list[str], timed: bool) -> list[Row]:
    original = onnx.load(source)
    feeds = feeds_for(source)
    rows, good = [], {"original": source}
    with tempfile.TemporaryDirectory() as folder:
        for tool in tools:
            row = Row(source.stem, tool, count_nodes(original))
            target = Path(folder) / f"{tool}.onnx"
            start = time.perf_counter()
            try:
                TOOLS[tool](source, target)
                row.seconds = time.perf_counter() - start
                judge(row, source, target, original, feeds)
            except Exception as error:
                row.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if not row.failure:
                good[tool] = target
            rows.append(row)
        if timed and feeds:
            found = latencies(good, feeds[0])
            for row in rows:
                row.latency = found[row.tool] / found["original"] if row.tool in found else math.nan
    return rows


def _measure(source: Path, tools: list[str], timed: bool) -> list[Row]:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:  # what a tool loads when it is first used is no part of what is timed
        small = Path(folder) / "small.onnx"
        onnx.save(onnx.parser.parse_model(SMALL), small)
        for tool in tools:
            TOOLS[tool](small, Path(folder) / f"{tool}.onnx")
    return measure(source, tools, timed)


def in_process(source: Path, tools: list[str], timed: bool, limit: float) -> list[Row]:
    try:
        return list(isolated(_measure, source, tools, timed, limit=limit))
    except Unfinished as problem:
        return [Row(source.stem, "all", 0, failure=str(problem))]


def geometric_mean(values: list[float]) -> float:
    found = [value for value in values if value > 0 and not math.isnan(value)]
    return math.exp(statistics.fmean(map(math.log, found))) if found else math.nan


def summary(rows: list[Row], tools: list[str]) -> list[list[str]]:
    """One line per tool and kind of file: geometric means of node share and latency, failures."""
    lines = []
    kinds = [*(f"-{flavour}" for flavour in FLAVOURS), "real", "light"]
    for kind in kinds:
        for tool in tools:
            mine = [row for row in rows if row.tool == tool and _kind(row.file) == kind]
            if not mine:
                continue
            good = [row for row in mine if not row.failure]
            shares = [row.nodes / row.before for row in good if row.nodes and row.before]
            lines.append([
                kind.strip("-"), tool, str(len(mine)), str(len(mine) - len(good)), f"{geometric_mean(shares):.2f}",
                f"{geometric_mean([row.latency for row in good]):.2f}",
                f"{max([row.bytes for row in good] or [0]):.2f}",
                str(sum(row.metadata is False for row in good)), f"{sum(row.seconds for row in good):.1f}",
            ])  # fmt: skip
    return lines


def _kind(file: str) -> str:
    if file.startswith("light_"):
        return "light"
    return next((f"-{flavour}" for flavour in FLAVOURS if file.endswith(f"-{flavour}")), "real")


SUMMARY_HEADS = ("kind", "tool", "files", "failures", "nodes", "latency", "most bytes", "metadata lost", "s")


def sources(options: argparse.Namespace) -> Iterator[Path]:
    for network in SIX_KINDS if options.six else NETWORKS:
        if not options.networks or network.name in options.networks:
            for flavour in options.flavours:
                path = export(network, flavour)
                if path is not None:
                    yield path
    if not options.no_real:
        yield from real_files()
    if not options.no_light:
        yield from light_files()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*")
    parser.add_argument("--six", action="store_true", help="one network of each of six kinds in place of all")
    parser.add_argument("--flavours", nargs="*", default=list(FLAVOURS), choices=FLAVOURS)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--no-real", action="store_true")
    parser.add_argument("--no-light", action="store_true")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for one file")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    for source in sources(options):
        for row in in_process(source, options.tools, not options.no_latency, options.limit):
            rows.append(row)
            print("{:34s} {:14s} {:>5s} {:>5s} {:>7s} {:>7s} {:>6s} {:5s} {:>6s} {}".format(*row.cells()), flush=True)
    lines = summary(rows, options.tools)
    for line in lines:
        print(" ".join(f"{cell:>13s}" for cell in line))
    print(environment())
    if options.write:
        append_table("Simplifying ONNX files", list(SUMMARY_HEADS), lines)
        append_table("Simplifying ONNX files, each", list(HEADS), [row.cells() for row in rows])


if __name__ == "__main__":
    main()
