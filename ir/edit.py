"""The only code that mutates graphs: a Builder that adds nodes, and edits that keep uses and history consistent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from regauge.ir.errors import GraphError
from regauge.ir.graph import Dtype, Edit, Graph, Kind, Node, Operand, Parameter, State, Value
from regauge.ir.operator import Operator, get_operator
from regauge.ir.shapes import infer_results
from regauge.ir.sizes import Size
from regauge.ir.weight_edits import computed_weight
from regauge.ir.weights import Weight

Results = Sequence[tuple[Sequence[Size], Dtype]]
Expected = Sequence[tuple[tuple[Size, ...], Dtype] | None]


class Builder:
    """Adds inputs, parameters and nodes to a graph; ``build.relu(x)`` is ``build("relu", x)``.

    New nodes get the builder's current ``scope``, ``source`` and ``origin``: frontends set them per imported node.
    ``expected`` holds shape and type of each result of the call that is being imported (None: no tensor), where its
    framework says: an adapter has to ask where data decides the size of a result.
    """

    def __init__(self, graph: Graph, *, by: str = "") -> None:
        self.graph = graph
        self.by = by
        self.scope: tuple[tuple[str, str], ...] = ()
        self.source = ""
        self.origin: Any = None
        self.expected: Expected = ()
        self.added: list[Node] = []
        self.made: list[Parameter] = []
        self._successors: list[tuple[Parameter, Parameter]] = []
        self._taken = {value.name for value in graph.values()}
        self._counters: dict[str, int] = {}

    @contextmanager
    def at(self, node: Node) -> Iterator[Builder]:
        """Build as if in place of ``node``: same module path, same source line, same origin."""
        before = (self.scope, self.source, self.origin)
        self.scope, self.source, self.origin = node.scope, node.source, node.origin
        try:
            yield self
        finally:
            self.scope, self.source, self.origin = before

    def region(self, graph: Graph) -> Builder:
        """A Builder for a region of a node of this graph: it shares the names, so that none is used twice."""
        inner = Builder(graph, by=self.by)
        self._taken |= inner._taken
        inner._taken, inner._counters = self._taken, self._counters
        inner.scope, inner.source, inner.origin = self.scope, self.source, self.origin
        return inner

    def free(self, name: str) -> bool:
        """Whether no value has this name yet."""
        return name not in self._taken

    def unique(self, name: str) -> str:
        """``name`` if no value has it, else ``name_1``, ``name_2`` ..."""
        name = re.sub(r"[^A-Za-z0-9_.:/-]", "_", name) or "v"
        candidate = name
        while candidate in self._taken:
            self._counters[name] = self._counters.get(name, 0) + 1
            candidate = f"{name}_{self._counters[name]}"
        self._taken.add(candidate)
        return candidate

    def input(self, name: str, shape: Sequence[Size], dtype: Dtype) -> Value:
        value = Value(name=self.unique(name), shape=shape, dtype=dtype)
        self.graph.inputs.append(value)
        self.graph.version += 1
        return value

    def parameter(self, name: str, weight: Weight | torch.Tensor, kind: Kind = "parameter", **fields: Any) -> Parameter:
        """Add a parameter under exactly this name; raises GraphError where it is taken."""
        if name in self.graph.parameters:
            raise GraphError(f"two parameters are called {name!r}")
        self._taken.add(name)
        value = Parameter(name=name, weight=weight, kind=kind, **fields)
        self.graph.parameters[name] = value
        self.graph.version += 1
        self.made.append(value)
        return value

    def folded(
        self,
        old: Parameter,
        function: Callable[..., torch.Tensor],
        *sources: Parameter,
        shape: Sequence[int] | None = None,
    ) -> Parameter:
        """A weight to read in place of ``old``: ``function`` of the tensors of ``old`` and of ``sources`` in float64.

        Once nobody reads ``old`` any more it goes, and the new one takes its names (regauge.ir.weight_edits).
        """
        new = self.computed(f"{old.name}_folded", function, old, *sources, shape=shape)
        self._successors.append((old, new))
        return new

    def computed(
        self,
        name: str,
        function: Callable[..., torch.Tensor],
        like: Parameter,
        *sources: Parameter,
        shape: Sequence[int] | None = None,
    ) -> Parameter:
        """A new weight, ``function`` of the tensors of ``like`` and ``sources`` in float64, of the type of ``like``."""
        assert isinstance(like.dtype, torch.dtype)
        shape = like.weight.shape if shape is None else shape
        weight = computed_weight(function, (like, *sources), shape, like.dtype)
        fields = {"trainable": like.trainable, "persistent": like.persistent}
        return self.parameter(self.unique(name), weight, like.kind, **fields)

    def take_successors(self) -> list[tuple[Parameter, Parameter]]:
        """The pairs (old weight, new weight) made since the last call."""
        pairs, self._successors = self._successors, []
        return pairs

    def constant(self, tensor: Weight | torch.Tensor, name: str = "constant") -> Parameter:
        return self.parameter(self.unique(name), tensor, kind="constant", persistent=False)

    def __call__(
        self,
        op: str,
        *operands: Operand,
        name: str | None = None,
        regions: Sequence[Graph] = (),
        results: Results | None = None,
        **attributes: Any,
    ) -> Any:
        """Add a node; returns its result, or a tuple of them. Shapes are inferred unless ``results`` states them."""
        operator = get_operator(op)
        given, full = operator.bind(operands, attributes)
        found = self.infer(operator, given, full) if results is None else results
        node = Node(
            op=op,
            inputs=given,
            attributes=full,
            scope=self.scope,
            source=self.source,
            regions=regions,
            origin=self.origin,
        )
        base = name or op
        node.outputs = tuple(
            Value(
                name=self.unique(base if len(found) == 1 else f"{base}.{i}"),
                shape=shape,
                dtype=dtype,
                producer=node,
                index=i,
            )
            for i, (shape, dtype) in enumerate(found)
        )
        for slot, value in node.operands():
            value.uses[node, slot] = None
        self.graph._nodes[node] = None
        self.graph.version += 1
        self.added.append(node)
        if self.by:
            node.metadata["regauge.added_by"] = self.by
        single = len(found) == 1 and results is None or (results is not None and len(results) == 1)
        return node.outputs[0] if single else node.outputs

    def infer(self, operator: Operator, operands: Sequence[Operand], attributes: Mapping[str, Any]) -> Results:
        """Shapes and dtypes of the results of a call; frontends that know them already override this."""
        return infer_results(operator, operands, attributes)

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_"):
            raise AttributeError(op)
        get_operator(op)  # a misspelt operator fails here, with a suggestion

        def call(*operands: Operand, **attributes: Any) -> Any:
            return self(op, *operands, **attributes)

        return call


def set_input(node: Node, slot: int, operand: Operand, graph: Graph) -> None:
    """Make ``node`` read another operand in one slot."""
    old = node.inputs[slot]
    if isinstance(old, Value):
        old.uses.pop((node, slot), None)
    node.inputs = (*node.inputs[:slot], operand, *node.inputs[slot + 1 :])
    if isinstance(operand, Value):
        operand.uses[node, slot] = None
    graph.version += 1


def replace_uses(graph: Graph, old: Value, new: Operand) -> None:
    """Let every node, output and state that reads ``old`` read ``new``."""
    for node, slot in list(old.uses):
        set_input(node, slot, new, graph)
    graph.outputs = [new if output is old else output for output in graph.outputs]
    if isinstance(new, Value):
        graph.states = [
            State(s.name, new if s.before is old else s.before, new if s.after is old else s.after)
            for s in graph.states
        ]
    graph.version += 1


def remove_node(graph: Graph, node: Node) -> None:
    """Remove a node whose results nobody reads; raises GraphError otherwise."""
    for value in node.outputs:
        if value.uses or any(output is value for output in graph.outputs):
            raise GraphError(f"{node.label} cannot be removed: {value} is still read")
    for slot, value in node.operands():
        value.uses.pop((node, slot), None)
    del graph._nodes[node]
    graph.version += 1


def remove_dead(graph: Graph, *, parameters: bool = True) -> int:
    """Remove nodes, and optionally constants and parameters, no output or state depends on; returns how many nodes."""
    live: set[Value] = {o for o in graph.outputs if isinstance(o, Value)} | {s.after for s in graph.states}
    stack = list(live)
    keep: set[Node] = set()
    while stack:
        producer = stack.pop().producer
        if producer is None or producer in keep:
            continue
        keep.add(producer)
        for _, value in producer.operands():
            if value not in live:
                live.add(value)
                stack.append(value)
    dead = [node for node in reversed(graph.nodes) if node not in keep]
    for node in dead:
        for slot, value in node.operands():
            value.uses.pop((node, slot), None)
        del graph._nodes[node]
    if parameters:
        states = {s.before for s in graph.states}
        for name, parameter in list(graph.parameters.items()):
            if (
                parameter.kind == "constant"
                and not parameter.uses
                and parameter not in live
                and parameter not in states
            ):
                del graph.parameters[name]
    graph.version += 1
    return len(dead)


def record(graph: Graph, by: str, what: str) -> None:
    """Add a line to the history of the graph."""
    graph.history.append(Edit(by, what))


def copy_graph(graph: Graph, mapping: dict[Value, Value] | None = None) -> Graph:
    """A graph with its own values and nodes that shares weights; ``mapping`` receives old value -> new value."""
    to_new: dict[Value, Value] = {} if mapping is None else mapping
    result = Graph(
        name=graph.name, metadata=dict(graph.metadata), symbols=dict(graph.symbols), history=list(graph.history)
    )
    for value in graph.inputs:
        to_new[value] = Value(name=value.name, shape=value.shape, dtype=value.dtype)
        to_new[value].origin = value.origin
    for name, parameter in graph.parameters.items():
        copied = Parameter(
            name=name,
            weight=parameter.weight,
            kind=parameter.kind,
            aliases=parameter.aliases,
            trainable=parameter.trainable,
            persistent=parameter.persistent,
        )
        copied.origin = parameter.origin
        to_new[parameter] = copied
        result.parameters[name] = copied
    result.inputs = [to_new[value] for value in graph.inputs]
    for node in graph.nodes:
        _copy_node(node, result, to_new)
    result.outputs = [_moved(output, to_new) for output in graph.outputs]
    result.states = [State(s.name, to_new[s.before], to_new[s.after]) for s in graph.states]
    return result


def _moved(operand: Operand, to_new: Mapping[Value, Value]) -> Operand:
    return to_new[operand] if isinstance(operand, Value) else operand


def _copy_node(node: Node, result: Graph, to_new: dict[Value, Value]) -> None:
    copied = Node(
        op=node.op,
        inputs=[_moved(operand, to_new) for operand in node.inputs],
        attributes=node.attributes,
        scope=node.scope,
        source=node.source,
        regions=[copy_graph(region, to_new) for region in node.regions],
        origin=node.origin,
    )
    copied.metadata = dict(node.metadata)
    copied.outputs = tuple(
        Value(name=value.name, shape=value.shape, dtype=value.dtype, producer=copied, index=i)
        for i, value in enumerate(node.outputs)
    )
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        new.origin = old.origin
        to_new[old] = new
    for slot, value in copied.operands():
        value.uses[copied, slot] = None
    result._nodes[copied] = None
