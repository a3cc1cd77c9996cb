"""Heads of several feature maps as one: what is concatenated level by level for each of them is concatenated once.

    concat(f(x), f(y)), concat(g(x), g(y))      split(concat(fg(x), fg(y)))

One-stage detectors give every feature map a head of classes and one of boxes; of each head, the results of all maps are
brought into one layout and concatenated. Heads of one map that do alike become one, from the concatenation back as far
as they go: permutes and reshapes with the same effect, the same activations, linear maps that walk alike. Maps of one
value have their weights side by side; of maps of two values the weights become the blocks of a larger one with zeros
between, and depthwise convolutions of one value read it twice over (two filters per channel are far slower where a
runtime has kernels for one: measured). Channels are laid out so that the last reshape finds what belongs together side
by side.

Zeros cost MACs and bytes, and a value that is read twice over is copied. Prices are in MACs, as a core does them in
onnxruntime: ``NODE_MACS`` for a node (about six microseconds), ``COPY_MACS`` for a number that is copied, ``RUN_MACS``
for each short run of numbers that a concatenation along a late axis lays beside others. A level is joined where that
costs less than its heads and the concatenation of their results; if only without the copies, then its last maps are,
each with zeros for the outputs of the others, and summed; else the results are laid side by side. All levels together
add at most one part in ``MOST_ADDED`` to the MACs of the graph, and no more bytes than folding has freed.

Measured on the face detector of the benchmarks, in onnxruntime on one core: joined as a whole, the three small ones of
its four levels run in 38 us less of 237, and the large one, whose zeros are 1.4% of all MACs, in 68 us more of 128,
summed in 57; with all else that is saved the file takes 1.00 of the time that it took with 21 nodes more.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from regauge.ir.cost import figures, local_figures
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.ir.sizes.expressions import Size, product, same
from regauge.passes.simplify.fixed_values import Fixed, combined, itself, new_weight
from regauge.passes.simplify.kernels import Geometry, geometry, kernel_size
from regauge.passes.simplify.layout import dynamic_sizes, positive_dims
from regauge.passes.simplify.limits import Limits, held_values, scopes, total_bytes
from regauge.passes.simplify.linear_map import X, bias_of, channel_axis, channels, input_axis, own_weight
from regauge.passes.simplify.merges import POINTWISE, joint_name, wide_bias
from regauge.passes.simplify.pieces import axis_of

NODE_MACS = 1 << 18
COPY_MACS = 8
RUN_MACS = 128
MOST_ADDED = 32

HEADS = ("linear", "conv")
ON_THE_WAY = (*HEADS, *POINTWISE, "permute", "reshape")


def join_heads(graph: Graph, limits: Limits) -> int:
    """Concatenate what several heads make of the same feature maps once for all heads; returns how many nodes went."""
    owners, count = list(scopes(graph)), 0
    for owner, build in owners:
        build.by, build.held = "heads", set().union(*(held_values(scope) for scope, _ in owners))
        elsewhere = set().union(*(held_values(scope) for scope, _ in owners if scope is not owner))
        for concats in _families(owner, build):
            if not any(node.output in elsewhere for node in concats):
                most = figures(graph).macs // MOST_ADDED
                count += _Joining(owner, build, most, limits.bytes_before - total_bytes(graph)).join(concats)
    return count


# -- which concatenations belong together ------------------------------------------------------------------------------


def _families(graph: Graph, build: Builder) -> list[list[Node]]:
    """Concatenations of what the same operators make of the same values."""
    found: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "concat" and len(node.inputs) > 1 and not is_fixed(node):
            ways = tuple(_way(value, build) for _, value in node.operands())
            if all(ops for _, ops in ways):
                found.setdefault((axis_of(node), ways), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _way(value: Value, build: Builder) -> tuple[int, tuple[str, ...]]:
    """Where a value comes from that nothing else reads: the first value that others read too, and what lies between."""
    ops: list[str] = []
    while (node := value.producer) is not None and node.op in ON_THE_WAY:
        x = node.inputs[0]
        if len(value.uses) > 1 or value in build.held or not isinstance(x, Value):
            break
        ops.append(node.op)
        value = x
    return id(value), tuple(ops)


def _across(concats: Sequence[Node]) -> int:
    """The axis along which the results of several concatenations can be laid side by side."""
    first, along = concats[0].output, axis_of(concats[0])
    for node in concats:
        if node.output.rank != first.rank or node.output.dtype != first.dtype:
            return refuse("they have different ranks or types")
    shapes = [node.output.shape for node in concats]
    apart = [axis for axis in range(first.rank) if any(not same(shape[axis], first.shape[axis]) for shape in shapes)]
    if len(apart) > 1 or along in apart:
        return refuse("they have different shapes")
    others = [axis for axis in range(first.rank) if axis != along]
    return apart[0] if apart else others[-1] if others else refuse("they have one axis")


# -- one head of several -----------------------------------------------------------------------------------------------


class _Joining:
    """Builds one head in the place of several, which stay until it is known to pay."""

    def __init__(self, graph: Graph, build: Builder, macs: int, size: int) -> None:
        self.graph, self.build = graph, build
        self.macs, self.bytes = macs, size  # that may still be added
        self.gone: dict[Node, None] = {}
        self.summed, self.copied = False, 0
        build.added, build.made = [], []

    def join(self, concats: Sequence[Node]) -> int:
        """Join the heads that end in some concatenations; returns how many nodes went, zero where it does not pay."""
        build = self.build
        try:
            axis = _across(concats)
            levels = [self.level(values, axis) for values in zip(*(node.inputs for node in concats), strict=True)]
            sizes = tuple(_known(node.output.shape[axis]) for node in concats)
            with build.at(concats[0]):
                whole = build.concat(*levels, dim=axis_of(concats[0]))
                parts = build.split(whole, sizes=sizes, dim=axis)
            fewer = len(self.gone) + len(concats) - len(build.added)
            if fewer < 1:
                refuse("it does not pay")
        except Refusal:
            build.take_back()
            return 0
        self.commit(concats, parts)
        return fewer

    def level(self, values: Sequence[Value], axis: int) -> Value:
        """The results of several heads for one feature map side by side: by one head if that pays, else as they are."""
        for summed in (False, True):
            build, before = self.build, dict(self.gone)
            nodes, parameters = len(build.added), len(build.made)
            self.summed, self.copied = summed, 0
            try:
                result = self.joined(values, axis, 1)
                self.pay([node for node in self.gone if node not in before], build.added[nodes:], values, axis)
                return result
            except Refusal:
                build.take_back(nodes, parameters)
                self.gone = before
        return self.build.concat(*values, dim=axis)  # type: ignore[no-any-return]

    def pay(self, gone: Sequence[Node], added: Sequence[Node], values: Sequence[Value], axis: int) -> None:
        """Refuse where a level that is joined costs more than its heads and a concatenation of their results."""
        old, new = (local_figures(nodes, self.graph) for nodes in (gone, added))
        macs, size, fewer = new.macs - old.macs, new.bytes - old.bytes, len(gone) + 1 - len(added)
        runs = len(values) * _entries(values[0].shape[:axis])
        if macs + COPY_MACS * self.copied > fewer * NODE_MACS + RUN_MACS * runs:
            refuse("it would cost more than the nodes")
        if macs > self.macs or size > self.bytes:
            refuse("the zeros would be too many")
        self.macs, self.bytes = self.macs - macs, self.bytes - size

    def joined(self, values: Sequence[Value], axis: int, blocks: int) -> Value:
        """Values side by side along an axis, block by block: each of the blocks of one beside those of the others."""
        nodes = [self.only_read(value) for value in values]
        first = nodes[0]
        for node in nodes:
            x, same_kind = node.output, node.op == first.op and node.output.dtype == first.output.dtype
            if not same_kind or x.rank != first.output.rank or _known(x.shape[axis]) % blocks:
                return refuse("they do different things")
            if not all(same(a, b) for i, (a, b) in enumerate(zip(x.shape, values[0].shape, strict=True)) if i != axis):
                return refuse("they have different shapes")
        with self.build.at(first):
            result = self.step(nodes, axis, blocks)
        self.gone.update(dict.fromkeys(nodes))
        return result

    def only_read(self, value: Value) -> Node:
        node = value.producer
        if node is None or is_fixed(node) or len(value.uses) > 1 or value in self.build.held or node in self.gone:
            return refuse(f"{value.name} is read by others, or must stay")
        return node

    def step(self, nodes: Sequence[Node], axis: int, blocks: int) -> Value:
        first = nodes[0]
        if first.op in HEADS:
            return self.maps(nodes, axis, blocks)
        if first.op == "reshape":
            return self.reshape(nodes, axis, blocks)
        if first.op != "permute" and first.op not in POINTWISE:
            return refuse(f"{first.label} cannot be done once for all")
        if any(node.attributes != first.attributes or len(node.inputs) > 1 for node in nodes):
            return refuse("they do the same in different ways")
        inner = positive_dims(first)[axis] if first.op == "permute" else axis
        x = self.joined([_moved(node) for node in nodes], inner, blocks)
        return self.build(first.op, x, **first.attributes)  # type: ignore[no-any-return]

    def reshape(self, nodes: Sequence[Node], axis: int, blocks: int) -> Value:
        """The axis is one of the operands, or a part of one: there are then as many more blocks as it goes into it."""
        shape = list(nodes[0].output.shape)
        behind = product(shape[axis + 1 :])
        given = _moved(nodes[0]).shape
        places = [i for i, size in enumerate(given) if same(product(given[i + 1 :]), behind) and not same(size, 1)]
        if not places:
            return refuse("it cuts across the axis")
        place, ratios = places[0], set()
        for node in nodes:
            x = _moved(node)
            before, after = _known(x.shape[place] if place < x.rank else 1), _known(node.output.shape[axis])
            ratios.add(before // after if after and before % after == 0 else 0)
        ratio = ratios.pop()
        if ratios or not ratio:
            return refuse("it cuts across the axis")
        x = self.joined([_moved(node) for node in nodes], place, blocks * ratio)
        shape[axis] = sum(_known(node.output.shape[axis]) for node in nodes)
        if dynamic_sizes(shape) > 1:
            return refuse("a reshape would need several dynamic sizes")
        return self.build.reshape(x, shape=tuple(shape))  # type: ignore[no-any-return]

    # -- maps ----------------------------------------------------------------------------------------------------------

    def maps(self, nodes: Sequence[Node], axis: int, blocks: int) -> Value:
        first, attributes = nodes[0], dict(nodes[0].attributes)
        own = [own_weight(self.build, node) for node in nodes]
        if axis != channel_axis(first) or len({weight.dtype for weight in own}) > 1:
            return refuse("their channels lie elsewhere, or their weights have different types")
        deep = [_is_depthwise(node) for node in nodes]
        if len({_walk(node) for node in nodes}) > 1:
            return refuse("they walk differently")
        if not all(deep) and (any(deep) or attributes.get("groups", 1) != 1):
            return refuse("their channels are in groups")
        values, along = [_moved(node) for node in nodes], input_axis(first)
        parts = [itself(weight) for weight in own]
        if all(deep):
            x = self.repeated(values, along, blocks)
            attributes["groups"] = sum(node.attributes["groups"] for node in nodes)
        elif all(value is values[0] for value in values):
            x = values[0]
        elif self.summed:
            return self.sum(nodes, own, blocks, attributes)
        else:
            x = self.joined(values, along, 1)
            parts = _spread(parts, [weight.weight.shape[1] for weight in own])
        return self.placed(nodes, own, parts, x, blocks, attributes)

    def repeated(self, values: Sequence[Value], along: int, blocks: int) -> Value:
        """What depthwise convolutions read: their operands side by side, or the one they all read, once for each."""
        if any(value is not values[0] for value in values):
            return self.joined(values, along, blocks)
        if blocks > 1:
            return refuse("its channels would have to change places")
        self.copied += sum(_entries(value.shape) for value in values)
        return self.build.concat(*values, dim=along)  # type: ignore[no-any-return]

    def sum(self, nodes: Sequence[Node], own: Sequence[Parameter], blocks: int, attributes: dict[str, Any]) -> Value:
        """Maps of different values, each with zeros where the channels of the others lie, and their sum."""
        total: Value | None = None
        for place, node in enumerate(nodes):
            counts = [channels(other) if other is not node else None for other in nodes]
            parts = [itself(own[place]) if n is None else _empty(own[place], n) for n in counts]
            result = self.placed(nodes, [own[place]], parts, _moved(node), blocks, attributes, biased=not place)
            total = result if total is None else self.build.add(total, result)
        assert total is not None
        return total

    def placed(
        self,
        nodes: Sequence[Node],
        own: Sequence[Parameter],
        parts: Sequence[Fixed],
        x: Value,
        blocks: int,
        attributes: dict[str, Any],
        biased: bool = True,
    ) -> Value:
        """The map of ``x`` whose weights are these, laid out in blocks along the output channels."""
        count = sum(channels(node) for node in nodes)
        inputs = _known(x.shape[input_axis(nodes[0])])
        shape = (count, inputs // attributes.get("groups", 1), *own[0].weight.shape[2:])

        def laid(*tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([t.reshape(blocks, -1, *t.shape[1:]) for t in tensors], 1).flatten(0, 1)

        weight = new_weight(self.build, joint_name(own, "weight"), own[0], combined(laid, *parts), shape)
        bias = None
        if biased and any(bias_of(node) is not None for node in nodes):
            vectors = [wide_bias(node) for node in nodes]
            bias = new_weight(self.build, joint_name(own, "bias"), own[0], combined(laid, *vectors), (count,))
        return self.build(nodes[0].op, x, weight, bias, **attributes)  # type: ignore[no-any-return]

    # -- in their place ------------------------------------------------------------------------------------------------

    def commit(self, concats: Sequence[Node], parts: Sequence[Value]) -> None:
        names = [node.name for node in concats]
        doomed = [*concats, *reversed(self.gone)]
        replaced = ", ".join(node.metadata.get("regauge.replaces") or node.name for node in (*self.gone, *concats))
        for node in self.build.added:
            node.metadata["regauge.replaces"] = replaced
        read = dict.fromkeys(value for node in doomed for _, value in node.operands() if isinstance(value, Parameter))
        for node, part in zip(concats, parts, strict=True):
            replace_uses(self.graph, node.output, part)
        waiting = dict.fromkeys(doomed)
        while waiting:
            for node in [node for node in waiting if not node.output.uses]:
                remove_node(self.graph, node)
                del waiting[node]
        for name, part in zip(names, parts, strict=True):
            part.name = name
        for parameter in read:
            if not parameter.uses and self.graph.parameters.get(parameter.name) is parameter:
                del self.graph.parameters[parameter.name]
                self.graph.version += 1


def _moved(node: Node) -> Value:
    x = node.inputs[X]
    assert isinstance(x, Value)
    return x


def _entries(shape: Sequence[Size]) -> int:
    """How many entries there are, of dynamic sizes one each."""
    return int(product(size for size in shape if isinstance(size, int)))


def _empty(like: Parameter, count: int) -> Fixed:
    return combined(lambda t: t.new_zeros(count, *t.shape[1:]), itself(like))


def _known(size: Size) -> int:
    return size if isinstance(size, int) else refuse("a size is dynamic")


def _walk(node: Node) -> tuple[tuple[int, ...], Geometry] | None:
    """The size of the kernel and how it walks, whatever the number of depthwise channels; None of a linear layer."""
    if node.op != "conv":
        return None
    walk = geometry(node)
    return kernel_size(node), replace(walk, groups=1) if _is_depthwise(node) else walk


def _is_depthwise(node: Node) -> bool:
    weight = node.inputs[1]
    assert isinstance(weight, Value)
    groups = node.attributes.get("groups", 1)
    return groups > 1 and same(weight.shape[1], 1) and same(weight.shape[0], groups)


def _spread(parts: Sequence[Fixed], inputs: Sequence[int]) -> list[Fixed]:
    """Weights ``o i k...`` with zeros where the inputs of the others lie."""

    def padded(place: int) -> Fixed:
        before, after = sum(inputs[:place]), sum(inputs[place + 1 :])

        def pad(tensor: torch.Tensor) -> torch.Tensor:
            start, end = (tensor.new_zeros(tensor.shape[0], n, *tensor.shape[2:]) for n in (before, after))
            return torch.cat([start, tensor, end], 1)

        return combined(pad, parts[place])

    return [padded(place) for place in range(len(parts))]
