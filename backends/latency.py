"""Measured latency of graphs: in onnxruntime where they were loaded from ONNX, or one was quantized for it; as emitted
torch modules else.

All graphs run in turns on one thread, so that a busy machine slows all of them alike. What counts is the median of the
processor time of that thread: the time that a run takes where nobody else wants the core. On a GPU it is the time until
the device is done.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regauge.backends.run_onnxruntime import Session
from regauge.backends.run_torch import flat_module
from regauge.backends.to_onnx import to_onnx
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import Interpreter, device_of
from regauge.ir.running.sample_inputs import sample_runs
from regauge.ir.storage.quantized_layers import planned_for_onnxruntime
from regauge.ir.timing import Timing

FEWEST, MOST = 21, 400  # rounds
SECONDS = 3.0  # for all rounds together, once there are enough
CLOSE = 0.003  # a median whose standard error is less than this share of it is good enough
_WARMUP = 3

Once = Callable[[], Any]
"""Runs a model once."""


def measure(graphs: Sequence[Graph], inputs: Any = None) -> list[Timing]:
    """The time of one run of each graph on the same inputs, a batch as ``graph.run`` takes it, or made-up ones.

    Raises RegaugeError where a graph cannot be run in the runtime, or no inputs are given and none can be made up.
    """
    given = inputs if inputs is not None else _made_up(graphs[0])
    in_onnxruntime = "onnx" in graphs[0].metadata or any(map(planned_for_onnxruntime, graphs))
    runtime = "onnxruntime" if in_onnxruntime else "torch"
    prepare = _in_onnxruntime if runtime == "onnxruntime" else _in_torch
    clock = _device_clock if runtime == "torch" and device_of(graphs[0]).type == "cuda" else time.thread_time
    with _one_thread(), torch.no_grad():
        times = _rounds([prepare(graph, given) for graph in graphs], clock)
    return [Timing(statistics.median(own), _noise(own), runtime) for own in times]


def _made_up(graph: Graph) -> list[Any]:
    for inputs, _ in sample_runs(graph):
        return inputs
    raise RegaugeError("no made-up inputs fit the graph, so its latency cannot be measured: give data=")


def _in_torch(graph: Graph, inputs: Any) -> Once:
    environment, _ = Interpreter(graph).bound(inputs)
    given, module = list(environment.values()), flat_module(graph)
    return lambda: module(*given)


def _in_onnxruntime(graph: Graph, inputs: Any) -> Once:
    with tempfile.TemporaryDirectory() as folder:
        session = Session(to_onnx(graph, Path(folder) / "model.onnx", verify=False), threads=1)
    feeds = session.feeds(inputs)
    return lambda: session.milliseconds(feeds)  # of which nothing counts but that it ran


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _rounds(runs: Sequence[Once], clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds of each, in turns, until the medians are known well enough or the time is used up."""
    for _ in range(_WARMUP):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for turn in range(MOST):
        for run, own in zip(runs, times, strict=True):
            before = clock()
            run()
            own.append((clock() - before) * 1e3)
        enough = turn + 1 >= FEWEST
        if enough and (time.perf_counter() - start > SECONDS or all(_noise(own) < CLOSE for own in times)):
            break
    return times


def _noise(times: Sequence[float]) -> float:
    """The standard error of the median as a share of it, by the distance of the quartiles (exact for normal times)."""
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float(0.93 * (high - low) / max(middle, 1e-12) / np.sqrt(len(times)))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
