"""Statistics of values over data, collected in one streaming run that all passes can share.

    statistics = Statistics(graph)
    ranges = statistics.register("conv1", Range(axis=1))
    moments = statistics.register(node.inputs[0], Spread(axis=-1))
    statistics.collect(batches, checkpoint="calibration.safetensors")
    ranges.lowest, moments.variance

Batches are run one at a time, and values are dropped when nothing reads them any more, so memory is that of one batch
in inference and of the collectors, which say how much they hold. With a ``checkpoint`` the collectors are saved after
each batch; the same call goes on behind the last batch that was saved, also after an interrupt.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.interpret import Interpreter
from regauge.passes.calibration.losses import labelled
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.progress import progress


class Collector(ABC):
    """Sums up one value over batches. What it holds are tensors in ``state``, by name; ``add`` changes them.

    ``axis`` is the axis whose indices are told apart; None: one figure for the whole value.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.state: dict[str, torch.Tensor] = {}

    @abstractmethod
    def add(self, x: torch.Tensor) -> None:
        """Take in the value of one batch."""

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What of a value of one batch is taken in."""
        return x

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[entries, indices of the axis] in double precision."""
        x = x.detach()
        whole = x.reshape(-1, 1) if self.axis is None else x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        return whole.double()

    def plus(self, name: str, amount: torch.Tensor) -> None:
        """Add to a sum."""
        self.state[name] = self.state[name] + amount if name in self.state else amount


C = TypeVar("C", bound=Collector)


class Range(Collector):
    """The least and the greatest entry of each index of an axis; holds two numbers for each."""

    def add(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        if len(rows):
            low, high = rows.amin(0), rows.amax(0)
            self.state["lowest"] = torch.minimum(self.state.get("lowest", low), low)
            self.state["highest"] = torch.maximum(self.state.get("highest", high), high)

    @property
    def lowest(self) -> torch.Tensor:
        return self.state["lowest"]

    @property
    def highest(self) -> torch.Tensor:
        return self.state["highest"]


class Spread(Collector):
    """Mean, variance and mean square of each index of an axis; holds two numbers for each.

    Batches are put together by the parallel formula (Chan, Golub and LeVeque 1979), which loses no digits to the mean.
    """

    def add(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        count, mean = torch.tensor(float(len(rows)), dtype=torch.float64), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if "count" in self.state and len(rows):
            before, whole = self.state["count"], self.state["count"] + count
            apart = mean - self.state["mean"]
            squares = self.state["squares"] + squares + apart.square() * before * count / whole
            mean, count = self.state["mean"] + apart * count / whole, whole
        if len(rows):
            self.state |= {"count": count, "mean": mean, "squares": squares}

    @property
    def mean(self) -> torch.Tensor:
        return self.state["mean"]

    @property
    def variance(self) -> torch.Tensor:
        return self.state["squares"] / self.state["count"]

    @property
    def mean_square(self) -> torch.Tensor:
        return self.variance + self.mean.square()


class Gram(Collector):
    """X'X of the entries as rows over an axis, with a column of ones behind it; holds the square of its size + 1."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__(axis)

    def add(self, x: torch.Tensor) -> None:
        assert self.axis is not None
        found = Moments(int(x.shape[self.axis]))
        found.add(self.rows(x))
        self.plus("gram", found.gram)

    @property
    def gram(self) -> torch.Tensor:
        """[size + 1, size + 1]; the last row and column are sums, the last entry is the number of rows."""
        return self.state["gram"]


class TokenNorms(Collector):
    """L2 norms over an axis at each place, least, mean and greatest over all places; holds four numbers."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__(axis)

    def add(self, x: torch.Tensor) -> None:
        norms = self.rows(x).square().sum(1).sqrt()
        if len(norms):
            low, high = norms.min(), norms.max()
            self.state["least"] = torch.minimum(self.state.get("least", low), low)
            self.state["greatest"] = torch.maximum(self.state.get("greatest", high), high)
            self.plus("sum", norms.sum())
            self.plus("count", torch.tensor(float(len(norms)), dtype=torch.float64))

    @property
    def mean(self) -> torch.Tensor:
        return self.state["sum"] / self.state["count"]


class Statistics:
    """Collectors by value, and the run that feeds them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.batches = 0  # how many have been taken in
        self._collectors: list[tuple[Value, Collector]] = []

    def register(self, value: Value | str, collector: C) -> C:
        """Collect on a graph input or a result of a node, given as it is or by name; returns the collector.

        Raises GraphError for an unknown name, and PassError for a parameter or a value of a branch or a loop.
        """
        found = self.graph.find(value) if isinstance(value, str) else value
        produced = found.producer is not None and found.producer in self.graph.nodes
        if isinstance(found, Parameter) or not (produced or found in self.graph.inputs):
            raise PassError(f"{found} is no value that graph {self.graph.name!r} computes: nothing can be collected")
        self._collectors.append((found, collector))
        return collector

    def collect(self, batches: Iterable[Any], *, checkpoint: str | os.PathLike[str] | None = None) -> int:
        """Run the graph on all batches; returns how many were taken in, those of an earlier run included.

        Batches are as ``optimize(data=...)`` takes them: tensors, tuples (labels behind the inputs are left out) or
        mappings; any iterable of them, which is read once. Raises PassError where a checkpoint is of other collectors,
        and where a value is not finite.
        """
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            self._load(path)
        done = self.batches
        total = len(batches) if isinstance(batches, Sized) else 0
        with progress("collecting statistics", total) as advance:
            for place, batch in enumerate(batches):
                if place >= done:
                    given = batch if isinstance(batch, Mapping | tuple | list) else (batch,)
                    self._add(labelled(self.graph, given).inputs)
                    if path is not None:
                        self._save(path)
                advance()
        return self.batches

    def _add(self, inputs: Any) -> None:
        wanted: dict[Node | None, list[tuple[Value, Collector]]] = {}
        for value, collector in self._collectors:
            wanted.setdefault(value.producer, []).append((value, collector))

        def look(node: Node, results: tuple[Any, ...]) -> None:
            for value, collector in wanted.get(node, ()):
                _take_in(value, results[value.index], collector)

        interpreter = Interpreter(self.graph, hook=look)
        if None in wanted:
            environment, _ = interpreter.bound(inputs)
            for value, collector in wanted[None]:
                _take_in(value, environment[value], collector)
        interpreter.run(inputs)
        self.batches += 1

    def _signature(self) -> str:
        return " ".join(f"{value.name}:{type(c).__name__}:{c.axis}" for value, c in self._collectors)

    def _save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{place}.{name}": tensor.contiguous().clone()
            for place, (_, collector) in enumerate(self._collectors)
            for name, tensor in collector.state.items()
        }
        tensors["batches"] = torch.tensor(self.batches)
        beside = path.with_name(path.name + ".part")
        save_file(tensors, beside, metadata={"collectors": self._signature()})
        os.replace(beside, path)

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                signature = (file.metadata() or {}).get("collectors")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PassError(f"{path} is no checkpoint of statistics: {error}; remove it") from error
        if signature != self._signature():
            raise PassError(f"{path} holds statistics of other values: remove it, or collect the same ones")
        self.batches = int(tensors.pop("batches"))
        for key, tensor in tensors.items():
            place, _, name = key.partition(".")
            self._collectors[int(place)][1].state[name] = tensor


def _take_in(value: Value, x: Any, collector: Collector) -> None:
    if not isinstance(x, torch.Tensor):
        raise PassError(f"{value} is no tensor: nothing can be collected")
    x = collector.seen(x)
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise PassError(f"{value} is not finite on the calibration data")
    collector.add(x)
