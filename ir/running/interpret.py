"""The reference interpreter: runs a graph node by node on torch tensors, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from regauge.ir.dtypes import dtype_name
from regauge.ir.errors import GraphError, RegaugeError, first_line
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.schedule import schedule, schedule_now
from regauge.ir.sizes.expressions import evaluate, solve_bindings
from regauge.ir.storage.weights import device_of_weight

Hook = Callable[[Node, tuple[Any, ...]], tuple[Any, ...] | None]
"""Called after each node with its results; may return other results in their place."""


LABELS = ("labels", "label", "target", "targets")
"""What labels are called in a batch that is a mapping, where no input of the graph has the name."""


class Interpreter:
    """Runs one graph. ``hook`` sees every node's results and may replace them; ``weights`` overrides parameters.

    States (running statistics, caches) start from their parameters or inputs at every run; the new values are in
    ``states`` after a run, and nothing is written back.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        hook: Hook | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.graph = graph
        self.hook = hook
        self.weights = dict(weights or {})
        self.device = device_of(graph) if device is None else torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self._moves = device is not None  # the parameters too
        self.states: dict[str, torch.Tensor] = {}
        self._unlike = ""  # what to say of an input that is not of the declared type or sizes, should a node fail

    def run(self, inputs: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
        """Results of the graph for inputs in order or by name, which are moved to where the weights are.

        Raises RegaugeError naming the node that failed.
        """
        self._unlike = ""
        environment, bindings = self.bound(inputs)
        with torch.no_grad():
            results = self._run_graph(self.graph, environment, bindings)
        self.states = {s.name: environment[s.after] for s in self.graph.states}
        return results

    def bound(self, inputs: Sequence[Any] | Mapping[str, Any]) -> tuple[dict[Value, Any], dict[sympy.Symbol, int]]:
        """The graph's inputs with what was given for them, and the dynamic sizes that this fixes.

        Raises GraphError for a wrong number of inputs, one that is no tensor, or one of another rank.
        """
        arguments = self._arguments(inputs)
        bindings: dict[sympy.Symbol, int] = {}
        for value, tensor in zip(self.graph.inputs, arguments, strict=True):
            if isinstance(tensor, tuple | list) and isinstance(value.dtype, torch.dtype):
                kind = type(tensor).__name__
                raise GraphError(f"the input {value} got {describe(tensor)}, a {kind}: give a tensor for each input")
            if isinstance(tensor, str):
                raise GraphError(f"the input {value} got {tensor!r}: give a tensor for each input")
            if isinstance(tensor, torch.Tensor):
                _check_rank(value, tensor)
                solve_bindings(value.shape, tensor.shape, bindings)
        self._unlike = self._unlike or _unlike_declared(self.graph.inputs, arguments)
        return dict(zip(self.graph.inputs, arguments, strict=True)), bindings

    def _arguments(self, inputs: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
        names = [value.name for value in self.graph.inputs]
        defaults = {name: weight.load() for name, weight in self.graph.metadata.get("input_defaults", {}).items()}
        if not isinstance(inputs, Mapping) and len(inputs) == len(names) - len(defaults):
            inputs = dict(zip([name for name in names if name not in defaults], inputs, strict=True))
        if isinstance(inputs, Mapping):
            inputs = {**defaults, **inputs}
            missing = [name for name in names if name not in inputs]
            if missing:
                given = ", ".join(str(name) for name in inputs if name not in defaults) or "nothing"
                raise GraphError(f"no value is given for the graph input {missing[0]!r}, but for {given}")
            inputs = [inputs[name] for name in names]
        if len(inputs) != len(names):
            raise GraphError(
                f"the graph takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}: give them as one tuple"
            )
        return [_tensor(x, self.device) for x in inputs]

    def _run_graph(self, graph: Graph, environment: dict[Value, Any], bindings: dict[sympy.Symbol, int]) -> list[Any]:
        for node, late, last in schedule(graph) if graph is self.graph else schedule_now(graph):
            results = self.run_node(node, environment, bindings)
            environment.update(zip(node.outputs, results, strict=True))
            for value in late:
                solve_bindings(value.shape, environment[value].shape, bindings)
            for value in last:
                del environment[value]
        return [self.read(output, environment, bindings) for output in graph.outputs]

    def read(self, operand: Any, environment: dict[Value, Any], bindings: Mapping[sympy.Symbol, int]) -> Any:
        if isinstance(operand, Parameter) and operand not in environment:
            tensor = self.weights.get(operand.name)
            tensor = operand.tensor if tensor is None else tensor
            return tensor.to(self.device) if self._moves else tensor
        if isinstance(operand, Value):
            return environment[operand]
        return evaluate(operand, bindings)

    def run_node(self, node: Node, environment: dict[Value, Any], bindings: dict[sympy.Symbol, int]) -> tuple[Any, ...]:
        operands = [
            environment[operand] if operand in environment else self.read(operand, environment, bindings)
            for operand in node.inputs
        ]
        attributes = {key: evaluate(value, bindings) for key, value in node.attributes.items()}
        if node.regions:
            attributes["regions"] = tuple(self._region(region, bindings) for region in node.regions)
        try:
            if self._on_cpu:
                raw = _function(node, operands)(*operands, **attributes)
            else:
                with self.device:  # tables are made there
                    raw = _function(node, operands)(*operands, **attributes)
        except RegaugeError:
            raise
        except Exception as error:
            shapes = ", ".join(map(describe, operands))
            where = f", called at {node.source}" if node.source else ""
            unlike = f"{self._unlike}: " if self._unlike else ""
            raise RegaugeError(
                f"{unlike}{node.label} failed on operands {shapes}{where}: {first_line(error)}"
            ) from error
        results = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
        if len(results) < len(node.outputs):
            raise RegaugeError(f"{node.label} gave {len(results)} results, the graph expects {len(node.outputs)}")
        results = results[: len(node.outputs)]
        replaced = self.hook(node, results) if self.hook is not None else None
        return results if replaced is None else replaced

    def _region(self, region: Graph, bindings: dict[sympy.Symbol, int]) -> Callable[..., list[Any]]:
        def call(*arguments: Any) -> list[Any]:
            inner = dict(bindings)
            for value, tensor in zip(region.inputs, arguments, strict=True):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == value.rank:
                    solve_bindings(value.shape, tensor.shape, inner)
            return self._run_graph(region, dict(zip(region.inputs, arguments, strict=True)), inner)

        return call


def _function(node: Node, operands: Sequence[Any]) -> Callable[..., Any]:
    operator = node.operator
    other = operator.with_gradients
    if other is None or node.attributes.get("training") or not torch.is_grad_enabled():
        return operator.evaluate
    reached = any(isinstance(operand, torch.Tensor) and operand.requires_grad for operand in operands)
    return other if reached else operator.evaluate


def device_of(graph: Graph) -> torch.device:
    """Where the graph's weights are: its inputs go there, and tables made during a run are made there.

    Weights that lie in a file are not read for it: they come to the CPU.
    """
    for parameter in graph.parameters.values():
        if parameter.kind != "constant":
            return device_of_weight(parameter.weight)
    return torch.device("cpu")


def _tensor(given: Any, device: torch.device) -> Any:
    """Arrays become tensors, where the weights are; arrays of types torch lacks (strings) stay arrays."""
    if isinstance(given, torch.Tensor):
        return given if given.device == device or "meta" in (given.device.type, device.type) else given.to(device)
    if not hasattr(given, "__array__") or getattr(getattr(given, "dtype", None), "kind", "") in "OUSV":
        return given
    return torch.as_tensor(given, device=device)


def describe(value: Any) -> str:
    """What messages say of a value: the shape of a tensor, never its elements."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {describe(item)}' for name, item in value.items())}}}"
    return str(tuple(value.shape)) if hasattr(value, "shape") else repr(value)


def _check_rank(value: Value, tensor: torch.Tensor) -> None:
    if tensor.dim() != value.rank:
        raise GraphError(f"the input {value} got a tensor of shape {tuple(tensor.shape)}")


def _unlike_declared(inputs: Sequence[Value], given: Sequence[Any]) -> str:
    """What to say of the first input that is not of the declared type and sizes; it may run all the same."""
    for value, tensor in zip(inputs, given, strict=True):
        if isinstance(tensor, torch.Tensor):
            sizes_fit = all(
                not isinstance(size, int) or size == n for size, n in zip(value.shape, tensor.shape, strict=True)
            )
            if tensor.dtype != value.dtype or not sizes_fit:
                return f"the input {value} got {dtype_name(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"
    return ""


def inputs_of(graph: Graph, batch: Sequence[Any] | Mapping[str, Any]) -> tuple[Any, ...] | Mapping[str, Any]:
    """What of a batch are inputs of the graph: a DataLoader gives labels behind them, which are left out."""
    if isinstance(batch, Mapping):
        return batch
    count = len(graph.inputs)
    if len(batch) < count:  # a run that begins, without what is carried from run to run
        count -= sum(state.returned for state in graph.states)
    if len(batch) < count:  # what has a default need not be given
        count -= len(graph.metadata.get("input_defaults", {}))
    return tuple(batch[:count])


def run_seeded(graph: Graph, inputs: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """Run a graph with the same random numbers each time, leaving the caller's generators as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(graph, inputs)


def run(graph: Graph, inputs: Sequence[Any] | Mapping[str, Any], **options: Any) -> list[Any]:
    """Run a graph once; options are those of :class:`Interpreter`."""
    return Interpreter(graph, **options).run(inputs)
