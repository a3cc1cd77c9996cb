"""Sites of attention: for each node the layers that make its queries, keys and values, and the one that reads it.

    x -> linear -> layout, rotation of pairs -> attention(q, k, v) -> layout -> linear -> y

Which channels of a layer are which head, in which order, is found by laying out numbered entries
(:mod:`regauge.passes.attention.entries`); so fused weights, shared heads that are repeated by any nodes, and rotary
positions in any notation need no patterns of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.passes.attention.entries import Entries, Trace, Tracer, followed
from regauge.passes.calibration.layers import Layer, layer_of

_EQUAL_TO = 1e-6  # tables in single precision, computed in another order


@dataclass(frozen=True, eq=False)
class Heads:
    """Channels of a linear layer (of its result; of its input for the output projection) as heads.

    ``channels``  [heads, size]: which channel of the layer is which entry of which head; heads that several query heads
                  share come once
    ``head_of``   [query heads]: the head that each query head uses
    ``pairs``     [pairs, 2]: indices i, j of a head that a rotation mixes, by angles that are the same in all heads:
                  i' = c i - s j, j' = s i + c j; none where there are no rotary positions
    ``factor``    by which one number all entries are multiplied; None where a table multiplies them
    ``even``      whether the indices that no rotation mixes are multiplied by the same numbers
    ``norms``     nodes in between that multiply a head by what is computed from it; their gains are not in ``factor``
    ``cached``    whether entries of another value (a cache) are laid beside them
    ``in_order``  whether the positions are those of the layer's result, in their order
    ``alone``     whether nothing but attention reads these channels of the layer's result
    ``nodes``     what lies between the layer and attention, in the order in which it runs
    """

    layer: Layer
    channels: torch.Tensor
    head_of: torch.Tensor
    pairs: torch.Tensor
    factor: float | None
    even: bool
    norms: tuple[Node, ...]
    cached: bool
    in_order: bool
    alone: bool
    nodes: tuple[Node, ...]
    is_output: bool = False

    @property
    def x(self) -> Value:
        """What the layer reads, [..., length, channels]."""
        value = self.layer.node.inputs[0]
        assert isinstance(value, Value)
        return value

    @property
    def count(self) -> int:
        return len(self.channels)

    @property
    def size(self) -> int:
        return int(self.channels.shape[1])

    @property
    def is_layout(self) -> bool:
        """Whether entries are moved and nothing else."""
        return not (len(self.pairs) or self.norms or self.cached) and self.factor == 1

    @property
    def weight(self) -> torch.Tensor:
        """[heads, size, inputs] of a projection, [heads, size, outputs] of the output's; in double precision."""
        matrix = self.layer.matrix(self.layer.weight.tensor.detach()).double()
        return (matrix.T if self.is_output else matrix)[self.channels]

    @property
    def bias(self) -> torch.Tensor | None:
        """[heads, size] of a projection."""
        bias = None if self.is_output else self.layer.bias
        return None if bias is None else bias.tensor.detach().double()[self.channels]

    def put(self, stored: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight ``stored`` with these heads in it, [heads, size, others]."""
        matrix = self.layer.matrix(stored).double().clone()
        (matrix.T if self.is_output else matrix)[self.channels] = weight.to(matrix)
        return self.layer.stored(matrix)


@dataclass(eq=False)
class Site:
    """An attention node with what projects into it and out of it; ``missing`` says why a part was not found."""

    node: Node
    query: Heads | None = None
    key: Heads | None = None
    value: Heads | None = None
    output: Heads | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def is_cross(self) -> bool:
        """Whether keys come from another value than queries, where both are known."""
        return self.query is not None and self.key is not None and self.query.x is not self.key.x

    @property
    def parts(self) -> tuple[Heads, Heads, Heads, Heads]:
        """The queries, keys, values and output of a site where none is missing."""
        assert self.query is not None and self.key is not None and self.value is not None and self.output is not None
        return self.query, self.key, self.value, self.output

    @property
    def keeps_scale(self) -> bool:
        """Whether scores keep their scale when the size of heads changes: a number, not one that a file derives."""
        return self.node.attributes.get("head_size") is None

    def group(self, part: Heads, head: int) -> list[int]:
        """The query heads that use a head of the keys or of the values."""
        return [place for place, own in enumerate(part.head_of.tolist()) if own == head]


def attention_sites(graph: Graph) -> list[Site]:
    """The sites of all nodes ``attention`` of a graph, in order.

    Graphs in which attention or biases are spelled out are put together by
    :func:`regauge.passes.attention.assembled.assembled` first.
    """
    tracer = Tracer(graph)
    return [_site(graph, tracer, node) for node in graph.nodes if node.op == "attention"]


def _site(graph: Graph, tracer: Tracer, node: Node) -> Site:
    site = Site(node)
    for slot, name in enumerate(("query", "key", "value")):
        try:
            setattr(site, name, _projection(graph, tracer, node, slot, site.query))
        except Refusal as reason:
            site.missing[name] = str(reason)
    try:
        site.output = _output(graph, tracer, node, site.query)
    except Refusal as reason:
        site.missing["output"] = str(reason)
    return site


# -- projections -------------------------------------------------------------------------------------------------------


def _projection(graph: Graph, tracer: Tracer, node: Node, slot: int, query: Heads | None) -> Heads:
    read = node.inputs[slot]
    if not isinstance(read, Value):
        return refuse("it is no tensor")
    layers = list(dict.fromkeys(_layers_above(read)))
    if len(layers) != 1:
        return refuse("it is made by several layers" if layers else "no linear layer makes it")
    layer = layer_of(layers[0])
    if layer is None:
        return refuse("the weight of a projection is no trained matrix of its own")
    result = layer.node.output
    trace = tracer.trace(result, read)
    shape, axis = tracer.shape(result), _channel_axis(layer, result)
    entries = _by_heads(trace.entries, tracer.shape(read), shape, axis)
    places, channels = _split(entries.sources, shape, axis)
    held = entries.sources > 0
    present = held.any(0).all(-1).all(1)  # [batch, length]: of a cache there are none
    if not bool((present == held.any(0).any(-1).any(1)).all()) or not bool(present.any()):
        return refuse("entries are missing")
    own, pairs = _rotation(_at(entries, present), _where(channels, present))
    heads, head_of = _distinct(own, _query_heads(tracer, node, len(own)) if query is None else len(query.head_of))
    rows = _first_rows(places, held, present)
    factor, even = _factors(_at(entries, present), pairs)
    return Heads(
        layer, heads, head_of, pairs, factor, even, tuple(trace.norms), trace.joined,
        in_order=bool(present.all()) and bool((rows == torch.arange(len(rows))).all()),
        alone=_is_alone(graph, tracer, layer, (node, slot), trace, heads), nodes=tuple(trace.nodes),
    )  # fmt: skip


def _channel_axis(layer: Layer, value: Value) -> int:
    """The axis of a layer's result or input that its weight makes or contracts."""
    return 1 if layer.node.op.startswith("conv") else value.rank - 1


def _layers_above(value: Value) -> Iterator[Node]:
    """The linear layers whose results reach a value through nodes that entries are followed through."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        node = value.producer
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op in ("linear", "matmul", "conv") and isinstance(node.inputs[1], Parameter):
            yield node
        elif followed(node):
            waiting += [operand for _, operand in node.operands()]


def _by_heads(entries: Entries, shape: tuple[int, ...], given: tuple[int, ...], axis: int) -> Entries:
    """Entries [terms, batch, heads, length, size]: heads that were folded into the batch have an axis of their own."""
    if len(shape) < 3:
        return refuse("it has no axis of heads")
    if len(shape) > 3:
        return entries.mapped(lambda term: term.reshape(-1, *shape[-3:]))
    first = entries.sources[0, :, 0]  # [batch x heads, size]
    channels = _split(first, given, axis)[1]
    periods = (n for n in range(1, len(first) + 1) if len(first) % n == 0)
    count = next(n for n in periods if bool((channels == channels[:n].repeat(len(first) // n, 1)).all()))
    return entries.mapped(lambda term: term.reshape(-1, count, *shape[-2:]))


def _split(sources: torch.Tensor, shape: tuple[int, ...], axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources, counted from one, as places and channels of the value that they count; -1 for none."""
    behind = int(torch.Size(shape[axis + 1 :]).numel())
    count = sources - 1
    channels = count // behind % shape[axis]
    places = count // (behind * shape[axis]) * behind + count % behind
    return torch.where(count < 0, -1, places), torch.where(count < 0, -1, channels)


def _at(entries: Entries, present: torch.Tensor) -> Entries:
    """[terms, places, heads, size]: entries at the places that have some."""
    return Entries(_where(entries.sources, present), _where(entries.factors, present))


def _where(terms: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return terms.movedim(3, 2)[:, present]


def _rotation(entries: Entries, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The channel of each entry, [heads, size], and the pairs that a rotation mixes; Refusal for another mixture."""
    if not bool((channels == channels[:, :1]).all()):
        return refuse("heads have other channels at other positions")
    table = channels[:, 0]  # [terms, heads, size]
    own = table[0].clone()
    if len(table) == 1 or not bool((table[1] >= 0).any()):
        return own, torch.zeros(0, 2, dtype=torch.long)
    mixed = (table[1] >= 0).all(0)
    if not bool((mixed == (table[1] >= 0).any(0)).all()):
        return refuse("only some heads are rotated")
    low, high = table.amin(0), table.amax(0)
    together: dict[tuple[int, int], list[int]] = {}
    for index in mixed.nonzero()[:, 0].tolist():
        together.setdefault((int(low[0, index]), int(high[0, index])), []).append(index)
    if any(len(pair) != 2 for pair in together.values()):
        return refuse("entries are mixed, and not in pairs")
    pairs = torch.tensor(list(together.values()))
    i, j = pairs.T
    if not bool(((low[:, i] == low[:, j]) & (high[:, i] == high[:, j])).all()):
        return refuse("heads are mixed in different pairs")
    return _oriented(entries, table, own, pairs), pairs


def _oriented(entries: Entries, table: torch.Tensor, own: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The channels with those of each pair in the order that makes the mixture i' = c i - s j, j' = s i + c j."""
    i, j = pairs.T
    by_first, by_second = entries.factors.unbind()  # [places, heads, size]

    def factor(at: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
        """By which an entry takes a channel, [places, heads, pairs]."""
        return torch.where(table[0][:, at] == channel, by_first[..., at], by_second[..., at])

    for first in (0, 1):
        a, b = table[first][:, i], table[1 - first][:, i]  # [heads, pairs]: the channels i and j, in this order
        if _equal(factor(i, a), factor(j, b)) and _equal(factor(i, b), -factor(j, a)):
            own[:, i], own[:, j] = a, b
            return own
    return refuse("pairs are mixed by other than rotations")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs() <= _EQUAL_TO * (a.abs() + b.abs())).all())


def _distinct(own: torch.Tensor, query_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads that differ, in the order in which they come, and which of them each query head uses."""
    known: dict[tuple[int, ...], int] = {}
    order = torch.tensor([known.setdefault(tuple(row), len(known)) for row in own.tolist()])
    heads = torch.tensor(list(known))
    if len(set(heads.flatten().tolist())) != heads.numel():
        return refuse("heads share channels in part")
    if query_heads % len(order):
        return refuse(f"{len(order)} heads for {query_heads} of queries")
    return heads, order.repeat_interleave(query_heads // len(order))


def _query_heads(tracer: Tracer, node: Node, own: int) -> int:
    """As attention has them, of which some operand has no axis of heads apart from its batch."""
    query = node.inputs[0]
    return tracer.shape(query)[-3] if isinstance(query, Value) and query.rank > 3 else own


def _first_rows(places: torch.Tensor, held: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[places]: the place of the layer's result that each place is made of; Refusal where there are several."""
    least, most = (_where(places, present) for _ in range(2))
    mask = _where(held, present)
    least = torch.where(mask, least, torch.iinfo(torch.long).max).amin((0, 2, 3))
    most = torch.where(mask, most, -1).amax((0, 2, 3))
    if not bool((least == most).all()):
        return refuse("a position is made of several")
    return least


def _factors(entries: Entries, pairs: torch.Tensor) -> tuple[float | None, bool]:
    size = entries.factors.shape[-1]
    single = torch.ones(size, dtype=torch.bool)
    single[pairs.flatten()] = False
    factors = entries.factors[0][..., single]
    even = _equal(factors, factors[..., :1].expand_as(factors))
    one = factors.flatten()[:1]
    constant = not len(pairs) and _equal(factors, one.expand_as(factors))
    return (float(one.real) if constant else None), even


def _is_alone(
    graph: Graph, tracer: Tracer, layer: Layer, end: tuple[Node, int], trace: Trace, heads: torch.Tensor
) -> bool:
    """Whether nothing but one operand of attention reads these channels; others may read other parts of the result."""
    result, own = layer.node.output, set(trace.nodes)
    mine = set(heads.flatten().tolist())
    waiting = [result, *(value for node in trace.nodes for value in node.outputs)]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        others = [use for use in value.uses if use[0] not in own and use != end]
        if not (others or value in graph.outputs) or not mine & _channels_of(tracer, layer, value, mine):
            continue
        if value in graph.outputs or any(symmetry_of(node) is not Symmetry.LAYOUT for node, _ in others):
            return False
        new = [made for node, _ in others for made in node.outputs if made not in seen]
        seen.update(new)
        waiting += new
    return True


def _channels_of(tracer: Tracer, layer: Layer, value: Value, unknown: set[int]) -> set[int]:
    """The channels of a layer's result that a value is made of; ``unknown`` where it is more than some sums."""
    result = layer.node.output
    try:
        sources = tracer.trace(result, value).entries.sources
    except Refusal:
        return unknown
    channels = _split(sources, tracer.shape(result), _channel_axis(layer, result))[1]
    return set(channels.flatten().tolist())


# -- the output --------------------------------------------------------------------------------------------------------


def _output(graph: Graph, tracer: Tracer, node: Node, query: Heads | None) -> Heads:
    layer = _layer_below(graph, node.output)
    if layer.taps != 1:
        return refuse("the output projection is no map of single positions")
    x = layer.node.inputs[0]
    assert isinstance(x, Value)
    trace = tracer.trace(node.output, x)
    shape, axis = tracer.shape(x), _channel_axis(layer, x)
    entries = trace.entries.mapped(lambda term: term.movedim(axis, -1).reshape(-1, shape[axis]))  # [terms, places, c]
    given = tracer.shape(node.output)
    if len(given) < 3:
        return refuse("it has no axis of heads")
    count = given[-3] if query is None or len(given) > 3 else len(query.head_of)
    source = entries.sources[0] - 1
    if len(entries.sources) > 1 or bool((source < 0).any()):
        return refuse("heads are mixed before it")
    entry, rest = source % given[-1], source // given[-1]
    place, head = rest // (given[-2] * count) * given[-2] + rest % given[-2], rest // given[-2] % count
    number = head * given[-1] + entry
    if not bool((number == number[:1]).all()) or number[0].sort().values.tolist() != list(range(count * given[-1])):
        return refuse("it does not read each head once at each position")
    if not bool((place == place[:, :1]).all()):
        return refuse("a position is made of several")
    channels = torch.empty(count * given[-1], dtype=torch.long)
    channels[number[0]] = torch.arange(number.shape[1])
    none = torch.zeros(0, 2, dtype=torch.long)
    factor, even = _factors(Entries(entries.sources, entries.factors[..., number[0].argsort()]), none)
    return Heads(
        layer, channels.reshape(count, -1), torch.arange(count), none, factor, even, tuple(trace.norms), trace.joined,
        in_order=bool((place[:, 0] == torch.arange(len(place))).all()), alone=True, nodes=tuple(trace.nodes),
        is_output=True,
    )  # fmt: skip


def _layer_below(graph: Graph, value: Value) -> Layer:
    """The only linear layer that reads a value, through nodes that entries are followed through."""
    while True:
        users = list(value.uses)
        if value in graph.outputs or len(users) != 1:
            return refuse("something else reads the result of attention too")
        node, slot = users[0]
        if node.op in ("linear", "matmul", "conv") and slot == 0:
            layer = layer_of(node)
            return layer if layer is not None else refuse("the weight of a projection is no trained matrix of its own")
        if not followed(node) or len(node.outputs) != 1:
            return refuse(f"{node.op} reads the result of attention")
        value = node.output
