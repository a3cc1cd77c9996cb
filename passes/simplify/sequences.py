"""Heads of one sequence, laid out with positions first until they are multiplied, in ONNX files.

    matmul(permute(reshape(x, (1, l, h, d)), (0, 2, 1, 3)), ...)
    matmul(permute(reshape(x, (l, 1, h, d)), (1, 2, 0, 3)), ...)

A permute that takes the first axis behind the batch of a product, or to its very end, is no copy in onnxruntime: its
product reads operands with strides (``transBatchA`` of its ``FusedMatMul``). Where the batch is one, positions may as
well be the first axis. Pointwise operators and pieces in between, as those of rotary positions, work in the layout
before, so that the permute is all that stands before the product and the scale that it takes in. The same numbers to
the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.axis_rules.rules import is_pointwise
from regauge.ir.edit import Builder, remove_node, set_input
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.rewriting.matcher import number_of
from regauge.ir.sizes.expressions import Size, same
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.layout import REGROUPING, dynamic_sizes, positive_dims, regrouped
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.pieces import axis_of

ALONG = ("split", "slice", "concat")  # work along one axis, wherever that lies
FARTHEST = 32  # nodes between a permute and the product
Dims = tuple[int, ...]
At = tuple[Value, Dims]  # a value whose axes are wanted in another order


def put_positions_first(graph: Graph, limits: Limits) -> int:
    """Lay heads of one sequence out with positions first, in a graph that was loaded from ONNX; returns how many."""
    if "onnx" not in graph.metadata:
        return 0
    owners = list(scopes(graph))
    held = set().union(*(held_values(owner) for owner, _ in owners))
    return sum(_lay_scope(owner, build, held) for owner, build in owners)


@dataclass
class _Way:
    """From an operand of a product back to where its axes may be put in another order for nothing."""

    product: Node
    slot: int
    dims: Dims  # of the operand, in the order in which it is wanted
    passed: set[Node] = field(default_factory=set)

    @property
    def operand(self) -> Value:
        value = self.product.inputs[self.slot]
        assert isinstance(value, Value)
        return value


def _lay_scope(graph: Graph, build: Builder, held: set[Value]) -> int:
    build.by, count = "sequences", 0
    ways = [way for node in graph.nodes if node.op == "matmul" for way in _ways(node)]
    for group in _groups(ways):
        readers = set().union(*(way.passed for way in group)) | {way.product for way in group}
        inner = [node for node in readers if not any(node is way.product for way in group)]
        alone = all(
            value not in held and readers.issuperset(value.consumers()) for node in inner for value in node.outputs
        )
        if alone and not any(way.product in way.passed for way in group):
            _Laying(graph, build, group).write()
            count += len(group)
    return count


def _groups(ways: Sequence[_Way]) -> list[list[_Way]]:
    """Ways that pass the same nodes, together."""
    groups: list[list[_Way]] = []
    for way in ways:
        joined = [group for group in groups if any(not way.passed.isdisjoint(other.passed) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(other for group in joined for other in group), way])
    return groups


# -- what may be laid out anew -----------------------------------------------------------------------------------------


def _ways(product: Node) -> Iterator[_Way]:
    """The operands of a product that can be had from a layout whose first axis goes behind the batch, or to the end."""
    if _stays(product) or product.output.dtype != torch.float32:
        return
    for node, slot in [_before_scale(product, slot) for slot, _ in product.operands()]:
        operand = node.inputs[slot]
        assert isinstance(operand, Value)
        rank = operand.rank
        if rank < 3 or isinstance(operand, Parameter):
            continue
        for first in (rank - 2, rank - 1):
            way = _Way(node, slot, (first, *(axis for axis in range(rank) if axis != first)))
            if _passes(way, operand, way.dims) and _gains(way):
                yield way
                break


def _before_scale(product: Node, slot: int) -> tuple[Node, int]:
    """The operand of a product, or of the scale before it, which a runtime takes in as well."""
    value = product.inputs[slot]
    scale = value.producer if isinstance(value, Value) else None
    if scale is None or scale.op != "mul" or _stays(scale) or len(value.uses) > 1:  # type: ignore[union-attr]
        return product, slot
    tall = [index for index, operand in enumerate(scale.inputs) if number_of(operand) is None]
    alike = len(tall) == 1 and isinstance(scale.inputs[tall[0]], Value)
    return (scale, tall[0]) if alike and scale.inputs[tall[0]].shape == value.shape else (product, slot)  # type: ignore


def _stays(node: Node) -> bool:
    """Whether a node must be left as it is, for what it does or as one of several that stand for one of a file."""
    return bool(is_fixed(node)) or is_part(node) and "regauge.added_by" not in node.metadata


def _gains(way: _Way) -> bool:
    """Whether a permute goes that is not already such a one, and stands alone."""
    permutes = [node for node in way.passed if node.op == "permute"]
    last = way.operand.producer
    if [last] == permutes == list(way.passed):
        return positive_dims(permutes[0]) != _inverse(way.dims)
    return bool(permutes)


def _passes(way: _Way, value: Value, dims: Dims) -> bool:
    """Whether a value can be had with its axes in another order without a permute; notes the nodes on the way."""
    if _moves_only_ones(value, dims):
        return isinstance(value, Parameter) or dynamic_sizes(value.shape) <= 1
    node = value.producer
    if node is None or value.rank < len(dims) or _stays(node) or len(way.passed) > FARTHEST:
        return False
    found = _operands(node, dims)
    if found is None:
        return False
    way.passed.add(node)
    return all(_passes(way, operand, order) for operand, order in found if isinstance(operand, Value))


def _operands(node: Node, dims: Dims) -> list[tuple[Any, Dims]] | None:
    """In which order a node wants the axes of its operands to give its results in this one; None where it cannot."""
    if node.op == "permute":
        given = positive_dims(node)
        return [(node.inputs[0], tuple(given[dim] for dim in dims))]
    if not is_pointwise(node) and node.op not in ALONG:
        return None
    return [(operand, dims if isinstance(operand, Value) and operand.rank else ()) for operand in node.inputs]


def _padded(value: Value, dims: Dims) -> tuple[Size, ...]:
    """The shape of a value that is broadcast to as many axes as are to be ordered."""
    return (1,) * (len(dims) - value.rank) + value.shape


def _moves_only_ones(value: Value, dims: Dims) -> bool:
    shape = _padded(value, dims)
    moved = [dim for dim in dims if not same(shape[dim], 1)]
    return moved == sorted(moved)


def _inverse(dims: Dims) -> Dims:
    return tuple(dims.index(axis) for axis in range(len(dims)))


# -- the rewriting -----------------------------------------------------------------------------------------------------


class _Laying:
    """Builds the nodes of some ways in the order that they are wanted in, and one permute before each product."""

    def __init__(self, graph: Graph, build: Builder, ways: Sequence[_Way]) -> None:
        self.graph, self.build, self.ways = graph, build, ways
        self.known: dict[At, Value] = {}
        self.stands_for: dict[Node, Node] = {}  # of new nodes, the old one

    def write(self) -> None:
        old = [node for node in self.graph.nodes if any(node in way.passed for way in self.ways)]
        permutes = [node for node in old if node.op == "permute"]
        for way in self.ways:
            mine = [node for node in permutes if node in way.passed]
            laid = self.laid(way.operand, way.dims, way.product)
            with self.anew(mine[-1]):
                turned = self.build.permute(laid, dims=_inverse(way.dims))
            self.stands_for[turned.producer] = mine[-1]
            set_input(way.product, way.slot, turned, self.graph)
        names = {node: [value.name for value in node.outputs] for node in old}
        for node in reversed(old):
            remove_node(self.graph, node)
        self.build.release(name for node in old for name in names[node])
        self.name(names)
        settle_successors(self.graph, self.build)

    def name(self, names: dict[Node, list[str]]) -> None:
        """New nodes take the names of those that they stand for, the first one where there are several."""
        for new, old in self.stands_for.items():
            new.metadata["regauge.replaces"] = old.metadata.get("regauge.replaces") or old.name
            for value, name in zip(new.outputs, names.pop(old, ()), strict=False):
                value.name = self.build.unique(name)

    @contextmanager
    def anew(self, node: Node) -> Iterator[None]:
        """Build in the place of a node, but as none of the file: what changes there are more than sizes."""
        with self.build.at(node):
            self.build.origin = None
            yield

    def laid(self, value: Value, dims: Dims, reader: Node) -> Value:
        """A value with its axes in this order."""
        if dims == tuple(range(len(dims))):
            return value
        if (value, dims) not in self.known:
            if _moves_only_ones(value, dims):
                self.known[value, dims] = self.shaped(value, dims, reader)
            else:
                self.rebuilt(value, dims)
        return self.known[value, dims]

    def shaped(self, value: Value, dims: Dims, reader: Node) -> Value:
        """A value of which only axes of size one move, by a reshape that stands for none of the file."""
        maker, shape = value.producer, [_padded(value, dims)[dim] for dim in dims]
        source = maker.inputs[0] if maker is not None and maker.op in REGROUPING and not is_fixed(maker) else value
        assert isinstance(source, Value)
        with self.anew(reader):
            return regrouped(self.build, source, shape)

    def rebuilt(self, value: Value, dims: Dims) -> None:
        node = value.producer
        assert node is not None
        found = _operands(node, dims)
        assert found is not None
        operands = [self.laid(x, order, node) if isinstance(x, Value) else x for x, order in found]
        if node.op == "permute":
            self.known[value, dims] = operands[0]
            return
        along = {"dim": dims.index(axis_of(node))} if node.op in ALONG else {}
        with self.anew(node):
            made = self.build(node.op, *operands, name=node.name, **{**node.attributes, **along})
        results = made if isinstance(made, tuple) else (made,)
        self.stands_for[results[0].producer] = node
        self.known |= {(old, dims): new for old, new in zip(node.outputs, results, strict=True)}
