"""Projections of attention heads: several of one value are one, and heads are told apart once they are laid out.

    permute(reshape(linear(x, wq))), ... wk, ... wv      split(permute(reshape(linear(x, [wq wk wv]))))
    permute(reshape(matmul(x, wq') + bq)), ...           split(permute(reshape(linear(x, [wq wk wv], [bq bk bv]))))
    permute(reshape(part)), ... of split(x)              split(permute(reshape(x)))

In ONNX files only, whose runtimes pay for each node. A split copies what it gives, which torch's does not, so that
projections stay apart where more is copied than the nodes are worth. Where the axes of a part
come in another order, as those of keys, it is permuted once more; onnxruntime then moves the first permute behind the
split and joins the two, so that what is saved there are the products and the reshapes.

Queries, keys and values share the axis of their features afterwards: leave the step out before passes that cut them
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.ir.sizes.expressions import Size, product, same
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.fixed_values import Fixed, combined, itself, new_weight
from regauge.passes.simplify.heads import NODE_MACS
from regauge.passes.simplify.kernels import kernel
from regauge.passes.simplify.layout import permuted, positive_dims
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import W, X, bias_of, channels, old_bias, own_weight
from regauge.passes.simplify.merges import joint_name, stacked
from regauge.passes.simplify.pieces import axis_of

COPY_MACS = 64  # for each entry that a split copies out of rows, and that a permute then finds apart, as was measured


def join_projections(graph: Graph, limits: Limits) -> int:
    """Make one projection of several of a value, and tell heads apart once they are laid out; how many nodes went."""
    if "onnx" not in graph.metadata:
        return 0
    owners, count = list(scopes(graph)), 0
    held = set().union(*(held_values(owner) for owner, _ in owners))
    for owner, build in owners:
        build.by, build.held, before = "projections", held, len(owner)
        for maps, layout in _siblings(owner, build):
            _join(owner, build, maps, layout)
        for node in list(owner.nodes):
            if node.op == "split" and axis_of(node) == node.outputs[0].rank - 1 and not _stays(node):
                _move(owner, build, node)
        count += before - len(owner)
    return count


@dataclass(frozen=True)
class _Layout:
    """How several values are laid out as heads: by a reshape and a permute of each."""

    lead: tuple[Size, ...]  # the axes before those of heads and of features
    heads: tuple[int, ...]  # of each value
    width: int  # of one head
    reshapes: list[Node]
    permutes: list[Node]

    @property
    def usual(self) -> Node:
        """A permute of the order that most have, features last where as many have others."""
        count = Counter(map(positive_dims, self.permutes))
        last = len(self.lead) + 1
        return max(self.permutes, key=lambda node: (count[positive_dims(node)], positive_dims(node)[-1] == last))

    @property
    def fewer(self) -> int:
        """How many reshapes and permutes go where they are done once."""
        dims = positive_dims(self.usual)
        return 2 * len(self.permutes) - 2 - sum(positive_dims(node) != dims for node in self.permutes)


def _layout(values: Sequence[Value], build: Builder) -> _Layout | None:
    """How values are laid out as heads that could as well be laid out together; None where they are not."""
    reshapes = [_reader(value, "reshape", build) for value in values]
    permutes = [None if node is None else _reader(node.output, "permute", build) for node in reshapes]
    shapes = [node.output.shape for node in reshapes if node is not None]
    if None in permutes or any(len(shape) < 3 or shape[:-2] != shapes[0][:-2] for shape in shapes):
        return None
    widths = {shape[-1] for shape in shapes}
    heads = [shape[-2] for shape in shapes if isinstance(shape[-2], int)]
    fit = all(same(shape[-1] * shape[-2], value.shape[-1]) for shape, value in zip(shapes, values, strict=True))
    if len(widths) > 1 or len(heads) < len(values) or not fit:
        return None
    found = _Layout(shapes[0][:-2], tuple(heads), widths.pop(), [*filter(None, reshapes)], [*filter(None, permutes)])
    return found if found.fewer > 0 else None


def _reader(value: Value, op: str, build: Builder) -> Node | None:
    """The only reader of a value, where it is of this kind and may be another one."""
    readers = [node for node, _ in value.uses]
    alone = len(readers) == 1 and value not in build.held and readers[0].op == op
    return readers[0] if alone and not _stays(readers[0]) and readers[0].output not in build.held else None


def _stays(node: Node) -> bool:
    return bool(is_fixed(node)) or is_part(node)


# -- the rewriting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Map:
    """A linear map, and the sum behind a product that is its bias."""

    node: Node
    sum: Node | None = None

    @property
    def output(self) -> Value:
        return (self.sum or self.node).output

    def bias(self) -> Fixed:
        """A number for each channel; zeros where there is none."""
        size, found = channels(self.node), old_bias(self.node)
        if self.sum is not None:
            (found,) = (itself(operand) for operand in self.sum.inputs if isinstance(operand, Parameter))
        return combined(lambda tensor: tensor.expand(size), found)


def _map(node: Node, build: Builder) -> _Map | None:
    """The map that a node is, with its bias; None where it is none that could be told from others by its weight."""
    if _stays(node) or node.op not in ("linear", "matmul") or node.inputs[W].rank != 2:  # type: ignore[union-attr]
        return None
    add = _reader(node.output, "add", build) if node.op == "matmul" else None
    if add is None:
        return _Map(node)
    (other,) = (operand for operand in add.inputs if operand is not node.output)
    own = isinstance(other, Parameter) and other.stored and len(other.uses) == 1 and other.shape == (channels(node),)
    return _Map(node, add) if own and add.output.shape == node.output.shape else None


def _siblings(graph: Graph, build: Builder) -> Iterator[tuple[list[_Map], _Layout]]:
    """Linear maps of one value whose results are laid out as heads, and how."""
    for value in list(graph.values()):
        maps = [_map(node, build) for node, slot in value.uses if slot == X and not isinstance(value, Parameter)]
        found = [one for one in maps if one is not None and _reader(one.output, "reshape", build)]
        layout = _layout([one.output for one in found], build) if len(found) > 1 else None
        if layout is not None and _pays([one.node for one in found], layout):
            yield found, layout


def _pays(nodes: Sequence[Node], layout: _Layout) -> bool:
    """Whether the nodes that go, one for each map but the first, and a split that comes, are worth the copies."""
    copied = product(size for node in nodes[:1] for size in node.output.shape[:-1]) * sum(map(channels, nodes))
    fewer = len(nodes) - 2 + layout.fewer
    return isinstance(copied, int) and COPY_MACS * copied <= fewer * NODE_MACS


def _join(graph: Graph, build: Builder, maps: Sequence[_Map], layout: _Layout) -> None:
    """Put one projection in the place of several."""
    build.added, build.made = [], []
    try:
        weight, bias = _stacked(build, maps)
    except Refusal:
        build.take_back()
        return
    first = maps[0].node
    build.scope, build.source = first.scope, first.source
    whole = build.linear(first.inputs[X], weight, bias)
    _lay_out(graph, build, whole, layout, None)
    for one in maps:
        for node in filter(None, (one.sum, one.node)):
            remove_node(graph, node)
    settle_successors(graph, build)


def _stacked(build: Builder, maps: Sequence[_Map]) -> tuple[Parameter, Parameter | None]:
    """Their weights one below another, and their biases; refuses where a weight is not a map's own."""
    nodes = [one.node for one in maps]
    if all(node.op == "linear" for node in nodes):
        return stacked(build, nodes, 0)
    own = [own_weight(build, node) for node in nodes]
    if len({weight.dtype for weight in own}) > 1:
        return refuse("their weights have different types")
    outputs, inputs = sum(map(channels, nodes)), int(maps[0].node.inputs[X].shape[-1])  # type: ignore
    joined = combined(lambda *tensors: torch.cat(tensors), *(kernel(build, node) for node in nodes))
    weight = new_weight(build, joint_name(own, "weight"), own[0], joined, (outputs, inputs))
    if all(one.sum is None and bias_of(one.node) is None for one in maps):
        return weight, None
    vector = combined(lambda *tensors: torch.cat(tensors), *(one.bias() for one in maps))
    return weight, new_weight(build, joint_name(own, "bias"), own[0], vector, (outputs,))


