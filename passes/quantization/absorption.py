"""High-bias absorption (Nagel et al. 2019, Data-Free Quantization, section 4.1.3).

Where a channel in front of a ReLU is nearly always above c >= 0, relu(x) = relu(x - c) + c nearly always: c goes out of
the shift in front, and W c into the shift of each layer behind. c = max(0, beta - 3 gamma) by the shift and the gain of
a batch norm, whose results are taken to be normal; with data, by mean and standard deviation of what is measured.

Here only where all readers are layers without padding, at whose borders c would be missing (the paper does not say).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.windows import per_axis
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.statistics import Spread, Statistics

DEVIATIONS = 3.0


def absorb(graph: Graph, batches: Sequence[Any] | None, left: Counter[str], *, by: str) -> int:
    """Absorb high shifts in place; returns of how many values. ``left`` counts ReLUs that keep theirs, by reason."""
    found = [(node, made) for node in graph.nodes if node.op == "relu" and (made := _shift_in_front(node)) is not None]
    amounts = _measured([node for node, _ in found], graph, batches) if batches is not None else {}
    count = 0
    for node, shift in found:
        amount = amounts[node] if batches is not None else _by_norm(node)
        if amount is None or not bool((amount > 0).any()):
            continue
        layers = _readers(graph, node)
        if isinstance(layers, str):
            left[layers] += 1
            continue
        set_weight(graph, shift, (shift.tensor.detach().double() - amount).to(shift.tensor.dtype), by=by)
        for layer in layers:
            taker = layer.shifted(_what_it_gives(layer, amount))
            assert taker is not None
            set_weight(graph, *taker, by=by)
        count += 1
    return count


def _shift_in_front(relu: Node) -> Parameter | None:
    """The parameter that alone shifts what a ReLU reads: of a batch norm in inference, or the bias of a layer."""
    x = relu.inputs[0]
    maker = x.producer if isinstance(x, Value) and len(x.uses) == 1 else None
    if maker is None or maker.op not in ("batch_norm", "linear", "conv") or maker.attributes.get("training"):
        return None
    shift = maker.inputs[2] if len(maker.inputs) > 2 else None
    return shift if isinstance(shift, Parameter) and len(shift.uses) == 1 else None


def _axis(relu: Node) -> int:
    """The axis of the channels."""
    x = relu.inputs[0]
    assert isinstance(x, Value) and x.producer is not None
    return -1 if x.producer.op == "linear" else 1


def _measured(relus: Sequence[Node], graph: Graph, batches: Sequence[Any]) -> dict[Node, torch.Tensor]:
    statistics = Statistics(graph)
    spreads = {relu: statistics.register(relu.inputs[0], Spread(_axis(relu))) for relu in relus}  # type: ignore[arg-type]
    statistics.collect(batches) if spreads else None
    return {relu: (s.mean - DEVIATIONS * s.variance.sqrt()).clamp(min=0) for relu, s in spreads.items()}


def _by_norm(relu: Node) -> torch.Tensor | None:
    x = relu.inputs[0]
    norm = x.producer if isinstance(x, Value) else None
    gain, shift = norm.inputs[1:3] if norm is not None and norm.op == "batch_norm" else (None, None)
    if not isinstance(gain, Parameter) or not isinstance(shift, Parameter):
        return None
    beta, gamma = (parameter.tensor.detach().double() for parameter in (shift, gain))
    return (beta - DEVIATIONS * gamma.abs()).clamp(min=0)


def _readers(graph: Graph, relu: Node) -> list[Layer] | str:
    """The layers that read a ReLU and can take a shift, or why it keeps its own."""
    if relu.output in graph.outputs:
        return "a result of the graph is not shifted"
    layers = [layer_of(node, blocks=True) for node, _ in relu.output.uses]
    if not layers or any(layer is None or layer.node.inputs[0] is not relu.output for layer in layers):
        return "others than layers read what would be shifted"
    found = [layer for layer in layers if layer is not None]
    if any(layer.node.op not in ("linear", "conv") for layer in found):
        return "others than layers read what would be shifted"
    if any(any(per_axis(lay.node.attributes.get("padding", 0), max(1, lay.weight.rank - 2))) for lay in found):
        return "zeros around an image would have to be shifted too"
    if any(layer.bias is None and layer.norm is None for layer in found):
        return "a layer behind has neither a bias nor a batch norm"
    return found


def _what_it_gives(layer: Layer, amount: torch.Tensor) -> torch.Tensor:
    """What a layer makes of the same amount at every place, [all its outputs]."""
    matrices = layer.matrices(layer.weight.tensor.detach().double())
    columns = amount.reshape(-1, layer.columns // layer.taps).repeat_interleave(layer.taps, 1)
    return torch.einsum("boc,bc->bo", matrices, columns.expand(layer.blocks, -1)).reshape(-1)
