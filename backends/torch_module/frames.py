"""The module hierarchy of a graph: which nodes ran inside which call of which module.

Every node carries the modules it was called under. A :class:`Frame` is one call of one module: its items are nodes and
the frames of the modules it called, in an order in which every item runs after what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import networkx

from regauge.ir.graph import Graph, Node
from regauge.ir.node_order import IN_ORDER


@dataclass(eq=False)
class Frame:
    """One call of the module at ``path``; a module that is called twice has two frames."""

    path: str
    class_name: str
    items: list[Node | Frame] = field(default_factory=list)

    def nodes(self) -> Iterator[Node]:
        for item in self.items:
            if isinstance(item, Frame):
                yield from item.nodes()
            else:
                yield item


def module_path(entry: str) -> str:
    """The module's path without the number of the call: ``layer@1`` is the second call of ``layer``."""
    return re.sub(r"@\d+", "", entry)


def scope_of(node: Node) -> tuple[tuple[str, str], ...]:
    """The modules around a node without the root, which is around every node."""
    return tuple((path, name) for path, name in node.scope if path)


def inside(path: str, parent: str) -> bool:
    """True for a path strictly below another; everything is below the root ``""``."""
    return path != parent and (not parent or path.startswith(parent + "."))


def frame_tree(graph: Graph) -> Frame:
    """The root frame of a graph."""
    return _frame("", root_class(graph), graph.nodes, 0, IN_ORDER in graph.metadata)


def root_class(graph: Graph) -> str:
    """The class of the captured module, that which a file notes as the root of its nodes, or the graph's name."""
    named = graph.metadata.get("torch", {}).get("root_class")
    noted = next((name for node in graph.nodes for path, name in node.scope if not path and name), "")
    words = re.split(r"[^A-Za-z0-9]+", str(named or noted or graph.name))
    name = "".join(word[:1].upper() + word[1:] for word in words if word)
    return name if name and not name[0].isdigit() else f"Model{name}"


def _frame(path: str, class_name: str, nodes: Sequence[Node], depth: int, in_order: bool) -> Frame:
    items: list[Node | Frame] = []
    for piece in _ordered(_pieces(nodes, depth), nodes, in_order):
        first = piece[0]
        if _key(first, depth) is None:
            items.extend(piece)
            continue
        entry, name = scope_of(first)[depth]
        items.append(_frame(module_path(entry), name, piece, depth + 1, in_order))
    return Frame(path, class_name, items)


def _key(node: Node, depth: int) -> str | None:
    scope = scope_of(node)
    return scope[depth][0] if len(scope) > depth else None


def _pieces(nodes: Sequence[Node], depth: int) -> list[list[Node]]:
    """Nodes of this frame one by one, and the nodes of each module it calls together."""
    pieces: dict[object, list[Node]] = {}
    for node in nodes:
        key = _key(node, depth)
        pieces.setdefault(node if key is None else key, []).append(node)
    return list(pieces.values())


def _ordered(pieces: list[list[Node]], nodes: Sequence[Node], in_order: bool) -> list[list[Node]]:
    """The pieces in an order that respects the data flow; a module whose nodes must interleave with others is split.

    Where nodes have to stay ``in_order``, so is each module with another node between its own.
    """
    position = {node: i for i, node in enumerate(nodes)}
    if all(position[piece[-1]] - position[piece[0]] == len(piece) - 1 for piece in pieces):
        return pieces
    if in_order:
        return sorted((run for piece in pieces for run in _runs(piece, position)), key=lambda run: position[run[0]])
    while True:
        owner = {node: i for i, piece in enumerate(pieces) for node in piece}
        flow: networkx.DiGraph[int] = networkx.DiGraph()
        flow.add_nodes_from(range(len(pieces)))
        for node, i in owner.items():
            for _, value in node.operands():
                source = owner.get(value.producer) if value.producer is not None else None
                if source is not None and source != i:
                    flow.add_edge(source, i)
        tangled = {i for part in networkx.strongly_connected_components(flow) if len(part) > 1 for i in part}
        if not tangled:
            order = networkx.lexicographical_topological_sort(flow, key=lambda i: position[pieces[i][0]])
            return [pieces[i] for i in order]
        split = [_runs(piece, position) if i in tangled else [piece] for i, piece in enumerate(pieces)]
        pieces = [run for runs in split for run in runs]


def _runs(piece: list[Node], position: dict[Node, int]) -> list[list[Node]]:
    """The maximal runs of neighbouring nodes: pieces that are runs cannot be tangled."""
    runs: list[list[Node]] = []
    for node in piece:
        if runs and position[node] == position[runs[-1][-1]] + 1:
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs
