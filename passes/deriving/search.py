"""The cheapest way to compute an expression: best-first search over contractions and common factors.

    a state    terms that are products of tensors: values, and what was computed before
    contract   two tensors of a term become one, summed over what nothing else has  (a stage is split)
    range      a tensor and a range: zeros are put around it, or a part is taken    (a range is relaxed, or tightened)
    gather     a b + a c becomes a (b + c), where b and c are single tensors
    a goal     every term is one tensor with no index but those of the result

What two terms contract alike is computed once. A step costs what a roofline of the device says of it; states that cost
as much as the best way that is known are left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from typing import Any, TypeAlias

from regauge.ir.cost import item_size
from regauge.ir.dtypes import Dtype
from regauge.ir.graph import Value
from regauge.ir.roofline import Device
from regauge.ir.sizes.expressions import Size, product
from regauge.passes.deriving.expressions import Axes, Expression, Factor, Index, Range


@dataclass(frozen=True)
class Tensor:
    """A source, read along these indices: the source says how many they are, and a term which."""

    source: Source
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A value of the graph, or a range, its axes taken apart into the indices of ``axes``."""

    value: Value | Range
    axes: Axes


def range_of(tensor: Tensor | None) -> Range | None:
    """The range that a tensor stands for; None of others."""
    source = None if tensor is None else tensor.source
    return source.value if isinstance(source, Leaf) and isinstance(source.value, Range) else None


@dataclass(frozen=True, eq=False)
class Contracted:
    """The product of two tensors, with the indices ``kept``; all others are summed."""

    left: Tensor
    right: Tensor | None  # None: a sum of one
    kept: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Gathered:
    """A sum of tensors, each with its scale, along the indices ``kept``."""

    parts: tuple[tuple[float, Tensor], ...]
    kept: tuple[Index, ...]


Source: TypeAlias = Leaf | Contracted | Gathered
Product: TypeAlias = tuple[float, tuple[Tensor, ...]]
Products: TypeAlias = tuple[Product, ...]


@dataclass(frozen=True)
class State:
    """Terms, what was computed for them, and the predicted seconds of that."""

    terms: Products
    computed: frozenset[Source]
    seconds: float


@dataclass(frozen=True)
class Found:
    """The cheapest terms that were found, each one tensor; how many states were looked at, and if all were."""

    terms: Products
    seconds: float
    states: int
    complete: bool


