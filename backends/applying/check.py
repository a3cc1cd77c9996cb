"""Does the user's module compute what the graph computes? One run of each on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from regauge.ir.errors import EmitError, first_line
from regauge.ir.graph import Graph, Value
from regauge.ir.running.interpret import device_of, run
from regauge.ir.sizes.expressions import evaluate

TOLERANCE = 1e-4  # of the largest value of a result; float32 sums in another order stay well below


class Check:
    """Runs the graph once, then any module as often as asked."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None) -> None:
        self.graph = graph
        if inputs is None:
            inputs = made_up_inputs(graph)
        if isinstance(inputs, Mapping):
            inputs = [inputs[value.name] for value in graph.inputs]
        device = device_of(graph)
        self.inputs = [tensor.to(device) for tensor in inputs]
        self.expected = run(graph, self.inputs)

    def failure(self, model: nn.Module) -> str | None:
        """None where the module agrees; else what went wrong, in words."""
        try:
            found = self.call(model)
        except Exception as error:  # whatever the user's code raises on sizes it does not expect
            return f"its forward fails ({first_line(error)[:160]})"
        return self._difference(found)

    def call(self, model: nn.Module) -> list[Any]:
        """The results of the module, flat; raises whatever its code raises."""
        model.train(bool(self.graph.metadata.get("torch", {}).get("training", False)))
        args, kwargs = self._arguments()
        with torch.no_grad():
            return pytree.tree_leaves(model(*args, **kwargs))

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch_born = self.graph.metadata.get("torch")
        if torch_born is None:
            return tuple(self.inputs), {}
        tensors = iter([tensor.clone() for tensor in self.inputs])
        names = set(torch_born["input_names"])
        leaves = [next(tensors) if name in names else value for name, value in torch_born["leaves"]]
        args, kwargs = pytree.tree_unflatten(leaves, torch_born["in_spec"])
        return tuple(args), dict(kwargs)

    def _difference(self, found: Sequence[Any]) -> str | None:
        if len(found) != len(self.expected):
            return f"it returns {len(found)} values, the graph {len(self.expected)}"
        for position, (actual, expected) in enumerate(zip(found, self.expected, strict=True)):
            if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
                continue
            if actual.shape != expected.shape:
                return f"result {position} has shape {tuple(actual.shape)}, the graph's has {tuple(expected.shape)}"
            scale = max(float(expected.abs().max()), 1e-6) if expected.is_floating_point() and expected.numel() else 1.0
            if not torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True):
                worst = float((actual.double() - expected.double()).abs().max())
                return f"result {position} differs by {worst:.2g} from the graph's"
        return None


def made_up_inputs(graph: Graph) -> list[torch.Tensor]:
    """Random inputs of the graph's shapes; integers stay inside the tables they index."""
    generator = torch.Generator().manual_seed(0)
    bindings = {symbol: _size(symbol, graph, number) for number, symbol in enumerate(sorted(_symbols(graph), key=str))}
    return [_tensor(value, bindings, generator) for value in graph.inputs]


def _symbols(graph: Graph) -> set[sympy.Symbol]:
    return {s for v in graph.inputs for size in v.shape if isinstance(size, sympy.Basic) for s in size.free_symbols}


def _size(symbol: sympy.Symbol, graph: Graph, number: int) -> int:
    least, most = graph.symbols.get(symbol, (1, None))
    wanted = max(least, 3 + 2 * number)  # different symbols get different sizes
    return wanted if most is None else min(wanted, most)


def _tensor(value: Value, bindings: Mapping[sympy.Symbol, int], generator: torch.Generator) -> torch.Tensor:
    shape = evaluate(value.shape, bindings)
    if not isinstance(value.dtype, torch.dtype):
        raise EmitError(f"the input {value.name} holds {value.dtype}: pass inputs for the check with inputs=")
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(value.dtype)
    rows = [
        int(table.shape[0])
        for node, slot in value.uses
        if node.op in ("embedding", "embedding_bag") and slot == 1
        for table in node.inputs[:1]
        if isinstance(table, Value)
    ]
    if rows:
        return torch.randint(0, min(rows), shape, generator=generator).to(value.dtype)
    return torch.ones(shape, dtype=value.dtype)
