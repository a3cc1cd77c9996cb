"""How much a graph's outputs move when values inside it do: squared gradients, without labels.

With v normal, E[(v' dy/dx)^2] is the sum of squares of the Jacobian's entries for x, over all entries of the outputs y:
by how much the squared distance of the outputs grows with a disturbance of x, to first order (the empirical Fisher of
a Gaussian likelihood).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Node, Value
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.schedule import schedule
from regauge.ir.sizes.expressions import solve_bindings

Visit = Callable[[Value, torch.Tensor, torch.Tensor], None]


def visit_gradients(
    graph: Graph, batches: Sequence[Any], values: Sequence[Value], visit: Visit, *, draws: int = 1, seed: int = 0
) -> None:
    """Call ``visit(value, tensor, gradient)`` for every batch and draw, with v' dy/dx for a normal v.

    Values on which no real output depends are left out. Memory: what the graph computes for one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        tensors, outputs = _run(graph, batch, set(values))
        for _ in range(draws if outputs and tensors else 0):
            total = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
            if not isinstance(total, torch.Tensor) or not total.requires_grad:
                continue
            inside = [tensor for _, tensor in tensors]
            found = torch.autograd.grad(total, inside, retain_graph=True, allow_unused=True)
            for (value, tensor), gradient in zip(tensors, found, strict=True):
                if gradient is not None:
                    visit(value, tensor.detach(), gradient)


def _run(graph: Graph, batch: Any, wanted: set[Value]) -> tuple[list[tuple[Value, torch.Tensor]], list[torch.Tensor]]:
    """The wanted values, each a tensor that gradients reach, and the real outputs; in regions one for each turn."""
    tensors: list[tuple[Value, torch.Tensor]] = []

    def reached(node: Node, results: tuple[Any, ...]) -> tuple[Any, ...]:
        if not any(value in wanted for value in node.outputs):
            return results
        found = list(results)
        for place, (value, result) in enumerate(zip(node.outputs, results, strict=True)):
            if value in wanted and isinstance(result, torch.Tensor) and result.is_floating_point():
                found[place] = result if result.requires_grad else result.detach().requires_grad_()
                tensors.append((value, found[place]))
        return tuple(found)

    interpreter = Interpreter(graph, hook=reached)
    environment, bindings = interpreter.bound(batch)
    with torch.enable_grad():
        for node, late, _ in schedule(graph):
            results = interpreter.run_node(node, environment, bindings)
            environment.update(zip(node.outputs, results, strict=True))
            for value in late:
                solve_bindings(value.shape, environment[value].shape, bindings)
        outputs = [interpreter.read(output, environment, bindings) for output in graph.outputs]
    return tensors, [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