class Search:
    """Searches one expression. ``budget`` is a number of states, ``until`` a time of :func:`time.perf_counter`."""

    def __init__(
        self, expression: Expression, bound: Callable[[Size], int], device: Device, dtype: Dtype, limit: Limit
    ) -> None:
        self.bound, self.device, self.limit = bound, device, limit
        self.item = item_size(dtype)
        self.result = {index for axis in expression.axes for index in axis}
        self._sources: dict[Any, Source] = {}
        terms = [(term.scale, tuple(map(self._leaf, term.factors))) for term in expression.terms]
        self.start = State(tuple(terms), frozenset(), 0.0)

    def _leaf(self, factor: Factor) -> Tensor:
        """A value; read the same way along other indices it is the same source."""
        indices = tuple(index for axis in factor.axes for index in axis)
        shape = tuple(tuple(index.size for index in axis) for axis in factor.axes)
        pattern = tuple(indices.index(index) for index in indices)
        source = self._sources.setdefault((factor.value, shape, pattern), Leaf(factor.value, factor.axes))
        return Tensor(source, indices)

    # -- search ------------------------------------------------------------------------------------------------------

    def run(self, at_most: float) -> Found | None:
        """The cheapest way that takes less than so many seconds; None where none is found."""
        best, least = None, at_most
        for state in [self.start, *self._next(self.start)]:
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
            for following in self._next(state):
                cost = self._ended(following).seconds if self._done(following) else following.seconds
                if cost < least:
                    heapq.heappush(heap, (cost, next(order), following))
        complete = not heap or heap[0][0] >= least
        return None if best is None else Found(best.terms, best.seconds, states, complete)

    def _greedy(self, state: State) -> State | None:
        """What always taking the cheapest step ends in."""
        while not self._done(state):
            state = min(self._next(state), key=lambda following: following.seconds, default=None)  # type: ignore[assignment]
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
        whole = float(product(self.bound(index.size) for index in self.result)) * self.item
        passes = len(state.terms) - 1 + sum(scale != 1 for scale, _ in state.terms)
        each = self.device.overhead + 3 * whole / self.device.bandwidth
        return State(state.terms, state.computed, state.seconds + passes * each)

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

    # -- steps -------------------------------------------------------------------------------------------------------

    def _next(self, state: State) -> Iterator[State]:
        for place, (scale, tensors) in enumerate(state.terms):
            for pair in self._pairs(tensors):
                rest = tuple(tensor for number, tensor in enumerate(tensors) if number not in pair)
                made = self._contracted([tensors[number] for number in pair], rest)
                if made is not None:
                    yield self._after(state, {place: (scale, (*rest, made))}, made.source)
        for first, second in combinations(range(len(state.terms)), 2):
            yield from self._gathers(state, first, second)

    def _pairs(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Tensors to contract: pairs that share an index, where there are any; a single one to be summed."""
        if len(tensors) == 1:
            return [(0,)] if not self.result.issuperset(tensors[0].indices) else []
        pairs = list(combinations(range(len(tensors)), 2))
        pairs = [(a, b) for a, b in pairs if range_of(tensors[a]) is None or range_of(tensors[b]) is None]
        sharing = [(a, b) for a, b in pairs if set(tensors[a].indices) & set(tensors[b].indices)]
        return [*(sharing or pairs)]

    def _contracted(self, tensors: Sequence[Tensor], rest: Iterable[Tensor]) -> Tensor | None:
        """The product of one or two tensors, summed over indices that neither the result nor another factor has.

        With a range one of its indices is exchanged for the other; None where another factor has that one as well.
        """
        needed = self.result.union(*(tensor.indices for tensor in rest))
        tensors = sorted(tensors, key=lambda tensor: range_of(tensor) is not None)
        if range_of(tensors[-1]) is not None:
            ends, own = set(tensors[-1].indices), set(tensors[0].indices)
            if len(tensors) == 1 or len(ends & own) != 1 or ends & needed != ends - own:
                return None
        every = tuple(dict.fromkeys(index for tensor in tensors for index in tensor.indices))
        kept = tuple(index for index in every if index in needed)
        number = {index: place for place, index in enumerate(every)}
        pattern = tuple((tensor.source, tuple(number[i] for i in tensor.indices)) for tensor in tensors)
        made = Contracted(tensors[0], tensors[1] if len(tensors) > 1 else None, kept)
        source = self._sources.setdefault((pattern, tuple(number[index] for index in kept)), made)
        return Tensor(source, kept)

    def _gathers(self, state: State, first: int, second: int) -> Iterator[State]:
        """Both terms as one, for each tensor that they share, where the rest of both is one tensor."""
        (scale, tensors), (other_scale, others) = state.terms[first], state.terms[second]
        if len(tensors) != 2 or len(others) != 2:
            return
        for common, rest in (tensors, tensors[::-1]):
            for other_common, other_rest in (others, others[::-1]):
                new = self._renamed(common, other_common)
                if new is None or range_of(rest) is not None or range_of(other_rest) is not None:
                    continue
                moved = Tensor(other_rest.source, tuple(new.get(index, index) for index in other_rest.indices))
                apart = set(moved.indices) ^ set(rest.indices)
                if not apart <= self.result.union(common.indices):  # what one of both sums over alone
                    continue
                kept = tuple(dict.fromkeys((*rest.indices, *moved.indices)))
                made = Gathered(((1.0, rest), (other_scale / scale, moved)), kept)
                source = self._sources.setdefault(self._sum_key(made), made)
                merged = (scale, (common, Tensor(source, made.kept)))
                yield self._after(state, {first: merged, second: None}, source)

    def _renamed(self, tensor: Tensor, other: Tensor) -> dict[Index, Index] | None:
        """Which indices of the other one are which, where both are the same source; None where they are not."""
        if tensor.source is not other.source:
            return None
        pairs = list(zip(tensor.indices, other.indices, strict=True))
        stays = all(a is b or not {a, b} & self.result for a, b in pairs)
        return {b: a for a, b in pairs} if stays else None

    def _sum_key(self, made: Gathered) -> Any:
        number = {index: place for place, index in enumerate(made.kept)}
        return tuple((scale, tensor.source, tuple(number[i] for i in tensor.indices)) for scale, tensor in made.parts)

    def _after(self, state: State, changes: dict[int, Product | None], source: Source) -> State:
        terms = [changes.get(place, term) for place, term in enumerate(state.terms)]
        seconds = state.seconds + (0.0 if source in state.computed else self._seconds(source))
        return State(tuple(term for term in terms if term is not None), state.computed | {source}, seconds)

    # -- costs -------------------------------------------------------------------------------------------------------

    def _bytes(self, indices: Iterable[Index]) -> float:
        return float(product(self.bound(index.size) for index in indices)) * self.item

    def _seconds(self, source: Source) -> float:
        if isinstance(source, Leaf):
            return 0.0
        if isinstance(source, Gathered):
            read = [tensor for _, tensor in source.parts]
            macs = 0.0
        else:
            read = [tensor for tensor in (source.left, source.right) if tensor is not None]
            every = {index for tensor in read for index in tensor.indices}
            summed = every - set(source.kept)
            macs = float(product(self.bound(index.size) for index in every)) if summed and len(read) > 1 else 0.0
            if range_of(source.right) is not None:  # entries are moved: all of the smaller tensor are read
                each = [self._bytes(source.left.indices), self._bytes(source.kept)]
                return self.device.overhead + (min(each) + each[1]) / self.device.bandwidth
        moved = sum(self._bytes(tensor.indices) for tensor in read) + self._bytes(source.kept)
        return self.device.overhead + max(2 * macs / self.device.flops, moved / self.device.bandwidth)


@dataclass(frozen=True)
class Limit:
    """How long a search may go on: a number of states for each expression, and a time for all of them."""

    states: int
    until: float
