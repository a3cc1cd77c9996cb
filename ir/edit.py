"""The only code that mutates graphs: a Builder that adds nodes, and edits that keep uses and history consistent."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from regauge.ir.dtypes import Dtype, dtype_name
from regauge.ir.errors import GraphError
from regauge.ir.graph import Edit, Graph, Kind, Node, Operand, Parameter, Value, add_use
from regauge.ir.operator import Operator, get_operator
from regauge.ir.shapes import infer_results
from regauge.ir.sizes.expressions import Size
from regauge.ir.sizes.sources import untold_sources
from regauge.ir.storage.weight_edits import computed_weight
from regauge.ir.storage.weights import Weight, dense

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
        self.held: Container[Value] = ()  # what outputs and states read, regions included, where the driver knows
        self._successors: list[tuple[Parameter, Parameter]] = []
        self._taken = {value.name for value in graph.values()}
        self._reserved: set[str] = set()
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
        inner._taken, inner._reserved, inner._counters = self._taken, self._reserved, self._counters
        inner.scope, inner.source, inner.origin = self.scope, self.source, self.origin
        return inner

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names for who asks for them with ``reserved``: nothing else gets one."""
        self._reserved.update(names)

    def free(self, name: str, *, reserved: bool = False) -> bool:
        """True if no value has this name yet nor, unless ``reserved``, is to have it."""
        return name not in self._taken and (reserved or name not in self._reserved)

    def unique(self, name: str, *, reserved: bool = False) -> str:
        """``name`` if it is free, else ``name_1``, ``name_2`` ..."""
        name = re.sub(r"[^A-Za-z0-9_.:/-]", "_", name) or "v"
        candidate = name
        while not self.free(candidate, reserved=reserved and candidate == name):
            self._counters[name] = self._counters.get(name, 0) + 1
            candidate = f"{name}_{self._counters[name]}"
        self._taken.add(candidate)
        return candidate

    def release(self, names: Iterable[str]) -> None:
        """Give back the names of values that are no longer in the graph."""
        self._taken.difference_update(names)

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
        dtype: torch.dtype | None = None,
    ) -> Parameter:
        """A weight to read in place of ``old``: ``function`` of the tensors of ``old`` and of ``sources`` in float64.

        Once nobody reads ``old`` any more it goes, and the new one takes its names (regauge.ir.storage.weight_edits).
        """
        new = self.computed(f"{old.name}_folded", function, old, *sources, shape=shape, dtype=dtype)
        self._successors.append((old, new))
        return new

    def computed(
        self,
        name: str,
        function: Callable[..., torch.Tensor],
        like: Parameter,
        *sources: Parameter,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Parameter:
        """A new weight, ``function`` of the tensors of ``like`` and ``sources`` in float64, else like ``like``."""
        assert isinstance(like.dtype, torch.dtype)
        shape = like.weight.shape if shape is None else shape
        weight = computed_weight(function, (like, *sources), shape, like.dtype if dtype is None else dtype)
        fields = {"trainable": like.trainable, "persistent": like.persistent}
        return self.parameter(self.unique(name), weight, like.kind, **fields)

    def take_successors(self) -> list[tuple[Parameter, Parameter]]:
        """The pairs (old weight, new weight) made since the last call."""
        pairs, self._successors = self._successors, []
        return pairs

    def constant(self, tensor: Weight | torch.Tensor, name: str = "constant") -> Parameter:
        return self.parameter(self.unique(name), tensor, kind="constant", persistent=False)

    def take_back(self, nodes: int = 0, parameters: int = 0) -> None:
        """Remove what was added beyond these numbers of nodes and parameters, and forget what was to succeed what."""
        for node in reversed(self.added[nodes:]):
            self.release(value.name for value in node.outputs)
            remove_node(self.graph, node)
        for parameter in self.made[parameters:]:
            del self.graph.parameters[parameter.name]
        self.release(parameter.name for parameter in self.made[parameters:])
        del self.added[nodes:], self.made[parameters:]
        self.take_successors()

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
            add_use(value, node, slot)
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
        add_use(operand, node, slot)
    graph.version += 1


def drop_operand(graph: Graph, node: Node, slot: int) -> None:
    """Make ``node`` read one operand less; those behind it move up."""
    for place, value in node.operands():
        value.uses.pop((node, place), None)
    node.inputs = (*node.inputs[:slot], *node.inputs[slot + 1 :])
    for place, value in node.operands():
        value.uses[node, place] = None
    graph.version += 1


def replace_uses(graph: Graph, old: Value, new: Operand) -> None:
    """Let every node, output and state that reads ``old`` read ``new``."""
    for node, slot in list(old.uses):
        set_input(node, slot, new, graph)
    graph.outputs = [new if output is old else output for output in graph.outputs]
    if isinstance(new, Value):
        graph.states = [
            replace(s, before=new if s.before is old else s.before, after=new if s.after is old else s.after)
            for s in graph.states
        ]
    graph.version += 1


def set_weight(graph: Graph, parameter: Parameter, weight: Weight | torch.Tensor, *, by: str = "set_weight") -> None:
    """Give a parameter new data, noted in the history; the old tensor, which copies and users share, stays as it was.

    Raises GraphError for a parameter of another graph (a copy has its own) and for data of another shape or type.
    """
    if not any(own is parameter for own in graph.all_parameters()):
        raise GraphError(
            f"{parameter} is no parameter of graph {graph.name!r}: use graph.parameters[{parameter.name!r}]"
        )
    new = dense(weight) if isinstance(weight, torch.Tensor) else weight
    if tuple(new.shape) != parameter.shape or new.dtype != parameter.dtype:
        raise GraphError(
            f"{parameter} cannot hold {dtype_name(new.dtype)}{list(new.shape)}: cut it with resize, or add a parameter"
        )
    parameter.weight = new
    record(graph, by, f"{parameter.name}: new weight")
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


def inline_region(build: Builder, node: Node, region: Graph, operands: Sequence[Operand]) -> list[Operand]:
    """Move the nodes of a region of ``node`` in front of it; returns what its outputs are there.

    ``operands`` stand for the inputs of the region, which must not be used afterwards. Its parameters come along; names
    that are taken here are changed.
    """
    graph = build.graph
    given = dict(zip(region.inputs, operands, strict=True))
    outputs = [given.get(o, o) if isinstance(o, Value) else o for o in region.outputs]
    for value, operand in given.items():
        replace_uses(graph, value, operand)
    region.outputs = []
    taken = {value.name for value in graph.values()}
    for value in [v for v in region.values() if v not in given]:
        if value.name in taken:
            value.name = build.unique(value.name)
        build._taken.add(value.name)
        taken.add(value.name)
    for parameter in region.parameters.values():
        graph.parameters[parameter.name] = parameter
    for inner in region.nodes:
        graph._nodes[inner] = None
    region.parameters, region._nodes = {}, {}
    region.version += 1
    graph.version += 1
    return outputs


def remove_parameter(graph: Graph, parameter: Parameter, *, by: str = "remove_parameter") -> None:
    """Remove a parameter that nothing reads, noted in the history; raises GraphError where something does."""
    if graph.parameters.get(parameter.name) is not parameter:
        raise GraphError(
            f"{parameter} is no parameter of graph {graph.name!r}: use graph.parameters[{parameter.name!r}]"
        )
    readers = [node.label for node in parameter.consumers()]
    readers += [f"output {slot}" for slot, output in enumerate(graph.outputs) if output is parameter]
    readers += [f"the state {state.name}" for state in graph.states if parameter in (state.before, state.after)]
    if readers:
        raise GraphError(f"{parameter} cannot be removed: {readers[0]} reads it")
    del graph.parameters[parameter.name]
    record(graph, by, f"{parameter.name}: removed")
    graph.version += 1


def tie(graph: Graph, kept: Parameter, other: Parameter) -> None:
    """Let all that reads ``other`` read ``kept``, of the same shape and type; ``other`` goes.

    Where the graph was captured the keys of its state_dict stay; a loaded file names each of its weights once.
    """
    replace_uses(graph, other, kept)
    if "onnx" not in graph.metadata and other.kind == "parameter":
        kept.aliases = (*kept.aliases, *other.names)
    del graph.parameters[other.name]
    graph.version += 1


def dead_nodes(graph: Graph, keep: Collection[str] = ()) -> list[Node]:
    """Nodes that no output, no state and no node named in ``keep`` depends on, each after those that read it.

    A node depends on the results whose shapes tell the dynamic sizes that it reads as well.
    """
    stack: list[Operand] = [*graph.outputs, *(state.after for state in graph.states)]
    stack += [node.outputs[0] for node in graph.nodes if node.outputs and node.name in keep]
    live: set[Node] = set()
    while True:
        _follow(stack, live)
        sources = untold_sources(graph, live)
        if not sources:
            return [node for node in reversed(graph.nodes) if node not in live]
        stack += [node.outputs[0] for node in sources]


def _follow(stack: list[Operand], live: set[Node]) -> None:
    """Add the nodes that the values on the stack depend on."""
    while stack:
        value = stack.pop()
        producer = value.producer if isinstance(value, Value) else None
        if producer is not None and producer not in live:
            live.add(producer)
            stack.extend(operand for _, operand in producer.operands())


def remove_dead(graph: Graph, *, parameters: bool = True, keep: Collection[str] = ()) -> int:
    """Remove nodes that nothing depends on, then what only they read; returns how many nodes went.

    That is constants and, unless ``parameters`` is False, trained parameters and buffers that have lost their last
    reader, now or before. Those that nothing ever read stay; with ``parameters=False``, for frontends, all that are
    left without a reader count as such. Nodes named in ``keep`` stay, with what they depend on. Regions are cleared.
    """
    nested = [region for node in graph.nodes for region in node.regions]
    inner = sum(remove_dead(region, parameters=parameters, keep=keep) for region in nested)
    dead = dead_nodes(graph, keep)
    for node in dead:
        for slot, value in node.operands():
            value.uses.pop((node, slot), None)
        del graph._nodes[node]
    held = {output for output in graph.outputs if isinstance(output, Value)}
    held |= {value for state in graph.states for value in (state.before, state.after)}
    unread = [p for p in graph.parameters.values() if not p.uses and p not in held]
    gone = [p for p in unread if p.kind == "constant" or (parameters and p.was_read)]
    for parameter in gone:
        del graph.parameters[parameter.name]
    if not parameters:
        for parameter in unread:
            parameter.was_read = False
    if dead or gone or inner:
        graph.version += 1
    return inner + len(dead)


def record(
    graph: Graph,
    by: str,
    what: str,
    sizes: tuple[str, int, int] | None = None,
    kept: tuple[int, ...] | None = None,
    majors: tuple[str, ...] = (),
) -> None:
    """Add a line to the history of the graph; of a Dim that was cut with its name, sizes and the indices it kept."""
    graph.history.append(Edit(by, what, sizes, kept, majors))
