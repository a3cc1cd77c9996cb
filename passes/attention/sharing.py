"""Attention with other heads than it had: projections of its queries, keys and values written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder, dead_nodes, record, remove_dead, remove_parameter, replace_uses, set_weight
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.attention.entries import Tracer
from regauge.passes.attention.placement import Path
from regauge.passes.attention.sites import Site
from regauge.passes.calibration.layers import Layer


@dataclass(frozen=True)
class Projection:
    """New heads for one operand: ``weight`` [heads, size, columns] and ``bias`` [heads, size], in double precision."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def at(self, heads: Sequence[int]) -> Projection:
        """Some of the heads, in this order."""
        order = torch.tensor(heads)
        return Projection(self.weight[order], None if self.bias is None else self.bias[order])

    def entries(self, order: torch.Tensor) -> Projection:
        """The entries of every head in another order."""
        return Projection(self.weight[:, order], None if self.bias is None else self.bias[:, order])


@dataclass(frozen=True)
class NewHeads:
    """What a site becomes: its projections, and the weight of its output [query heads, size, outputs].

    ``head_of`` says which key and value head each query head uses; ``shift`` is added to the output's bias, where it
    has one.
    """

    query: Projection
    key: Projection
    value: Projection
    output: torch.Tensor
    head_of: tuple[int, ...]
    shift: torch.Tensor | None = None


def write_heads(graph: Graph, site: Site, new: NewHeads, *, by: str) -> Value:
    """Let a site of ``graph``, which is changed, have new heads; returns the result of attention, which is a new node.

    Groups of equal size stand side by side, so that attention shares heads itself; others are repeated by an index.
    Raises Refusal, before anything is changed, where a path cannot be written for other heads.
    """
    paths = _site_paths(graph, site)
    if may_be_ordered(site, new.head_of):
        order = sorted(range(len(new.head_of)), key=lambda head: new.head_of[head])
        new = _ordered(new, order)
    build = Builder(graph, by=by)
    with build.at(site.node), all_or_nothing(build):
        own = [part.entries(path.entries) for part, path in zip((new.query, new.key, new.value), paths, strict=True)]
        given = projected(build, [(path.heads.layer, part) for path, part in zip(paths, own, strict=True)])
        operands = [path.laid_out(build, y, len(part.weight)) for path, y, part in zip(paths, given, own, strict=True)]
        result = _attend(build, site.node, operands, new.head_of)
    write_output(graph, site, new.output, new.shift, by)
    take_place(graph, build, site.node.output, result, by)
    record(graph, by, f"{site.node.name}: {len(new.key.weight)} heads of keys and values")
    return result


@contextmanager
def all_or_nothing(build: Builder) -> Iterator[None]:
    """What was built is taken back where something cannot be built; Refusal then."""
    try:
        yield
    except (Refusal, RegaugeError) as reason:
        build.take_back()
        raise Refusal(str(reason)) from reason


def take_place(graph: Graph, build: Builder, old: Value, new: Value, by: str) -> None:
    """Let a value be read in the place of another, and new weights have the names of those that nobody reads then."""
    kept = {node.name for node in dead_nodes(graph)}
    replace_uses(graph, old, new)
    read = [parameter for parameter in graph.parameters.values() if parameter.uses]
    remove_dead(graph, parameters=False, keep=kept)
    settle_successors(graph, build)
    for parameter in read:
        if graph.parameters.get(parameter.name) is parameter and not parameter.uses:
            remove_parameter(graph, parameter, by=by)


def _site_paths(graph: Graph, site: Site) -> list[Path]:
    """The paths of a site's queries, keys and values; Refusal where there is none."""
    tracer = Tracer(graph)
    found = []
    for read, heads in zip(site.node.inputs, site.parts[:3], strict=False):
        assert isinstance(read, Value)
        if heads.layer.node.op not in ("linear", "matmul"):
            refuse(f"{heads.layer.node.label} is no linear layer")
        found.append(Path(tracer, heads, read))
    return found


def _attend(build: Builder, node: Node, operands: Sequence[Value], head_of: Sequence[int]) -> Value:
    """The attention of a node on queries, keys and values of other heads; its place is not taken yet."""
    query, *shared = operands
    heads = len(set(head_of))
    side_by_side = list(head_of) == [head * heads // len(head_of) for head in range(len(head_of))]
    grouped = side_by_side and len(head_of) % heads == 0
    if not grouped:
        index = build.constant(torch.tensor(head_of), "head_of")
        shared = [build.index_select(value, index, dim=value.rank - 3) for value in shared]
    attributes = {**node.attributes, "enable_gqa": grouped and heads < len(head_of)}
    result: Value = build(node.op, query, *shared, *node.inputs[3:], name=node.output.name, **attributes)
    return result


def may_be_ordered(site: Site, head_of: Sequence[int]) -> bool:
    """Whether query heads can be sorted by the head that they use: groups are even, and no mask tells heads apart."""
    counts = {head_of.count(head) for head in head_of}
    mask = site.node.inputs[3] if len(site.node.inputs) > 3 else None
    return len(counts) == 1 and not (isinstance(mask, Value) and mask.rank > 2 and mask.shape[-3] != 1)


def _ordered(new: NewHeads, order: Sequence[int]) -> NewHeads:
    head_of = tuple(new.head_of[head] for head in order)
    return NewHeads(new.query.at(order), new.key, new.value, new.output[torch.tensor(order)], head_of, new.shift)


def projected(build: Builder, parts: Sequence[tuple[Layer, Projection]]) -> list[Value]:
    """What layers give for new heads, [..., heads x size] for each part; parts of one layer stay one layer."""
    found: dict[int, Value] = {}
    for layer in {layer.node: layer for layer, _ in parts}.values():
        own = {place: new for place, (other, new) in enumerate(parts) if other.node is layer.node}
        y = _linear(build, layer, list(own.values()))
        start = 0
        for place, new in own.items():
            end = start + new.weight.shape[0] * new.weight.shape[1]
            found[place] = y if len(own) == 1 else build.slice(y, dim=y.rank - 1, start=start, end=end, step=1)
            start = end
    return [found[place] for place in range(len(parts))]


def _linear(build: Builder, layer: Layer, parts: Sequence[Projection]) -> Value:
    weight = torch.cat([new.weight.flatten(0, 1) for new in parts])
    operands: list[Operand] = [layer.node.inputs[0], build.folded(layer.weight, lambda _: weight, shape=weight.shape)]
    biases = [new.bias for new in parts]
    if any(bias is not None for bias in biases):
        zeros = [new.weight.new_zeros(new.weight.shape[:2]) for new in parts]
        whole = torch.cat([(zero if b is None else b).flatten() for b, zero in zip(biases, zeros, strict=True)])
        if layer.bias is not None:
            operands.append(build.folded(layer.bias, lambda _: whole, shape=whole.shape))
        else:
            name = f"{layer.weight.name.removesuffix('weight')}bias"
            operands.append(build.computed(name, lambda _: whole, layer.weight, shape=whole.shape))
    y: Value = build.linear(*operands, name=layer.node.output.name)
    return y


def write_output(graph: Graph, site: Site, output: torch.Tensor, shift: torch.Tensor | None, by: str) -> None:
    """Give the output of a site other weights [query heads, size, outputs], and add ``shift`` to its bias."""
    heads = site.parts[3]
    layer = heads.layer
    set_weight(graph, layer.weight, heads.put(layer.weight.tensor.detach(), output), by=by)
    shifted = None if shift is None else layer.shifted(shift)
    if shifted is not None:
        set_weight(graph, *shifted, by=by)
