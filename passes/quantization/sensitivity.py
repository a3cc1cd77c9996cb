"""What it costs to store a layer in few bits: the scores that mixed precision weighs against bytes.

loss       how far the outputs of the graph move on data, squared, with this layer alone in that form
gradient   the sum of (dL/dy . (y' - y))^2 over the entries of the layer's output y, y' in that form: to first order
           what the loss moves by (NVIDIA Model Optimizer, auto_quantize); here L is v'y of the outputs, v normal
hessian    tr(H) / n |Q(W) - W|^2, n the entries of W (Dong et al. 2020, HAWQ-V2), and half of what each pair of layers
           one behind the other costs more together than alone, L(Q_l, Q_m) - L(Q_l) - L(Q_m), which is measured
           (Schaefer et al. 2023, Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
           Quantization); of |y - y0|^2 / 2 of the outputs, H of cross-entropy where batches have labels
lim        1 - cos of what goes into the residual branch that the layer lies in and what comes out of the sum behind it
           (layer input modification: Dumitru et al. 2024, Layer-Wise Quantization; of blocks); 1 in no branch
entropy    as loss, but all forms of neighbouring layers that depend on one another together: what is lost by both need
           not be the sum (Q-VLM; blocks by the entropy of activations, see :mod:`.dependency`)
zd         one minus the share of weights more than one standard deviation above their mean (the same, z-score
           distribution): no data

Of lim and zd the paper gives a share of the layers, those of the highest scores, more bits; here they are multiplied
by |Q(W) - W|^2 / |W|^2, so that they can be weighed against bytes as the others are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.losses import Labelled
from regauge.passes.calibration.probe import Probe
from regauge.passes.calibration.weight_gradients import hessian_traces
from regauge.passes.quantization.trials import Trial, Trials

Sensitivity: TypeAlias = Literal["loss", "gradient", "hessian", "lim", "entropy", "zd"]
WITHOUT_DATA = ("zd",)

Losses: TypeAlias = Mapping[str, Sequence[float]]
"""By the name of a layer's weight what each of its forms costs."""


def losses(
    way: Sensitivity, graph: Graph, layers: Sequence[Layer], tried: Trials, batches: Sequence[Labelled]
) -> Losses:
    """What each form of each layer costs; of those in :data:`WITHOUT_DATA` there may be no batches."""
    if way == "gradient":
        return _by_gradients(graph, layers, tried, batches)
    if way in ("lim", "zd"):
        scores = _by_branches(graph, layers, batches) if way == "lim" else _by_outliers(layers)
        return {layer.weight.name: _weighed(layer, tried, scores) for layer in layers}
    probe = Probe(graph, [batch.inputs for batch in batches])
    if way == "loss":
        return {name: [probe.change(trial.data) for trial in own] for name, own in tried.items()}
    return _by_hessian(graph, layers, tried, batches, probe)


def _weighed(layer: Layer, tried: Trials, scores: Mapping[str, float]) -> list[float]:
    """A layer's score by the error of each form as a share of the weight."""
    whole = float(layer.weight.tensor.detach().double().square().sum()) or 1.0
    return [scores[layer.weight.name] * trial.off / whole for trial in tried[layer.weight.name]]


def _by_outliers(layers: Sequence[Layer]) -> dict[str, float]:
    found = {}
    for layer in layers:
        weight = layer.weight.tensor.detach().double()
        z = (weight - weight.mean()) / weight.std().clamp(min=1e-30)
        found[layer.weight.name] = 1 - float((z > 1).double().mean())
    return found


def _by_hessian(
    graph: Graph, layers: Sequence[Layer], tried: Trials, batches: Sequence[Labelled], probe: Probe
) -> Losses:
    traces = hessian_traces(graph, [layer.weight for layer in layers], batches)
    found = {
        layer.weight.name: [
            traces[layer.weight] / layer.weight.tensor.numel() * trial.off for trial in tried[layer.weight.name]
        ]
        for layer in layers
    }
    names = [layer.weight.name for layer in layers]
    alone = {name: [probe.change(trial.data) for trial in tried[name]] for name in names}
    for one, other in zip(names, names[1:], strict=False):
        for form, (a, b) in enumerate(zip(tried[one], tried[other], strict=False)):
            both = probe.change({**a.data, **b.data})
            more = (both - alone[one][form] - alone[other][form]) / 2  # of |y - y0|^2 / 2, as the traces are
            found[one][form] += more / 2
            found[other][form] += more / 2
    return found


