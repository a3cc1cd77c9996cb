"""The cheapest way to part a network in two: Dinic's algorithm (Dokl. Akad. Nauk SSSR 194, 1970)."""

from __future__ import annotations

from collections.abc import Hashable

NEVER = 1 << 60  # the price of an edge that must not be cut


class Network:
    """Nodes and edges with prices; an edge costs its price where it leads from the side of the source to the other."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}
        self._edges: list[dict[int, int]] = []  # what each edge may still carry, by start and end

    def add(self, start: Hashable, end: Hashable, price: int = NEVER) -> None:
        """An edge; prices of edges between the same nodes add up."""
        one, other = self._place(start), self._place(end)
        self._edges[one][other] = min(NEVER, self._edges[one].get(other, 0) + price)
        self._edges[other].setdefault(one, 0)

    def _place(self, node: Hashable) -> int:
        place = self._places.setdefault(node, len(self._edges))
        if place == len(self._edges):
            self._edges.append({})
        return place

    def source_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The nodes on the side of the source of the cheapest cut; of cuts of one price the one nearest to the sink.

        The prices are used up by it. Every path from the source to the sink must have an edge that may be cut.
        """
        start, end = self._place(source), self._place(sink)
        while True:
            steps = self._steps_to(end)
            if start not in steps:
                return {node for node, place in self._places.items() if place not in steps}
            ways = [self._ways(here, steps) for here in range(len(self._edges))]
            while self._push(start, end, ways):
                pass

    def _steps_to(self, end: int) -> dict[int, int]:
        """How many edges that can carry more lead from each node to an end; nodes without a way to it are left out."""
        steps, row = {end: 0}, [end]
        for place in row:
            for before in self._edges[place]:
                if before not in steps and self._edges[before][place]:
                    steps[before] = steps[place] + 1
                    row.append(before)
        return steps

    def _ways(self, here: int, steps: dict[int, int]) -> list[int]:
        """The nodes behind a node that are one step nearer to the end."""
        return [there for there in self._edges[here] if here in steps and steps.get(there) == steps[here] - 1]

    def _push(self, start: int, end: int, ways: list[list[int]]) -> bool:
        """Send as much as fits along one shortest path, and drop ways that lead nowhere; whether there was a path."""
        path = [start]
        while path[-1] != end:
            here = path[-1]
            while ways[here] and not self._edges[here][ways[here][-1]]:
                ways[here].pop()
            if ways[here]:
                path.append(ways[here][-1])
                continue
            path.pop()
            if not path:
                return False
            ways[path[-1]].pop()
        pairs = list(zip(path, path[1:], strict=False))
        amount = min(self._edges[one][other] for one, other in pairs)
        for one, other in pairs:
            self._edges[one][other] -= amount
            self._edges[other][one] += amount
        return True