def _move(graph: Graph, build: Builder, node: Node) -> None:
    """Lay out what is split before it is split."""
    layout = _layout(node.outputs, build)
    whole = node.inputs[0]
    if layout is not None and isinstance(whole, Value):
        _lay_out(graph, build, whole, layout, node)
        remove_node(graph, node)


def _lay_out(graph: Graph, build: Builder, whole: Value, layout: _Layout, split: Node | None) -> None:
    """Put the heads of what lies side by side in ``whole`` in the place of those that were laid out one by one."""
    usual, axis = layout.usual, len(layout.lead)
    dims = positive_dims(usual)
    with build.at(layout.reshapes[0]):
        shaped = build.reshape(whole, shape=(*layout.lead, sum(layout.heads), layout.width))
    with build.at(usual):
        turned = build.permute(shaped, dims=dims)
    with build.at(split or usual):
        build.origin = None if split is None else split.origin
        parts = build.split(turned, sizes=layout.heads, dim=dims.index(axis))
    for part, reshape, permute in zip(parts, layout.reshapes, layout.permutes, strict=True):
        with build.at(permute):
            new = permuted(build, part, [dims.index(dim) for dim in positive_dims(permute)])
        made = new.producer
        assert made is not None
        made.metadata["regauge.replaces"] = permute.metadata.get("regauge.replaces") or permute.name
        replace_uses(graph, permute.output, new)
        remove_node(graph, permute)
        remove_node(graph, reshape)
        new.name = permute.name
