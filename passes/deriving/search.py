"""The cheapest way to compute an expression: best-first search over contractions and common factors.

    a state    terms that are products of tensors: values, and what was computed before
    contract   two tensors of a term become one, summed over what nothing else has  (a stage is split)
    unfold     a tensor and a window: what each tap reads lies side by side         (the wide index is split)
    convolve   two tensors and the windows between them become one                  (a stage is matched to an operator)
    shift      a tensor and a window: its taps are added up, each from its place    (offset add, selective add)
    range      a tensor and a range: zeros are put around it, or a part is taken    (a range is relaxed, or tightened)
    gather     a b + a c becomes a (b + c), where b and c are single tensors
    a goal     every term is one tensor with no index but those of the result

What two terms contract alike is computed once. A step costs what a roofline of the device says of it; states that cost
as much as the best way that is known are left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from regauge.ir.cost import item_size
from regauge.ir.dtypes import Dtype
from regauge.ir.sizes.expressions import product
from regauge.passes.deriving.costs import Call, Costs
from regauge.passes.deriving.expressions import Expression, Index, Window
from regauge.passes.deriving.sources import (
    Contracted,
    Convolved,
    Leaf,
    Product,
    Products,
    Shifted,
    Source,
    State,
    Unfolded,
    biases,
    is_part,
    places_of,
    range_of,
    read_by,
    turned,
)
from regauge.passes.deriving.steps import Steps


@dataclass(frozen=True)
class Found:
    """The cheapest terms that were found, each one tensor; how many states were looked at, and if all were."""

    terms: Products
    seconds: float
    states: int
    complete: bool


class Search:
    """Searches one expression. ``budget`` is a number of states, ``until`` a time of :func:`time.perf_counter`."""

    def __init__(self, expression: Expression, costs: Costs, dtype: Dtype, limit: Limit) -> None:
        self.costs, self.limit = costs, limit
        self.item = item_size(dtype)
        self.steps = Steps(expression, self._seconds)
        self.start, self.result = self.steps.start, self.steps.result

    # -- search ------------------------------------------------------------------------------------------------------

    def run(self, at_most: float) -> Found | None:
        """The cheapest way that takes less than so many seconds; None where none is found."""
        best, least = None, at_most
        for state in [self.start, *self.steps.after(self.start)]:
            end = self._greedy(state)
            if end is not None and end.seconds < least:
                best, least = end, end.seconds
        order, seen, states = count(), set[Any](), 0
        heap = [(0.0, next(order), self.start)]
        while heap and heap[0][0] < least:
            if states >= self.limit.states or time.perf_counter() > self.limit.until:
                break
            seconds, _, state = heapq.heappop(heap)
            key = self._key(state)
            if key in seen:
                continue
            seen.add(key)
            states += 1
            if self._done(state):
                best, least = self._ended(state), min(least, self._ended(state).seconds)
                continue
            for following in self.steps.after(state):
                cost = self._ended(following).seconds if self._done(following) else following.seconds
                if cost < least:
                    heapq.heappush(heap, (cost, next(order), following))
        complete = not heap or heap[0][0] >= least
        return None if best is None else Found(best.terms, best.seconds, states, complete)

    def _greedy(self, state: State) -> State | None:
        """What always taking the cheapest step ends in."""
        while not self._done(state):
            state = min(self.steps.after(state), key=lambda following: following.seconds, default=None)  # type: ignore[assignment]
            if state is None:
                return None
        return self._ended(state)

    def _done(self, state: State) -> bool:
        return all(
            len(tensors) <= 1 and self.result.issuperset(i for tensor in tensors for i in tensor.indices)
            for _, tensors in state.terms
        )

    def _ended(self, state: State) -> State:
        """With the cost of adding the terms up, and of their scales."""
        whole = self._bytes(self.result)
        passes = len(state.terms) - 1 + sum(scale != 1 for scale, _ in state.terms)
        passes -= len(biases(state.terms))
        return State(state.terms, state.computed, state.seconds + passes * self.costs.moved(2 * whole, whole))

    def _key(self, state: State) -> Any:
        """Equal for states that differ in the order of terms and factors, or in which indices they sum over."""
        return frozenset(self._term_key(term) for term in state.terms), state.computed

    def _term_key(self, term: Product) -> Any:
        scale, tensors = term
        numbers: dict[Index, Any] = {}
        found = []
        for tensor in sorted(tensors, key=lambda tensor: id(tensor.source)):
            names = tuple(i if i in self.result else numbers.setdefault(i, len(numbers)) for i in tensor.indices)
            found.append((tensor.source, names))
        return scale, tuple(found)

    # -- costs -------------------------------------------------------------------------------------------------------

    def _size(self, indices: Iterable[Index]) -> float:
        return float(product(self.costs.bound(index.size) for index in indices))

    def _bytes(self, indices: Iterable[Index]) -> float:
        return self._size(indices) * self.item

    def _seconds(self, source: Source) -> float:
        costs, kept = self.costs, 0.0 if isinstance(source, Leaf) else self._bytes(source.kept)
        read = [self._bytes(tensor.indices) for tensor in read_by(source)]
        if isinstance(source, Leaf):
            return 0.0
        if isinstance(source, Shifted):
            return self._shifted(source, read[0], kept)
        if isinstance(source, Unfolded):
            _, _, tap = turned(source.window, spread=False)
            taps = self._size([tap] if tap is not None else [])
            return costs.moved(kept, kept) + 2 * taps * costs.moved(read[0], read[0])
        if isinstance(source, Convolved):
            return costs.convolution(self._call(source), sum(read) + kept)
        if isinstance(source, Contracted) and range_of(source.right) is not None:
            if is_part(source):
                return costs.start
            return costs.moved(min(read[0], kept), kept)  # entries are moved: all of the smaller tensor are read
        macs = 0.0
        if isinstance(source, Contracted) and source.right is not None:
            every = {*source.left.indices, *source.right.indices}
            macs = self._size(every) if every - set(source.kept) else 0.0
        device = costs.device
        return costs.start + max(2 * macs / device.flops, (sum(read) + kept) / device.bandwidth)

    def _call(self, source: Convolved) -> Call:
        ends = [turned(window, spread=source.spread) for window in source.windows]
        gone = {own for own, _, _ in ends}
        every = {*source.left.indices, *source.right.indices, *(made for _, made, _ in ends)} - gone
        if source.spread:
            every = {*source.left.indices, *source.right.indices}
        x, kernel, kept = set(source.left.indices), set(source.right.indices), set(source.kept)
        taps = {tap for _, _, tap in ends}
        return Call(
            macs=self._size(index for index in every if index is not None),
            columns=int(self._size(kernel - x - taps)),
            channels=int(self._size((x & kernel) - kept)),
            pixels=int(self._size(kept - kernel)),  # as many as may lie beside one another
            volume=len(ends) == 3,
            grouped=bool(x & kernel & kept),
            depthwise=not x & kernel - kept,
            spread=source.spread,
        )

    def _shifted(self, source: Shifted, read: float, kept: float) -> float:
        """Each tap is taken out and cut, with zeros where it reads nothing, and they are added up."""
        costs, window = self.costs, places_of(source.window)
        assert isinstance(window, Window)
        if source.spread and window.stride > 1:
            laps = -(-window.taps // window.stride)
            phases = costs.moved(kept, kept / costs.library.permuted) + costs.moved(kept, kept)
            return phases + (laps > 1) * laps * (3 * costs.moved(kept, kept) + costs.start)
        seconds = -costs.moved(2 * kept, kept)
        for first, low, high in window.parts(spread=source.spread):
            zeros = costs.moved(kept, kept) * (high - low < (window.wide if source.spread else window.out))
            cut = costs.moved(kept, kept) * (first > 0 or bool(zeros) or window.stride > 1)
            seconds += costs.start + cut + zeros + costs.moved(2 * kept, kept)
        return seconds


@dataclass(frozen=True)
class Limit:
    """How long a search may go on: a number of states for each expression, and a time for all of them."""

    states: int
    until: float