def _by_gradients(graph: Graph, layers: Sequence[Layer], tried: Trials, batches: Sequence[Labelled]) -> Losses:
    """By v' y in place of a loss, v normal: its squared gradients are those of |y - y0|^2."""
    found = {layer.weight.name: [0.0] * len(tried[layer.weight.name]) for layer in layers}
    read = [layer.node.inputs[0] for layer in layers]
    values = [*(layer.node.output for layer in layers), *(x for x in read if isinstance(x, Value))]
    for batch in batches:
        given, _ = Interpreter(graph).bound(batch.inputs)
        seen: dict[Value, torch.Tensor] = {x: tensor for x, tensor in given.items() if x in read}
        slopes: dict[Value, torch.Tensor] = {}

        def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
            seen[value], slopes[value] = tensor, gradient  # noqa: B023

        visit_gradients(graph, [batch.inputs], list(dict.fromkeys(values)), visit)
        for layer, x in zip(layers, read, strict=True):
            if layer.node.output in slopes and isinstance(x, Value) and x in seen:
                for form, trial in enumerate(tried[layer.weight.name]):
                    found[layer.weight.name][form] += _moved(layer, trial, seen[x], slopes[layer.node.output])
    return found


def _moved(layer: Layer, trial: Trial, x: torch.Tensor, slope: torch.Tensor) -> float:
    """The sum of (dL/dy . (y' - y))^2 over the entries of a layer's output."""
    change = layer.matrices(trial.data[layer.weight.name] - layer.weight.tensor.detach())
    bias = torch.zeros(layer.blocks, layer.outputs)
    if layer.bias is not None and layer.bias.name in trial.data:
        bias = (trial.data[layer.bias.name] - layer.bias.tensor.detach()).reshape(bias.shape)
    parts = zip(layer.blocks_of_input(x), layer.blocks_of_output(slope), change, bias, strict=True)
    return sum(float(((rows @ w.t() + b) * g).square().sum().double()) for rows, g, w, b in parts)


def _by_branches(graph: Graph, layers: Sequence[Layer], batches: Sequence[Labelled]) -> dict[str, float]:
    """1 - cos over the entries of an example, the mean over examples."""
    found, branches = dict.fromkeys((layer.weight.name for layer in layers), 1.0), _branches(graph)
    by_node, run = {layer.node: layer for layer in layers}, Lockstep(graph, [batch.inputs for batch in batches])
    for node in run.steps():
        if node not in branches:
            continue
        shortcut, inside = branches[node]
        before = run.values(shortcut)
        run.execute(node)
        pairs = zip(before, run.values(node.output), strict=True)
        cosines = [F.cosine_similarity(a.flatten(1), b.flatten(1), 1) for a, b in pairs]
        score = 1 - float(torch.cat(cosines).double().mean())
        for inner in inside:
            if inner in by_node:
                name = by_node[inner].weight.name
                found[name] = min(found[name], score)  # of branches within branches the innermost comes first
    return found


def _branches(graph: Graph) -> dict[Node, tuple[Value, set[Node]]]:
    """The sums of a value and what is computed from it alone or with others: the value, and the nodes of the branch."""
    place, found = {node: i for i, node in enumerate(graph.nodes)}, dict[Node, tuple[Value, set[Node]]]()
    for node in graph.nodes:
        operands = [x for x in node.inputs if isinstance(x, Value) and not isinstance(x, Parameter)]
        if node.op != "add" or len(operands) != 2 or operands[0].shape != operands[1].shape:
            continue
        for shortcut, end in (operands, operands[::-1]):
            inside = _between(shortcut, end, place)
            if inside:
                found[node] = (shortcut, inside)
    return found


def _between(start: Value, end: Value, place: Mapping[Node, int]) -> set[Node]:
    """The nodes that compute ``end`` from ``start``; none where it does not depend on it."""
    first = -1 if start.producer is None else place.get(start.producer, -1)
    found, waiting, reached = set[Node](), [end], False
    while waiting:
        value = waiting.pop()
        reached = reached or value is start
        node = value.producer
        if value is start or node is None or place.get(node, -1) <= first or node in found:
            continue
        found.add(node)
        waiting += [x for _, x in node.operands()]
    return found if reached else set()
