"""Gradients of a loss for weights, batch by batch or example by example, and their products with the Hessian.

The graph runs on the reference interpreter with gradients: what it holds is what autograd keeps of one batch, or of one
example where examples can be run alone (the number of examples is dynamic).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import sympy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.schedule import schedule
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.losses import Labelled, Loss, are_logits, example_slices, loss_of

Gradients = dict[Parameter, torch.Tensor]
Replace = Callable[[Node, Value, torch.Tensor], torch.Tensor]
"""What a node reads in place of a value: masks are put in here."""


class Differentiable:
    """A graph that is run with gradients for some of its parameters."""

    def __init__(self, graph: Graph, parameters: Sequence[Parameter], replace: Replace | None = None) -> None:
        self.graph = graph
        self.replace = replace
        self.weights = {p: p.tensor.detach().clone().requires_grad_() for p in parameters}
        self._interpreter = Interpreter(graph, weights={p.name: w for p, w in self.weights.items()})

    def run(self, inputs: Any, weights: Mapping[str, torch.Tensor] | None = None) -> list[Any]:
        """The outputs; ``weights`` are read in place of parameters of these names."""
        self._interpreter.weights |= weights or {}
        environment, bindings = self._interpreter.bound(inputs)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for node, _, last in schedule(self.graph):
                with self._replaced(node, environment):
                    results = self._interpreter.run_node(node, environment, bindings)
                environment.update(zip(node.outputs, results, strict=True))
                for value in last:
                    environment.pop(value, None)
            return [self._interpreter.read(output, environment, bindings) for output in self.graph.outputs]

    @contextmanager
    def _replaced(self, node: Node, environment: dict[Value, Any]) -> Iterator[None]:
        if self.replace is None:
            yield
            return
        before = {value: environment[value] for _, value in node.operands() if value in environment}
        for value, tensor in before.items():
            if isinstance(tensor, torch.Tensor):
                environment[value] = self.replace(node, value, tensor)
        yield
        environment.update(before)


def batch_gradients(
    graph: Graph, parameters: Sequence[Parameter], batches: Sequence[Labelled], loss: Loss | None, seed: int = 0
) -> Gradients:
    """The gradient of the mean loss over all examples; parameters that it does not depend on are left out."""
    total: Gradients = {}
    whole = max(1, sum(examples_in(batch.inputs) for batch in batches))
    for batch, found in _each(graph, parameters, batches, loss, seed):
        share = examples_in(batch.inputs) / whole
        for parameter, gradient in found.items():
            total[parameter] = total.get(parameter, 0) + gradient * share
    return total


def _each(
    graph: Graph, parameters: Sequence[Parameter], batches: Sequence[Labelled], loss: Loss | None, seed: int
) -> Iterator[tuple[Labelled, Gradients]]:
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        yield batch, _loss_gradients(Differentiable(graph, parameters), batch, loss, generator)


def _loss_gradients(
    network: Differentiable,
    batch: Labelled,
    loss: Loss | None,
    generator: torch.Generator,
    *,
    create_graph: bool = False,
) -> Gradients:
    """The gradients of a batch's loss for the weights that it depends on."""
    value = loss_of(network.run(batch.inputs), batch, loss, squared=False, generator=generator)
    if value is None:
        return {}
    weights = list(network.weights.values())
    found = torch.autograd.grad(value, weights, allow_unused=True, create_graph=create_graph)
    return {p: gradient for p, gradient in zip(network.weights, found, strict=True) if gradient is not None}


def example_gradients(
    graph: Graph, parameters: Sequence[Parameter], batches: Sequence[Labelled], loss: Loss | None, seed: int = 0
) -> Iterator[Gradients]:
    """The gradient of each example's own loss, one after the other.

    A graph of a fixed number of examples runs once on the batch, and back for each example.
    """
    generator = torch.Generator().manual_seed(seed)
    network = Differentiable(graph, parameters)
    weights = list(network.weights.values())
    for outputs, example in example_outputs(network, batches):
        value = loss_of(outputs, example, loss, squared=True, generator=generator)
        if value is not None:
            found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
            yield _present(network.weights, found)


def example_outputs(network: Differentiable, batches: Sequence[Labelled]) -> Iterator[tuple[list[Any], Labelled]]:
    """The outputs of each example, and the example."""
    first = network.graph.inputs[0].shape[:1] if network.graph.inputs else ()
    alone = (
        bool(first) and isinstance(first[0], sympy.Symbol) and network.graph.symbols.get(first[0], (1, None))[0] <= 1
    )
    for batch in batches:
        count = examples_in(batch.inputs)
        examples = example_slices(batch, count)
        if alone:
            yield from ((network.run(example.inputs), example) for example in examples)
            continue
        outputs = network.run(batch.inputs)
        if not all(isinstance(y, torch.Tensor) and y.dim() and y.shape[0] == count for y in outputs):
            yield outputs, batch  # results are of the batch as a whole: it is one example
            continue
        yield from (([y[n : n + 1] for y in outputs], example) for n, example in enumerate(examples))


