"""Names parts by the modules that own their weights.

blocks.3                       all that lies below it goes
blocks.3.{ln1,qkv,proj}        some of it
node_12                        neither weights nor nodes have module names: the name of the part's result
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from regauge.ir.graph import Graph, Parameter


class ModuleNames:
    """The modules of a graph, as told by the names of its weights, or by the scopes of the nodes that read them."""

    def __init__(self, graph: Graph) -> None:
        self._below: Counter[tuple[str, ...]] = Counter()
        for parameter in graph.parameters.values():
            if parameter.kind == "parameter" and len(parameter.consumers()) == 1:
                path = _path(parameter)
                self._below.update(path[:length] for length in range(1, len(path)))

    def of(self, weights: Sequence[Parameter], fallback: str) -> str:
        """The name of a part with these weights of its own."""
        paths = [_path(parameter) for parameter in weights]
        if not paths or any(len(path) < 2 for path in paths):
            return fallback
        depth = min(_shared(paths), min(map(len, paths)) - 1)
        prefix = paths[0][:depth]
        for length in range(1, depth + 1):
            if self._below[prefix[:length]] == len(weights):
                return ".".join(prefix[:length])
        children = list(dict.fromkeys(path[depth] for path in paths))
        listed = children[0] if len(children) == 1 else "{" + ",".join(children) + "}"
        return ".".join([*prefix, listed])


def _path(parameter: Parameter) -> tuple[str, ...]:
    """The modules from the root down to the one that holds a weight, and the weight's own name."""
    if "." in parameter.name:
        return tuple(parameter.name.split("."))
    scopes = [node.scope[-1][0] for node in parameter.consumers() if node.scope]
    return (*(scopes[0].split(".") if scopes and scopes[0] else ()), parameter.name)


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many leading steps all paths share."""
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return shared
