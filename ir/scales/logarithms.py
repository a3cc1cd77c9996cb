"""Positive scales under products: a weighted union-find over logarithms, and the linear relations left beside it.

An unknown is a scale s > 0, and a relation says of powers of some that their product is one: sum p_i log s_i = 0. One
of a single scale fixes it at 1, one of two makes one a power of the other, log s_a = p log s_b, which the union-find
holds. What is left has three and more, a product of activations or with a weight, and is solved by elimination, in
which scales that occur in a single relation go first: nearly all weights, so that what remains is small.

Relations are homogeneous, since it is asked how scales may be moved from where they are; where a number multiplies, the
number stays in the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Powers = dict[Key, Fraction]


@dataclass
class LogScales(Generic[Key]):
    """Unknown scales and what relates them; see the module docstring.

    ``fixed`` holds the roots whose scale can only be 1, each with who said it last.
    """

    fixed: dict[Key, str] = field(default_factory=dict)
    _parent: dict[Key, tuple[Key, Fraction]] = field(default_factory=dict)
    _ranks: dict[Key, int] = field(default_factory=dict)
    _relations: list[tuple[Mapping[Key, Fraction], str]] = field(default_factory=list)

    def find(self, key: Key) -> tuple[Key, Fraction]:
        """The root of a scale, and its power: log s = power * log s_root."""
        path: list[tuple[Key, Fraction]] = []
        while (up := self._parent.get(key)) is not None:
            path.append((key, up[1]))
            key = up[0]
        power = Fraction(1)
        for below, own in reversed(path):
            power *= own
            self._parent[below] = (key, power)
        return key, power

    def fix(self, key: Key, by: str) -> None:
        self.fixed[self.find(key)[0]] = by

    def relate(self, powers: Mapping[Key, Fraction | int], by: str = "") -> None:
        """Say that the product of scales to these powers is one; ``by`` are words for who says it."""
        found = self._reduced(powers)
        match len(found):
            case 0:
                return
            case 1:
                self.fixed.update(dict.fromkeys(found, by))
            case 2:
                (a, p), (b, q) = found.items()
                self._unite(a, b, -q / p)
            case _:
                self._relations.append((found, by))

    def _reduced(self, powers: Mapping[Key, Fraction | int]) -> Powers[Key]:
        """A relation in terms of roots that are not fixed."""
        result: Powers[Key] = {}
        for key, power in powers.items():
            root, own = self.find(key)
            if root not in self.fixed:
                result[root] = result.get(root, Fraction(0)) + power * own
        return {root: power for root, power in result.items() if power}

    def _unite(self, a: Key, b: Key, power: Fraction) -> None:
        """Let log s_a = power * log s_b, of two roots."""
        if self._ranks.get(a, 0) > self._ranks.get(b, 0):
            a, b, power = b, a, 1 / power
        self._parent[a] = (b, power)
        self._ranks[b] = max(self._ranks.get(b, 0), self._ranks.get(a, 0) + 1)

    def settle(self) -> None:
        """Reduce the relations until none of them has fewer than three scales."""
        count = -1
        while count != len(self._relations):
            count, relations = len(self._relations), self._relations
            self._relations = []
            for relation, by in relations:
                self.relate(relation, by)

    def freedom(self, keys: Iterable[Key], yields: Callable[[Key], bool]) -> dict[Key, Powers[Key]]:
        """The ways in which scales may be moved: by root, the powers in which others follow.

        ``keys`` are all roots to ask about, and those that ``yields`` says follow others where they can. A root that
        follows has no way of its own.
        """
        self.settle()
        pivots, rows = self._eliminated(yields)
        place = {pivot: number for number, pivot in enumerate(pivots)}
        readers: dict[Key, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            for key in row:
                readers[key].append(number)
        return {
            key: _followed(key, pivots, rows, readers)
            for key in keys
            if key not in place and key not in self.fixed and self.find(key)[0] == key
        }

    def _eliminated(self, yields: Callable[[Key], bool]) -> tuple[list[Key], list[Powers[Key]]]:
        """Pivots and rows: log s_pivot = sum of the row, in which no pivot occurs that comes later in the lists."""
        pivots, rows, rest = self._peeled(yields)
        expressed: dict[Key, Powers[Key]] = {}
        for relation in rest:
            solved: Powers[Key] = {}
            for key, power in relation.items():
                for other, own in expressed.get(key, {key: Fraction(1)}).items():
                    solved[other] = solved.get(other, Fraction(0)) + power * own
            solved = {key: power for key, power in solved.items() if power}
            if not solved:
                continue
            pivot = next((key for key in solved if yields(key)), next(reversed(solved)))
            row = {key: -power / solved[pivot] for key, power in solved.items() if key != pivot}
            for other, own_row in expressed.items():
                if pivot in own_row:
                    expressed[other] = _substituted(own_row, pivot, row)
            expressed[pivot] = row
        return [*expressed, *reversed(pivots)], [*expressed.values(), *reversed(rows)]

    def _peeled(
        self, yields: Callable[[Key], bool]
    ) -> tuple[list[Key], list[Powers[Key]], list[Mapping[Key, Fraction]]]:
        """Relations of which a yielding scale occurs in no other are solved for it, and that again and again."""
        relations = [relation for relation, _ in self._relations]
        places: dict[Key, set[int]] = defaultdict(set)
        for number, relation in enumerate(relations):
            for key in relation:
                places[key].add(number)
        stack = [key for key in places if yields(key) and len(places[key]) == 1]
        pivots: list[Key] = []
        rows: list[Powers[Key]] = []
        gone: set[int] = set()
        while stack:
            pivot = stack.pop()
            if len(places[pivot]) != 1:
                continue
            (number,) = places[pivot]
            relation = relations[number]
            pivots.append(pivot)
            rows.append({key: -power / relation[pivot] for key, power in relation.items() if key != pivot})
            gone.add(number)
            for key in relation:
                places[key].discard(number)
                if len(places[key]) == 1 and yields(key):
                    stack.append(key)
        return pivots, rows, [relation for number, relation in enumerate(relations) if number not in gone]


def _substituted(row: Powers[Key], key: Key, by: Mapping[Key, Fraction]) -> Powers[Key]:
    power = row[key]
    result = {other: own for other, own in row.items() if other != key}
    for other, own in by.items():
        result[other] = result.get(other, Fraction(0)) + power * own
    return {other: own for other, own in result.items() if own}


def _followed(key: Key, pivots: list[Key], rows: list[Powers[Key]], readers: Mapping[Key, list[int]]) -> Powers[Key]:
    """What follows where one free scale is moved, itself with the power 1; only rows that it reaches are looked at."""
    result = {key: Fraction(1)}
    waiting: list[int] = []
    seen: set[int] = set()
    for number in readers.get(key, ()):
        heappush(waiting, number)
    while waiting:
        number = heappop(waiting)
        if number in seen:
            continue
        seen.add(number)
        power = sum((own * result[k] for k, own in rows[number].items() if k in result), Fraction(0))
        if power:
            result[pivots[number]] = power
            for later in readers.get(pivots[number], ()):
                heappush(waiting, later)
    return result
