"""Where the heads of a projection lie in the values between its layer and attention, and the same path for other heads.

    y = linear(x, w)  ->  layout  ->  rotary positions  ->  heads repeated  ->  attention

A path is run again on heads of another number: from where heads and their entries first have axes of their own, up to
where they last come once each; the nodes between are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.rewriting.rewrite import refuse
from regauge.passes.attention.entries import Entries, Tracer
from regauge.passes.attention.sites import Heads


@dataclass(frozen=True)
class Placement:
    """How a value on the path of a projection has its heads.

    ``rows``    axes of the positions, from the major to the minor as the layer's result has them
    ``head``    the axis of heads
    ``entry``   the axes of the entries of a head: several where pairs have one of their own
    ``copies``  how often each head comes
    ``entries`` [size]: which entry of a head lies at each place of these axes; None where heads are in another order,
                or rotated
    """

    rows: tuple[int, ...]
    head: int
    entry: tuple[int, ...]
    copies: int
    entries: torch.Tensor | None

    @property
    def axes(self) -> tuple[int, ...]:
        return (*self.rows, self.head, *self.entry)


def placement(heads: Heads, found: Entries) -> Placement | None:
    """Where heads lie in a value on their path, of its entries; None where they have no axes of their own."""
    channels = heads.layer.outputs
    numbers = torch.full((2, channels), -1)
    numbers[0][heads.channels] = torch.arange(heads.count)[:, None].expand(heads.channels.shape)
    numbers[1][heads.channels] = torch.arange(heads.size).expand(heads.channels.shape)
    count = found.sources[0] - 1
    head, entry = numbers[0][count % channels], numbers[1][count % channels]
    if bool((torch.stack([count, head, entry]) < 0).any()):
        return None
    own = _head_axes(heads, head, entry)
    rows = None if own is None else _row_axes(count // channels, own)
    if own is None or rows is None:
        return None
    copies = head.shape[own[0]] // heads.count
    plain = len(found.sources) == 1 and bool((found.factors == 1).all()) and copies == 1
    numbered = head.movedim(own[0], 0).flatten(1)[:, 0]
    in_order = plain and bool((numbered == torch.arange(heads.count)).all())
    entries = entry.permute(*own[1:], *rows, own[0]).reshape(heads.size, -1)[:, 0]
    return Placement(rows, own[0], own[1:], copies, entries if in_order else None)


def _head_axes(heads: Heads, head: torch.Tensor, entry: torch.Tensor) -> tuple[int, ...] | None:
    """The axis of heads, and those of entries, along which nothing else varies."""
    at, inner = _varying(head), _varying(entry)
    if not at:  # one head: the last axis that could be its own
        at = [axis for axis in range(head.dim()) if axis not in inner and head.shape[axis] == 1][-1:]
    if len(at) != 1 or at[0] in inner or head.shape[at[0]] % heads.count:
        return None
    extent = int(torch.tensor([entry.shape[axis] for axis in inner]).prod())
    return (at[0], *inner) if extent == heads.size else None


def _row_axes(places: torch.Tensor, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The other axes, by their strides in the layer's result; None where they do not count its positions through."""
    rows = [axis for axis in range(places.dim()) if axis not in axes]
    if any(axis in axes for axis in _varying(places)):
        return None
    found = places.permute(*rows, *axes).flatten(len(rows))[..., 0]
    strides = [int(found.select(at, 1).flatten()[0]) if found.shape[at] > 1 else 0 for at in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda at: -strides[at])
    counted = found.permute(order).flatten()
    return tuple(rows[at] for at in order) if bool((counted == torch.arange(len(counted))).all()) else None


def _varying(number: torch.Tensor) -> list[int]:
    """The axes along which numbers vary."""
    return [axis for axis in range(number.dim()) if bool((number != number.narrow(axis, 0, 1)).any())]


class Path:
    """The way of one operand of attention from its layer, in a graph whose nodes are those of the site."""

    def __init__(self, tracer: Tracer, heads: Heads, read: Value) -> None:
        self.heads = heads
        traced = tracer.trace(heads.layer.node.output, read).found
        steps = [value for node in heads.nodes for value in node.outputs]
        self._placed = {value: place for value in steps if (place := placement(heads, traced[value])) is not None}
        single = [value for value, found in self._placed.items() if found.copies == 1]
        if not single or read not in self._placed:
            refuse("its heads have no axis of their own")
        self.start, self.end, self.read = single[0], single[-1], read
        entries = self._placed[self.start].entries
        if entries is None:
            refuse("its heads are changed before they have an axis of their own")
        self.entries: torch.Tensor = entries
        self._between = self._nodes_between()

    def _nodes_between(self) -> list[Node]:
        """The nodes from ``start`` to ``end``; Refusal where those behind do more than lay out."""
        made, found, behind = {self.start}, list[Node](), {self.end}
        for node in self.heads.nodes:
            operands = [value for _, value in node.operands()]
            if self.end not in made and any(value in made for value in operands):
                made.update(node.outputs)
                found.append(node)
            elif any(value in behind for value in operands):
                if symmetry_of(node) is not Symmetry.LAYOUT:
                    refuse(f"{node.label} stands behind where heads are repeated")
                behind.update(node.outputs)
        if self.read not in behind or self.end not in made:
            refuse("its heads take several ways")
        return found

    def laid_out(self, build: Builder, y: Value, count: int) -> Value:
        """What attention reads, of y [..., count x size] in place of the layer's result: ``count`` heads, each once.

        The entries of heads in y are in the order of ``entries``.
        """
        place = self._placed[self.start]
        rows, entry = ([self.start.shape[axis] for axis in axes] for axes in (place.rows, place.entry))
        value = build.reshape(y, shape=(*rows, count, *entry))
        value = _permuted(build, value, [place.axes.index(axis) for axis in range(value.rank)])
        made: dict[Operand, Any] = {self.start: value}
        for node in self._between:
            operands = [made.get(o, o) if isinstance(o, Value) else o for o in node.inputs]
            results = build(node.op, *operands, **self._attributes(node, count))
            made.update(zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True))
        found: Value = made[self.end]
        return self._as_read(build, found)

    def _as_read(self, build: Builder, value: Value) -> Value:
        """The axes of the path's end in the order in which attention reads them."""
        own, wanted = self._placed[self.end], self._placed[self.read]
        if self.end is self.read:
            return value
        if len(own.axes) != len(wanted.axes):
            return refuse("its axes change where heads are repeated")
        return _permuted(build, value, [own.axes[wanted.axes.index(axis)] for axis in range(value.rank)])

    def _attributes(self, node: Node, count: int) -> Mapping[str, Any]:
        """The attributes of a node, where it reshapes with the new number of heads."""
        shape = node.attributes.get("shape")
        source = node.inputs[0]
        if shape is None or count == self.heads.count:
            return node.attributes
        known = self._placed.get(node.outputs[0]) or (self._placed.get(source) if isinstance(source, Value) else None)
        if known is None or known.head >= len(shape) or shape[known.head] != self.heads.count:
            return refuse(f"{node.label} holds the number of heads")
        return {**node.attributes, "shape": (*shape[: known.head], count, *shape[known.head + 1 :])}


def _permuted(build: Builder, value: Value, order: list[int]) -> Value:
    found: Value = value if order == sorted(order) else build.permute(value, dims=tuple(order))
    return found
