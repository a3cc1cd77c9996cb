"""Projections of attention heads: several of one value are one, and heads are told apart once they are laid out.

    permute(reshape(linear(x, wq))), ... wk, ... wv      split(permute(reshape(linear(x, [wq wk wv]))))
    permute(reshape(matmul(x, wq') + bq)), ...           split(permute(reshape(linear(x, [wq wk wv], [bq bk bv]))))
    permute(reshape(part)), ... of split(x)              split(permute(reshape(x)))
    split(permute(reshape(linear(x, [wq wk wv]))))       permute(reshape(linear(x, wq))), ...

In ONNX files only, whose runtimes pay for each node. A split copies what it gives, which torch's does not, so that
projections stay apart, or are taken apart, where more is copied than the nodes are worth. Where the axes of a part
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
from regauge.passes.simplify.pieces import axis_of, offsets

COPY_MACS = 64  # for each entry that a split copies out of rows, and that a permute then finds apart, as was measured


def join_projections(graph: Graph, limits: Limits) -> int:
    """Make one projection of several of a value, and tell heads apart once they are laid out, or by their weights where
    they are large; how many nodes went, or were taken apart."""
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
        count += sum(_take_apart(owner, build, node) for node in list(owner.nodes) if node.op == "split")
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


# -- one projection as several -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fused:
    """A projection whose results are laid out as heads and split along the outermost axis of its channels."""

    map: _Map
    reshape: Node
    permute: Node
    split: Node
    axis: int  # of the reshaped value

    @property
    def nodes(self) -> list[Node]:
        """From the last one to the first."""
        return [self.split, self.permute, self.reshape, *filter(None, (self.map.sum, self.map.node))]


def _fused(build: Builder, split: Node) -> _Fused | None:
    """What a split takes apart, where it is one projection that nothing else reads."""
    permute = _maker(build, split, "permute")
    reshape = None if permute is None else _maker(build, permute, "reshape")
    made = None if reshape is None else _maker(build, reshape, "linear", "matmul", "add")
    if permute is None or reshape is None or made is None or _stays(split):
        return None
    products = [value.producer for _, value in made.operands()] if made.op == "add" else [made]
    maps = [_map(node, build) for node in products if node is not None]
    found = next((one for one in maps if one is not None and one.output is made.output), None)
    axis = positive_dims(permute)[axis_of(split)]
    shape = reshape.output.shape
    if found is None or not all(isinstance(size, int) for size in (*shape[axis:], *split.attributes["sizes"])):
        return None
    outermost = same(product(shape[axis:]), made.output.shape[-1])
    return _Fused(found, reshape, permute, split, axis) if outermost else None


def _maker(build: Builder, node: Node, *ops: str) -> Node | None:
    """What gives the first operand of a node, and nothing else, where it is of these kinds and may be another one."""
    value = node.inputs[0]
    made = value.producer if isinstance(value, Value) else None
    alone = isinstance(value, Value) and len(value.uses) == 1 and value not in build.held
    return made if made is not None and alone and made.op in ops and not _stays(made) else None


def _take_apart(graph: Graph, build: Builder, split: Node) -> bool:
    """Put several projections in the place of one whose results are copied apart for more than the nodes are worth."""
    fused = _fused(build, split)
    copied = None if fused is None else product(fused.map.output.shape)
    more = 3 * len(split.outputs) - 4  # nodes, and never fewer than would go where they were joined
    if fused is None or not isinstance(copied, int) or COPY_MACS * copied <= more * NODE_MACS:
        return False
    build.added, build.made = [], []
    try:
        parts = _parts(build, fused)
    except Refusal:
        build.take_back()
        return False
    old = [operand for node in fused.nodes for operand in node.inputs if isinstance(operand, Parameter)]
    laid = [_lay_part(graph, build, fused, *pair) for pair in zip(parts, split.outputs, strict=True)]
    for node in fused.nodes:
        remove_node(graph, node)
    for value, name in laid:
        build.release([name])
        value.name = build.unique(name)
    settle_successors(graph, build)
    for parameter in old:
        if not parameter.uses and graph.parameters.get(parameter.name) is parameter:
            del graph.parameters[parameter.name]
            graph.version += 1
    return True


def _parts(build: Builder, fused: _Fused) -> list[Value]:
    """A map for each part, of its rows of the weight; refuses where that is not the map's own."""
    node, bias = fused.map.node, fused.map.bias()
    own, inputs = own_weight(build, node), int(node.inputs[X].shape[-1])  # type: ignore
    vectors = [x for x in (fused.map.sum or node).inputs if isinstance(x, Parameter) and x is not own]
    inner = int(product(fused.reshape.output.shape[fused.axis + 1 :]))
    ends = [int(end) * inner for end in offsets(fused.split.attributes["sizes"])]
    found: list[Value] = []
    for start, end in zip(ends, ends[1:], strict=False):

        def rows(tensor: torch.Tensor, start: int = start, end: int = end) -> torch.Tensor:
            return tensor[start:end]

        names = [f"{parameter.name}_{len(found)}" for parameter in (own, *vectors)]
        weight = new_weight(build, names[0], own, combined(rows, kernel(build, node)), (end - start, inputs))
        vector = new_weight(build, names[1], own, combined(rows, bias), (end - start,)) if vectors else None
        with build.at(node):
            build.origin = None  # it stands for a part of the node of the file
            found.append(build.linear(node.inputs[X], weight, vector))
    return found


def _lay_part(graph: Graph, build: Builder, fused: _Fused, part: Value, output: Value) -> tuple[Value, str]:
    """Lay a part out as the heads that the split gave in its place, without an axis of size one that goes at once;
    returns them, and the name of what they stand for."""
    axis, dims, place = fused.axis, positive_dims(fused.permute), axis_of(fused.split)
    shape = list(fused.reshape.output.shape)
    shape[axis] = output.shape[place]
    squeeze = _reader(output, "squeeze", build)
    direct = squeeze is not None and squeeze.attributes["dims"] == (place,)
    behind = squeeze is not None or _reader(output, "permute", build) is not None
    behind = behind and not direct and same(shape[axis], 1)  # it is left to rules how the axis goes
    if direct or behind:
        dims = tuple(dim - (dim > axis) for dim in dims if dim != axis)
        del shape[axis]
    with build.at(fused.permute):
        build.origin = None
        turned = permuted(build, build.reshape(part, shape=tuple(shape)), dims)
        turned = build.unsqueeze(turned, dim=place) if behind else turned
    made = turned.producer
    assert made is not None
    made.metadata["regauge.replaces"] = f"{fused.map.node.name}, {fused.split.name}"
    target = squeeze.output if squeeze is not None and direct else output
    replace_uses(graph, target, turned)
    if squeeze is not None and direct:
        remove_node(graph, squeeze)
    return turned, target.name
