"""Scales and shifts carried back, through pieces and changes of layout, into the linear maps that made what they scale.

    mul(split(concat(reshape(conv(x, w)), reshape(conv(y, v))))[0], s)    split(concat(reshape(conv(x, w')), ...))[0]
    mul(select(permute(reshape(linear(x, w, b))), 0), s)                  select(permute(reshape(linear(x, w', b'))), 0)
    mul(exp(split(conv(x, w, b))[1]), c)                                  exp(split(conv(x, w, b'))[1])

Boxes of detectors are decoded so, queries of fused projections scaled. A factor is laid out over all entries of what it
scales, and followed to the maps entry by entry; it goes into their weights where all places of a channel get the same
one. So a table that repeats a few numbers per anchor counts as these numbers, where its values are constants.

A positive factor behind an exponential is a shift before it: ``exp(x) * c = exp(x + ln c)``. Its argument is rounded
after the shift, so the result moves by up to ``|ln c|`` half units of rounding: c lies between e^-8 and e^8, and
half precision is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.ops.slice_bounds import bound
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.ir.sizes.expressions import same
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.affine_steps import PAIRS
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, itself, successor
from regauge.passes.simplify.laid_factors import MOST, Laid, known_size, regrouped_factor, rounds
from regauge.passes.simplify.layout import positive_dims
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import (
    MAPS,
    Factor,
    W,
    axes_of,
    bias_of,
    channel_axis,
    channels,
    old_bias,
    own_weight,
    placed_bias,
    rebuilt,
)
from regauge.passes.simplify.pieces import axis_of, offsets

LARGEST_LOG = 8.0  # of a factor behind an exponential
HOMOGENEOUS = ("relu", "leaky_relu")  # f(s x) = s f(x) for positive s
PIECES = ("split", "slice", "select")
REGROUPING = ("reshape", "squeeze", "unsqueeze")
PASSED = (*MAPS, *HOMOGENEOUS, *PIECES, *REGROUPING, "add", "concat", "permute", "exp")

# -- cuts --------------------------------------------------------------------------------------------------------------


def _cut(node: Node, index: int = 0) -> tuple[int, int, int]:
    """The axis a piece is cut from, and the places where it starts and ends."""
    base = node.inputs[0]
    assert isinstance(base, Value)
    axis = axis_of(node)
    size = known_size(base.shape[axis])
    if node.op == "split":
        places = offsets(node.attributes["sizes"])
        return axis, known_size(places[index]), known_size(places[index + 1])
    if node.op == "select":
        start = known_size(bound(node.attributes["index"], size))
        return axis, start, start + 1
    if node.attributes["step"] != 1:
        return refuse("it skips entries")
    start, end = (known_size(bound(node.attributes[name], size)) for name in ("start", "end"))
    return axis, start, max(start, min(end, size))


def _check_others(node: Node, axis: int, start: int, end: int) -> None:
    """Refuse where something else reads the entries of a piece of a value."""
    base = node.inputs[0]
    assert isinstance(base, Value)
    for reader, _ in base.uses:
        if reader is node:
            continue
        if reader.op not in ("slice", "select"):
            refuse(f"{reader.label} reads it too")
        other, low, high = _cut(reader)
        if other != axis or (low < end and start < high):
            refuse(f"{reader.label} reads it too")


# -- the way back ------------------------------------------------------------------------------------------------------


class _Way:
    """Follows a factor from a value to the maps that made it; what it finds there is built when all is well."""

    def __init__(self, build: Builder) -> None:
        self.build = build
        self.maps: dict[Node, Laid] = {}
        self.shifts: dict[Node, Laid] = {}  # additions of a weight of their own

    def back(self, value: Value, laid: Laid, *readers: Node) -> None:
        """Let what made a value, which only ``readers`` read, take a factor over; refuses where something cannot."""
        if not laid.scales and not laid.shifts:
            return
        node = value.producer
        if node is None or value in self.build.held or [user for user, _ in value.uses] != list(readers):
            refuse(f"{value.name} is read by others, or is no result")
        if is_fixed(node) or node.regions:
            refuse(f"{node.label} must stay")
        if node.op in MAPS:
            return self.take(node, laid)
        if node.op == "add":
            return self.added(node, laid)
        if node.op in HOMOGENEOUS and not laid.shifts and bool((laid.scale > 0).all()):
            return self.back(_moved(node), laid, node)
        if node.op == "concat":
            return self.joined(node, laid)
        if node.op in PIECES:
            return self.cut(node, value, laid)
        if node.op == "permute":
            order = positive_dims(node)
            inverse = [order.index(axis) for axis in range(len(order))]
            return self.back(_moved(node), laid.each(lambda t, _: t.permute(inverse)), node)
        if node.op in REGROUPING:
            x = _moved(node)
            return self.back(x, laid.each(lambda t, _: regrouped_factor(t, value.shape, x.shape)), node)
        refuse(f"{node.label} lies before it")

    def joined(self, node: Node, laid: Laid) -> None:
        axis = axis_of(node)
        wide = max(laid.scale.shape[axis], laid.shift.shape[axis]) > 1
        start = 0
        for _, operand in node.operands():
            size = known_size(operand.shape[axis]) if wide else 1

            def part(tensor: torch.Tensor, _: float, start: int = start, size: int = size) -> torch.Tensor:
                return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, start, size)

            self.back(operand, laid.each(part), node)
            start += size

    def cut(self, node: Node, value: Value, laid: Laid) -> None:
        axis, start, end = _cut(node, value.index)
        base = _moved(node)
        _check_others(node, axis, start, end)
        size = known_size(base.shape[axis])

        def spread(tensor: torch.Tensor, neutral: float) -> torch.Tensor:
            tensor = tensor.unsqueeze(axis) if node.op == "select" else tensor
            shape = [*tensor.shape]
            shape[axis] = size
            result = tensor.new_full(shape, neutral)
            result.narrow(axis, start, end - start).copy_(tensor)
            return result

        self.back(base, laid.each(spread), *(reader for reader, _ in base.uses))

    def added(self, node: Node, laid: Laid) -> None:
        """A factor of a sum with a weight of its own, as the bias of a matmul: the weight takes its share."""
        slots = [slot for slot, operand in enumerate(node.inputs) if isinstance(operand, Parameter)]
        if len(slots) != 1:
            refuse(f"{node.label} lies before it")
        bias, x = node.inputs[slots[0]], node.inputs[1 - slots[0]]
        assert isinstance(bias, Parameter)
        own = self.build.graph.parameters.get(bias.name) is bias
        if len(bias.uses) > 1 or not own or fixed(self.build, bias) is None or bias.dtype != node.output.dtype:
            refuse(f"{bias.name} has other readers, or is of another type")
        if not isinstance(x, Value) or x.rank != node.output.rank or not all(map(same, x.shape, node.output.shape)):
            refuse(f"{node.label} changes the shape")
        wide = (1,) * (node.output.rank - bias.rank) + tuple(bias.weight.shape)
        for part in (laid.scale, laid.shift):
            if any(size not in (1, own) for size, own in zip(part.shape, wide, strict=True)):
                refuse(f"{bias.name} is the same where its factor is not")
        if laid.shifts and (rounds(bias.tensor, bias.dtype) or rounds(laid.shift, bias.dtype)):
            refuse("so large a shift rounds what it is added to")
        if node in self.shifts:
            refuse(f"{node.label} would take two factors over")
        self.shifts[node] = laid
        return self.back(x, Laid(laid.scale, torch.zeros_like(laid.scale)), node)

    def take(self, node: Node, laid: Laid) -> None:
        """A map takes a factor over, which must be one number per channel."""
        own_weight(self.build, node)
        axis = channel_axis(node)
        channels(node)
        for part in (laid.scale, laid.shift):
            if any(size > 1 for place, size in enumerate(part.shape) if place != axis):
                refuse(f"its factor is not the same at all places of {node.label}")
        if laid.shifts and node.op == "matmul":
            refuse("a matmul has no bias")
        if node in self.maps:
            refuse(f"{node.label} would take two factors over")
        self.maps[node] = laid


def _moved(node: Node) -> Value:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return x


# -- what is carried ---------------------------------------------------------------------------------------------------


def carry_back(graph: Graph, limits: Limits) -> int:
    """Let linear maps take scales and shifts over that lie behind pieces and changes of layout; returns how many."""
    count, loaded = 0, "onnx" in graph.metadata
    owners = list(scopes(graph))
    for owner, build in owners:
        for node in list(owner.nodes):
            if node.op in (*PAIRS, "neg") and not is_fixed(node):
                build.held = set().union(*(held_values(scope) for scope, _ in owners))
                elsewhere = any(node.output in held_values(scope) for scope, _ in owners if scope is not owner)
                count += not elsewhere and _carry(owner, build, node, loaded)
    return count


def _carry(graph: Graph, build: Builder, node: Node, loaded: bool) -> bool:
    build.added, build.made, build.by = [], [], "carrying"
    try:
        value, inner, others = _moving(build, node)
        way = _Way(build)
        for laid in _steps(build, node, value, inner, others, loaded):
            way = _Way(build)
            way.back(inner, laid, node if inner is value or value.producer is None else value.producer)
        pairs = _place(build, way)
    except Refusal:
        build.take_back()
        return False
    _commit(graph, build, node, value, pairs)
    return True


def _moving(build: Builder, node: Node) -> tuple[Value, Value, list[Operand]]:
    """The operand that is carried over, what lies before its exponential where it is one, and the other operands."""
    slots = [slot for slot, operand in node.operands() if fixed(build, operand) is None]
    value = node.inputs[slots[0]] if len(slots) == 1 else None
    out = node.output
    if not isinstance(value, Value) or value.dtype != out.dtype or value.rank != out.rank:
        return refuse("it is no scale and no shift")
    real = isinstance(out.dtype, torch.dtype) and out.dtype.is_floating_point
    if not real or not all(map(same, value.shape, out.shape)):
        return refuse("it changes the shape, or is none of real numbers")
    if [user for user, _ in value.uses] != [node] or value in build.held:
        return refuse(f"{value.name} is read by others")
    others = [operand for slot, operand in enumerate(node.inputs) if slot != slots[0]]
    made = value.producer
    if made is None or is_fixed(made) or made.op not in PASSED:
        return refuse("nothing takes it over")
    if (
        made.op == "exp"
        and out.dtype in (torch.float32, torch.float64)
        and (node.op == "mul" or (node.op == "div" and slots == [0]))
    ):
        return value, _moved(made), others
    if node.op == "div" and (slots != [0] or node.attributes["rounding_mode"] is not None):
        return refuse("it is no scale")
    return value, value, others


def _steps(
    build: Builder, node: Node, value: Value, inner: Value, others: Sequence[Operand], loaded: bool
) -> Iterator[Laid]:
    """What is carried back; where its values may change by training, first random ones that must get there, too."""
    parts = [fixed(build, operand) for operand in others]
    sources = [source for part in parts if part is not None for source in part.sources]
    if sum(math.prod(source.weight.shape) for source in sources) > MOST:
        refuse("its factor is large")
    constant = loaded or all(source.kind == "constant" for source in sources)
    other = torch.ones((), dtype=torch.float64)
    if parts and parts[0] is not None:
        other = parts[0].function(*(source.tensor.double() for source in sources))
    other = other.reshape((1,) * (value.rank - other.dim()) + tuple(other.shape))
    through_exponential = inner is not value
    if not constant:
        if through_exponential:
            refuse("its sign may change by training")
        yield _laid(node, value, _probe(other))
    yield _logarithm(node, other) if through_exponential else _laid(node, value, other)


def _probe(like: torch.Tensor) -> torch.Tensor:
    """Values that have nothing in common: negative ones and positive ones, none equal, none zero."""
    place = torch.arange(1, like.numel() + 1, dtype=torch.float64)
    return (place * (-1) ** place).reshape(like.shape)


def _laid(node: Node, value: Value, other: torch.Tensor) -> Laid:
    one, zero = torch.ones((1,) * value.rank).double(), torch.zeros((1,) * value.rank).double()
    if node.op == "neg":
        return Laid(-one, zero)
    if node.op == "sub":
        first = node.inputs[0] is value
        return Laid(one, -other) if first else Laid(-one, other)
    if node.op == "add":
        return Laid(one, other)
    return Laid(other if node.op == "mul" else other.reciprocal(), zero)


def _logarithm(node: Node, other: torch.Tensor) -> Laid:
    if not bool((other > 0).all()) or not bool((other.log().abs() <= LARGEST_LOG).all()):
        return refuse("its factors are not all between e^-8 and e^8")
    shift = other.log() if node.op == "mul" else -other.log()
    return Laid(torch.ones((1,) * other.dim()).double(), shift)


# -- what is built -----------------------------------------------------------------------------------------------------


def _place(build: Builder, way: _Way) -> list[tuple[Node, Value]]:
    """New maps and sums beside the old ones, with the nodes they replace; refuses where a weight is not finite."""
    pairs = [(node, _new_sum(build, node, laid)) for node, laid in way.shifts.items()]
    pairs += [(node, _new_map(build, node, laid)) for node, laid in way.maps.items()]
    return pairs if pairs else refuse("it does nothing")


def _new_sum(build: Builder, node: Node, laid: Laid) -> Value:
    slot = next(slot for slot, operand in enumerate(node.inputs) if isinstance(operand, Parameter))
    bias = node.inputs[slot]
    assert isinstance(bias, Parameter)
    shape = tuple(bias.weight.shape)

    def along(tensor: torch.Tensor) -> Fixed:
        return Fixed((), lambda: tensor.reshape(tensor.shape[tensor.dim() - len(shape) :]))

    value = combined(lambda b, s, t: b * s + t, itself(bias), along(laid.scale), along(laid.shift))
    new = successor(build, bias, value, shape)
    with build.at(node):
        operands = (new if operand is bias else operand for operand in node.inputs)
        return build.add(*operands, name=node.name)  # type: ignore[no-any-return]


def _new_map(build: Builder, node: Node, laid: Laid) -> Value:
    axes, size = axes_of(node), channels(node)
    scale, shift = (Fixed((), lambda t=t: t.reshape(-1).expand(size)) for t in (laid.scale, laid.shift))
    weight = old = own_weight(build, node)
    if laid.scales:
        factors = Factor(scale, axes.results[0][channel_axis(node)]).along(axes.operands[W], "the output channels")
        weight = successor(build, old, combined(torch.mul, itself(old), factors))
    bias = bias_of(node)
    if laid.shifts or bias is not None:
        bias = placed_bias(build, node, combined(lambda b, s, t: b * s + t, old_bias(node), scale, shift))
    return rebuilt(build, node, weight, bias)


def _commit(graph: Graph, build: Builder, node: Node, value: Value, pairs: Sequence[tuple[Node, Value]]) -> None:
    for old, new in pairs:
        replaced, name = old.metadata.get("regauge.replaces") or old.name, old.name
        old_value = old.output
        replace_uses(graph, old_value, new)
        remove_node(graph, old)
        new.name = name
        assert new.producer is not None
        new.producer.metadata["regauge.replaces"] = f"{replaced}, {node.name}"
        value = new if value is old_value else value
    read = [operand for _, operand in node.operands() if isinstance(operand, Parameter)]
    result = node.output
    replace_uses(graph, result, value)
    remove_node(graph, node)
    if any(value is output for output in graph.outputs):
        value.name = result.name
    settle_successors(graph, build)
    for parameter in read:
        if not parameter.uses and parameter not in build.held and graph.parameters.get(parameter.name) is parameter:
            del graph.parameters[parameter.name]
            graph.version += 1
