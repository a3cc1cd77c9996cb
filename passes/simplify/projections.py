"""Projections of attention heads: several of one value are one, and heads are told apart once they are laid out.

    permute(reshape(linear(x, wq))), ... wk, ... wv      split(permute(reshape(linear(x, [wq wk wv]))))
    permute(reshape(part)), ... of split(x)              split(permute(reshape(x)))

In ONNX files only, whose runtimes pay for each node. A split copies what it gives, which torch's does not, so that
projections stay apart where more is copied than the nodes are worth (the prices of heads.py). Where the axes of a part
come in another order, as those of keys, it is permuted once more; onnxruntime then moves the first permute behind the
split and joins the two, so that what is saved there are the products and the reshapes.

Queries, keys and values share the axis of their features afterwards: leave the step out before passes that cut them
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.purity import is_fixed
from regauge.ir.rewrite import Refusal
from regauge.ir.sizes import Size, product, same
from regauge.ir.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.heads import COPY_MACS, NODE_MACS
from regauge.passes.simplify.layout import permuted, positive_dims
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import X, channels, own_weight
from regauge.passes.simplify.merges import stacked
from regauge.passes.simplify.pieces import axis_of


def join_projections(graph: Graph, limits: Limits) -> int:
    """Make one projection of several of a value, and tell heads apart once they are laid out; how many nodes went."""
    if "onnx" not in graph.metadata:
        return 0
    owners, count = list(scopes(graph)), 0
    held = set().union(*(held_values(owner) for owner, _ in owners))
    for owner, build in owners:
        build.by, build.held, before = "projections", held, len(owner)
        for nodes, layout in _siblings(owner, build):
            _join(owner, build, nodes, layout)
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


def _siblings(graph: Graph, build: Builder) -> Iterator[tuple[list[Node], _Layout]]:
    """Linear maps of one value whose results are laid out as heads, and how."""
    for value in list(graph.values()):
        maps = [node for node, slot in value.uses if node.op == "linear" and slot == X and not _stays(node)]
        found = [node for node in maps if _reader(node.output, "reshape", build)]
        layout = _layout([node.output for node in found], build) if len(found) > 1 else None
        if layout is not None and _pays(found, layout):
            yield found, layout


def _pays(nodes: Sequence[Node], layout: _Layout) -> bool:
    """Whether the nodes that go, one for each map but the first, and a split that comes, are worth the copies."""
    copied = product(size for node in nodes[:1] for size in node.output.shape[:-1]) * sum(map(channels, nodes))
    fewer = len(nodes) - 2 + layout.fewer
    return isinstance(copied, int) and COPY_MACS * copied <= fewer * NODE_MACS


def _join(graph: Graph, build: Builder, nodes: Sequence[Node], layout: _Layout) -> None:
    """Put one projection in the place of several."""
    build.added, build.made = [], []
    try:
        for node in nodes:
            own_weight(build, node)
        weight, bias = stacked(build, nodes, 0)
    except Refusal:
        build.take_back()
        return
    first = nodes[0]
    build.scope, build.source = first.scope, first.source
    whole = build.linear(first.inputs[X], weight, bias)
    _lay_out(graph, build, whole, layout, None)
    for node in nodes:
        remove_node(graph, node)
    settle_successors(graph, build)


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
