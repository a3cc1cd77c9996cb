"""Bonds that are there to stay: values that a pass made narrow on purpose, because they are kept between runs.

    y = up (down x)        down: r from n, up: m from r; a cache holds the r numbers of ``down x`` for each position

Where r (m + n) is more than m n, their product has fewer parameters and MACs than the two maps, and multiplying them
would undo what was asked for: the cache would hold m numbers again. So the pass that writes such a pair notes it on the
node that makes the bond, and this is the one rule about it: no rewriting does away with a noted bond. A value of its
shape may take its place, and is noted in turn. What is a state or an output needs no note, since rewriting leaves those
as they are. A file does not hold the note: give a decoder its cache before it is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from regauge.ir.graph import Node, Value

BOND = "regauge.bond"  # of a node: what the bond is kept for


def keep_bond(value: Value, why: str) -> None:
    """Note that a value, the only result of a node, is to stay as narrow as it is."""
    if value.producer is not None:
        value.producer.metadata[BOND] = why


def hand_bonds_on(matched: Iterable[Node], olds: Sequence[Value], news: Sequence[Any], added: Sequence[Node]) -> str:
    """Note bonds among nodes that a rewrite takes away on what takes their place.

    ``olds`` are the results that are replaced by ``news``, and ``added`` the nodes that were built. Returns why the
    rewrite must not be done, "" where it may.
    """
    removed = [node for node in matched if len(node.outputs) == 1]
    for node in removed:
        if BOND not in node.metadata:
            continue
        value, heir = node.output, None
        if value in olds:
            new = news[olds.index(value)]
            heir = new.producer if isinstance(new, Value) else None
        elif any(reader not in removed for reader in value.consumers()):
            continue  # it stays, for what else reads it
        else:
            heir = next((own for own in added if any(made.shape == value.shape for made in own.outputs)), None)
            if heir is None:
                return f"{node.name} is as narrow as it is for {node.metadata[BOND]}"
        if heir is not None:
            heir.metadata.setdefault(BOND, node.metadata[BOND])
    return ""