def hessian_products(
    graph: Graph, parameters: Sequence[Parameter], batches: Sequence[Labelled], loss: Loss | None, seed: int = 0
) -> Gradients:
    """H g, with H the Hessian and g the gradient of a batch's loss; the mean over batches.

    By a double backward; where an operator has no second derivative in torch, by a central difference of gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    total: Gradients = {}
    for batch in batches:
        network = Differentiable(graph, parameters)
        gradients = partial(_loss_gradients, network, batch, loss, generator)
        for parameter, part in _hessian_product(network, gradients).items():
            total[parameter] = total.get(parameter, 0) + part / len(batches)
    return total


def _hessian_product(network: Differentiable, gradients: Callable[..., Gradients]) -> Gradients:
    found = gradients(create_graph=True)
    products = [(g * g.detach()).sum().double() for g in found.values() if g.requires_grad]
    if not products:
        return {}
    try:
        second = torch.autograd.grad(torch.stack(products).sum(), list(network.weights.values()), allow_unused=True)
    except RuntimeError as reason:
        if "is not implemented" not in str(reason):
            raise
        return _difference(network, {p: g.detach() for p, g in found.items()}, gradients)
    return _present(network.weights, second)


def _difference(network: Differentiable, along: Gradients, gradients: Callable[[], Gradients]) -> Gradients:
    """(g(w + e d) - g(w - e d)) / 2e for d = ``along``: H d but for terms of order e^2.

    The step is that of a central difference, the cube root of the precision, as a share of the norm of the weights.
    """
    lengths = [torch.stack([x[p].detach().double().norm() for p in along]).norm() for x in (network.weights, along)]
    precision = max(torch.finfo(gradient.dtype).eps for gradient in along.values())
    step = float(precision ** (1 / 3) * lengths[0] / lengths[1].clamp(min=1e-300))

    def move(by: float) -> None:
        with torch.no_grad():
            for parameter, gradient in along.items():
                network.weights[parameter].add_(gradient, alpha=by)

    move(step)
    above = gradients()
    move(-2 * step)
    below = gradients()
    return {p: (above[p].detach() - below[p].detach()) / (2 * step) for p in along if p in above and p in below}


def hessian_traces(
    graph: Graph, parameters: Sequence[Parameter], batches: Sequence[Labelled], draws: int = 1, seed: int = 0
) -> dict[Parameter, float]:
    """The trace of the Hessian of the loss in each parameter, estimated; the mean over examples.

    Where labels are classes of the first output the loss is cross-entropy, and the trace the mean of v' H v over
    ``draws`` of signs v, by a double backward (Hutchinson 1990). Else it is |y - y0|^2 / 2 of the outputs, whose
    Hessian at y = y0 is J' J: its trace is the mean of |J' v|^2 over normal v (Gauss-Newton).
    """
    generator = torch.Generator().manual_seed(seed)
    total = dict.fromkeys(parameters, 0.0)
    whole = max(1, sum(examples_in(batch.inputs) for batch in batches)) * draws
    for batch in batches:
        network = Differentiable(graph, parameters)
        weights, examples = list(network.weights.values()), examples_in(batch.inputs)
        outputs = network.run(batch.inputs)
        real = [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
        summed = not real or not are_logits(
            real[0], batch.labels
        )  # else the loss is the mean over the batch's examples
        for _ in range(draws):
            loss = loss_of(outputs, batch, None, squared=True, generator=generator)
            if loss is None:
                continue
            first = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True, create_graph=not summed)
            parts = _squares(first) if summed else _curvatures(first, weights, generator)
            for parameter, part in zip(network.weights, parts, strict=True):
                total[parameter] += part * (1 if summed else examples) / whole
    return total


def _squares(gradients: Sequence[torch.Tensor | None]) -> list[float]:
    return [0.0 if found is None else float(found.double().square().sum()) for found in gradients]


def _curvatures(
    gradients: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor], generator: torch.Generator
) -> list[float]:
    """v' H v of the block of each weight: signs of others are independent, so that the mean has no cross terms."""
    signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
    pairs = zip(gradients, signs, strict=True)
    along = [(g * v).sum().double() for g, v in pairs if g is not None and g.requires_grad]
    if not along:
        return [0.0] * len(weights)
    second = torch.autograd.grad(torch.stack(along).sum(), weights, allow_unused=True, retain_graph=True)
    return [0.0 if h is None else float((h * v).double().sum()) for h, v in zip(second, signs, strict=True)]


def _present(weights: Mapping[Parameter, torch.Tensor], found: Sequence[torch.Tensor | None]) -> Gradients:
    return {p: gradient.detach() for p, gradient in zip(weights, found, strict=True) if gradient is not None}
