"""Attention over rounded blocks (:mod:`regauge.passes.decoding.recent`) step by step.

    states   codes of the full blocks; keys and values of the block that is not full yet, as they are
    step     those and the new ones side by side; whatever has become full is rounded; the rest is handed out

How many positions there are behind is block * blocks + rest, and both are sizes of states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.sizes.expressions import Size, floor_divide, simplify
from regauge.passes.decoding.block_ranges import BlockCoder
from regauge.passes.decoding.recent import Recent, attend, in_a_row, in_blocks, recent_mask, recent_of


def only_for_recent(nodes: list[Node]) -> set[Node]:
    """The nodes that round blocks and lay them beside what is not rounded: steps compute that in another way."""
    own = {node: recent for node in nodes if (recent := recent_of(node)) is not None}
    plain = {value for node in own for value in plain_operands(node)}
    sources = {recent.source for recent in own.values()}
    plain |= {value for node in nodes for value in node.outputs if value.name in sources}
    waiting = [operand for node in own for operand in node.inputs[1:3]]
    found: set[Node] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Value) and value not in plain and value.producer is not None:
            if value.producer not in found:
                found.add(value.producer)
                waiting += value.producer.inputs
    return found


def plain_operands(node: Node) -> tuple[Value, Value]:
    """The keys and the values as they are."""
    found = []
    for slot in (1, 2):
        joined = node.inputs[slot]
        assert isinstance(joined, Value) and joined.producer is not None and joined.producer.op == "concat"
        plain = joined.producer.inputs[-1]
        assert isinstance(plain, Value)
        found.append(plain)
    return found[0], found[1]


class RecentSteps:
    """Writes the steps of all such attentions of a graph; ``kept`` takes pairs of states, handed in and handed out."""

    def __init__(
        self, build: Builder, recent: Recent, blocks: Any, rest: Any, length: Any, turned: Callable[..., Value]
    ) -> None:
        """``turned(value, source, given)`` is a value at all positions, where its source at these is what is given."""
        self.build, self.block, self.turned = build, recent.block, turned
        self.blocks, self.rest, self.length = blocks, rest, length
        self.past = simplify(blocks * self.block + rest)
        self.full = floor_divide(rest + length, self.block)  # blocks that become full in this run
        self.kept: list[tuple[Value, Value]] = []
        self._mask: Value | None = None

    def write(self, node: Node, recent: Recent, names: tuple[str, str]) -> Value:
        query = node.inputs[0]
        assert isinstance(query, Value)
        plain = plain_operands(node)
        kept = recent.kept(self.build.graph, *plain)
        parts = zip(plain, kept, recent.coders(self.build.graph, *kept), names, strict=True)
        read = [self._all(*part) for part in parts]
        if self._mask is None:
            start, end = simplify(self.blocks * self.block), simplify(self.past + self.length)
            self._mask = recent_mask(
                self.build, self.block, simplify(self.blocks + self.full), (self.past, end), (start, end)
            )
        return attend(self.build, node, query, read[0], read[1], self._mask)

    def _all(self, x: Value, own: Value, coder: BlockCoder, name: str) -> Value:
        """The full blocks as they are given back, and behind them the block that was not full, and what is new."""
        build, axis, count = self.build, own.rank - 2, simplify(self.full * self.block)
        before = build.input(f"{name}.recent", self._with(own.shape, axis, self.rest), own.dtype)
        joined = build.concat(before, own, dim=axis)
        rest = build.slice(joined, dim=axis, start=count, end=simplify(self.rest + self.length))
        self.kept.append((before, rest))
        new = in_blocks(build, build.slice(joined, dim=axis, start=0, end=count), self.block, self.full)
        parts = []
        for number, code in enumerate(coder.codes(build, new)):
            place = code.rank - 3
            old = build.input(f"{name}.{number}", self._with(code.shape, place, self.blocks), code.dtype)
            parts.append(build.concat(old, code, dim=place))
            self.kept.append((old, parts[-1]))
        left = in_a_row(build, coder.back(build, tuple(parts), int(own.shape[-1])), own)
        if own is not x:
            left, joined = self._turned(x, own, left, joined, rest)
        return build.concat(left, joined, dim=x.rank - 2)  # type: ignore[no-any-return]

    def _turned(self, x: Value, own: Value, left: Value, joined: Value, rest: Value) -> tuple[Value, Value]:
        """Keys of the full blocks, and those that are as they were, computed from what is kept of them."""
        build, axis, start = self.build, own.rank - 2, simplify(self.blocks * self.block)
        past = build.slice(left, dim=axis, start=0, end=start)
        full = self.turned(x, own, build.concat(left, rest, dim=axis))
        whole = self.turned(x, own, build.concat(past, joined, dim=axis))
        end = simplify((self.blocks + self.full) * self.block)
        recent = build.slice(whole, dim=x.rank - 2, start=start, end=simplify(self.past + self.length))
        return build.slice(full, dim=x.rank - 2, start=0, end=end), recent

    @staticmethod
    def _with(shape: tuple[Size, ...], axis: int, size: Size) -> list[Size]:
        return [size if place == axis else own for place, own in enumerate(shape)]
