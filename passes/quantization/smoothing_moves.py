"""Where scales and shifts of a value go: into the parameters of its frame, into what makes it, or into new nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder, set_input, set_weight
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame, find_frames, frames_at
from regauge.ir.gauge.insertion import entries, rescale
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.statistics import Range, Spread, Statistics
from regauge.passes.quantization.placement import readers_in
from regauge.passes.quantization.smoothing import Readers, Room, Smoothing

Choice = Callable[[Readers, Room | None], Smoothing]

_WORTH_A_NODE = 0.7  # of the error that is left: a multiplication more is worth it


def smooth_all(graph: Graph, found: Sequence[Readers], choose: Choice, *, nodes: bool, by: str) -> int:
    """Smooth values in place, each as ``choose`` says; returns how many. ``nodes`` says if some may be added.

    Frames come first: their writers are layers, whose rows others look at.
    """
    frames = [frame for frame in find_frames(graph) if Gauge.SCALE in frame.gauge]
    scales: dict[Frame, torch.Tensor] = {}
    others, count = [], 0
    for readers in found:
        room = None if readers.in_space or _takers(graph, readers) else room_of(graph, frames, readers)
        if room is None:
            others.append(readers)
            continue
        best = choose(readers, room)
        if best.share < 1:
            count += 1
            for frame, index, side in room.moves:
                own = scales.setdefault(frame, torch.ones(frame.shape, dtype=torch.float64)).reshape(-1)
                has = index >= 0
                own[index[has]] = best.scale.double()[has] ** -side
    if scales:
        rescale(graph, scales, by=by)
    for readers in others:
        if nodes or _takers(graph, readers):
            best = choose(readers, None)
            count += best.share < 1 and smooth(graph, readers, best, by=by)
    return count


def linear_misfit(layer: Layer) -> str | None:
    """Why a layer's inputs are not told apart by channel; None where they are."""
    return "a convolution: equalize scales its channels" if layer.node.op == "conv" else None


def readers_of(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], chained: Collection[Value] = ()
) -> list[Readers]:
    """The values that layers read, with what these are like on data; ``chained`` ones come as integers."""
    statistics = Statistics(graph)
    found = []
    for value in dict.fromkeys(x for layer in layers if isinstance(x := layer.node.inputs[0], Value)):
        own, beside = readers_in(value, layers)
        if own or beside:
            axis = 1 if (own or beside)[0].node.op == "conv" else -1
            ranges = statistics.register(value, Range(axis)), statistics.register(value, Spread(axis))
            found.append(Readers(value, own, *ranges, beside, value in chained))
    if found:
        statistics.collect(batches)
    return found


def room_of(graph: Graph, frames: Sequence[Frame], readers: Readers) -> Room | None:
    """The scales that frames allow the channels of a value; None where they allow none.

    Where several frames run along the axis, a channel has the scale of the one with the most, as a head size within
    heads has more than the heads. Nothing else that is rounded may lie in them: what suits one value of a stream would
    ruin the others.
    """
    found = []
    nodes = {layer.node for layer in readers.layers}
    free = [frame for frame in frames if not _is_read_by_others(frame, nodes)]
    for frame, place, side in frames_at(free, readers.value, -1):
        index = torch.from_numpy(entries(graph, frame, place))
        if index.numel() == index.shape[-1]:
            found.append((frame, index.reshape(-1), side))
    if not found:
        return None
    numbers = torch.full((len(found[0][1]),), -1)
    moves, count = [], 0
    for frame, index, side in sorted(found, key=lambda move: -int(torch.Size(move[0].shape).numel())):
        own = torch.where(numbers < 0, index, -1)
        if not bool((own >= 0).any()):
            continue
        moves.append((frame, own, side))
        numbers = torch.where(own >= 0, own + count, numbers)
        count += int(torch.Size(frame.shape).numel())
    return Room(numbers, count, moves)


def _is_read_by_others(frame: Frame, nodes: Collection[Node]) -> bool:
    """Whether layers other than these read a value of a frame."""
    values = {place[0] for place in (*frame.values, *frame.opposite)}
    users = (use for value in values for use in value.uses)
    return any(slot == 0 and node not in nodes and layer_of(node, blocks=True, shared=True) for node, slot in users)


def smooth(graph: Graph, readers: Readers, found: Smoothing, *, by: str) -> bool:
    """Let the value be smoothed for its layers; False where that is not worth a node. The function stays the same."""
    takers = _takers(graph, readers)
    bound = readers.chained or readers.in_space or readers.clamp is not None
    if not takers and (bound or found.share > _WORTH_A_NODE):
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
