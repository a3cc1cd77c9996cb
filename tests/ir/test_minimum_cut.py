"""Minimum cuts: those that networkx finds."""

import random

import networkx
import pytest

from regauge.ir.minimum_cut import Network


@pytest.mark.parametrize("seed", range(60))
def test_cuts_are_those_of_networkx(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randrange(3, 14)
    theirs: networkx.DiGraph[int] = networkx.DiGraph()
    theirs.add_nodes_from(range(count))
    edges = {tuple(chance.sample(range(count), 2)) for _ in range(chance.randrange(1, 40))}
    ours = Network()
    for start, end in sorted(edges):
        if chance.random() < 0.2 and start != 0 and end != count - 1:
            theirs.add_edge(start, end)
            ours.add(start, end)
        else:
            price = chance.randrange(1, 9)
            theirs.add_edge(start, end, capacity=price)
            ours.add(start, end, 1)
            ours.add(start, end, price - 1)
    named = {node for edge in edges for node in edge} | {0, count - 1}
    _, (side, _) = networkx.minimum_cut(theirs, 0, count - 1)
    assert ours.source_side(0, count - 1) == side & named
