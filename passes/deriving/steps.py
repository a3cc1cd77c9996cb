"""The steps from a state of a search to others: contractions, convolutions, shifted sums, ranges, common factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

from regauge.passes.deriving.expressions import Expression, Factor, Index, Window
from regauge.passes.deriving.sources import (
    Contracted,
    Convolved,
    Gathered,
    Leaf,
    Product,
    Shifted,
    Source,
    State,
    Tensor,
    Unfolded,
    places_of,
    range_of,
    turned,
    window_ends,
)


class Steps:
    """Steps between states of one expression; ``seconds`` says what a source costs."""

    def __init__(self, expression: Expression, seconds: Callable[[Source], float]) -> None:
        self.result = {index for axis in expression.axes for index in axis}
        self._seconds = seconds
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

    # -- steps -------------------------------------------------------------------------------------------------------

    def after(self, state: State) -> Iterator[State]:
        """The states that are one step away."""
        for place, (scale, tensors) in enumerate(state.terms):
            for made, rest in self._made(tensors):
                yield self._after(state, {place: (scale, (*rest, made))}, made.source)
        for first, second in combinations(range(len(state.terms)), 2):
            yield from self._gathers(state, first, second)

    def _made(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """What some factors of a term may become together, and the other factors."""
        for pair in self._pairs(tensors):
            given = [tensors[number] for number in pair]
            rest = tuple(tensor for number, tensor in enumerate(tensors) if number not in pair)
            window = next((tensor for tensor in given if isinstance(places_of(tensor), Window)), None)
            if window is not None:
                (tensor,) = [tensor for tensor in given if tensor is not window]
                ways = [self._shifted(tensor, window, rest), self._unfolded(tensor, window, rest)]
            else:
                ways = [self._contracted(given, rest)]
            for made in ways:
                if made is not None:
                    yield made, rest
        whole = [tensor for tensor in tensors if places_of(tensor) is None]
        if any(isinstance(places_of(tensor), Window) for tensor in tensors):
            for x, kernel in permutations(whole, 2):
                yield from self._convolved(x, kernel, [one for one in tensors if one is not x and one is not kernel])

    def _pairs(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Tensors to contract: pairs that share an index, where there are any; a single one to be summed."""
        if len(tensors) == 1:
            return [(0,)] if not self.result.issuperset(tensors[0].indices) else []
        pairs = list(combinations(range(len(tensors)), 2))
        pairs = [(a, b) for a, b in pairs if places_of(tensors[a]) is None or places_of(tensors[b]) is None]
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

    # -- windows -----------------------------------------------------------------------------------------------------

    def _convolved(
        self, x: Tensor, kernel: Tensor, rest: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """A kernel moved over a tensor, in windows that lie between both; forwards, or transposed."""
        for spread in (False, True):
            between = [tensor for tensor in rest if _between(x, kernel, tensor, spread=spread)]
            for count in range(1, len(between) + 1):
                for windows in combinations(between, count):
                    others = tuple(tensor for tensor in rest if not any(tensor is window for window in windows))
                    made = self._moved(x, kernel, windows, others, spread=spread)
                    if made is not None:
                        yield made, others

    def _moved(
        self, x: Tensor, kernel: Tensor, windows: tuple[Tensor, ...], others: Sequence[Tensor], *, spread: bool
    ) -> Tensor | None:
        """A kernel moved over a tensor in these windows; None where something else has what is summed."""
        needed = self.result.union(*(tensor.indices for tensor in others))
        ends = [turned(window, spread=spread) for window in windows]
        made = [end for _, end, _ in ends]
        gone = {index for own, _, tap in ends for index in (own, tap)}
        if gone & needed or not needed.issuperset(made):
            return None
        every = dict.fromkeys((*x.indices, *kernel.indices, *made))
        kept = tuple(index for index in every if index in needed and index is not None)
        return self._tensor(Convolved(x, kernel, windows, spread, kept), (x, kernel, *windows), spread)

    def _shifted(self, tensor: Tensor, window: Tensor, rest: Iterable[Tensor]) -> Tensor | None:
        """The taps of a tensor added up, each from its place; None where something else has what is summed."""
        needed, places = self.result.union(*(other.indices for other in rest)), places_of(window)
        assert isinstance(places, Window)
        for spread in (False, True):
            own, made, tap = turned(window, spread=spread)
            fits = tap is not None and own is not None and made is not None and {own, tap} <= set(tensor.indices)
            if not fits or made in tensor.indices or made not in needed or {own, tap} & needed:
                continue
            if spread and places.stride > 1 and places.dilation > 1:
                continue
            kept = tuple(made if index is own else index for index in tensor.indices if index is not tap)
            return self._tensor(Shifted(tensor, window, spread, kept), (tensor, window), spread)
        return None

    def _unfolded(self, tensor: Tensor, window: Tensor, rest: Sequence[Tensor]) -> Tensor | None:
        """What a window reads of a tensor, where another window is left that a convolution may be over."""
        needed = self.result.union(*(other.indices for other in rest))
        wide, out, tap = window_ends(window)
        others = any(isinstance(places_of(other), Window) for other in rest)
        if not others or wide not in tensor.indices or wide in needed or tap is None or out is None:
            return None
        if {out, tap} & set(tensor.indices) or not {out, tap} <= needed or not isinstance(tensor.source, Leaf):
            return None
        at = tensor.indices.index(wide)
        kept = (*tensor.indices[:at], tap, out, *tensor.indices[at + 1 :])
        return self._tensor(Unfolded(tensor, window, kept), (tensor, window), False)

    def _tensor(self, source: Convolved | Shifted | Unfolded, read: Sequence[Tensor], spread: bool) -> Tensor:
        """A source as a tensor; where the same is computed already along other indices it is that one."""
        number: dict[Index, int] = {}
        for tensor in read:
            for index in tensor.indices:
                number.setdefault(index, len(number))
        pattern = tuple((tensor.source, tuple(number[i] for i in tensor.indices)) for tensor in read)
        key = (type(source), spread, pattern, tuple(number[index] for index in source.kept))
        return Tensor(self._sources.setdefault(key, source), source.kept)

    # -- common factors ----------------------------------------------------------------------------------------------

    def _gathers(self, state: State, first: int, second: int) -> Iterator[State]:
        """Both terms as one, for all factors that they share, where the rest of both is one tensor."""
        (scale, tensors), (other_scale, others) = state.terms[first], state.terms[second]
        if len(tensors) != len(others) or len(tensors) < 2:
            return
        for rest in tensors:
            common = tuple(tensor for tensor in tensors if tensor is not rest)
            for other_rest in others:
                new = self._renamed(common, tuple(tensor for tensor in others if tensor is not other_rest), {})
                if new is None or places_of(rest) is not None or places_of(other_rest) is not None:
                    continue
                moved = Tensor(other_rest.source, tuple(new.get(index, index) for index in other_rest.indices))
                apart = set(moved.indices) ^ set(rest.indices)
                if not apart <= self.result.union(*(tensor.indices for tensor in common)):
                    continue  # what one of both sums over alone
                kept = tuple(dict.fromkeys((*rest.indices, *moved.indices)))
                made = Gathered(((1.0, rest), (other_scale / scale, moved)), kept)
                source = self._sources.setdefault(self._sum_key(made), made)
                merged = (scale, (*common, Tensor(source, made.kept)))
                yield self._after(state, {first: merged, second: None}, source)

    def _renamed(
        self, tensors: Sequence[Tensor], others: Sequence[Tensor], new: dict[Index, Index]
    ) -> dict[Index, Index] | None:
        """Which indices of the others are which, where they are the same sources; None where they are not."""
        if not tensors:
            return new
        for other in others:
            if tensors[0].source is not other.source:
                continue
            pairs = list(zip(tensors[0].indices, other.indices, strict=True))
            if all(new.get(b, a) is a and (a is b or not {a, b} & self.result) for a, b in pairs):
                rest = [tensor for tensor in others if tensor is not other]
                found = self._renamed(tensors[1:], rest, {**new, **{b: a for a, b in pairs}})
                if found is not None:
                    return found
        return None

    def _sum_key(self, made: Gathered) -> Any:
        number = {index: place for place, index in enumerate(made.kept)}
        return tuple((scale, tensor.source, tuple(number[i] for i in tensor.indices)) for scale, tensor in made.parts)

    def _after(self, state: State, changes: dict[int, Product | None], source: Source) -> State:
        terms = [changes.get(place, term) for place, term in enumerate(state.terms)]
        seconds = state.seconds + (0.0 if source in state.computed else self._seconds(source))
        return State(tuple(term for term in terms if term is not None), state.computed | {source}, seconds)


def _between(x: Tensor, kernel: Tensor, window: Tensor, *, spread: bool) -> bool:
    """Whether a window takes a kernel over ``x``: that has what it reads, the kernel its taps, none what it gives."""
    if not isinstance(places_of(window), Window):
        return False
    own, made, tap = turned(window, spread=spread)
    if own not in x.indices or own in kernel.indices or made is None or made in (*x.indices, *kernel.indices):
        return False
    return tap is None or (tap in kernel.indices and tap not in x.indices)
