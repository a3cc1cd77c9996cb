"""Moving range from activations to weights, exactly: (x - c) / s and W s with bias b + W c give what x, W and b gave.

The scales are those of SmoothQuant (Xiao et al. 2023), the shift is that of Outlier Suppression+ (Wei et al. 2023):
half way between the ends of each channel. Rounding with step d leaves d^2 / 12, so of a layer y = x W' the error is

    d_x^2 / 12  sum_j s_j^2 |w_j|^2   +   sum_o d_o^2 / 12  sum_j E[x_j^2] / s_j^2

for each row, with d_x the step of x / s, and d_o that of row o of W s. SmoothQuant takes max|x_j|^a / max|w_j|^(1-a),
with one exponent a for all; here s starts there, with the best of a few, and follows the gradient of this error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.edit import Builder, set_input, set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Range, Spread
from regauge.passes.quantization.grid import Grid

EXPONENTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STEPS, _RATE = 60, 0.06  # of the descent, in logarithms of scales
_WORTH_A_NODE = 0.7  # of the error that is left: a multiplication more is worth it
_WORTH_A_SHIFT = 0.85  # and so an addition


@dataclass
class Readers:
    """A value, the layers that read it, and what its channels are like on data.

    ``beside`` are depthwise convolutions: whatever scale a channel has, its weights have as many steps.
    """

    value: Value
    layers: list[Layer]
    range: Range
    spread: Spread
    beside: list[Layer] = field(default_factory=list)
    chained: bool = False  # the value comes as integers: no node may stand in front of the layers

    @property
    def clamp(self) -> Node | None:
        """The ReLU that gives the value: scales go through it to the layer in front, a shift does not."""
        producer = self.value.producer
        return producer if producer is not None and producer.op == "relu" else None


@dataclass
class Smoothing:
    """Scales and shift [channels] of a value, and the expected error as a share of that without them."""

    scale: torch.Tensor
    shift: torch.Tensor
    share: float


def smoothing_of(readers: Readers, activations: Grid, weights: Grid, exponent: float | None = None) -> Smoothing:
    """The best scales, or those of an ``exponent`` without a shift."""
    parts = [_by_channel(layer) for layer in readers.layers]
    beside = sum((_rows_by_channel(layer) for layer in readers.beside), torch.zeros(len(readers.range.lowest)))
    low, high, spread = readers.range.lowest, readers.range.highest, readers.spread
    plain = _Error(low, high, spread.mean_square, parts, beside, activations, weights)
    ones, zeros = torch.ones_like(low), torch.zeros_like(low)
    base = max(float(plain(ones)), 1e-300)
    if exponent is not None:
        scale = plain.by_exponent(exponent)
        return Smoothing(scale, zeros, float(plain(scale)) / base)
    found = Smoothing(scale := plain.least(), zeros, float(plain(scale)) / base)
    flat = all(layer.bias is not None and layer.node.op != "conv" for layer in readers.layers)
    if readers.clamp is None and flat and not readers.beside:  # what is padded with zeros cannot be shifted
        middle = (low + high) / 2
        squares = spread.variance + (spread.mean - middle).square()
        shifted = _Error(low - middle, high - middle, squares, parts, beside, activations, weights)
        scale = shifted.least()
        share = float(shifted(scale)) / base
        if share < _WORTH_A_SHIFT * found.share:
            return Smoothing(scale, middle, share)
    return found


def _by_channel(layer: Layer) -> torch.Tensor:
    """Magnitudes of a weight, [outputs, channels, taps]."""
    matrix = layer.matrix(layer.weight.tensor.detach()).abs().float()
    return matrix.reshape(len(matrix), -1, layer.taps)


def _rows_by_channel(layer: Layer) -> torch.Tensor:
    """Of a depthwise convolution the squares of each channel's weights."""
    return layer.weight.tensor.detach().float().flatten(1).square().sum(1)


@dataclass
class _Error:
    """The expected error of the layers as a function of the scales; see the module docstring."""

    low: torch.Tensor
    high: torch.Tensor
    squares: torch.Tensor
    parts: Sequence[torch.Tensor]  # magnitudes of weights, [outputs, channels, taps]
    beside: torch.Tensor  # squares of the weights of depthwise readers, [channels]
    activations: Grid
    weights: Grid

    def __call__(self, s: torch.Tensor) -> torch.Tensor:
        step, _ = self.activations.span((self.low / s).amin(), (self.high / s).amax())
        error = step.square() * (s.square() * self.beside).sum()
        for part in self.parts:
            steps = ((part * s[:, None]).flatten(1).amax(1) / self.weights.high).square().sum()
            error = error + step.square() * (s.square() * part.square().sum((0, 2))).sum()
            error = error + steps * part.shape[2] * (self.squares / s.square()).sum()
        return error / 12

    def by_exponent(self, exponent: float) -> torch.Tensor:
        reach = torch.maximum(-self.low, self.high).clamp(min=1e-5)
        found = [part.amax((0, 2)) for part in self.parts] or [torch.ones_like(reach)]
        greatest = torch.stack(found).amax(0).clamp(min=1e-5)
        s = reach.pow(exponent) / greatest.pow(1 - exponent)
        return s / s.log().mean().exp()

    def least(self) -> torch.Tensor:
        starts = [torch.ones_like(self.low), *map(self.by_exponent, EXPONENTS)]
        best = min(starts, key=lambda s: float(self(s)))
        least = float(self(best))
        logarithm = best.log().requires_grad_(True)
        optimiser = torch.optim.Adam([logarithm], lr=_RATE)
        for _ in range(_STEPS):
            optimiser.zero_grad()
            with torch.enable_grad():
                error = self(logarithm.exp())
            if error.item() < least:
                best, least = logarithm.detach().exp(), error.item()
            error.log().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return best


