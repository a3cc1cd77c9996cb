"""From frames to code: which modules stay modules, and the statements of each forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regauge.backends.torch_module.code import Code, Flowing, operands_of
from regauge.backends.torch_module.expressions import Helpers
from regauge.backends.torch_module.frames import Frame, inside
from regauge.backends.torch_module.functions import Functions
from regauge.backends.torch_module.layers import flowing_operands, frame_layer, owned_layer
from regauge.backends.torch_module.places import Places
from regauge.backends.torch_module.recurrent import recurrent_layer
from regauge.backends.torch_module.statements import Statements
from regauge.backends.torch_module.statistics import counters, updating_norms
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.attention import SCALED_BY


class Forward:
    """Writes the code of every frame, innermost first. ``modules`` holds the code of each module path;
    with ``kernels`` fused nodes are operators of torch."""

    def __init__(self, graph: Graph, places: Places, *, kernels: bool = False, tuned: str | None = None) -> None:
        self.graph = graph
        self.places = places
        self.helpers = Helpers()
        self.functions = Functions(self, kernels=kernels, tuned=tuned)
        self.modules: dict[str, Code] = {}
        self.norms = updating_norms(graph)
        left_to_norms = {id(state) for states in self.norms.values() for state in states}
        self.states = [s for s in graph.states if not s.returned and id(s) not in left_to_norms]
        self.written = {state.before for state in self.states}
        self.counters = counters(self.states, self.norms)
        self.rescaled = _rescaled(graph)
        self.needed: set[Value] = {o for o in graph.outputs if isinstance(o, Value)} | {s.after for s in self.states}

    def root(self, frame: Frame) -> Code:
        """The code of the whole graph: its arguments are the graph's inputs, its results the graph's outputs."""
        items = self._items(frame, "")
        code = Code("", frame.class_name, items, list(self.graph.inputs), [])
        Statements(self, code).write(self.graph.outputs)
        return code

    def _items(self, frame: Frame, path: str) -> list[Node | Code]:
        """The frame's nodes and calls as the module at ``path`` runs them; calls it cannot make are dissolved."""
        items: list[Node | Code] = []
        for item in frame.items:
            if isinstance(item, Node):
                items.append(self._lifted(item, path))
            elif not inside(item.path, path):
                items.extend(self._items(item, path))  # a module of another branch, called from here
            else:
                child = self._code(item)
                known = self.modules.setdefault(child.path, child)
                items.extend([child] if known.key() == child.key() else child.items)
        return items

    def _lifted(self, node: Node, path: str) -> Node | Code:
        found = owned_layer(node, path, self.places)
        if found is None:
            return node
        child = self._layer_code(*found, node)
        return child if self.modules.setdefault(child.path, child).key() == child.key() else node

    def _code(self, frame: Frame) -> Code:
        items = self._items(frame, frame.path)
        recurrent = recurrent_layer(items, frame.path, self.places)
        if recurrent is not None:
            arguments: list[Flowing | None] = list(recurrent.arguments)
            outputs = list(recurrent.node.outputs)
            return Code(frame.path, "", items, arguments, outputs, layer=recurrent.text, recurrent=True)
        layer = self._counting_norm(items, frame.path) or self._only_layer(items, frame.path)
        if layer is not None:
            return layer
        reads, results = self._flow(items, frame.path)
        code = Code(frame.path, frame.class_name, items, reads, results)
        Statements(self, code).write(results)
        return code

    def _only_layer(self, items: Sequence[Node | Code], path: str) -> Code | None:
        if len(items) != 1 or not isinstance(items[0], Node):
            return None
        text = frame_layer(items[0], path, self.places)
        return None if text is None else self._layer_code(path, text, items[0])

    def _counting_norm(self, items: Sequence[Node | Code], path: str) -> Code | None:
        """A batch norm in training mode with the node that counts its batches: the layer does both."""
        counting = [item for item in items if isinstance(item, Node) and self.counters.get(item, ("",))[0] == path]
        if len(counting) != 1:
            return None
        rest = [item for item in items if item is not counting[0]]
        layer = self._only_layer(rest, path) if rest and rest[0] in self.norms else None
        if layer is not None:
            _, state = self.counters[counting[0]]
            self.states = [other for other in self.states if other is not state]
            self.needed.discard(state.after)
        return layer

    def results_of(self, node: Node) -> list[Value]:
        """The results of a node that its source gives; a batch norm that updates its buffers gives one."""
        return list(node.outputs[:1] if node in self.norms else node.outputs)

    def _layer_code(self, path: str, text: str, node: Node) -> Code:
        operands = flowing_operands(node, path, self.places)
        arguments: list[Flowing | None] = [o if isinstance(o, Value) else None for o in operands]
        return Code(path, "", [node], arguments, self.results_of(node), layer=text)

    def _flow(self, items: Sequence[Node | Code], path: str) -> tuple[list[Flowing | None], list[Value]]:
        """What the items read from outside, in order of first use, and what others read of theirs."""
        inner = set(_nodes(items))
        produced = {value for node in inner for value in node.outputs}
        used: dict[Flowing, None] = {}
        for item in items:
            for value in self.reads(item, path):
                if value not in produced:
                    used[value] = None
        results = [
            value
            for item in items
            for value in (item.results if isinstance(item, Code) else item.outputs)
            if value in self.needed or any(user not in inner for user, _ in value.uses)
        ]
        return list(used), results

    def reads(self, item: Node | Code, path: str) -> list[Flowing]:
        """Tensors an item needs as variables. Sizes are read off them; see :meth:`Statements.symbol`."""
        if isinstance(item, Code):
            return [value for value in item.arguments if value is not None and not self.is_reachable(value, path)]
        return [value for value in operands_of(item) if not self.is_reachable(value, path)]

    def is_reachable(self, value: Flowing, path: str) -> bool:
        """True for a parameter that the module at ``path`` can read as its own or its children's."""
        return isinstance(value, Parameter) and self.places.name_under(value, path) is not None


def _rescaled(graph: Graph) -> set[Node]:
    """Attentions whose scale is explained where it is written: all that took it from their head size, if that of any
    was cut, so that layers that differ in sizes only share their source."""
    scaled = [node for _, node in graph.walk() if SCALED_BY in node.metadata]
    cut = any(
        str(value.shape[-1]) != node.metadata[SCALED_BY] for node in scaled for _, value in list(node.operands())[:1]
    )
    return set(scaled) if cut else set()


def _nodes(items: Sequence[Node | Code]) -> Iterator[Node]:
    for item in items:
        if isinstance(item, Code):
            yield from _nodes(item.items)
        else:
            yield item