def smooth(graph: Graph, readers: Readers, found: Smoothing, *, by: str) -> bool:
    """Let the value be smoothed for its layers; False where that is not worth a node. The function stays the same."""
    takers = _takers(graph, readers)
    flat = all(layer.node.op != "conv" for layer in [*readers.layers, *readers.beside])
    if not takers and (found.share > _WORTH_A_NODE or readers.chained or readers.clamp is not None or not flat):
        return False  # kernels on integers clamp by rounding: nothing may stand between
    shifts = bool(found.shift.any())
    for layer in readers.layers:
        weight = layer.matrix(layer.weight.tensor.detach()).double()
        columns = found.scale.repeat_interleave(layer.taps)
        set_weight(graph, layer.weight, layer.stored(weight * columns), by=by)
        if shifts and layer.bias is not None:
            bias = layer.bias.tensor.detach()
            set_weight(graph, layer.bias, (bias.double() + weight @ found.shift).to(bias.dtype), by=by)
    for layer in readers.beside:
        data = layer.weight.tensor.detach()
        wider = data.double() * found.scale.reshape(-1, *(1 for _ in data.shape[1:]))
        set_weight(graph, layer.weight, wider.to(data.dtype), by=by)
    if takers:
        for place, parameter in enumerate(takers):
            data = parameter.tensor.detach()
            moved = data.double() - found.shift if shifts and place == 1 else data.double()
            moved = moved / found.scale.reshape(-1, *(1 for _ in data.shape[1:]))
            set_weight(graph, parameter, moved.to(data.dtype), by=by)
        return True
    _insert(graph, readers, found, by)
    return True


def _insert(graph: Graph, readers: Readers, found: Smoothing, by: str) -> None:
    """Nodes that smooth the value, in front of the layers."""
    value = readers.value
    build = Builder(graph, by=by)
    with build.at(value.producer or readers.layers[0].node):
        factor = build.parameter(build.unique(f"{value.name}_smoothing"), (1 / found.scale).float(), kind="buffer")
        product = build.mul(value, factor, name=f"{value.name}_smoothed")
        if bool(found.shift.any()):
            amount = (-found.shift / found.scale).float()
            shift = build.parameter(build.unique(f"{value.name}_shift"), amount, kind="buffer")
            product = build.add(product, shift, name=f"{value.name}_shifted")
    for layer in readers.layers:
        set_input(layer.node, 0, product, graph)


def _takers(graph: Graph, readers: Readers) -> list[Parameter]:
    """The parameters of what makes the value that can take scales and shift in, those of the shift last: of a norm, or
    of a layer, behind which a ReLU may stand. None where others read the value, or these parameters."""
    value, producer = readers.value, readers.value.producer
    nodes = {layer.node for layer in [*readers.layers, *readers.beside]}
    if readers.clamp is not None and not _read_elsewhere(graph, value, nodes):
        nodes, value = {readers.clamp}, readers.clamp.inputs[0]  # type: ignore[assignment]
        producer = value.producer
    if producer is None or _read_elsewhere(graph, value, nodes):
        return []
    if producer.op == "add":
        return _affine(graph, producer)
    if producer.op not in ("layer_norm", "linear", "conv"):
        return []
    found = producer.inputs[1:3]
    if len(found) < 2 or not all(_is_own(parameter, producer) for parameter in found):
        return []
    return [parameter for parameter in found if isinstance(parameter, Parameter)]


def _affine(graph: Graph, shifted: Node) -> list[Parameter]:
    """Gain and shift of x * gain + shift, where each is a vector over the last axis that nothing else reads."""
    shift, product = _split(shifted)
    scaled = product.producer if product is not None else None
    if shift is None or product is None or scaled is None or scaled.op != "mul":
        return []
    gain, x = _split(scaled)
    alone = x is not None and x.shape == product.shape and not _read_elsewhere(graph, product, {shifted})
    return [gain, shift] if gain is not None and alone else []


def _split(node: Node) -> tuple[Parameter | None, Value | None]:
    """The vector of its own that a node reads, and its other operand."""
    for own, other in (node.inputs[:2], node.inputs[1::-1]):
        if isinstance(own, Parameter) and own.rank == 1 and _is_own(own, node) and isinstance(other, Value):
            return own, other
    return None, None


def _read_elsewhere(graph: Graph, value: Value, nodes: set[Node]) -> bool:
    return any(node not in nodes for node in value.consumers()) or value in graph.outputs


def _is_own(parameter: object, node: Node) -> bool:
    return isinstance(parameter, Parameter) and list(parameter.uses) == [(node, node.inputs.index(parameter))]
